"""What the subcommands do."""

import argparse
import functools
import io
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from optimum_otprune.architectures.changes import check_dense
from optimum_otprune.card import needs_remote_code
from optimum_otprune.checkpoint import weight_bytes
from optimum_otprune.commands.arguments import config_options, loading_options, state_folder
from optimum_otprune.commands.benchmark import run_benchmark
from optimum_otprune.commands.demo import run_demo
from optimum_otprune.commands.reading import protocol, saved_folder, tell_seen
from optimum_otprune.commands.terminal import showing_progress
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError, IntegrityError, UsageError
from optimum_otprune.files import recover, save_text
from optimum_otprune.hub import PushResult
from optimum_otprune.hub_access import check_hub_access
from optimum_otprune.loading import hub_id
from optimum_otprune.manifest import verify_folder
from optimum_otprune.options import BUDGET_FIELDS
from optimum_otprune.outputs import check_output_file, check_output_folder, check_place, noted_places, output_path
from optimum_otprune.pipeline import hidden_memory, spill_path
from optimum_otprune.processes import check_model, check_single, is_main_process, wait_for_all
from optimum_otprune.pruner import OTPruner
from optimum_otprune.report import REPORT_FILE, PruningReport
from optimum_otprune.resume import forget_if_saved
from optimum_otprune.sharing import push_saved
from optimum_otprune.state import StateFolder
from optimum_otprune.trials import TuningResult

_OWN_KEYS = ("optimum_otprune_version", "pruning_ratio")  # of a configuration, which a better one may replace


def _main_process_speaks(action: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Make an action that all processes of a run do together print from the main one alone."""

    @functools.wraps(action)
    def quiet_elsewhere(args: argparse.Namespace) -> None:
        is_main = is_main_process()
        with nullcontext() if is_main else redirect_stdout(io.StringIO()), showing_progress(args.quiet or not is_main):
            action(args)

    return quiet_elsewhere


@_main_process_speaks
def prune(args: argparse.Namespace) -> None:
    """Prune a model and save it."""
    if args.eval_data is not None and not args.eval:
        raise UsageError("`--eval-data` would be ignored without `--eval`.")
    if args.max_windows is not None and not args.eval:
        raise UsageError("`--max-windows` would be ignored without `--eval`.")
    if args.private and args.push_to_hub is None:
        raise UsageError("`--private` would be ignored without `--push-to-hub`.")
    hidden_memory(args.max_hidden_memory)
    spill_path(args.spill_folder)
    output, state = output_path(args.output), state_folder(args)
    places = noted_places(
        source_model=args.model,
        calibration_data=args.calibration_data,
        evaluation_data=args.eval_data,
        state=state,
        spill_folder=args.spill_folder,
        offload_folder=args.offload_folder,
    )
    check_place(output, places)
    config = _config(args)
    if state is not None:
        check_single("`--resume`", "Leave it out, or start one.")
    is_new = args.overwrite or args.dry_run
    if is_main_process() and not args.dry_run:
        recover(output)
    is_saved = state is not None and not is_new and _was_saved(args.model, output, state, config)
    if not is_saved:
        check_output_folder(output, args.overwrite)
    target = {"private": args.private or None, "token": args.token}
    repo_id = None if args.push_to_hub is None else check_hub_access(args.push_to_hub, **target)
    if args.dry_run:
        _dry_run(args, config, output)
        return
    if is_saved:
        print(f"{output} is complete already; what was left of the run is removed.")
    else:
        _prune_and_save(args, config, output, state)
    if repo_id is not None and is_main_process():
        _tell_push(push_saved(output, repo_id, **target))


def _dry_run(args: argparse.Namespace, config: OTPruningConfig, output: Path) -> None:
    plan = OTPruner.plan(
        args.model,
        config,
        args.calibration_data,
        batch_size=args.batch_size,
        max_hidden_memory=args.max_hidden_memory,
        evaluate=args.eval,
        evaluation_data=args.eval_data,
        **loading_options(args),
    )
    check_output_folder(output, args.overwrite, plan.bytes_after)
    print(plan)


def _was_saved(model: str, output: Path, state: Path, config: OTPruningConfig) -> bool:
    """Whether an earlier run of this command ended between saving its result and removing its state."""
    if not os.path.isdir(state) or not (output / REPORT_FILE).is_file():
        return False
    try:
        verify_folder(output)
    except IntegrityError:
        return False
    report = PruningReport.load(output / REPORT_FILE)
    is_same = report.config == config.to_dict() and report.base_model == hub_id(model)
    return is_same and forget_if_saved(state, report)


def _prune_and_save(args: argparse.Namespace, config: OTPruningConfig, output: Path, state: Path | None) -> None:
    if state is not None:
        with StateFolder.opened(state):
            pass  # what is wrong with it is told before a model is loaded
    pruner = OTPruner.from_pretrained(args.model, config, **loading_options(args))
    check_model(pruner.model)
    check_dense(pruner.model)
    check_output_folder(output, args.overwrite, weight_bytes(pruner.model))
    wait_for_all()  # before the first one writes there
    passes = {"batch_size": args.batch_size, "progress": not args.quiet}
    measured = {**passes, "max_windows": args.max_windows}
    if args.eval:
        dense = pruner.evaluate(args.eval_data, **measured)
    report = pruner.prune(
        args.calibration_data,
        resume_from=state,
        max_hidden_memory=args.max_hidden_memory,
        spill_folder=args.spill_folder,
        **passes,
    )
    print(report)
    if args.eval:
        pruned = pruner.evaluate(args.eval_data, **measured)
        print(f"Perplexity: {dense['perplexity']:.2f} dense -> {pruned['perplexity']:.2f} pruned ({protocol(pruned)})")
        tell_seen(report, pruned)
        if pruner.report is not None and pruner.report.contradiction is not None:
            print(pruner.report.contradiction)
    pruner.save_pretrained(output, overwrite=args.overwrite)
    trust = ", trust_remote_code=True" if needs_remote_code(config, report) else ""
    print(f"Saved to {output}. Load it with AutoModelForCausalLM.from_pretrained({str(output)!r}{trust}).")


@showing_progress(quiet=True, silent="optimum_otprune.tuning")  # trials are printed; lines per layer would hide them
def tune(args: argparse.Namespace) -> None:
    """Search for a better configuration and write it to a file."""
    given = [name for name in BUDGET_FIELDS if getattr(args, name) is not None]
    if args.target_latency is not None and given:
        option = given[0].replace("_", "-")
        raise UsageError(f"`--target-latency` and `--{option}` say in more than one way how much to prune. Give one.")
    config = _config(args)
    output = output_path(args.output)
    places = noted_places(source_model=args.model, calibration_data=args.calibration_data, study=args.study)
    check_output_file(output, args.overwrite, places, _OWN_KEYS)
    pruner = OTPruner.from_pretrained(args.model, config, **loading_options(args))

    def show(result: TuningResult) -> None:
        for trial in result.trials[shown[0] :]:
            print(trial.describe(result.base), flush=True)
        shown[0] = len(result.trials)

    shown = [0]
    best = pruner.tune(
        args.calibration_data,
        num_trials=args.trials,
        timeout=args.timeout,
        study=args.study,
        target_latency=args.target_latency,
        latency_shape=args.latency_shape,
        batch_size=args.batch_size,
        progress=not args.quiet,
        on_trial=show,
    )
    save_text(output, best.to_json_string(), args.overwrite, _OWN_KEYS)
    result = pruner.tuning
    assert result is not None
    print(
        f"Perplexity on held-out calibration samples: {result.base_perplexity:.3f} given -> "
        f"{result.best_perplexity:.3f} best (trial {result.best.number} of {len(result.trials)})"
    )
    print(f"Saved to {output}. Prune with it: otprune prune {args.model} --config {output} -o OUT")


@_main_process_speaks
def evaluate(args: argparse.Namespace) -> None:
    """Measure the perplexity of a model."""
    pruner = OTPruner.from_pretrained(args.model, **loading_options(args))
    if args.seqlen is not None:
        pruner.config = _usage(lambda: pruner.config.replace(seqlen=args.seqlen))
    metrics = pruner.evaluate(
        args.data, batch_size=args.batch_size, max_windows=args.max_windows, progress=not args.quiet
    )
    print(f"Perplexity: {metrics['perplexity']:.2f} ({protocol(metrics)})")
    tell_seen(pruner.report, metrics)


@_main_process_speaks
def benchmark(args: argparse.Namespace) -> None:
    """Compare the speed of two models."""
    check_single("`otprune benchmark`", "Start one.")
    run_benchmark(args)


def push(args: argparse.Namespace) -> None:
    """Push a saved model."""
    folder = saved_folder(args)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder.name!r} is no folder. Give one that `otprune prune` wrote.")
    _tell_push(
        push_saved(
            folder,
            args.repo_id,
            private=args.private or None,
            token=args.token,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            deadline=args.deadline,
        )
    )


def _tell_push(result: PushResult) -> None:
    print(f"Pushed to {result.url}." if result.changed else f"{result.url} holds it already; nothing was sent.")


@showing_progress(quiet=True)
def demo(args: argparse.Namespace) -> None:
    """Prune the small model that the package carries."""
    _usage(lambda: OTPruningConfig(pruning_ratio=args.pruning_ratio))
    run_demo(args.pruning_ratio, None if args.output is None else output_path(args.output), args.overwrite)


def _config(args: argparse.Namespace) -> OTPruningConfig:
    options = config_options(args)
    if args.config is None:
        return _usage(lambda: OTPruningConfig(**options))
    saved = OTPruningConfig.from_pretrained(args.config)
    return _usage(lambda: saved.replace(**options))


def _usage(make: Any) -> Any:
    """A configuration that cannot be made of the options is wrong usage."""
    try:
        return make()
    except ConfigurationError as error:
        raise UsageError(str(error)) from error
