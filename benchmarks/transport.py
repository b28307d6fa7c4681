"""Transport from n channels to n / 2: time and cost of the solvers beside `ot.emd` on all arcs, in one run.

    python benchmarks/transport.py --sizes 1024 4096 14336 --output benchmarks/results/transport.json

Exact transport shall cost the same (1e-9) in a tenth of the time at n = 4096, Sinkhorn at most 0.1 % more, and at
n = 14336 neither may need a minute or more than two float64 copies of the cost, the given one included. Where `ot.emd`
is not run, a plan is compared with what no plan can cost less than (`duality.lower_bound`). Targets are for the costs
and marginals of pruning; clusters and log-normal marginals are harder, and reported beside them.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ot
import torch
from _rows import Row, shown, write_json
from _transport_problems import COSTS, MARGINALS, PRUNING_COSTS, PRUNING_MARGINALS, Problem, make_problem

from optimum_otprune.functional.solvers import solve_transport
from optimum_otprune.functional.transport.duality import lower_bound
from optimum_otprune.functional.transport.plans import SolverSettings, TransportPlan, median_cost
from optimum_otprune.functional.transport.sinkhorn import entropic_plan

_SAME_COST, _FASTER, _GAP, _COPIES = 1e-9, 10.0, 1e-3, 2.1
_SECONDS = {"cpu": 60.0, "cuda": 2.0}
_FASTER_AT, _LARGE = 4096, 8192  # n from which these targets hold
_SIZES = [1024, 4096, 14336]
_PIVOTS = 100_000_000


def at_most(name: str, value: float, unit: str, limit: float | None) -> Row:
    target = "" if limit is None else f"≤ {limit:g}"
    return Row(name, value, unit, target, None if limit is None else value <= limit)


def at_least(name: str, value: float, unit: str, limit: float | None) -> Row:
    target = "" if limit is None else f"≥ {limit:g}"
    return Row(name, value, unit, target, None if limit is None else value >= limit)


class _Memory:
    """The most resident memory beyond what there was at the start, sampled; None where the system does not tell."""

    def __enter__(self) -> "_Memory":
        self.file = Path("/proc/self/statm")
        self.start = self.peak = self._resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def _resident(self) -> int:
        return int(self.file.read_text().split()[1]) * 4096 if self.file.exists() else 0

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, self._resident())

    @property
    def added(self) -> int | None:
        return self.peak - self.start if self.start else None


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return the last result, and the median of the times."""
    times = []
    result = None
    for _ in range(repeats):
        result = None  # frees the last plan
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def measure(cost: str, marginals: str, n: int, args: argparse.Namespace) -> list[Row]:
    """Return the figures of one problem."""
    problem = make_problem(cost, marginals, n)
    label = f"{cost}, {marginals}, n = {n}"
    asked = cost in PRUNING_COSTS and marginals in PRUNING_MARGINALS
    rows, best = [], None
    if "emd" in args.solvers:
        exact, seconds, copies = _solve("emd", problem, args)
        best = exact.cost
        rows.append(at_most(f"exact, seconds: {label}", seconds, "s", _SECONDS["cpu"] if asked else None))
        rows += _copies(f"exact, copies: {label}", copies, n)
        del exact
        if n <= args.rival_up_to:
            rival, rival_seconds = timed(lambda: _rival(problem), args.rival_repeats)
            rows.append(at_most(f"exact, cost beside ot.emd: {label}", abs(best / rival - 1), "", _SAME_COST))
            limit = _FASTER if asked and n >= _FASTER_AT else None
            rows.append(at_least(f"exact, speed-up over ot.emd: {label}", rival_seconds / seconds, "×", limit))
    if "sinkhorn" in args.solvers:
        rows += _sinkhorn(problem, label, best, asked, args)
    return rows


def _rival(problem: Problem) -> float:
    _, log = ot.emd(*(part.numpy() for part in (problem.source, problem.target, problem.cost)), _PIVOTS, log=True)
    return float(log["cost"])


def _solve(name: str, problem: Problem, args: argparse.Namespace) -> tuple[TransportPlan, float, float | None]:
    settings = SolverSettings(epsilon=args.epsilon)
    with _Memory() as memory:
        plan, seconds = timed(lambda: solve_transport(name, *problem, settings), args.repeats)
    added = memory.added
    return plan, seconds, None if added is None else 1 + added / problem.cost.numel() / 8


def _copies(name: str, copies: float | None, n: int) -> list[Row]:
    return [] if copies is None or n < _LARGE else [at_most(name, copies, "float64 copies of the cost", _COPIES)]


def _sinkhorn(problem: Problem, label: str, best: float | None, asked: bool, args: argparse.Namespace) -> list[Row]:
    problem = Problem(*(part.to(args.device) for part in problem))
    plan, seconds, copies = _solve("sinkhorn", problem, args)
    value = plan.cost
    del plan
    if best is None:
        found = entropic_plan(*problem, args.epsilon * median_cost(problem.cost))
        best = lower_bound(problem.cost, problem.source, problem.target, found.target_potential)
    limit = _GAP if asked else None
    rows = [
        at_most(f"sinkhorn, seconds: {label}", seconds, "s", _SECONDS[args.device] if asked else None),
        at_most(f"sinkhorn, gap to the least cost: {label}", value / best - 1, "", limit),
    ]
    return rows + (_copies(f"sinkhorn, copies: {label}", copies, len(problem.source)) if args.device == "cpu" else [])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=_SIZES, help="channels n, to n / 2")
    parser.add_argument("--costs", nargs="+", default=list(COSTS), choices=COSTS)
    parser.add_argument("--marginals", nargs="+", default=list(MARGINALS), choices=MARGINALS)
    parser.add_argument("--solvers", nargs="+", default=["emd", "sinkhorn"], choices=["emd", "sinkhorn"])
    parser.add_argument("--epsilon", type=float, default=5e-4, help="of sinkhorn, times the median cost")
    parser.add_argument("--repeats", type=int, default=3, help="of the package's solvers; medians are printed")
    parser.add_argument("--rival-repeats", type=int, default=3, help="of ot.emd")
    parser.add_argument("--rival-up-to", type=int, default=4096, help="largest n that ot.emd is run for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of sinkhorn")
    parser.add_argument("--quick", action="store_true", help="one small problem of each cost of pruning, in seconds")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.rival_repeats, args.marginals = 1, 1, ["importance"]
        args.sizes = [512] if args.sizes == _SIZES else args.sizes
        args.costs = list(PRUNING_COSTS) if args.costs == list(COSTS) else args.costs
    return args


def rows(sizes: Sequence[int] | None = None, quick: bool = False) -> Iterator[Row]:
    """The figures with a target, as soon as they are there: of the costs and marginals of pruning."""
    given = ["--threads", str(torch.get_num_threads()), "--costs", *PRUNING_COSTS, "--marginals", *PRUNING_MARGINALS]
    args = arguments([*given, "--sizes", *map(str, sizes or _SIZES), *(["--quick"] if quick else [])])
    yield from _all_rows(args)


def _all_rows(args: argparse.Namespace) -> Iterator[Row]:
    for n in args.sizes:
        for cost in args.costs:
            for marginals in args.marginals:
                yield from measure(cost, marginals, n, args)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    found = shown(_all_rows(args))
    write_json(found, args.output)
    return found


if __name__ == "__main__":
    main()
