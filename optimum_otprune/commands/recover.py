"""`otprune recover`: a pruned model is trained towards the dense one and saved."""

import argparse
from pathlib import Path

from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.load import load_without_weights
from optimum_otprune.commands.actions import saved_report
from optimum_otprune.commands.arguments import base_options, chosen, logits_folder, state_folder
from optimum_otprune.commands.terminal import main_process_speaks
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.recovery_options import RecoveryOptions
from optimum_otprune.models.devices import weight_bytes
from optimum_otprune.models.distributed import check_model, check_single, is_main_process, wait_for_all
from optimum_otprune.models.training import check_trainable
from optimum_otprune.pruner import OTPruner
from optimum_otprune.pruning.dry_run.estimate import Skeleton
from optimum_otprune.pruning.recovery.dense_logits import DenseLogits
from optimum_otprune.pruning.recovery.snapshots import forget_recovery_if_saved
from optimum_otprune.pruning.resume import forget
from optimum_otprune.storage.files import recover as recover_folder
from optimum_otprune.storage.outputs import check_output_folder, output_path
from optimum_otprune.storage.state_folder import StateFolder


@main_process_speaks
def recover(args: argparse.Namespace) -> None:
    """Train a pruned model towards the dense one and save it."""
    output, state = output_path(args.output), state_folder(args)
    if state is not None:
        check_single("`--resume`", "Leave it out, or start one.")
    if logits_folder(args) is not None:
        check_single("`--cache-logits`", "Leave it out, or start one.")
    if args.dry_run:
        _dry_run(args, output)
        return
    if is_main_process():
        recover_folder(output)
    if state is not None and not args.overwrite and _was_recovered(output, state):
        print(f"{output} is complete already; what was left of the run is removed.")
        return
    check_output_folder(output, args.overwrite)
    for folder in (state, logits_folder(args)):
        if folder is not None:
            with StateFolder.opened(folder):
                pass  # a folder that cannot be used is an error before a model is loaded
    kept = _kept_logits(args)
    pruner = OTPruner.from_pretrained(args.model, **chosen(args, LoadingOptions))
    check_model(pruner.model)
    check_trainable(pruner.model, args.trained)
    check_output_folder(output, args.overwrite, weight_bytes(pruner.model))
    wait_for_all()  # all processes check before the first one writes there
    options = _options(args)
    options["resume_from"] = state
    base = args.base if kept is None else kept
    print(pruner.recover(args.data, base_model=base, heldout_data=args.heldout_data, **options))
    pruner.save_pretrained(output, overwrite=args.overwrite)
    if kept is not None and not args.cache_logits:
        forget(kept.folder, kept.fingerprint)
    print(f"Saved to {output}.")


def _kept_logits(args: argparse.Namespace) -> DenseLogits | None:
    """Write the dense model's logits, if that is asked for, before the pruned model is loaded."""
    folder = logits_folder(args)
    if folder is None:
        return None
    pruner, _ = _without_weights(args)
    return pruner.keep_logits(
        folder, args.data, base_model=args.base, heldout_data=args.heldout_data, **_options(args)
    )


def _options(args: argparse.Namespace) -> RecoveryOptions:
    options = chosen(args, RecoveryOptions)
    options["progress"], options["base_options"], options["cache_logits"] = not args.quiet, base_options(args), None
    return options


def _without_weights(args: argparse.Namespace) -> tuple[OTPruner, Skeleton]:
    found, skeleton = load_without_weights(args.model, check_loading_options(chosen(args, LoadingOptions)))
    pruner = OTPruner(found.model, found.config, found.tokenizer, found.report, found.base_model, found.base_card)
    return pruner, skeleton


def _dry_run(args: argparse.Namespace, output: Path) -> None:
    pruner, skeleton = _without_weights(args)
    options = _options(args)
    options["cache_logits"], options["resume_from"] = logits_folder(args), state_folder(args)
    plan = pruner.plan_recovery(args.data, base_model=args.base, skeleton=skeleton, **options)
    check_output_folder(output, args.overwrite, weight_bytes(skeleton.model))
    print(plan)


def _was_recovered(output: Path, state: Path) -> bool:
    """Return whether an earlier run of this command ended between saving its result and removing its state."""
    report = saved_report(output, state)
    return report is not None and forget_recovery_if_saved(state, report)
