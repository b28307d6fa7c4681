"""`otprune quantize`: a pruned folder with quantized weights."""

import argparse

from optimum_otprune.checkpoints.quantize import quantize_model
from optimum_otprune.commands.arguments import chosen, saved_folder
from optimum_otprune.commands.terminal import main_process_speaks
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.storage.outputs import output_path


@main_process_speaks
def quantize(args: argparse.Namespace) -> None:
    """Quantize a pruned folder, and print what that did to it."""
    folder, output = saved_folder(args.folder), output_path(args.output)
    print(quantize_model(folder, output, args.scheme, overwrite=args.overwrite, **chosen(args, LoadingOptions)))
    print(f"Saved to {output}; loaded again, it gives what was quantized.")
