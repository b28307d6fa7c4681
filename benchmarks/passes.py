"""What pruning in closed form, and scoring by gradients, cost in dense forward passes over the same tokens.

    python benchmarks/passes.py [--widths 576 1152] [--tokens-per-channel 16] [--quick] [--output passes.json]

Random Llama weights with hidden size n / 3.5 and heads of 64: time depends on shapes alone. A dense forward pass is
that of the blocks, over the same batches in the same run, once before and once after the pruning; the mean counts.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _rows import Row, at_most, shown, told, write_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.gradients import Asked, layer_gradients

WIDTHS = (576, 1152, 2304, 4096, 8192)
SCORED_WIDTHS = (576, 1152, 2304)
_PRUNING_LIMIT, _SCORING_LIMIT = 4.0, 8.0  # dense forward passes
_TOKENS_PER_CHANNEL = 16
_FEWEST_TOKENS = 32768
_SEQLEN, _BATCH = 512, 8
_SCORED_SEQLEN, _SCORED_TOKENS = 256, 16384
_GROWTH_WIDTH = 1152


class Size(NamedTuple):
    """Of a model and of its calibration data."""

    width: int
    layers: int
    tokens: int
    seqlen: int = _SEQLEN

    @property
    def hidden(self) -> int:
        """The multiple of 64 next to n / 3.5."""
        return max(64, round(self.width / 3.5 / 64) * 64)

    def __str__(self) -> str:
        return f"n = {self.width}, {self.layers} layer{'s' * (self.layers > 1)}, {self.tokens:,} tokens"


class Cost(NamedTuple):
    """Seconds of the work, and of one dense forward pass."""

    work: float
    forward: float

    @property
    def passes(self) -> float:
        return self.work / self.forward


def model_and_samples(size: Size) -> tuple[LlamaForCausalLM, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(1024, (max(2, size.tokens // size.seqlen), size.seqlen))


@torch.no_grad()
def forward_seconds(model: LlamaForCausalLM, samples: Tensor) -> float:
    """Of all samples, after one batch to warm up."""
    batches = samples.split(_BATCH)
    model.base_model(input_ids=batches[0], use_cache=False)
    start = time.perf_counter()
    for batch in batches:
        model.base_model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def pruning_cost(size: Size) -> Cost:
    """Of `OTPruner.prune` in closed form, half of the channels."""
    model, samples = model_and_samples(size)
    dense = copy.deepcopy(model)
    pruner = OTPruner.from_pretrained(model, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast"))
    before = forward_seconds(dense, samples)
    start = time.perf_counter()
    pruner.prune(samples, batch_size=_BATCH, progress=False)
    seconds = time.perf_counter() - start
    return Cost(seconds, (before + forward_seconds(dense, samples)) / 2)


def scoring_cost(size: Size) -> Cost:
    """Of SNIP and FO scores of all FFN weights together."""
    model, samples = model_and_samples(size)
    before = forward_seconds(model, samples)
    start = time.perf_counter()
    passes = Passes(PrunableModel.of(model), samples, PassSettings(_BATCH, progress=False))
    layer_gradients(passes, Asked(True, False))
    seconds = time.perf_counter() - start
    return Cost(seconds, (before + forward_seconds(model, samples)) / 2)


def rows(
    quick: bool = False, widths: Sequence[int] = WIDTHS, tokens_per_channel: float | None = None
) -> Iterator[Row]:
    """Closed-form pruning at every width, and how its cost grows.

    Args:
        quick: Tiny models.
        widths: n.
        tokens_per_channel: Calibration tokens in units of n, however few; default: 16, and at least 32,768.
    """
    if quick:
        yield from _pruning_rows(Size(128, 2, 1024))
        yield from growth_rows(128, (1, 2), (8, 16))
        return
    for width in widths:
        tokens = width * (tokens_per_channel or _TOKENS_PER_CHANNEL)
        tokens = round(tokens) if tokens_per_channel else max(_FEWEST_TOKENS, tokens)
        yield from _pruning_rows(Size(width, 4 if width < 4096 else 2 if width < 8192 else 1, tokens))
    yield from growth_rows(_GROWTH_WIDTH, (2, 4, 8), (16, 32, 64))


def _pruning_rows(size: Size) -> Iterator[Row]:
    cost = pruning_cost(size)
    yield at_most(f"closed-form pruning, {size}", cost.passes, "forward passes", _PRUNING_LIMIT)
    yield told("  pruning", cost.work, "s")
    yield told("  one dense forward pass", cost.forward, "s")


def growth_rows(width: int, layers: Sequence[int], tokens_per_channel: Sequence[int]) -> Iterator[Row]:
    """Pruning at one width with more layers, and with more tokens."""
    sizes = [Size(width, number, tokens_per_channel[0] * width) for number in layers]
    sizes += [Size(width, layers[0], factor * width) for factor in tokens_per_channel[1:]]
    for size in sizes:
        cost = pruning_cost(size)
        yield told(f"growth: {size}", cost.passes, "forward passes")
        yield told("  seconds a layer", cost.work / size.layers, "s")


def scoring_rows(quick: bool = False, widths: Sequence[int] = SCORED_WIDTHS) -> Iterator[Row]:
    """SNIP and FO together at every width."""
    sizes = [Size(width, 4, _SCORED_TOKENS, _SCORED_SEQLEN) for width in widths]
    for size in [Size(128, 2, 512, 32)] if quick else sizes:
        cost = scoring_cost(size)
        yield at_most(f"scoring by SNIP and FO, {size}", cost.passes, "forward passes", _SCORING_LIMIT)
        yield told("  scoring", cost.work, "s")
        yield told("  one dense forward pass", cost.forward, "s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", help=f"default: {WIDTHS}, of scoring {SCORED_WIDTHS}")
    parser.add_argument("--tokens-per-channel", type=float, help="of pruning; default: 16, and at least 32,768 tokens")
    parser.add_argument("--quick", action="store_true", help="tiny models, in seconds; their figures mean little")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    found = shown(rows(args.quick, args.widths or WIDTHS, args.tokens_per_channel))
    found += shown(scoring_rows(args.quick, args.widths or SCORED_WIDTHS))
    write_json(found, args.output)


if __name__ == "__main__":
    main()
