"""Messages on standard error while a command runs; afterwards, the settings of the process are restored."""

import argparse
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging

from optimum_otprune.commands.speaking import VisibleFormatter
from optimum_otprune.models.distributed import is_main_process


@contextmanager
def showing_progress(quiet: bool, silent: str | None = None) -> Iterator[None]:
    """Show one line per layer while the block of code runs.

    Args:
        quiet: Whether to leave out lines per layer and progress bars of loading.
        silent: The name of a logger of this package that then logs nothing but errors.
    """
    package = logging.getLogger("optimum_otprune")
    with ExitStack() as stack:
        if not package.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(VisibleFormatter())
            stack.callback(package.removeHandler, handler)
            package.addHandler(handler)
        _set_level(stack, package, logging.WARNING if quiet else logging.INFO)
        if silent is not None:
            _set_level(stack, logging.getLogger(silent), logging.ERROR)
        if quiet:
            stack.enter_context(_no_bars())
        yield


def _set_level(stack: ExitStack, logger: logging.Logger, level: int) -> None:
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide progress bars of transformers and of the Hub's client, which share a switch but for one variable."""
    is_on, is_hub_off = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client warns each time that the variable decides
            if is_on:
                transformers_logging.enable_progress_bar()
            if is_hub_off:
                disable_progress_bars()


def main_process_speaks(action: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Make an action that all processes of a run do together print from the main one alone.

    Args:
        action: The work of a command.
    """

    @functools.wraps(action)
    def quiet_elsewhere(args: argparse.Namespace) -> None:
        is_main = is_main_process()
        with nullcontext() if is_main else redirect_stdout(io.StringIO()), showing_progress(args.quiet or not is_main):
            action(args)

    return quiet_elsewhere
