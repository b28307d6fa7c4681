"""`otprune compare`: a pruned model beside the dense one, on the terminal, as JSON and as a page."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from optimum_otprune.checkpoints.comparison.compare import LoadedPair, load_pair
from optimum_otprune.checkpoints.comparison.page import comparison_page, times
from optimum_otprune.commands.arguments import chosen, named_data
from optimum_otprune.commands.benchmark import device_name
from optimum_otprune.commands.checks import COMPARISON_JSON, COMPARISON_PAGE
from optimum_otprune.commands.speed import BenchmarkSettings, check_comparable, check_settings, compare
from optimum_otprune.config.comparison_options import ComparisonOptions, MeasuringOptions
from optimum_otprune.errors import UsageError
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.inputs import input_device
from optimum_otprune.pruning.model_comparison import ModelComparison
from optimum_otprune.storage.files import writing_folder
from optimum_otprune.storage.manifest import write_manifest
from optimum_otprune.storage.outputs import noted_places, output_path
from optimum_otprune.storage.untrusted import read_bytes

_LARGEST_PROMPTS = 1 << 20  # bytes of a file of prompts
_SPEED = BenchmarkSettings(seqlens=(128,), warm_up=1, repeats=3)
_NAME_WIDTH = 28  # characters of a data set's name in a table


def run_compare(args: argparse.Namespace) -> None:
    """Compare two models, print what was found, and write it to a folder if one is given.

    Args:
        args: Values of the options of `otprune compare`.

    Raises:
        OTPruneError: If a model, data or a prompt cannot be used, or the folder cannot be written.
    """
    prompts = _prompts(args)
    pair = load_pair(args.dense, args.pruned, chosen(args, ComparisonOptions))
    if args.speed:
        _check_speed(pair)
    options = chosen(args, MeasuringOptions)
    options["progress"] = not args.quiet
    comparison = pair.compare(named_data(args.data) if args.data else None, prompts, options)
    if args.speed:
        comparison = _with_speed(comparison, pair)
    _print(comparison)
    if args.output is not None:
        folder = output_path(args.output)
        _save(comparison, folder, args)
        print(f"\nSaved to {folder}: {COMPARISON_JSON}, and {COMPARISON_PAGE} for a browser.")


def _prompts(args: argparse.Namespace) -> list[str] | None:
    """Return the prompts that were given, or None for the built-in ones."""
    if args.no_prompts:
        return []
    if args.prompts is None:
        return args.prompt
    file = Path(os.path.expanduser(args.prompts))
    try:
        text = read_bytes(file, _LARGEST_PROMPTS).decode("utf-8-sig")
    except ValueError as error:
        why = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UsageError(
            f"The prompts in {file.name!r} cannot be used: {why}. Give a text file, a prompt a line."
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{file.name!r} holds no prompts. Give a text file, a prompt a line.")
    return [*(args.prompt or ()), *lines]


def _check_speed(pair: LoadedPair) -> None:
    models = {"dense": pair.dense.model, "pruned": pair.pruned.model}
    check_comparable(*(ffn_blocks(model) for model in models.values()))
    check_settings(models, _SPEED)


def _with_speed(comparison: ModelComparison, pair: LoadedPair) -> ModelComparison:
    found = compare(pair.dense.model, pair.pruned.model, _SPEED)
    threads = torch.get_num_threads()
    device = f"{device_name(input_device(pair.pruned.model))}, {threads} thread{'s' if threads > 1 else ''}"
    return dataclasses.replace(
        comparison,
        speed=tuple(one.to_dict() for one in found),
        settings={**comparison.settings, "device": device, "speed": _SPEED._asdict()},
    )


def _print(comparison: ModelComparison) -> None:
    dense, pruned = comparison.dense, comparison.pruned
    print(f"dense   {dense.name}: {dense.parameters:,} parameters, {dense.dtype}")
    print(f"pruned  {pruned.name}: {pruned.parameters:,} parameters ({comparison.size_ratio:.1%}), {pruned.dtype}")
    if comparison.data:
        print(
            f"\n{'data':<{_NAME_WIDTH}} {'dense':>9} {'pruned':>9} {'ratio':>7} {'agree':>7} {'KL':>8} {'tokens':>9}"
        )
    for row in comparison.data:
        name = row.name if len(row.name) <= _NAME_WIDTH else f"…{row.name[1 - _NAME_WIDTH :]}"
        print(
            f"{name:<{_NAME_WIDTH}} {row.dense_perplexity:>9.2f} {row.perplexity:>9.2f} {times(row.ratio):>7} "
            f"{row.agreement:>7.1%} {row.kl:>8.4f} {row.num_tokens:>9,}"
        )
        if row.seen_windows:
            print(f"  {row.seen_windows} of {row.num_windows} windows hold text that the model was calibrated on")
    if comparison.data:
        print("Perplexity of both; agree: the same next token is most likely; KL: nats per token, 0 is no difference.")
    for entry in comparison.prompts:
        print(f"\n> {_indented(entry.prompt)}")
        print(f"  dense:  {_indented(entry.dense)}")
        print(f"  pruned: {'the same' if entry.dense == entry.pruned else _indented(entry.pruned)}")
    for speed in comparison.speed:
        decode = "" if speed["decode_speedup"] is None else f", {times(speed['decode_speedup'])} writing"
        print(
            f"\nSpeed, {speed['batch_size']} × {speed['seqlen']} tokens: {times(speed['prefill_speedup'])} reading "
            f"(promised {times(speed['promised_speedup'])}){decode}"
        )


def _indented(text: str) -> str:
    return text.strip("\n").replace("\n", "\n          ")


def _save(comparison: ModelComparison, folder: Path, args: argparse.Namespace) -> None:
    """Write both files and a manifest; the folder appears complete or not at all."""
    places = noted_places(source_model=args.pruned, dense_model=args.dense)
    content = json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n"
    page = comparison_page(comparison)
    with writing_folder(folder, args.overwrite, len(content) + len(page), places) as partial:
        (partial / COMPARISON_JSON).write_text(content, encoding="utf-8")
        (partial / COMPARISON_PAGE).write_text(page, encoding="utf-8")
        write_manifest(partial)
