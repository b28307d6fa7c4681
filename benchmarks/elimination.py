"""What the closed-form algebra of one layer costs: elimination, choice of λ with refit, and second moments.

    python benchmarks/elimination.py --output benchmarks/results/elimination.json

Everything is measured on a random SwiGLU layer of each width n with hidden size n / 3.5, half of whose channels go,
and told in dense forward passes of such a Llama block (FFN and the four projections of attention) over 8 n tokens;
that pass is measured in the same run on fewer tokens and scaled linearly. `greedy excess` compares the channels that
stay with those of elimination by its formulas, one whole matrix at a time: the least-squares error that they leave.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _rows import Row, shown, write_json
from torch import Tensor

from optimum_otprune.functional.compensation import refit_down
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.gram import GramAccumulator, GramStatistics
from optimum_otprune.functional.selection import obs_channels

WIDTHS = (576, 1024, 2048, 4096, 8192, 14336)
QUICK_WIDTHS = (64, 192)
_BATCH = 1024  # tokens
_DAMPING = 1e-3  # as elimination's
_BUDGET = 4.0  # forward passes for all of closed-form pruning
_NARROWEST = 576  # layer that the budget is meant for
_MEMORY = 4.0  # float64 matrices of the size of the Gram matrix, beside it
_EXCESS = 0.01


class Layer(NamedTuple):
    """A random FFN and the attention's projections beside it."""

    ffn: FFNWeights
    projections: list[Tensor]
    scale: Tensor

    @classmethod
    def of(cls, width: int, generator: torch.Generator) -> "Layer":
        size = round(width / 3.5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / size**0.5

        ffn = FFNWeights(up=normal(width, size), down=normal(size, width), gate=normal(width, size) * 2)
        return cls(ffn, [normal(size, size) for _ in range(4)], 3 * torch.rand(size, generator=generator))

    def inputs(self, tokens: int, generator: torch.Generator) -> Tensor:
        return torch.randn(tokens, len(self.scale), generator=generator) * self.scale

    def forward(self, inputs: Tensor) -> Tensor:
        for projection in self.projections:
            inputs = inputs @ projection
        return ffn_forward(self.ffn, inputs, torch.nn.functional.silu)


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Median time, after one run that does not count if there are several."""
    if repeats > 1:
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def second_moments(
    layer: Layer, tokens: int, generator: torch.Generator
) -> tuple[GramStatistics, GramStatistics, float]:
    """Of fitted tokens and of a quarter that is held out, and the seconds that 1,000 tokens took."""
    size, width = layer.ffn.down.shape
    sums = [GramAccumulator(width, size) for _ in range(2)]
    times = []
    batch = min(_BATCH, tokens // 4)
    for index in range(tokens // batch):
        hidden = channel_activations(layer.ffn, layer.inputs(batch, generator), torch.nn.functional.silu)
        targets = hidden @ layer.ffn.down.T
        start = time.perf_counter()
        sums[index % 4 == 3].add(hidden, targets)
        times.append(time.perf_counter() - start)
    return sums[0].statistics(), sums[1].statistics(), statistics.median(times) * 1000 / batch


def one_by_one(gram: Tensor, down: Tensor, kept_size: int) -> Tensor:
    """Elimination by its formulas, the whole inverse downdated after every removal."""
    gram, down = gram.double(), down.double()
    inverse = torch.linalg.inv(_damped(gram))
    alive = torch.ones(len(gram), dtype=torch.bool)
    for _ in range(len(gram) - kept_size):
        cost = torch.where(alive, down.square().sum(dim=0) / inverse.diagonal(), torch.inf)
        worst = int(cost.argmin())
        row = inverse[worst] / inverse[worst, worst]
        down = down.addr(down[:, worst], row, alpha=-1.0)
        inverse.addr_(inverse[worst].clone(), row, alpha=-1.0)
        inverse[worst, worst] = 1.0
        alive[worst] = False
    return alive.nonzero().flatten()


def least_squares_error(gram: Tensor, down: Tensor, kept: Tensor) -> float:
    """What the best refit of the kept channels leaves of `‖W h‖²`."""
    gram, down = _damped(gram.double()), down.double()
    cross = down @ gram[:, kept]
    explained = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram[kept][:, kept]))
    return float(((down @ gram) * down).sum() - (cross * explained.T).sum())


def _damped(gram: Tensor) -> Tensor:
    return gram + torch.diag(torch.full((len(gram),), _DAMPING) * gram.diagonal().mean())


class PeakMemory:
    """Bytes that work takes beyond what was there before it; 0 where the system does not tell."""

    def __init__(self, work: Callable[[], Any]) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets earlier peaks
            before = self._read("VmRSS")
        except OSError:
            work()
            self.bytes = 0
        else:
            work()
            self.bytes = max(0, self._read("VmHWM") - before)

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(width: int, tokens: int, compare_up_to: int, repeats: int) -> list[Row]:
    """All figures of one width.

    Args:
        width: n.
        tokens: To sum second moments of.
        compare_up_to: Widest layer for which elimination by its formulas is affordable.
        repeats: Of what takes under a second or so.
    """
    generator = torch.Generator().manual_seed(width)
    layer = Layer.of(width, generator)
    down = layer.ffn.down
    inputs = layer.inputs(min(2048, 8 * width), generator)
    forward = seconds(lambda: layer.forward(inputs), 3) / len(inputs)  # of one token
    fit, heldout, gram_seconds = second_moments(layer, tokens, generator)
    total = fit.gram + heldout.gram
    repeats = repeats if width <= 2048 else 1
    kept: list[Tensor] = []
    peak = PeakMemory(lambda: kept.append(obs_channels(total, down, width // 2)))
    obs = seconds(lambda: obs_channels(total, down, width // 2), repeats)
    kept_fit, kept_heldout = fit.select(kept[0]), heldout.select(kept[0])
    ridge = seconds(lambda: refit_down(kept_fit, kept_heldout, down[:, kept[0]]), repeats)
    unit = 8 * width * forward
    name, passes = f"n = {width}", "forward passes"
    together = (obs + ridge) / unit + gram_seconds / 1000 / forward
    found = [
        Row(f"{name}: dense forward, 8 n tokens", unit, "s", "", None),
        Row(f"{name}: elimination", obs, "s", "done", True),
        Row(f"{name}: elimination", obs / unit, passes, "", None),
        Row(f"{name}: choice of λ and refit", ridge, "s", "", None),
        Row(f"{name}: choice of λ and refit", ridge / unit, passes, "", None),
        Row(f"{name}: second moments of 1,000 tokens", gram_seconds, "s", "", None),
        Row(f"{name}: second moments", gram_seconds / 1000 / forward, passes, "", None),
        _judged(f"{name}: all three", together, passes, _BUDGET, width >= _NARROWEST),
    ]
    if peak.bytes:
        matrices = peak.bytes / (8 * width**2)
        # In narrow layers they are lost in what libraries allocate.
        found.append(_judged(f"{name}: memory of elimination", matrices, "n × n float64", _MEMORY, width >= 2048))
    if width <= compare_up_to:
        greedy = least_squares_error(total, down, one_by_one(total, down, width // 2))
        excess = least_squares_error(total, down, kept[0]) / greedy - 1
        found.append(Row(f"{name}: greedy excess", 100 * excess, "%", f"≤ {_EXCESS:.0%}", excess <= _EXCESS))
    return found


def _judged(name: str, value: float, unit: str, limit: float, counts: bool) -> Row:
    return Row(name, value, unit, f"≤ {limit:g}", value <= limit) if counts else Row(name, value, unit, "", None)


def rows(
    widths: Sequence[int], tokens_per_channel: float = 1.0, compare_up_to: int = 1024, repeats: int = 3
) -> Iterator[Row]:
    """All figures of all widths; see `measure`."""
    for width in widths:
        yield from measure(width, max(64, round(tokens_per_channel * width)), compare_up_to, repeats)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--tokens-per-channel", type=float, default=1.0, help="of the second moments")
    parser.add_argument("--compare-up-to", type=int, default=1024, help="widest layer for the greedy excess")
    parser.add_argument("--repeats", type=int, default=3, help="of what is fast; medians are told")
    parser.add_argument("--quick", action="store_true", help="small layers, in seconds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    widths = QUICK_WIDTHS if args.quick else args.widths
    print(f"threads: {torch.get_num_threads()}")
    found = shown(rows(widths, args.tokens_per_channel, args.compare_up_to, args.repeats))
    write_json(found, args.output)


if __name__ == "__main__":
    main()
