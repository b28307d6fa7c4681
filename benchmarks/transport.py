"""Transport of n channels to n/2: exact and entropic, beside `ot.emd` on the full problem in the same run.

    python benchmarks/transport.py [--sizes 1024 4096 14336] [--quick] [--device cuda]

Costs are the package's own, of random FFNs (channels alike in groups, hidden size n/16, at least 32): differences of
weight vectors, and activations that a kept channel cannot explain. Masses are uniform on both sides: the full problem,
in which kept channels may stay at no cost. `ot.emd` is run up to n = 4 096; beyond, the exact cost is that of the
package's own solver, which proves it. Memory is the resident memory that a solver adds, in units of one float64 cost.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ot
import torch
from _rows import Row, at_most, shown, told, write_json
from torch import Tensor

from optimum_otprune.functional.costs import CostInputs, transport_cost
from optimum_otprune.functional.ffn import FFNWeights, channel_activations
from optimum_otprune.functional.gram import gram_statistics
from optimum_otprune.functional.selection import top_channels
from optimum_otprune.functional.solvers import SolverSettings, TransportPlan, solve_transport

SIZES, QUICK_SIZES = (1024, 4096, 14336), (256,)
COSTS = ("weight", "activation")
_RIVAL_UP_TO = 4096
_LIMIT_AT, _SECONDS, _GPU_SECONDS = 14336, 60.0, 2.0
_FASTER_AT, _FASTER = 4096, 10.0
_EPSILON = 2e-4  # of the median cost: its entropy costs less than a thousandth
_TOKENS = 4096


def problem(n: int, cost: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cost `(n, n/2)` and both marginals."""
    generator = torch.Generator().manual_seed(seed)
    d = max(32, n // 16)
    groups = torch.randint(n // 4, (n,), generator=generator)

    def channels() -> Tensor:
        own, shared = (torch.randn(count, d, generator=generator) / d**0.5 for count in (n, n // 4))
        return shared[groups] + 0.5 * own

    weights = FFNWeights(gate=channels(), up=channels(), down=channels().T.contiguous())
    kept = top_channels(torch.rand(n, generator=generator), n // 2)
    inputs = CostInputs(weights)
    if cost == "activation":
        tokens = torch.randn(_TOKENS, d, generator=generator)
        hidden = channel_activations(weights, tokens, torch.nn.functional.silu)
        inputs = CostInputs(weights, gram_statistics(hidden, hidden @ weights.down.T).gram, _TOKENS)
    matrix = transport_cost(cost, inputs, kept).matrix
    return matrix, *(torch.full((count,), 1 / count, dtype=torch.float64) for count in matrix.shape)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def rival(cost: Tensor, source: Tensor, target: Tensor) -> float:
    """Cost of the plan of `ot.emd` on the full problem."""
    arrays = [part.numpy() for part in (source, target, cost)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ot.emd(*arrays, numItermax=10_000_000)
    return float((plan * arrays[2]).sum())


def added_memory(work: Callable[[], Any]) -> tuple[Any, float | None]:
    """A result and the resident bytes that it took beyond those before, where Linux tells."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return work(), None

    def peak() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    clear.write_text("5")
    before = peak()
    return work(), float(peak() - before)


def rows(sizes: Sequence[int] = SIZES, costs: Sequence[str] = COSTS, device: str = "cpu") -> Iterator[Row]:
    """Every figure, as soon as it is there."""
    for n in sizes:
        for name in costs:
            yield from _rows_of(n, name, device)


def _rows_of(n: int, name: str, device: str) -> Iterator[Row]:
    title = f"n = {n:,}, {name} cost"
    cost, source, target = problem(n, name)
    slow = None
    if n <= _RIVAL_UP_TO:
        least, slow = timed(lambda: rival(cost, source, target))
        yield told(f"{title}: ot.emd", slow, "s")
    exact, seconds, memory = _solved("emd", cost, source, target)
    yield from _speed(f"{title}: exact", seconds, n, "cpu")
    if slow is None:
        least = exact.cost
    else:
        gap = abs(exact.cost - least) / least
        yield at_most("  difference of its cost to ot.emd's", gap, "of the cost", 1e-9)
        target_speed = f"≥ {_FASTER:g}" if n == _FASTER_AT else ""
        faster = slow / seconds
        yield Row("  times faster than ot.emd", faster, "×", target_speed, faster >= _FASTER if target_speed else None)
    yield from _memory(memory, cost, n)
    placed = [part.to(device) for part in (cost, source, target)]
    entropic, seconds, memory = _solved("sinkhorn", *placed, SolverSettings(epsilon=_EPSILON))
    yield from _speed(f"{title}: sinkhorn, ε = {_EPSILON:g}", seconds, n, device)
    yield at_most("  cost beyond the exact one", entropic.cost / least - 1, "of the cost", 1e-3)
    yield from _memory(memory, cost, n)


def _solved(solver: str, *problem_and_settings: Any) -> tuple[TransportPlan, float, float | None]:
    (plan, seconds), memory = added_memory(lambda: timed(lambda: solve_transport(solver, *problem_and_settings)))
    return plan, seconds, memory


def _speed(name: str, seconds: float, n: int, device: str) -> Iterator[Row]:
    if n == _LIMIT_AT:
        yield at_most(name, seconds, "s", _SECONDS if device == "cpu" else _GPU_SECONDS)
    else:
        yield told(name, seconds, "s")


def _memory(added: float | None, cost: Tensor, n: int) -> Iterator[Row]:
    if added is None or n < _FASTER_AT:
        return
    copies = added / (cost.numel() * 8)
    yield Row("  memory it added, the plan included", copies, "float64 costs", "≤ 2.2", copies <= 2.2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exact and entropic transport beside ot.emd")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="channels (default: 1024 4096 14336)")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=list(COSTS))
    parser.add_argument("--device", default="cpu", help="of the entropic solver")
    parser.add_argument("--quick", action="store_true", help="a small problem")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(argv)
    found = shown(rows(args.sizes or (QUICK_SIZES if args.quick else SIZES), args.costs, args.device))
    write_json(found, args.output)
    return 0 if all(row.ok is not False for row in found) or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
