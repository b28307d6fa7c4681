"""The versions that a result depends on."""

from importlib import metadata


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that a result depends on."""
    names = ("torch", "transformers", "POT", "datasets")
    return {"optimum_otprune": metadata.version("optimum_otprune"), **{name: metadata.version(name) for name in names}}
