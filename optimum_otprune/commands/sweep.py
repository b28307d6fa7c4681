"""`otprune sweep`: the quality curve of one model, as a table, a file and a plot."""

import argparse
from pathlib import Path

from optimum_otprune.checkpoints.card.plots import can_plot, save_sweep_plot
from optimum_otprune.commands.actions import given_config
from optimum_otprune.commands.arguments import chosen, named_data
from optimum_otprune.commands.reading import protocol
from optimum_otprune.commands.terminal import showing_progress
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.models.defaults import SWEEP_FILE, SWEEP_PLOT
from optimum_otprune.pruner import OTPruner
from optimum_otprune.pruning.tuning.sweep_results import SweepPoint, SweepResult
from optimum_otprune.storage.outputs import output_path


# A line for each ratio is printed; lines per layer would hide them.
@showing_progress(quiet=True)
def sweep(args: argparse.Namespace) -> None:
    """Prune a model at several ratios, one after another, and measure each."""
    folder = None if args.output is None else output_path(args.output)
    pruner = OTPruner.from_pretrained(args.model, given_config(args), **chosen(args, LoadingOptions))
    result = pruner.sweep(
        args.ratios,
        args.calibration_data,
        None if args.data is None else named_data(args.data),
        batch_size=args.batch_size,
        max_windows=args.max_windows,
        max_hidden_memory=args.max_hidden_memory,
        spill_folder=args.spill_folder,
        progress=not args.quiet,
        folder=folder,
        on_point=_Teller(),
    )
    print(f"\n{result.table()}\n")
    for name, measured in result.data.items():
        print(f"Perplexity on {protocol({**measured, 'data': name})}.")
        if seen := measured.get("seen_windows"):
            windows = f"{seen:,} of the {measured['num_windows']:,} windows"
            print(f"{windows} hold text that was calibrated on; expect a higher perplexity on other text.")
    if folder is not None:
        _save_plot(result, folder)


class _Teller:
    """Prints a line for each new point of a quality curve."""

    def __init__(self) -> None:
        self._told: set[float] | None = None

    def __call__(self, result: SweepResult) -> None:
        """Print what is new; of a curve that is continued, how much is there."""
        if self._told is None:
            self._told = {point.pruning_ratio for point in result.points if point.error is None}
            if self._told:
                print(f"Already there: {len(self._told)} of the ratios.", flush=True)
            return
        for point in result.points:
            if point.pruning_ratio not in self._told:
                self._told.add(point.pruning_ratio)
                print(f"Ratio {point.pruning_ratio:g}: {self._outcome(result, point)}", flush=True)

    @staticmethod
    def _outcome(result: SweepResult, point: SweepPoint) -> str:
        if point.error is not None:
            return f"failed: {point.error}"
        found = (f"{value:,.2f} ({result.increase(point, name):+.1%})" for name, value in point.perplexities.items())
        return f"perplexity {', '.join(found)}; {point.seconds:.1f} s"


def _save_plot(result: SweepResult, folder: Path) -> None:
    """Draw the plot beside the file if that is possible, and say what is in the folder."""
    if not can_plot():
        print(f"Saved {SWEEP_FILE} to {folder}. A plot needs matplotlib: pip install 'optimum_otprune[plots]'.")
        return
    save_sweep_plot(result, folder / SWEEP_PLOT)
    print(f"Saved {SWEEP_FILE} and {SWEEP_PLOT} to {folder}.")
