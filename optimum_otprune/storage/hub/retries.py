"""Bounded retries against the Hub: which errors to retry, how long to wait, and which error is raised in the end."""

import importlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from numbers import Real
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from optimum_otprune.errors import (
    ConfigurationError,
    HubAuthenticationError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubPermissionError,
    HubRejectedError,
    HubTimeoutError,
    HubUnavailableError,
)

ATTEMPTS = 6  # waiting 1, 2, 4, 8 and 16 seconds between them outlasts half a minute of trouble
LONGEST_WAIT = 300.0  # seconds: the Hub counts requests in windows of five minutes, so no longer wait is needed

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_AGAIN = "Nothing local is lost; run it again"

# The HTTP library of the client, which is another one in earlier versions.
_HTTP = importlib.import_module(HTTPError.__module__.partition(".")[0])
# What the client lets through: its own errors are OSErrors, LFS uploads end in RuntimeError, refused metadata and
# an error page in place of JSON in ValueError, Xet in ConnectionError.
CLIENT_ERRORS = (OSError, RuntimeError, ValueError, HTTPError)
# JSON: a proxy's error page where the client expects an answer.
_CONNECTION_ERRORS = (_HTTP.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)

T = TypeVar("T")


class Deadline:
    """A time limit, and the flag that tells a thread to stop.

    Args:
        seconds: The time limit in seconds from now; infinity, and what no float can hold, waits forever.

    Raises:
        ConfigurationError: If `seconds` is not a number, or is below 0.
    """

    def __init__(self, seconds: float):
        given: object = seconds
        if isinstance(given, bool) or not isinstance(given, Real) or not seconds >= 0:
            raise ConfigurationError(f"`deadline` is {seconds!r}; want a number of seconds, not below 0.")
        self._end = time.monotonic() + (float(seconds) if seconds < threading.TIMEOUT_MAX else math.inf)
        self.abandoned = threading.Event()

    @property
    def left(self) -> float:
        """The seconds that are left, not below 0."""
        return max(0.0, self._end - time.monotonic())

    def run(self, work: Callable[[], T]) -> T:
        """Do the work in a thread that is left behind at the deadline: an upload can hang without ever saying so.

        Args:
            work: The function to run; it must check `abandoned` before it changes anything that cannot be undone.

        Raises:
            HubTimeoutError: If the deadline passed.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def record() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: BLE001 (raised again below, in the caller's thread)
                errors.append(error)

        thread = threading.Thread(target=record, name="otprune-hub", daemon=True)
        thread.start()
        try:
            thread.join(min(self.left, threading.TIMEOUT_MAX))
        finally:
            self.abandoned.set()
        if errors:
            raise errors[0]
        if not results:
            raise _timed_out()
        return results[0]


def with_retries(call: Callable[[], T], what: str, deadline: Deadline, connects_again: bool = False) -> T:
    """Call until it works, waiting 1, 2, 4, … seconds or what the server asks for.

    Args:
        call: A function that is safe to repeat.
        what: What messages name the repository, such as `"The repository 'user/name'"`.
        deadline: The time limit, after which no attempt starts.
        connects_again: Whether the client itself tries several times to connect, as it does for downloads.

    Raises:
        HubError: If a retry would not help, or did not; the subclass says why.
    """
    for attempt in range(ATTEMPTS):
        if deadline.abandoned.is_set():
            raise _timed_out()
        try:
            return call()
        except HubError:
            raise
        except CLIENT_ERRORS as error:
            wait = waiting_time(error, attempt)
            is_final = connects_again and any(isinstance(each, _HTTP.ConnectError) for each in _chain(error))
            if is_final or not is_transient(error) or attempt == ATTEMPTS - 1:
                raise explained(error, what) from error
            if wait >= deadline.left:
                raise _timed_out() from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of one that caused it; None if there is none."""
    statuses = [each.response.status_code for each in _chain(error) if isinstance(each, HfHubHTTPError)]
    return statuses[0] if statuses else None


def is_transient(error: BaseException) -> bool:
    """Whether another attempt can help."""
    chain = _chain(error)
    if any(isinstance(each, (OfflineModeIsEnabled, HFValidationError)) for each in chain):
        return False
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    # An upload that the client gave up is a bare RuntimeError.
    return type(error) is RuntimeError or any(isinstance(each, _CONNECTION_ERRORS) for each in chain)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__
    return found


def waiting_time(error: BaseException, attempt: int) -> float:
    """Return the seconds before the next attempt: what the server asks for, or else doubling from one."""
    asked = _asked_for(error)
    return min(LONGEST_WAIT, 2.0**attempt if asked is None else asked)


def _asked_for(error: BaseException) -> float | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    retry_after = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    window = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return None if window is None else float(window[1]) + 1


def explained(error: BaseException, what: str) -> HubError:
    """Return the error as one of ours: what was wrong and what to do, without token, path or the client's advice."""
    if any(isinstance(each, OfflineModeIsEnabled) for each in _chain(error)):
        return HubUnavailableError(f"The Hub was not asked: offline mode is on. {_AGAIN} with HF_HUB_OFFLINE unset.")
    if isinstance(error, LocalTokenNotFoundError):
        return _no_token()
    status = status_of(error)
    if isinstance(error, HFValidationError):
        return HubRejectedError(f"{what} has no valid name. Give 'user/name', of letters, digits, '-', '_' and '.'.")
    if isinstance(error, RevisionNotFoundError):
        return HubNotFoundError(f"{what} has no such revision. Give a branch, tag or commit that exists. {_AGAIN}.")
    if isinstance(error, GatedRepoError) or status in (402, 403):
        return HubPermissionError(
            f"{what}: the token may not do this (status {status}). {_AGAIN} with a token that has the role 'write' "
            "for it, or give a repository of your own."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return HubNotFoundError(
            f"{what} does not exist, or is private and the token may not see it. {_AGAIN} with another name or token."
        )
    if status == 401:
        return _no_token()
    if status in (409, 412):
        return HubConflictError(
            f"{what} was changed by somebody else meanwhile (status {status}). Look at what changed there; nothing "
            "local is lost, so run it again to put this on top."
        )
    if isinstance(error, LocalEntryNotFoundError) and not is_transient(error):
        return HubNotFoundError(f"{what} was not downloaded before, and the Hub was not asked. Allow downloads.")
    if is_transient(error):
        how = f"status {status}" if status is not None else "no connection, or it was cut"
        return HubUnavailableError(
            f"{what}: the Hub failed {ATTEMPTS} times ({how}). {_AGAIN} later; what was uploaded is not sent twice. "
            "If uploads fail only here, set HF_HUB_DISABLE_XET=1."
        )
    if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError) and error.errno is not None:
        return HubError(
            f"{what}: a file of this machine could not be read or written ({os.strerror(error.errno)}). Mend that, "
            "and run it again."
        )
    return HubRejectedError(
        f"{what}: the Hub refused what was sent ({_reason(error, status)}). Nothing local is lost; correct it and run "
        "it again."
    )


def _no_token() -> HubError:
    return HubAuthenticationError(
        f"There is no Hub token, or it is not valid any more. {_AGAIN} after `hf auth login`, or give `token`."
    )


def _timed_out() -> HubError:
    return HubTimeoutError(
        f"The Hub did not finish before the deadline. {_AGAIN}: what has arrived is found there. If it hangs again, "
        "set HF_HUB_DISABLE_XET=1, or give a longer `deadline`."
    )


def _reason(error: BaseException, status: int | None) -> str:
    """Return in a short line what the server says of metadata; other texts of the client hold paths and advice."""
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        return " ".join(str(error).split())[:300]
    return f"status {status}" if status is not None else type(error).__name__
