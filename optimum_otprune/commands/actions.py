"""The work of each subcommand."""

import argparse
import os
from pathlib import Path

import safetensors.torch

from optimum_otprune.checkpoints.card.render import needs_remote_code
from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.dense import dense_reference
from optimum_otprune.checkpoints.load import hub_id
from optimum_otprune.checkpoints.push import check_push, push_saved
from optimum_otprune.commands.arguments import (
    SAMPLING,
    chosen,
    config_options,
    given_options,
    recovery_state_folder,
    saved_folder,
    state_folder,
)
from optimum_otprune.commands.benchmark import run_benchmark
from optimum_otprune.commands.checks import CONFIGURATION_KEYS, usage
from optimum_otprune.commands.compare import run_compare
from optimum_otprune.commands.demo import run_demo
from optimum_otprune.commands.reading import calibration_words, protocol, tell_agreement, tell_seen
from optimum_otprune.commands.terminal import main_process_speaks, showing_progress
from optimum_otprune.config.checks import hidden_memory
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.recovery_options import RecoveryOptions
from optimum_otprune.errors import IntegrityError, UsageError
from optimum_otprune.models.agreement import DenseOutputs
from optimum_otprune.models.changes import check_dense
from optimum_otprune.models.devices import weight_bytes
from optimum_otprune.models.distributed import check_model, check_single, from_main, is_main_process, wait_for_all
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.training import check_trainable
from optimum_otprune.pruner import OTPruner
from optimum_otprune.pruning.recovery.snapshots import forget_recovery_if_saved
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.pruning.resume import forget_if_saved
from optimum_otprune.pruning.settings import spill_path
from optimum_otprune.pruning.tuning.trials import TuningResult, TuningSettings
from optimum_otprune.storage.files import recover as recover_folder
from optimum_otprune.storage.files import save_bytes, save_text
from optimum_otprune.storage.hub.options import PushOptions
from optimum_otprune.storage.hub.push import PushResult
from optimum_otprune.storage.manifest import verify_folder
from optimum_otprune.storage.outputs import check_output_folder, output_path
from optimum_otprune.storage.state_folder import StateFolder


@main_process_speaks
def prune(args: argparse.Namespace) -> None:
    """Prune a model and save it."""
    spill_path(args.spill_folder)
    output, state = output_path(args.output), state_folder(args)
    config = given_config(args)
    if state is not None and args.recover is not None:
        check_single("`--resume` with `--recover`", "Leave one out and `otprune recover` later, or start one.")
    is_new = args.overwrite or args.dry_run
    if is_main_process() and not args.dry_run:
        recover_folder(output)
    is_saved = False
    if state is not None and not is_new:
        recovery = recovery_state_folder(args)
        is_saved = from_main(is_main_process() and _was_saved(args.model, output, state, config, recovery))
    if not is_saved:
        check_output_folder(output, args.overwrite)
    target = PushOptions(private=args.private or None, token=args.token)
    repo_id = None if args.push_to_hub is None else check_push(args.push_to_hub, target)
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
        recover=args.recover,
        **chosen(args, LoadingOptions),
    )
    check_output_folder(output, args.overwrite, plan.bytes_after)
    print(plan)


def _was_saved(model: str, output: Path, state: Path, config: OTPruningConfig, recovery: Path | None) -> bool:
    """Return whether an earlier run of this command ended between saving its result and removing its state."""
    report = saved_report(output, state)
    if report is None:
        return False
    is_same = report.config == config.to_dict() and report.base_model == hub_id(model)
    if recovery is not None and os.path.isdir(recovery) and is_same:
        is_same = forget_recovery_if_saved(recovery, report)
    return is_same and forget_if_saved(state, report)


def saved_report(output: Path, state: Path) -> PruningReport | None:
    """Return the report of a complete output beside which a state is left; None where one of them is not there."""
    if not os.path.isdir(state) or not (output / REPORT_FILE).is_file():
        return None
    try:
        verify_folder(output)
    except IntegrityError:
        return None
    return PruningReport.load(output / REPORT_FILE)


def _prune_and_save(args: argparse.Namespace, config: OTPruningConfig, output: Path, state: Path | None) -> None:
    if state is not None and is_main_process():
        with StateFolder.opened(state):
            pass  # a folder that cannot be used is an error before a model is loaded
    pruner = OTPruner.from_pretrained(args.model, config, **chosen(args, LoadingOptions))
    check_model(pruner.model)
    check_dense(pruner.model)
    if args.recover is not None:
        check_trainable(pruner.model, "all")  # rather than when it is pruned
    check_output_folder(output, args.overwrite, weight_bytes(pruner.model))
    wait_for_all()  # all processes check before the first one writes there
    passes = {"batch_size": args.batch_size, "progress": not args.quiet}
    kept = DenseOutputs(hidden_memory(args.max_hidden_memory), spill_path(args.spill_folder))
    measured = {**passes, "max_windows": args.max_windows, "dense": kept}
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
    print(calibration_words(report))
    if args.recover is not None:
        recovery = RecoveryOptions(num_tokens=args.recover, batch_size=args.batch_size, progress=not args.quiet)
        recovery["resume_from"] = recovery_state_folder(args)
        recovery["base_options"] = dict(chosen(args, LoadingOptions))
        print(pruner.recover(base_model=args.model, **recovery))
    if args.eval:
        pruned = pruner.evaluate(args.eval_data, **measured)
        print(f"Perplexity: {dense['perplexity']:.2f} dense -> {pruned['perplexity']:.2f} pruned ({protocol(pruned)})")
        tell_agreement(pruned)
        tell_seen(report, pruned)
        if pruner.report is not None and pruner.report.contradiction is not None:
            print(pruner.report.contradiction)
    pruner.save_pretrained(output, overwrite=args.overwrite)
    trust = ", trust_remote_code=True" if needs_remote_code(config, report) else ""
    print(f"Saved to {output}. Load it with {report.auto_class}.from_pretrained({str(output)!r}{trust}).")


# Trials are printed; lines per layer would hide them.
@showing_progress(quiet=True, silent="optimum_otprune.pruning.tuning.search")
def tune(args: argparse.Namespace) -> None:
    """Search for a better configuration and write it to a file."""
    output, config = output_path(args.output), given_config(args)
    settings = TuningSettings(
        num_trials=args.trials,
        timeout=args.timeout,
        seed=config.seed,
        passes=PassSettings(args.batch_size),
        target_latency=args.target_latency,
        latency_shape=args.latency_shape,
    )
    usage(settings.checked)
    pruner = OTPruner.from_pretrained(args.model, config, **chosen(args, LoadingOptions))

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
    save_text(output, best.to_json_string(), args.overwrite, CONFIGURATION_KEYS)
    result = pruner.tuning
    assert result is not None
    print(
        f"Perplexity on held-out calibration samples: {result.base_perplexity:.3f} given -> "
        f"{result.best_perplexity:.3f} best (trial {result.best.number} of {len(result.trials)})"
    )
    print(f"Saved to {output}. Prune with it: otprune prune {args.model} --config {output} -o OUT")


@main_process_speaks
def write_calibration(args: argparse.Namespace) -> None:
    """Let a model write calibration samples into a file."""
    config = OTPruningConfig(**given_options(args, SAMPLING))
    pruner = OTPruner.from_pretrained(args.model, config, **chosen(args, LoadingOptions))
    tokens = pruner.write_calibration(max_hidden_memory=args.max_hidden_memory, progress=not args.quiet)
    save_bytes(output_path(args.output), safetensors.torch.save({"input_ids": tokens}))
    print(
        f"{len(tokens):,} samples of {tokens.shape[1]:,} tokens in {args.output}. Prune on them: otprune prune "
        f"{args.model} --calibration-data {args.output} -o OUT"
    )


@main_process_speaks
def evaluate(args: argparse.Namespace) -> None:
    """Measure the perplexity of a model."""
    pruner = OTPruner.from_pretrained(args.model, **chosen(args, LoadingOptions))
    if args.seqlen is not None:
        pruner.config = usage(lambda: pruner.config.replace(seqlen=args.seqlen))
    loading = check_loading_options(chosen(args, LoadingOptions))
    dense = dense_reference(args.base, pruner.model, pruner.tokenizer, loading)
    metrics = pruner.evaluate(
        args.data, batch_size=args.batch_size, max_windows=args.max_windows, progress=not args.quiet, dense=dense
    )
    before = "" if dense is None else f"{metrics['dense_perplexity']:.2f} dense -> "
    print(f"Perplexity: {before}{metrics['perplexity']:.2f} ({protocol(metrics)})")
    tell_agreement(metrics)
    tell_seen(pruner.report, metrics)


@main_process_speaks
def compare(args: argparse.Namespace) -> None:
    """Compare what two models say."""
    run_compare(args)


@main_process_speaks
def benchmark(args: argparse.Namespace) -> None:
    """Compare the speed of two models."""
    check_single("`otprune benchmark`", "Start one.")
    run_benchmark(args)


def push(args: argparse.Namespace) -> None:
    """Push a saved model."""
    folder = saved_folder(args.folder)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder.name!r} is no folder. Give one that `otprune prune` wrote.")
    _tell_push(push_saved(folder, args.repo_id, **chosen(args, PushOptions)))


def _tell_push(result: PushResult) -> None:
    print(f"Pushed to {result.url}." if result.changed else f"{result.url} holds it already; nothing was sent.")


@showing_progress(quiet=True)
def demo(args: argparse.Namespace) -> None:
    """Prune the small model that the package carries."""
    run_demo(args.pruning_ratio, None if args.output is None else output_path(args.output), args.overwrite)


def given_config(args: argparse.Namespace) -> OTPruningConfig:
    """Return the configuration that the options and the file of a command make.

    Raises:
        UsageError: If they contradict each other.
    """
    options = config_options(args)
    if args.config is None:
        return usage(lambda: OTPruningConfig(**options))
    saved = OTPruningConfig.from_pretrained(args.config)
    return usage(lambda: saved.replace(**options))
