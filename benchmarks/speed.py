"""Prefill of a pruned model against what its removed operations promise, and what widths that are no multiples cost.

    python benchmarks/speed.py [--quick] [--device cuda] [--output speed.json]

Random Llama weights: speed depends on shapes alone. The dense and the narrower model take turns in one run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from _rows import Row, shown, write_json
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_otprune.commands.speed import BenchmarkSettings, SpeedComparison, compare, cut_copy

TARGET = 0.85  # of the promised speed-up


def dense_model(quick: bool, device: str, dtype: str) -> LlamaForCausalLM:
    hidden, width, layers = (128, 512, 2) if quick else (1024, 4096, 4)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def rows(quick: bool, device: str = "cpu", dtype: str = "float32", repeats: int | None = None) -> list[Row]:
    """All figures of this script."""
    model = dense_model(quick, device, dtype)
    dense = model.config.intermediate_size
    repeats = repeats or (2 if quick else 7)
    settings = BenchmarkSettings((1,), (64,) if quick else (512,), new_tokens=0, warm_up=1, repeats=repeats)
    found = []
    for width in (dense * 3 // 4, dense // 2, dense // 4):
        (comparison,) = compare(model, cut_copy(model, width), settings)
        found += _share_rows(comparison, f"{dense} -> {width}")
    odd = dense // 2 - 27
    (comparison,) = compare(cut_copy(model, odd), cut_copy(model, dense // 2), settings)
    name = f"time of prefill with {odd} channels, in units of that with {dense // 2}"
    found.append(Row(name, comparison.prefill_speedup, "", "", None))
    return found


def _share_rows(comparison: SpeedComparison, change: str) -> list[Row]:
    reached, saved = comparison.share_reached, comparison.share_of_time_saved
    assert saved is not None
    measured = f"{comparison.prefill_speedup:.2f} x of {comparison.promised_speedup:.2f} x promised"
    return [
        Row(f"prefill, {change}: {measured}", reached, "", f">= {TARGET}", reached >= TARGET),
        Row(f"  the same as time saved of time promised, {change}", saved, "", "", None),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds; its figures mean little")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found = shown(rows(args.quick, args.device, args.dtype, args.repeats))
    write_json(found, args.output)


if __name__ == "__main__":
    main()
