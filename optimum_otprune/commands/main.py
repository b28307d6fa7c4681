"""`otprune`: the subcommands of `optimum-cli otprune` without the prefix."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from optimum.commands.base import RootOptimumCLICommand

from optimum_otprune.commands.parser import OTPruneCommand


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; default: the process's.
    """
    root = RootOptimumCLICommand("otprune")
    root.parser.description = OTPruneCommand.COMMAND.help
    root.parser.add_argument("--version", action="version", version=f"otprune {version('optimum_otprune')}")
    for command in OTPruneCommand.SUBCOMMANDS:
        root.register_subcommand(command)
    args = root.parser.parse_args(argv)
    if not hasattr(args, "func"):
        root.parser.print_help(sys.stderr)
        raise SystemExit(2)
    args.func(args).run()
