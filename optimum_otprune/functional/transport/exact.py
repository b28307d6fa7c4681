"""Exact transport by few arcs: solve on promising ones, price all others, add those that would help, until none would.

Mass that can stay where it costs nothing is not solved for at first. This and the choice of arcs are guesses; the
potentials of the small problem prove over all arcs that the plan is the cheapest, or say which arcs were missing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import TransportError
from optimum_otprune.functional.transport.duality import c_transform
from optimum_otprune.functional.transport.pot import network_simplex, sparse_network_simplex

# Guesses. No number here changes the cost of the plan by more than `_GAP`, which the certificate sees to; rounds and
# times were measured on the problems of benchmarks/transport.py with 1,024 and 2,048 channels.
SPARSE_FROM = 2**18  # entries of the cost from which few arcs are faster than all
_FIRST = 6  # first arcs of a channel of average mass: 3 take a third more rounds, 12 make larger ones; none is faster
_FIRST_MOST = 160  # first arcs of any channel: 40 take a tenth more rounds, and 640 save none
# Times the arcs that a column wants. Where more of one column are cheap, they mostly cost the same, as with a uniform
# cost, and only so many are looked at: this bounds memory, and between 1 and 16 it makes no difference in rounds.
_CROWD = 4
_ADDED_PER_ROW = 4  # arcs that pricing adds: 1 takes a tenth more rounds, and 16 save next to none
_ADDED_PER_COLUMN = 4  # the same for columns
# Times the largest excess; arcs of larger reduced cost are dropped. A quarter of it takes more rounds (30 for 17), and
# keeping all arcs takes a third more time.
_DROPPED = 1.0
_CHUNK = 256  # rows that are copied at a time, which bounds memory: 29 MB at 14,336 channels
_SAMPLE = 512  # rows that tell which arcs of a column are cheap: 128 and 2,048 take as many rounds
_ROUNDS = 60  # at most 7 were needed; what is not proved by then is solved on all arcs

# Tolerances for float64, between its rounding (1e-16) and what matters. On those problems `_USABLE` and `_TIE` can be
# 1,000 times smaller or larger, and `_ROUNDING` 100 times, without a difference in rounds.
_GAP = 3e-10  # of the cost, that the certificate may leave open: rounding hides 3e-12 in hard problems
_ROUNDING = 1e-13  # of the largest cost; smaller differences are rounding
_USABLE = 1e-9  # of the largest cost; arcs of larger reduced cost are in no cheapest plan
_TIE = 1e-9  # share of a mass; masses that agree so far are equal, so that none of either is left over


class _Remainder(NamedTuple):
    """What is left to transport when some mass stays.

    Attributes:
        rows: The sources that keep mass, LongTensor `(k,)`.
        columns: The targets where this mass stays, LongTensor `(k,)`.
        masses: The masses that stay, `(k,)`: all that the source has or all that the target takes.
        source: The mass that each source has left to move, `(n,)`; exactly 0 where nothing is left.
        target: The mass that each target has left to take, `(m,)`; exactly 0 where nothing is left.
    """

    rows: Tensor
    columns: Tensor
    masses: Tensor
    source: Tensor
    target: Tensor


class _Solution(NamedTuple):
    """A plan and its potentials; wherever the plan sends mass, the two potentials add up to the cost.

    Attributes:
        rows: The source of each entry of the plan, LongTensor `(k,)`.
        columns: The target of each entry, LongTensor `(k,)`.
        masses: The mass that each entry moves, `(k,)`.
        source_potential: The potential u of each source, `(n,)`.
        target_potential: The potential v of each target, `(m,)`.
    """

    rows: Tensor
    columns: Tensor
    masses: Tensor
    source_potential: Tensor
    target_potential: Tensor


def exact_plan(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, iterations: int) -> Tensor:
    """Return the cheapest plan.

    From `SPARSE_FROM` entries of the cost on, few arcs are tried. All arcs are solved at once, which is as exact and
    slower on large problems, in three cases: below that size; where the network simplex gives up on few arcs, as it
    may for masses as small as the rounding of others; and where the potentials prove nothing after many rounds.

    Args:
        cost_matrix: The cost of each source and target, `(n, m)` float64, finite, on the CPU.
        source_marginal: The mass of each source, `(n,)` float64, non-negative.
        target_marginal: The mass of each target, `(m,)` float64, non-negative, with the same sum.
        iterations: The largest number of pivots of the network simplex.

    Returns:
        The plan `(n, m)`, as a sparse tensor where few arcs were enough.

    Raises:
        TransportError: If the network simplex gives up.
    """
    if cost_matrix.numel() >= SPARSE_FROM:
        # An arc that can carry no mass would leave its potential open.
        rows, columns = source_marginal.nonzero()[:, 0], target_marginal.nonzero()[:, 0]
        cost = cost_matrix if len(rows) == len(source_marginal) else cost_matrix[rows]
        cost = cost if len(columns) == len(target_marginal) else cost[:, columns]
        found = _FewArcs(cost, source_marginal[rows], target_marginal[columns], iterations).solve()
        if found is not None:
            ends = torch.stack([rows[found.rows], columns[found.columns]])
            plan = torch.sparse_coo_tensor(ends, found.masses, cost_matrix.shape, check_invariants=False)
            return plan.coalesce()
    return network_simplex(cost_matrix, source_marginal, target_marginal, iterations)


class _FewArcs:
    """A transport problem of positive masses, and the arcs that it is solved on; an arc is a source and a target."""

    def __init__(self, cost: Tensor, source: Tensor, target: Tensor, iterations: int) -> None:
        self.cost, self.source, self.target, self.iterations = cost.contiguous(), source, target, iterations
        self.n, self.m = cost.shape
        self.largest = max(abs(float(end)) for end in cost.aminmax())
        self.rounding = _ROUNDING * self.largest
        self.smallest_gap = torch.finfo(cost.dtype).eps * self.largest
        self.stays = torch.full((self.n,), -1)  # the column where mass of this row stays; LongTensor
        self.arcs = torch.empty(0, dtype=torch.long)  # row · m + column, sorted
        self.potentials = (torch.zeros_like(source), torch.zeros_like(target))

    def solve(self) -> _Solution | None:
        """Return the cheapest plan, or None if no plan could be proved to be the cheapest."""
        self._choose_arcs()
        last_gap, exact = torch.inf, False
        for _ in range(_ROUNDS):
            remainder = self._remainder()
            try:
                solution = self._solve_arcs(remainder, exact)
            except TransportError:  # few arcs may not carry masses that are as small as the rounding of others
                return None
            self.potentials = solution.source_potential, solution.target_potential
            missing, gap, excess = self._price(solution)
            value = float(self._costs(solution.rows, solution.columns) @ solution.masses)
            if gap <= max(_GAP * value, self.smallest_gap):
                return solution
            missing = missing[~torch.isin(missing, self.arcs)]
            if exact and not len(missing):
                return None
            exact = not len(missing)
            if gap < last_gap / 2 and not exact:
                self._drop(solution, _DROPPED * excess)
            if len(missing):
                self._add(missing, remainder)
            last_gap = gap
        return None

    def _drop(self, solution: _Solution, largest: float) -> None:
        """Remove arcs of larger reduced cost that carry nothing; pricing finds those again that are needed."""
        rows, columns = self.arcs // self.m, self.arcs % self.m
        reduced = self._costs(rows, columns) - solution.source_potential[rows] - solution.target_potential[columns]
        carrying = solution.rows * self.m + solution.columns
        self.arcs = torch.unique(torch.cat([self.arcs[reduced <= largest], carrying]))

    def _costs(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.cost.view(-1)[rows * self.m + columns]

    def _choose_arcs(self) -> None:
        """Choose the cheapest arcs of every row and column with mass left, and arcs that can carry all mass."""
        nearest = self.cost.argmin(dim=1, keepdim=True)
        least = self.cost.gather(1, nearest)[:, 0]
        free = (least.abs() <= self.rounding).nonzero()[:, 0]
        partner = torch.full((self.m,), -1)
        partner[nearest[free, 0].flip(0)] = free.flip(0)  # if several could stay in one place, one of them does
        columns = (partner >= 0).nonzero()[:, 0]
        rows = partner[columns]
        differ = (self.source[rows] - self.target[columns]).abs() > _TIE * self.target[columns]
        self.stays[rows[differ]] = columns[differ]
        self.potentials = (least, torch.zeros_like(self.target))
        remainder = self._remainder()
        self.arcs = torch.unique(torch.cat([self._carrying(remainder), *self._cheapest(remainder)]))

    def _cheapest(self, remainder: _Remainder) -> list[Tensor]:
        """Return the cheapest arcs of each row and column with mass left; a column's are sought below a cost."""
        rows, columns = remainder.source.nonzero()[:, 0], remainder.target.nonzero()[:, 0]
        left, right = remainder.source[rows], remainder.target[columns]
        wanted = torch.zeros(self.m, dtype=torch.long)
        wanted[columns] = _count(right, left.mean(), len(rows))
        limits = self._column_limits(rows, wanted)
        arcs, below = [], []
        counts, order = _count(left, right.mean(), self.m).sort(descending=True)
        for some, count in zip(torch.split(rows[order], _CHUNK), torch.split(counts, _CHUNK)):
            part = self.cost[some]
            best = part.topk(int(count.max()), dim=1, largest=False).indices
            promising = torch.arange(best.shape[1]) < count[:, None]
            arcs.append((some[:, None] * self.m + best)[promising])
            below += self._below(part, some, limits, wanted)
        candidates = torch.cat(below)
        candidates = candidates[self.cost.view(-1)[candidates].argsort(stable=True)]
        column, order = (candidates % self.m).sort(stable=True)  # within a column the cheapest first
        number = torch.bincount(column, minlength=self.m)
        rank = torch.arange(len(column)) - (number.cumsum(0) - number)[column]
        return [*arcs, candidates[order][rank < wanted[column]]]

    def _below(self, part: Tensor, rows: Tensor, limits: Tensor, wanted: Tensor) -> list[Tensor]:
        """Return arcs of some rows that cost at most the limit of their column; of many with one cost, a few."""
        close = part <= limits
        arcs = []
        if close.count_nonzero() > _CROWD * wanted.sum():
            crowded = (close.sum(dim=0) > _CROWD * wanted).nonzero()[:, 0]
            close[:, crowded] = False
            cheapest = part[:, crowded].topk(min(_CROWD * _FIRST, len(rows)), dim=0, largest=False).indices
            arcs.append((rows[cheapest] * self.m + crowded).flatten())
        index, column = close.nonzero().T
        return [*arcs, rows[index] * self.m + column]

    def _column_limits(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """Return costs below which columns have about twice the arcs that are wanted, judged by a sample of rows."""
        sample = rows[:: max(1, len(rows) // _SAMPLE)]
        ranks = (2 * wanted * len(sample) / len(rows)).ceil().long().clamp(0, len(sample))
        sorted_costs = self.cost[sample].T.contiguous().topk(int(ranks.max()), dim=1, largest=False).values
        limits = sorted_costs.gather(1, (ranks - 1).clamp_min(0)[:, None])[:, 0]
        return torch.where(ranks > 0, limits, -torch.inf)

    def _carrying(self, remainder: _Remainder) -> Tensor:
        """Return arcs that can carry the remainder: sources fill targets in order, each where the last one stopped."""
        rows, columns = remainder.source.nonzero()[:, 0], remainder.target.nonzero()[:, 0]
        given, taken = remainder.source[rows].cumsum(0), remainder.target[columns].cumsum(0)
        last_column = torch.searchsorted(taken, given).clamp_max(len(columns) - 1)  # that this row reaches
        last_row = torch.searchsorted(given, taken).clamp_max(len(rows) - 1)  # that this column takes from
        pairs = (
            (rows, columns[last_column]),
            (rows[1:], columns[last_column[:-1]]),
            (rows[last_row], columns),
            (rows[last_row[:-1]], columns[1:]),
        )
        return torch.cat([row * self.m + column for row, column in pairs])

    def _remainder(self) -> _Remainder:
        """Return what is left to transport when the mass in `stays` stays."""
        rows = (self.stays >= 0).nonzero()[:, 0]
        columns = self.stays[rows]
        masses = torch.minimum(self.source[rows], self.target[columns])
        source, target = self.source.clone(), self.target.clone()
        whole = source[rows] == masses
        source[rows] = torch.where(whole, 0.0, source[rows] - masses)
        target[columns] = torch.where(whole, target[columns] - masses, 0.0)
        return _Remainder(rows, columns, masses, source, target)

    def _solve_arcs(self, remainder: _Remainder, exact: bool) -> _Solution:
        """Solve the remainder on the chosen arcs, with costs from which the last potentials are subtracted.

        That is a good start. The rounding error of the network simplex's potentials grows with its largest cost and
        with the number of channels. If `exact`, it is given only the arcs that a cheapest plan can use, whose costs
        are next to nothing.
        """
        u, v = (potential.clone() for potential in self.potentials)
        rows, columns = remainder.source.nonzero()[:, 0], remainder.target.nonzero()[:, 0]
        row_number, column_number = torch.full((self.n,), -1), torch.full((self.m,), -1)
        row_number[rows], column_number[columns] = torch.arange(len(rows)), torch.arange(len(columns))
        first, second = row_number[self.arcs // self.m], column_number[self.arcs % self.m]
        usable = (first >= 0) & (second >= 0)
        costs = self._costs(self.arcs // self.m, self.arcs % self.m) - u[self.arcs // self.m] - v[self.arcs % self.m]
        if exact:
            usable &= costs <= _USABLE * self.largest
        plan = sparse_network_simplex(
            first[usable],
            second[usable],
            costs[usable],
            remainder.source[rows],
            remainder.target[columns],
            self.iterations,
        )
        u[rows] += plan.source_potential
        v[columns] += plan.target_potential
        whole = remainder.source[remainder.rows] == 0
        costs = self._costs(remainder.rows, remainder.columns)
        v[remainder.columns[~whole]] = (costs - u[remainder.rows])[~whole]
        u[remainder.rows[whole]] = (costs - v[remainder.columns])[whole]
        return _Solution(
            torch.cat([rows[plan.rows], remainder.rows]),
            torch.cat([columns[plan.columns], remainder.columns]),
            torch.cat([plan.masses, remainder.masses]),
            u,
            v,
        )

    def _price(self, solution: _Solution) -> tuple[Tensor, float, float]:
        """Compute the reduced costs of all arcs.

        Returns:
            Arcs of negative reduced cost, some of every row and column; how much cheaper than the plan another one can
            be at most; and the largest amount by which a reduced cost is negative.
        """
        u, v = solution.source_potential, solution.target_potential
        excess = u - c_transform(self.cost, v)
        gap = float(excess.clamp_min(0) @ self.source)
        wanting = (excess > self.rounding).nonzero()[:, 0]
        arcs = []
        for rows in torch.split(wanting, _CHUNK) if len(wanting) else ():
            reduced = self.cost[rows].sub_(v).sub_(u[rows, None])
            least, columns = reduced.topk(min(_ADDED_PER_ROW, self.m), dim=1, largest=False)
            arcs.append((rows[:, None] * self.m + columns)[least < -self.rounding])
            wanted = (reduced.amin(dim=0) < -self.rounding).nonzero()[:, 0]
            part = reduced if len(wanted) == self.m else reduced[:, wanted]
            least, index = part.topk(min(_ADDED_PER_COLUMN, len(rows)), dim=0, largest=False)
            arcs.append((rows[index] * self.m + wanted)[least < -self.rounding])
        return torch.unique(torch.cat(arcs)) if arcs else wanting, gap, float(excess.max())

    def _add(self, missing: Tensor, remainder: _Remainder) -> None:
        """Add missing arcs; mass that stays at one of their ends is solved for from now on."""
        rows, columns = missing // self.m, missing % self.m
        resident = torch.full((self.m,), -1)
        resident[remainder.columns] = remainder.rows
        moved = torch.cat([rows[remainder.source[rows] == 0], resident[columns[remainder.target[columns] == 0]]])
        moved = torch.unique(moved)
        self.arcs = torch.unique(torch.cat([self.arcs, missing, moved * self.m + self.stays[moved]]))
        self.stays[moved] = -1


def _count(masses: Tensor, other: Tensor, most: int) -> Tensor:
    """Return how many arcs each channel gets at first: more for one whose mass fills many of the other side."""
    return (_FIRST * (1 + masses / other)).clamp_max(min(_FIRST_MOST, most)).ceil().long()
