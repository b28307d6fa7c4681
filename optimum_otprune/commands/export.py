"""`otprune export`: a saved model in the format of another program."""

import argparse
import sys

from optimum_otprune.checkpoints.export.export import export_folder
from optimum_otprune.commands.arguments import saved_folder
from optimum_otprune.commands.terminal import showing_progress
from optimum_otprune.errors import ExportError
from optimum_otprune.models.distributed import check_single
from optimum_otprune.storage.outputs import output_path


@showing_progress(quiet=True)
def export(args: argparse.Namespace) -> None:
    """Export a saved model and compare the result with it."""
    check_single("`otprune export`", "Start one.")
    folder, output = saved_folder(args.folder), output_path(args.output)
    try:
        result = export_folder(folder, args.to, output, args.type, args.tool, args.overwrite)
    except ExportError as error:
        if error.output:
            print(error.output.rstrip(), file=sys.stderr)
        raise
    print(f"Saved to {output}, with weights in {result.kind}.")
    print(result)
