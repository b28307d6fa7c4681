"""How the package says what is wrong: errors, each an `OTPruneError` and the fitting builtin, and warnings."""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable
from urllib.parse import unquote

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")  # the user part of an address
_PACKAGE = __name__.partition(".")[0]
_SHORTEST = 3  # characters of a credential that is removed outside addresses, too; shorter ones occur in any text


def without_credentials(text: str) -> str:
    """Return a text without the user names and passwords of addresses; those of `HF_ENDPOINT` go everywhere.

    Example:
        >>> without_credentials("No answer from https://me:secret@hub.example/api.")
        'No answer from https://hub.example/api.'
    """
    text = _USER.sub("", text)
    found = _USER.search(os.environ.get("HF_ENDPOINT", ""))
    if found is None:
        return text
    whole = found[0].removesuffix("@")
    secrets = {whole, unquote(whole), whole.partition(":")[2], unquote(whole.partition(":")[2])}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


class OTPruneError(Exception):
    """Base class of all errors that this package raises on purpose; no message holds credentials of an address."""

    def __init__(self, *args: object):
        super().__init__(*(without_credentials(part) if isinstance(part, str) else part for part in args))


class ConfigurationError(OTPruneError, ValueError):
    """A field of the configuration is unknown, has a wrong type, is out of range or contradicts another one."""


class RegistryError(OTPruneError, ValueError):
    """A name is not registered, or is taken already."""


class CalibrationDataError(OTPruneError, ValueError):
    """Calibration or evaluation data cannot be used as they are."""


class UnsupportedModelError(OTPruneError, ValueError):
    """The model's architecture or state cannot be pruned."""


class HalfPrunedError(OTPruneError, RuntimeError):
    """Pruning was interrupted and could not be undone: the model is neither dense nor pruned."""


class CustomFunctionError(OTPruneError, RuntimeError):
    """A function that is not of this package, a user's own or a plugin's, raised an error."""


class ModelLoadError(OTPruneError, OSError):
    """A model, tokenizer or configuration could not be found, downloaded or read."""


class NumericalError(OTPruneError, ArithmeticError):
    """NaN, infinity or a failed factorization where finite numbers are needed."""


class TransportError(OTPruneError, ArithmeticError):
    """A transport problem is infeasible, or its solver did not reach a usable plan."""


class ShapeError(OTPruneError, ValueError):
    """Tensors whose shapes do not fit together."""


class OutputError(OTPruneError, OSError):
    """The output folder cannot be written: not empty, read-only, or the disk is full."""


class ReportError(OTPruneError, ValueError):
    """A report file is damaged or was written by something else."""


class UsageError(OTPruneError, ValueError):
    """The command line was used in a wrong way."""


class MissingExtraError(OTPruneError, ImportError):
    """An optional library is needed that is not installed."""


class ExportError(OTPruneError, RuntimeError):
    """A program that writes or reads another format is missing or failed, or its result computes something else.

    Attributes:
        output: All that the program said, if it failed.
    """

    def __init__(self, *args: object, output: str = ""):
        super().__init__(*args)
        self.output = without_credentials(output)


class ProcessError(OTPruneError, RuntimeError):
    """Another one of the processes that prune together stopped."""


class StudyError(OTPruneError, ValueError):
    """The file of a tuning study or quality curve is damaged, or belongs to another model, data or configuration."""


class StateError(OTPruneError, ValueError):
    """The state of an interrupted run is damaged, in use, or of another model, data, configuration or environment."""


class IntegrityError(OTPruneError, OSError):
    """Files are not those that were saved: changed, missing, or others beside them."""


class HubError(OTPruneError, OSError):
    """The Hub did not do what was asked; nothing local is lost."""


class HubAuthenticationError(HubError, PermissionError):
    """There is no token, or it is not valid any more."""


class HubPermissionError(HubError, PermissionError):
    """The token does not have the right to write to the repository."""


class HubNotFoundError(HubError, FileNotFoundError):
    """The repository or revision does not exist, or is private and the token may not see it."""


class HubConflictError(HubError):
    """Somebody else changed the repository in the meantime."""


class HubRejectedError(HubError, ValueError):
    """The Hub refuses what was sent, such as the card's metadata."""


class HubUnavailableError(HubError, ConnectionError):
    """The Hub cannot be reached, or keeps failing; also in offline mode."""


class HubTimeoutError(HubError, TimeoutError):
    """The Hub did not finish before the deadline."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name that is not in a list, with the nearest name that is."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{suggestion} Known: {', '.join(known)}."


def unregistered_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name that is not registered here, but may be where another package is installed."""
    return f"{unknown_name(kind, name, known)} Use one of these, or install the package that registers it."


def raised(error: BaseException) -> str:
    """Return the words for what code of somebody else raised.

    Example:
        >>> raised(ValueError("bad.")), raised(KeyError())
        ('raised ValueError: bad', 'raised KeyError')
    """
    text = str(error).rstrip(".")
    return f"raised {type(error).__name__}{f': {text}' if text else ''}"


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` that points to the line by which this package was called.

    The caller's line is searched from the outermost call on, since library code such as a context manager may stand in
    between.

    Args:
        message: The warning, which says what is wrong, and what to do.
    """
    frame, depth, called = sys._getframe(), 1, 1
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
            called = depth + 1
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=called)
