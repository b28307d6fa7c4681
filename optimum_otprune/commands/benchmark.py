"""`otprune benchmark`: speed and memory of a dense and a pruned model, beside what the removed operations promise."""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_otprune.checkpoints.load import load_checkpoint
from optimum_otprune.commands.arguments import chosen
from optimum_otprune.commands.assisted import AssistedSpeed, measure_assisted, read_prompts
from optimum_otprune.commands.checks import BENCHMARK_KEYS
from optimum_otprune.commands.speed import (
    BenchmarkSettings,
    Speed,
    SpeedComparison,
    check_comparable,
    check_numbers,
    check_settings,
    compare,
    cut_copy,
    widths_by_multiple,
)
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.errors import UsageError
from optimum_otprune.models.devices import weight_bytes
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.pruning.side_by_side import ComparedModel
from optimum_otprune.pruning.versions import versions
from optimum_otprune.storage.files import save_text
from optimum_otprune.storage.hub.options import filled
from optimum_otprune.storage.outputs import output_path

_HEAD = (
    f"{'batch':>5} {'prompt':>6} {'model':<8} {'first token':>11} {'prefill':>13} {'decode':>11} {'peak memory':>11} "
    f"{'KV cache':>9}"
)


def run_benchmark(args: argparse.Namespace) -> None:
    """Measure, print the results, and write them to a file if one is given.

    Args:
        args: Values of the options that `add_benchmark_options` adds.

    Raises:
        OTPruneError: If a model cannot be loaded, the two do not belong together, or a shape cannot be run.
    """
    device = checked_device(args.device)
    settings = BenchmarkSettings(
        tuple(args.batch_sizes), tuple(args.seqlens), args.new_tokens, args.warm_up, args.repeats
    )
    check_numbers(settings, args.multiple_of)
    loaded_dense = _load("dense", args, device, args.dtype)
    dense = loaded_dense.model
    loaded_pruned = _load("pruned", args, device, str(dense.dtype).removeprefix("torch."))
    pruned = loaded_pruned.model
    blocks = ffn_blocks(dense), ffn_blocks(pruned)
    check_comparable(*blocks)
    check_settings({"dense": dense, "pruned": pruned}, settings)
    widths = widths_by_multiple(*blocks, args.multiple_of)
    prompts = None if args.assistant is None else read_prompts(loaded_dense, loaded_pruned, args.assistant, settings)
    models = {"dense": _describe(dense, blocks[0]), "pruned": _describe(pruned, blocks[1])}
    where: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dense.dtype),
    }
    print(
        f"{where['device']}, {where['threads']} threads, {where['dtype'].removeprefix('torch.')}; medians of ", end=""
    )
    print(f"{settings.repeats} rounds after {settings.warm_up} to warm up, the models taking turns.\n")
    _print_models(models)
    comparisons = compare(dense, pruned, settings)
    _print_speeds(comparisons)
    _print_ratios(comparisons)
    assisted = None if prompts is None else measure_assisted(dense, pruned, prompts, settings)
    if assisted is not None:
        _print_assisted(assisted)
    cuts = _measure_multiples(dense, widths, settings)
    if args.json is not None:
        content = {
            **where,
            "settings": settings._asdict(),
            "models": models,
            "comparisons": [comparison.to_dict() for comparison in comparisons],
            "assistant": None if assisted is None else assisted.to_dict(),
            "multiples": cuts,
            "versions": versions(),
        }
        save_text(output_path(args.json), json.dumps(content, indent=2) + "\n", True, BENCHMARK_KEYS)
        print(f"\nSaved to {args.json}.")


def checked_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: A name such as `"cuda:0"`.

    Raises:
        UsageError: If there is no such device.
    """
    try:
        torch.ones(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}). Give another, such as cpu."
        ) from error
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of a device for a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else str(device)


def _load(side: str, args: argparse.Namespace, device: torch.device, dtype: str) -> ComparedModel:
    given = chosen(args, LoadingOptions)
    given |= {"dtype": dtype, "device_map": str(device)}
    found = load_checkpoint(getattr(args, side), filled(LoadingOptions, given))
    return ComparedModel(side, found.model.eval(), found.tokenizer)


def _describe(model: PreTrainedModel, blocks: Sequence[FFNBlock]) -> dict[str, object]:
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": weight_bytes(model),
        "ffn_widths": [block.intermediate_size for block in blocks],
    }


def _print_models(models: Mapping[str, Mapping[str, Any]]) -> None:
    for name, model in models.items():
        low, high = min(model["ffn_widths"]), max(model["ffn_widths"])
        width = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        print(
            f"{name:<7} {model['parameters']:,} parameters, weights {_megabytes(model['weight_bytes'])}, "
            f"FFN width {width}"
        )
    ratio = {key: models["pruned"][key] / models["dense"][key] for key in ("parameters", "weight_bytes")}
    print(f"pruned/dense: parameters {ratio['parameters']:.3f}, weights {ratio['weight_bytes']:.3f}\n")


def _print_speeds(comparisons: Sequence[SpeedComparison]) -> None:
    print(_HEAD)
    for comparison in comparisons:
        for name, speed in (("dense", comparison.dense), ("pruned", comparison.pruned)):
            print(f"{comparison.batch_size:>5} {comparison.seqlen:>6} {name:<8} {_speed_cells(speed)}")
    if all(comparison.dense.peak_bytes is None for comparison in comparisons):
        print(
            "Peak memory is not measured on this device: count the weights, the KV cache and one layer's activations."
        )


def _speed_cells(speed: Speed) -> str:
    decode = "–" if speed.decode_tokens_per_second is None else f"{speed.decode_tokens_per_second:,.1f} tok/s"
    peak = "–" if speed.peak_bytes is None else _megabytes(speed.peak_bytes)
    return (
        f"{speed.first_token_seconds * 1e3:>8,.1f} ms {speed.prefill_tokens_per_second:>7,.0f} tok/s {decode:>11} "
        f"{peak:>11} {_megabytes(speed.cache_bytes):>9}"
    )


def _print_ratios(comparisons: Sequence[SpeedComparison]) -> None:
    print(
        f"\n{'batch':>5} {'prompt':>6} {'prefill':>8} {'promised':>8} {'reached':>8} {'time saved':>10} {'decode':>8}"
    )
    for comparison in comparisons:
        decode = "–" if comparison.decode_speedup is None else f"{comparison.decode_speedup:.2f} ×"
        saved = "–" if comparison.share_of_time_saved is None else f"{comparison.share_of_time_saved:.1%}"
        print(
            f"{comparison.batch_size:>5} {comparison.seqlen:>6} {comparison.prefill_speedup:>6.2f} × "
            f"{comparison.promised_speedup:>6.2f} × {comparison.share_reached:>8.1%} "
            f"{saved:>10} {decode:>8}"
        )
    print(
        "Speed-ups, pruned against dense. Promised: by operations of FFN, attention and head. Reached: share of that"
    )
    print("speed-up. Time saved: share of the time that the removed operations promise to save.")


def _print_assisted(found: AssistedSpeed) -> None:
    print(f"\n{'dense':<19} {'tokens':>6} {'calls':>6} {'decode':>13}")
    for name, writing in (("alone", found.alone), ("with its assistant", found.assisted)):
        rate = writing.tokens / writing.seconds
        print(f"{name:<19} {writing.tokens:>6} {writing.calls:>6} {rate:>7,.1f} tok/s")
    print(
        f"The pruned model as assistant saves {found.share_of_calls_saved:.1%} of the dense model's calls: "
        f"{found.speedup:.2f} × as fast, the same text after {found.identical} of {len(found.alone.texts)} prompts."
    )


def _measure_multiples(
    dense: PreTrainedModel, widths: Mapping[int, int], settings: BenchmarkSettings
) -> list[dict[str, object]]:
    """Compare the dense model cut to each width with the dense model; one width is measured once."""
    found: list[dict[str, object]] = []
    for width in dict.fromkeys(widths.values()):
        multiples = [multiple for multiple, of_this in widths.items() if of_this == width]
        comparisons = compare(dense, cut_copy(dense, width), settings)
        if not found:
            print(f"\n{'multiple':>14} {'width':>7} {'batch':>5} {'prompt':>6} ", end="")
            print(f"{'prefill':>8} {'promised':>8} {'decode':>8}")
        for comparison in comparisons:
            decode = "–" if comparison.decode_speedup is None else f"{comparison.decode_speedup:.2f} ×"
            print(
                f"{', '.join(map(str, multiples)):>14} {width:>7,} {comparison.batch_size:>5} {comparison.seqlen:>6} "
                f"{comparison.prefill_speedup:>6.2f} × {comparison.promised_speedup:>6.2f} × {decode:>8}"
            )
        entries = [comparison.to_dict() for comparison in comparisons]
        found.append({"multiples": multiples, "width": width, "comparisons": entries})
    return found


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
