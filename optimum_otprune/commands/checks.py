"""Checks before anything heavy is imported: options that do not fit, and outputs that would do harm."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from optimum_otprune.commands.arguments import (
    SAMPLING,
    chosen,
    config_options,
    given_options,
    logits_folder,
    state_folder,
)
from optimum_otprune.config.checks import check_count, check_option, check_size
from optimum_otprune.config.options import BUDGET_FIELDS, OPTIONS_BY_NAME
from optimum_otprune.config.recovery_options import RecoveryOptions, RecoverySettings
from optimum_otprune.errors import ConfigurationError, OutputError, UsageError
from optimum_otprune.models.defaults import EXPORT_TYPES, SWEEP_FILE, SWEEP_PLOT
from optimum_otprune.storage.hub.retries import Deadline
from optimum_otprune.storage.manifest import MANIFEST_FILE
from optimum_otprune.storage.outputs import (
    check_output_file,
    check_output_folder,
    check_outside_results,
    check_place,
    check_results_folder,
    noted_places,
    output_path,
    resolved_output,
)
from optimum_otprune.storage.untrusted import visible

# First keys of files that a newer command may replace: a configuration, and results of a benchmark.
CONFIGURATION_KEYS = ("optimum_otprune_version", "pruning_ratio")
BENCHMARK_KEYS = ("comparisons", "multiples", "versions")
COMPARISON_JSON, COMPARISON_PAGE = "compare.json", "compare.html"
COMPARISON_FILES = frozenset((COMPARISON_JSON, COMPARISON_PAGE, MANIFEST_FILE))

T = TypeVar("T")


def prune(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune prune`."""
    if args.eval_data is not None and not args.eval:
        raise UsageError("`--eval-data` would be ignored without `--eval`.")
    if args.max_windows is not None and not args.eval:
        raise UsageError("`--max-windows` would be ignored without `--eval`.")
    if args.private and args.push_to_hub is None:
        raise UsageError("`--private` would be ignored without `--push-to-hub`.")
    usage(lambda: check_count("batch_size", args.batch_size))
    usage(lambda: check_size("max_hidden_memory", args.max_hidden_memory))
    _check_windows(args)
    if args.recover is not None:
        usage(lambda: RecoverySettings.of({"num_tokens": args.recover}, 0))
    output, state = usage(lambda: output_path(args.output)), state_folder(args)
    check_place(output, {})  # checked before the state, which is named after it
    places = noted_places(
        source_model=args.model,
        calibration_data=args.calibration_data,
        evaluation_data=args.eval_data,
        state=state,
        spill_folder=args.spill_folder,
        offload_folder=args.offload_folder,
    )
    check_place(output, places)
    if state is None or args.overwrite or args.dry_run:  # otherwise it may be the result of an earlier run
        check_output_folder(output, args.overwrite)
    _check_options(args)


def write_calibration(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune write-calibration`."""
    usage(lambda: check_size("max_hidden_memory", args.max_hidden_memory))
    for name, value in given_options(args, SAMPLING).items():
        usage(partial(check_option, OPTIONS_BY_NAME[name], value))
    output = usage(lambda: output_path(args.output))
    if output.suffix != ".safetensors":
        raise UsageError("`--output`: want the name of a file that ends in .safetensors.")
    if os.path.lexists(output):
        raise OutputError(f"The output file {resolved_output(output).name!r} exists. Choose another name.")
    check_output_file(output, False, noted_places(source_model=args.model))
    check_outside_results(output)


def recover(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune recover`."""
    usage(lambda: check_count("batch_size", args.batch_size))
    usage(lambda: RecoverySettings.of(chosen(args, RecoveryOptions), 0))
    output, state = usage(lambda: output_path(args.output)), state_folder(args)
    check_place(output, {})
    places = noted_places(
        state=state,
        source_model=args.model,
        dense_model=args.base,
        calibration_data=args.data,
        evaluation_data=args.heldout_data,
        offload_folder=args.offload_folder,
    )
    check_place(output, places)
    check_place(output, noted_places(logits=logits_folder(args), offload_folder=args.base_offload_folder))
    if state is None or args.overwrite or args.dry_run:  # otherwise it may be the result of an earlier run
        check_output_folder(output, args.overwrite)


def tune(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune tune`."""
    given = [name for name in BUDGET_FIELDS if getattr(args, name) is not None]
    if args.target_latency is not None and given:
        option = given[0].replace("_", "-")
        raise UsageError(f"`--target-latency` and `--{option}` say in more than one way how much to prune. Give one.")
    _check_options(args)
    output = usage(lambda: output_path(args.output))
    places = noted_places(source_model=args.model, calibration_data=args.calibration_data, study=args.study)
    check_output_file(output, args.overwrite, places, CONFIGURATION_KEYS)
    check_outside_results(output)


def sweep(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune sweep`."""
    given = [name for name in BUDGET_FIELDS if getattr(args, name) is not None]
    if given:
        raise UsageError(f"`--{given[0].replace('_', '-')}` would be ignored: `--ratios` says how much to prune.")
    usage(lambda: [check_option(OPTIONS_BY_NAME["pruning_ratio"], ratio) for ratio in args.ratios])
    usage(lambda: check_count("batch_size", args.batch_size))
    usage(lambda: check_size("max_hidden_memory", args.max_hidden_memory))
    _check_windows(args)
    _check_options(args)
    if args.output is not None:
        places = noted_places(
            source_model=args.model,
            calibration_data=args.calibration_data,
            spill_folder=args.spill_folder,
            offload_folder=args.offload_folder,
        )
        output = usage(lambda: output_path(args.output))
        for data in args.data or ():
            check_place(output, noted_places(evaluation_data=data))
        check_results_folder(output, places, (SWEEP_FILE, SWEEP_PLOT))


def evaluate(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune evaluate`."""
    usage(lambda: check_count("batch_size", args.batch_size))
    usage(lambda: check_option(OPTIONS_BY_NAME["seqlen"], args.seqlen))
    _check_windows(args)


def push(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune push`."""
    if args.deadline is not None:
        usage(lambda: Deadline(args.deadline))


def benchmark(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune benchmark`."""
    if args.json is not None:
        output = usage(lambda: output_path(args.json))
        for model in (args.dense, args.pruned):
            check_output_file(output, True, noted_places(source_model=model), BENCHMARK_KEYS)
        check_outside_results(output)


def compare(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune compare`."""
    if args.no_prompts and (args.prompt or args.prompts is not None or args.chat):
        raise UsageError("`--no-prompts` lets the models write nothing, so no prompts and no `--chat` go with it.")
    for name in ("batch_size", "new_tokens"):
        usage(lambda name=name: check_count(name, getattr(args, name)))  # type: ignore[misc]
    usage(lambda: check_option(OPTIONS_BY_NAME["seqlen"], args.seqlen))
    _check_windows(args)
    if args.output is not None:
        output = usage(lambda: output_path(args.output))
        places = noted_places(source_model=args.pruned, dense_model=args.dense)
        for data in args.data or ():
            check_place(output, noted_places(evaluation_data=data))
        check_output_folder(output, args.overwrite, places=places)
        _check_comparison(output)


def export(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune export`."""
    if args.type is not None and args.type not in EXPORT_TYPES[args.to]:
        raise UsageError(
            f"`--type {args.type}` is not written to {args.to}; want one of {', '.join(EXPORT_TYPES[args.to])}."
        )
    output = usage(lambda: output_path(args.output))
    check_output_folder(output, args.overwrite, places=noted_places(source_model=args.folder))


def quantize(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune quantize`."""
    output = usage(lambda: output_path(args.output))
    places = noted_places(source_model=args.folder, offload_folder=args.offload_folder)
    check_output_folder(output, args.overwrite, places=places)


def demo(args: argparse.Namespace) -> None:
    """Check the arguments of `otprune demo`."""
    usage(lambda: check_option(OPTIONS_BY_NAME["pruning_ratio"], args.pruning_ratio))
    if args.output is not None:
        check_output_folder(usage(lambda: output_path(args.output)), args.overwrite)


def usage(make: Callable[[], T]) -> T:
    """Return the result of a function; an option or the name of an output that cannot be is wrong usage.

    Raises:
        UsageError: If the function raises a `ConfigurationError`.
    """
    try:
        return make()
    except (ConfigurationError, OutputError) as error:
        raise UsageError(str(error)) from error


def _check_comparison(output: Path) -> None:
    """Raise an error if a folder that would be replaced holds a saved model, or anything but a comparison."""
    others = sorted({*os.listdir(output)} - COMPARISON_FILES) if output.is_dir() else []
    if others:
        raise OutputError(
            f"The output folder {output.name!r} holds {visible(others[0], 60)!r}, which is no file of a comparison, "
            "so it is not replaced. Choose another folder."
        )


def _check_windows(args: argparse.Namespace) -> None:
    if args.max_windows is not None:
        usage(lambda: check_count("max_windows", args.max_windows))


def _check_options(args: argparse.Namespace) -> None:
    """Check each option by itself; whether they fit together is checked by the configuration."""

    def check() -> None:
        for name, value in config_options(args).items():
            check_option(OPTIONS_BY_NAME[name], value)

    usage(check)
