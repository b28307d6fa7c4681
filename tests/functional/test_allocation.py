"""A budget of channels is shared out where removals cost least."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.functional.allocation import allocate_widths


def total(removal_costs, widths) -> float:
    return sum(float(costs[: len(costs) - width].sum()) for costs, width in zip(removal_costs, widths))


@settings(max_examples=60, deadline=None)
@given(
    curves=st.lists(st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4).map(sorted), min_size=2, max_size=3),
    spare=st.integers(0, 9),
)
def test_of_convex_curves_no_other_widths_cost_less(curves, spare):
    costs = [torch.tensor(curve, dtype=torch.float64) for curve in curves]
    kept_total = min(len(costs) + spare, 4 * len(costs))
    widths = allocate_widths(costs, kept_total)
    assert sum(widths) == kept_total
    others = [choice for choice in product(range(1, 5), repeat=len(costs)) if sum(choice) == kept_total]
    assert total(costs, widths) <= min(total(costs, choice) for choice in others) + 1e-9


def test_a_cheap_removal_behind_a_dear_one_does_not_count_as_cheap():
    hidden, plain = torch.tensor([9.0, 0.0, 0.0, 9.0]), torch.tensor([2.0, 2.0, 2.0, 9.0])
    assert allocate_widths([hidden, plain], kept_total=6) == [4, 2]


def test_widths_are_multiples_and_the_budget_is_never_exceeded():
    cheap, dear = torch.full((10,), 1.0), torch.full((10,), 5.0)
    assert allocate_widths([cheap, dear], kept_total=15, multiple_of=4) == [4, 10]
    assert allocate_widths([cheap, dear], kept_total=13, multiple_of=4) == [4, 8]
    assert allocate_widths([cheap, dear], kept_total=20, multiple_of=4) == [10, 10]


def test_layers_of_different_widths_share_one_budget():
    assert allocate_widths([torch.full((4,), 3.0), torch.full((8,), 1.0)], kept_total=8) == [4, 4]


def test_permuting_layers_permutes_their_widths():
    costs = [torch.rand(6, generator=torch.Generator().manual_seed(seed)).sort().values for seed in range(3)]
    widths = allocate_widths(costs, kept_total=9)
    assert allocate_widths(costs[::-1], kept_total=9) == widths[::-1]


def test_a_budget_below_one_multiple_a_layer_is_refused():
    with pytest.raises(ConfigurationError, match="7 channels are too few for 2 layers that keep at least 4 each"):
        allocate_widths([torch.ones(8), torch.ones(8)], kept_total=7, multiple_of=4)
