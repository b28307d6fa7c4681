"""The subcommands and their options; what they do is imported when they run, so that `--help` is fast."""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_otprune.commands.arguments import (
    CALIBRATION_HELP,
    DATA_HELP,
    LISTED,
    SAMPLING,
    add_benchmark_options,
    add_compare_options,
    add_config_options,
    add_debug_option,
    add_memory_options,
    add_model_options,
    add_option,
    add_options,
    add_output_options,
    add_overwrite_option,
    add_recover_option,
    add_recovery_options,
    add_resume_option,
    add_run_options,
    add_saved_folder,
    add_windows_option,
)
from optimum_otprune.commands.command import Command
from optimum_otprune.config.loading_options import PlacementOptions
from optimum_otprune.models.defaults import EXPORT_TYPES, SCHEMES, SWEEP_RATIOS, TRIALS
from optimum_otprune.storage.hub.options import HubOptions, PushOptions

_READING = "optimum_otprune.commands.reading"


class PruneCommand(Command):
    """`otprune prune`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        add_output_options(parser)
        parser.add_argument(
            "--push-to-hub", metavar="REPO", help="also push the result there; checked before the model is loaded"
        )
        parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
        parser.add_argument("--calibration-data", metavar="DATA", help=CALIBRATION_HELP)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print in seconds what would be done, with expected memory and time; no weights are read",
        )
        parser.add_argument(
            "--eval", action="store_true", help="measure perplexity before and after, and agreement of both"
        )
        parser.add_argument("--eval-data", metavar="DATA", help=f"what to measure it on: {DATA_HELP}")
        add_windows_option(parser)
        add_recover_option(parser)
        add_resume_option(parser)
        add_config_options(parser)
        add_memory_options(parser)
        add_run_options(parser)


class RecoverCommand(Command):
    """`otprune recover`."""

    actions = "optimum_otprune.commands.recover"
    lost = "Nothing of it was kept; with `--resume`, the weights so far are, and the same command goes on."
    kept = "The weights so far are"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        add_output_options(parser)
        add_recovery_options(parser)
        add_resume_option(parser, "the weights so far")
        add_run_options(parser)


class WriteCalibrationCommand(Command):
    """`otprune write-calibration`."""

    action = "write_calibration"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        parser.add_argument(
            "-o", "--output", required=True, metavar="FILE", help="token ids to write, such as written.safetensors"
        )
        for name in SAMPLING:
            add_option(parser, name)
        add_memory_options(parser, spills=False)
        parser.add_argument("--quiet", action="store_true", help="no progress bar")
        add_debug_option(parser)


class TuneCommand(Command):
    """`otprune tune`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        parser.add_argument(
            "-o", "--output", required=True, metavar="FILE", help="file for the best configuration, such as best.json"
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace an output file that holds a configuration"
        )
        parser.add_argument("--calibration-data", metavar="DATA", help=CALIBRATION_HELP)
        group = parser.add_argument_group("search")
        group.add_argument(
            "--trials", type=int, default=TRIALS, metavar="N", help=f"trials in all (default: {TRIALS})"
        )
        group.add_argument("--timeout", type=float, metavar="S", help="start no trial after so many seconds")
        group.add_argument("--study", metavar="FILE", help="file that keeps the trials; an existing one is continued")
        group.add_argument(
            "--target-latency",
            type=float,
            metavar="S",
            help="seconds of a forward pass, in place of a ratio or target",
        )
        group.add_argument(
            "--latency-shape",
            type=int,
            nargs=2,
            metavar=("BATCH", "SEQLEN"),
            help="of that forward pass (default: one calibration sample)",
        )
        add_config_options(parser)
        add_run_options(parser)


class SweepCommand(Command):
    """`otprune sweep`."""

    actions = "optimum_otprune.commands.sweep"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        parser.add_argument(
            "--ratios",
            type=float,
            nargs="+",
            default=SWEEP_RATIOS,
            metavar="X",
            help=f"shares of every FFN's channels to remove (default: {' '.join(map(str, SWEEP_RATIOS))})",
        )
        parser.add_argument(
            "-o",
            "--output",
            metavar="FOLDER",
            help="folder that keeps the result of each ratio; the same command goes on with what is there",
        )
        parser.add_argument("--calibration-data", metavar="DATA", help=CALIBRATION_HELP)
        parser.add_argument("--data", nargs="+", metavar="DATA", help=f"what to measure on: {DATA_HELP}")
        add_windows_option(parser)
        add_config_options(parser)
        add_memory_options(parser)
        add_run_options(parser)


class EvaluateCommand(Command):
    """`otprune evaluate`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_model_options(parser)
        parser.add_argument("--data", metavar="DATA", help=DATA_HELP)
        parser.add_argument(
            "--base",
            metavar="DENSE",
            help="the dense model, Hub id or local folder: also give mean KL divergence from it and agreement with it",
        )
        parser.add_argument("--seqlen", type=int, metavar="N", help="tokens per window")
        add_windows_option(parser)
        add_run_options(parser)


class BenchmarkCommand(Command):
    """`otprune benchmark`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_benchmark_options(parser)


class CompareCommand(Command):
    """`otprune compare`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_compare_options(parser)


class ExportCommand(Command):
    """`otprune export`."""

    actions = "optimum_otprune.commands.export"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_saved_folder(parser)
        parser.add_argument("--to", required=True, choices=tuple(EXPORT_TYPES), help="the format to write")
        add_output_options(parser)
        parser.add_argument(
            "--type",
            choices=tuple(dict.fromkeys(kind for kinds in EXPORT_TYPES.values() for kind in kinds)),
            help="type of the weights (default: the folder's, or f32 where the format is not written with that)",
        )
        parser.add_argument(
            "--tool",
            metavar="PROGRAM",
            help="the program that writes it: llama.cpp's convert_hf_to_gguf.py, or the optimum-cli of an environment "
            "with optimum-onnx or optimum-intel (default: what is found here)",
        )
        add_debug_option(parser)


class QuantizeCommand(Command):
    """`otprune quantize`."""

    actions = "optimum_otprune.commands.quantize"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_saved_folder(parser, "FOLDER")
        add_output_options(parser)
        parser.add_argument(
            "--scheme",
            choices=SCHEMES,
            default=SCHEMES[0],
            help="int8 or int4 (torchao, a byte a weight in both), or nf4 (bitsandbytes, half a byte); default: "
            "%(default)s",
        )
        add_options(parser.add_argument_group("loading"), PlacementOptions)
        parser.add_argument("--trust-remote-code", action="store_true", help="run modeling code from the folder")
        parser.add_argument("--quiet", action="store_true", help="no progress bars of loading")
        add_debug_option(parser)


class ReportCommand(Command):
    """`otprune report`."""

    actions = _READING

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_saved_folder(parser)
        parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
        add_debug_option(parser)


class CardCommand(Command):
    """`otprune card`."""

    actions = _READING

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_saved_folder(parser)
        parser.add_argument("--name", help="of the model, such as user/name (default: the folder's)")
        parser.add_argument(
            "--write",
            action="store_true",
            help="replace README.md in the folder, edits by hand included, in place of printing",
        )
        parser.add_argument(
            "--lm-eval",
            nargs="+",
            metavar="FILE",
            help="results files that `lm_eval --output_path` wrote for this model, or for the dense one beside it: "
            "add them to report, card and .eval_results in the folder",
        )
        add_debug_option(parser)


class PushCommand(Command):
    """`otprune push`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        add_saved_folder(parser)
        parser.add_argument("repo_id", metavar="REPO", help="user/name; made if it does not exist")
        add_options(parser, PushOptions)
        add_debug_option(parser)


class VerifyCommand(Command):
    """`otprune verify`."""

    actions = _READING

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        parser.add_argument("source", metavar="OUT", help="folder that `otprune prune` wrote, or user/name")
        add_options(parser, HubOptions, without=("local_files_only",))
        add_debug_option(parser)


class ListCommand(Command):
    """`otprune list`."""

    actions = "optimum_otprune.commands.listing"
    action = "list_names"

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        parser.add_argument(
            "kind", nargs="?", choices=LISTED, metavar="KIND", help=f"{', '.join(LISTED)} (default: all)"
        )
        add_debug_option(parser)


class DemoCommand(Command):
    """`otprune demo`."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Options."""
        parser.add_argument(
            "-o", "--output", metavar="OUT", help="folder for the pruned model (default: a temporary one)"
        )
        add_overwrite_option(parser)
        parser.add_argument("--pruning-ratio", type=float, default=0.5, metavar="X", help="default: 0.5")
        add_debug_option(parser)


class OTPruneCommand(BaseOptimumCLICommand):
    """`optimum-cli otprune`."""

    COMMAND = CommandInfo("otprune", "Structured pruning of FFN layers by optimal transport.")
    SUBCOMMANDS = (
        CommandInfo("prune", "Prune a model and save it.", PruneCommand),
        CommandInfo("recover", "Train a pruned model towards the dense one, and save it.", RecoverCommand),
        CommandInfo(
            "write-calibration", "Let a model write calibration samples into a file.", WriteCalibrationCommand
        ),
        CommandInfo("tune", "Search for a better configuration and write it to a file.", TuneCommand),
        CommandInfo("sweep", "Show what each of several ratios costs a model: table, file and plot.", SweepCommand),
        CommandInfo("evaluate", "Measure the perplexity of a model, pruned or not.", EvaluateCommand),
        CommandInfo(
            "compare", "Show on data and prompts what a pruned model lost beside the dense one.", CompareCommand
        ),
        CommandInfo("benchmark", "Compare speed and memory of a dense and a pruned model.", BenchmarkCommand),
        CommandInfo("export", "Export a saved model to GGUF, ONNX or OpenVINO, and compare.", ExportCommand),
        CommandInfo("quantize", "Save a pruned model with weights in 8 or 4 bits.", QuantizeCommand),
        CommandInfo("report", "Print what pruning did to a saved model.", ReportCommand),
        CommandInfo("card", "Make the model card of a saved model again.", CardCommand),
        CommandInfo("push", "Push a saved model to the Hub, in one commit.", PushCommand),
        CommandInfo("verify", "Check every file of a saved model against its manifest.", VerifyCommand),
        CommandInfo(
            "list", "Show the importances, solvers, methods, … that can be named, with parameters.", ListCommand
        ),
        CommandInfo("demo", "Prune the small model that the package carries; works offline.", DemoCommand),
    )
