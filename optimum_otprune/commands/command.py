"""How a subcommand runs: what it imports, how a failure reads, and which exit code it gives."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from optimum.commands.base import BaseOptimumCLICommand

from optimum_otprune.commands.arguments import state_folder
from optimum_otprune.commands.signals import Terminated, imports_interrupted, sigterm_interrupts
from optimum_otprune.commands.speaking import one_line, speaking
from optimum_otprune.errors import OTPruneError, StateError, UsageError
from optimum_otprune.storage.state_folder import has_state

_CHECKS = "optimum_otprune.commands.checks"


class Command(BaseOptimumCLICommand):
    """A subcommand, which runs the function of its name in the module `checks`, if any, and then that in `actions`.

    Exit codes: 0 done, 2 wrong usage, 1 failed, 130 interrupted, 143 terminated; a failure is one line unless
    `--debug`.
    """

    actions = "optimum_otprune.commands.actions"
    action: str | None = None  # the name of the function there, if it is not that of the command
    lost = "No layer of it was kept; with `--resume`, finished ones are, and the same command goes on."
    kept = "Finished layers are"
    _has_begun = False  # a half-imported module can be neither used nor imported again

    def run(self) -> None:
        """Run the command, and end the process with an exit code if it fails."""
        assert self.args is not None
        try:
            with sigterm_interrupts(), speaking():
                check = getattr(_imported(_CHECKS), self.action or self.COMMAND.name, None)
                if check is not None:
                    check(self.args)
                action = getattr(_imported(self.actions), self.action or self.COMMAND.name)
                self._has_begun = True
                action(self.args)
        except (OTPruneError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
            is_known = not isinstance(error, RuntimeError) or isinstance(error, OTPruneError) or _ran_out(error)
            if self.args.debug or not is_known:
                raise
            code, message = _outcome(error)
            print(f"otprune {self.COMMAND.name}: error: {message}{self._advice(error)}", file=sys.stderr)
            raise SystemExit(code) from None

    def _advice(self, error: BaseException) -> str:
        """Return what to do after a failure that kept what was done, or an interruption that lost it."""
        assert self.args is not None
        folder = state_folder(self.args)
        if folder is None and isinstance(error, KeyboardInterrupt) and self._lost_work():
            return f" {self.lost}"
        if folder is None or isinstance(error, (UsageError, StateError)) or not has_state(folder):
            return ""
        return f" {self.kept} in {str(folder)!r}: run the same command again to go on."

    def _lost_work(self) -> bool:
        """Return whether `--resume` would have kept what an interruption lost."""
        assert self.args is not None
        if "resume" not in self.args or getattr(self.args, "dry_run", False) or not self._has_begun:
            return False
        is_alone = import_module("optimum_otprune.models.distributed").num_processes() == 1
        is_saved = (Path(self.args.output) / import_module("optimum_otprune.pruning.report").REPORT_FILE).is_file()
        return is_alone and not is_saved


def _imported(module: str) -> ModuleType:
    with imports_interrupted():
        return import_module(module)


def _ran_out(error: RuntimeError) -> bool:
    """Return whether the memory of an accelerator ran out; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message."""
    if isinstance(error, KeyboardInterrupt):
        return (143, "terminated.") if isinstance(error, Terminated) else (130, "interrupted.")
    if isinstance(error, MemoryError):
        return 1, f"memory ran out{f' ({one_line(error)})' if str(error) else ''}. Close other programs, or use less."
    if isinstance(error, RuntimeError) and _ran_out(error):
        return 1, "the memory of the device ran out. Use smaller batches or samples, or a device with more memory."
    return 2 if isinstance(error, UsageError) else 1, one_line(error)
