"""The version of this package, alone in the lowest layer so that every module can import it."""

__version__ = "0.1.0"
