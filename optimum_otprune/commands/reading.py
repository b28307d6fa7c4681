"""Subcommands that only read a saved folder; torch is not imported for them."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from optimum_otprune.checkpoints.card.added_results import add_results
from optimum_otprune.checkpoints.card.folder import folder_card, replace_card
from optimum_otprune.checkpoints.card.lm_eval import read_lm_eval
from optimum_otprune.checkpoints.card.results import seen_before
from optimum_otprune.commands.arguments import chosen, saved_folder
from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.hub.options import HubOptions
from optimum_otprune.storage.hub.push import verify_saved
from optimum_otprune.storage.untrusted import visible


def report(args: argparse.Namespace) -> None:
    """Print the report of a saved model."""
    folder = saved_folder(args.folder)
    if not os.path.isfile(folder / REPORT_FILE):
        raise ReportError(f"{folder.name!r} has no {REPORT_FILE}: it is no folder that `otprune prune` wrote.")
    saved = PruningReport.load(folder / REPORT_FILE)
    if args.json:
        print(json.dumps(saved.to_dict(), indent=2, sort_keys=True))
        return
    for layer in saved.layers:
        print(layer)
    print(saved)
    print(calibration_words(saved))
    for recovery in saved.recoveries:
        print(recovery)
    if saved.quantization is not None:
        print(saved.quantization)
    for metrics in saved.evaluations:
        print(f"Perplexity of the {metrics['stage']} model: {metrics['perplexity']:.2f} ({protocol(metrics)})")
        tell_agreement(metrics)
        tell_seen(saved, metrics)
    for task in saved.tasks:
        print(task)


def calibration_words(saved: PruningReport) -> str:
    """Return what a model was calibrated on, in one line."""
    calibration = saved.calibration
    given, written = calibration["num_samples"], calibration.get("written_samples", 0)
    shown = f"{given:,} samples of {calibration['seqlen']:,} tokens from {visible(calibration['data'], 60)}"
    own = f"{written:,} {'more ' if given else ''}that the dense model wrote itself"
    return f"Calibrated on: {', and '.join([*([shown] if given else []), *([own] if written else [])])}"


def card(args: argparse.Namespace) -> None:
    """Print the model card of a saved model, or write it."""
    folder = saved_folder(args.folder)
    if args.lm_eval:
        _add_results(folder, args)
        return
    text = folder_card(folder, args.name)
    if not args.write:
        print(text, end="")
        return
    if replace_card(folder, text):
        print("warning: README.md had other text, perhaps edited by hand; it was replaced.", file=sys.stderr)
    print(f"Saved the model card of {folder.resolve().name}.")


def _add_results(folder: Path, args: argparse.Namespace) -> None:
    runs = [read_lm_eval(Path(os.path.expanduser(file))) for file in args.lm_eval]
    added = add_results(folder, runs, args.name, args.write)
    for sentence in added.doubts:
        print(f"warning: {sentence}", file=sys.stderr)
    count = sum(len(run.results) for run in runs)
    print(f"Added {count} results of lm-eval to {folder.resolve().name}: {', '.join(added.files)}.")


def verify(args: argparse.Namespace) -> None:
    """Check a saved model's files."""
    saved_folder(args.source)  # what can name no folder can name no repository
    source = os.path.expanduser(args.source)
    commit = verify_saved(source, **chosen(args, HubOptions))
    print(f"All files are as they were saved{'' if commit is None else f' (commit {commit})'}.")


def tell_seen(saved: PruningReport | None, metrics: Mapping[str, object]) -> None:
    """Print whether a pruned model was measured on text that it was calibrated on."""
    if saved is not None and metrics["stage"] == "pruned" and (sentence := seen_before(saved, metrics)):
        print(sentence)


def tell_agreement(metrics: Mapping[str, object]) -> None:
    """Print how far the model is from the dense one, if it was measured against that."""
    if "kl" in metrics:
        print(
            f"Against the dense model: the same next token for {metrics['agreement']:.1%}, mean KL divergence "
            f"{metrics['kl']:.4f} nats per token"
        )


def protocol(metrics: Mapping[str, object]) -> str:
    """Return a phrase for how a perplexity was measured."""
    return (
        f"{metrics['num_tokens']:,} tokens of {metrics['data']} in windows of {metrics['seqlen']}, {metrics['dtype']}"
    )
