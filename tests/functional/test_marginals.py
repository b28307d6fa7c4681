"""Source and target distributions, mixtures and strategies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import rankdata

from optimum_otprune.errors import NumericalError, RegistryError, ShapeError
from optimum_otprune.functional import marginals
from optimum_otprune.functional.marginals import (
    MarginalInputs,
    Strategy,
    distributions,
    marginal,
    mixtures,
    register_strategy,
    strategies,
)
from tests.functional.helpers import law, normal, permutation, seeds, untouched

STATISTICS = ("mean", "max", "std", "p95", "consistency", "structural", "mutual_information", "share")


def inputs_of(scores, is_kept=None) -> MarginalInputs:
    """Inputs whose weight-level statistics are the scores, rotated by one more for each."""
    scores = torch.as_tensor(scores)
    kept = torch.arange(len(scores)) % 2 == 0 if is_kept is None else torch.as_tensor(is_kept)
    return MarginalInputs(scores, kept, {name: scores.roll(shift) for shift, name in enumerate(STATISTICS)})


def random_inputs(seed, size=9) -> MarginalInputs:
    return MarginalInputs(
        normal(seed, size),
        normal(seed + 1, size) > 0,
        {name: normal(seed + 2 + index, size) for index, name in enumerate(STATISTICS)},
    )


def assert_probability_vector(mass, size):
    assert mass.shape == (size,)
    assert mass.dtype == torch.float64
    assert torch.isfinite(mass).all()
    assert (mass >= 0).all()
    assert abs(float(mass.sum()) - 1) < 1e-12


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-3, 3, width=32),
    st.integers(-2, 2).map(float),
)


@pytest.mark.parametrize("name", distributions.names())
@law
@given(scores=st.lists(numbers, min_size=1, max_size=12), data=st.data())
def test_every_distribution_is_a_probability_vector_for_any_finite_scores(name, scores, data):
    is_kept = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    for dtype in (torch.float32, torch.float64):
        inputs = inputs_of(torch.tensor(scores, dtype=dtype), is_kept)
        assert_probability_vector(marginal(name, inputs), len(scores))


@pytest.mark.parametrize("name", distributions.names())
@pytest.mark.parametrize(
    "scores",
    [
        [-5.0, -1.0, -3.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0, 0.0],
        [1e150, -1e150, 1.0],
        [3e38, -3e38, 0.0],
        [1e-300, 0.0, 0.0],
    ],
)
def test_negative_constant_huge_and_tiny_scores_are_no_exception(name, scores):
    assert_probability_vector(marginal(name, inputs_of(torch.tensor(scores, dtype=torch.float64))), 3)


@pytest.mark.parametrize("name", distributions.names())
def test_bfloat16_scores_give_a_float64_probability_vector(name):
    inputs = inputs_of(normal(0, 9, dtype=torch.bfloat16))
    with untouched(inputs.importance, inputs.is_kept, *inputs.statistics.values()):
        mass = marginal(name, inputs)
    assert_probability_vector(mass, 9)
    assert mass.device == inputs.importance.device


@pytest.mark.parametrize("name", [name for name in distributions.names() if name != "radical"])
def test_constant_scores_spread_the_mass_evenly_or_by_place(name):
    mass = marginal(name, inputs_of([1.7] * 5))
    if name == "robust":  # of equal scores, the first ranks lowest
        assert (mass.diff() > 0).all()
    else:
        torch.testing.assert_close(mass, torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", distributions.names())
@law
@given(seed=seeds)
def test_permuting_channels_permutes_every_distribution(name, seed):
    inputs, order = random_inputs(seed), permutation(seed, 9)
    torch.testing.assert_close(
        marginal(name, inputs.select(order)), marginal(name, inputs)[order], rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", ["importance", "entropy_regularized", "adaptive", "robust"])
@law
@given(seed=seeds)
def test_a_more_important_channel_never_gets_less_mass(name, seed):
    inputs = random_inputs(seed)
    mass = marginal(name, inputs)[torch.argsort(inputs.importance)]
    assert (mass.diff() >= -1e-12).all()


@pytest.mark.parametrize("name", distributions.names())
@law
@given(seed=seeds)
def test_every_distribution_agrees_with_its_formula_in_numpy(name, seed):
    inputs = random_inputs(seed)
    scores = inputs.importance.numpy()
    statistic = {key: value.numpy() for key, value in inputs.statistics.items()}
    kept = inputs.is_kept.numpy()

    def to_unit(values):
        return (values - values.min()) / np.ptp(values)

    def moved(values):
        return values - values.min() + 1e-3 * np.ptp(values)

    standard = (scores - scores.mean()) / scores.std()
    first = softmax(standard)
    expected = {
        "uniform": lambda: np.ones(9),
        "importance": lambda: moved(scores),
        "weight_aware": lambda: moved(sum(to_unit(statistic[key]) for key in ("max", "std", "share"))),
        "max_preserving": lambda: softmax(statistic["max"]),
        "diversity_aware": lambda: moved(to_unit(statistic["std"]) + to_unit(statistic["share"])),
        "radical": lambda: np.where(kept, 9 / max(kept.sum(), 1) if kept.any() else 1.0, 1.0),
        "entropy_regularized": lambda: softmax(standard - 0.1 * first * np.log(first)),
        "adaptive": lambda: softmax(scores / (1 + scores.std())),
        "robust": lambda: softmax((rankdata(scores) - 1) / 8),
    }[name]()
    np.testing.assert_allclose(marginal(name, inputs), expected / expected.sum(), rtol=1e-9, atol=1e-14)


def test_mass_in_proportion_to_the_importance_by_hand():
    # moved by 2 + 4/1000: 0.004, 1.004, 4.004
    mass = marginal("importance", inputs_of([-2.0, -1.0, 2.0]))
    torch.testing.assert_close(mass, torch.tensor([0.004, 1.004, 4.004]).double() / 5.012, rtol=1e-6, atol=0)


def test_radical_gives_kept_channels_n_over_k_times_the_mass():
    mass = marginal("radical", inputs_of([1.0] * 6, [True, False, False, True, False, False]))
    torch.testing.assert_close(mass, torch.tensor([3.0, 1, 1, 3, 1, 1]).double() / 10, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kept", [True, False])
def test_radical_is_uniform_where_all_or_none_are_kept(kept):
    torch.testing.assert_close(marginal("radical", inputs_of([1.0, 5.0], [kept] * 2)), torch.full((2,), 0.5).double())


def test_robust_looks_at_the_order_only():
    plain, outlier = (marginal("robust", inputs_of(scores)) for scores in ([1.0, 2.0, 3.0], [-1e9, 2.0, 1e30]))
    torch.testing.assert_close(plain, outlier, rtol=0, atol=0)
    expected = torch.tensor([1.0, math.exp(0.5), math.e]).double()
    torch.testing.assert_close(plain, expected / expected.sum())


def test_adaptive_starves_fewer_channels_than_a_plain_softmax():
    scores = 100 * normal(0, 9)
    mass = marginal("adaptive", inputs_of(scores))
    assert mass.min() > torch.softmax(scores, dim=0).min()
    assert mass.min() > 1e-3


def test_selecting_channels_selects_everything():
    inputs = random_inputs(0)
    channels = torch.tensor([4, 1])
    selected = inputs.select(channels)
    assert torch.equal(selected.importance, inputs.importance[[4, 1]])
    assert torch.equal(selected.is_kept, inputs.is_kept[[4, 1]])
    assert all(torch.equal(selected.statistics[name], inputs.statistics[name][[4, 1]]) for name in STATISTICS)


@pytest.mark.parametrize(
    ("name", "missing"), [("weight_aware", "max"), ("max_preserving", "max"), ("diversity_aware", "std")]
)
def test_a_statistic_that_was_not_collected_is_named(name, missing):
    with pytest.raises(ShapeError, match=f"needs the weight-level statistic '{missing}', which was not collected"):
        marginal(name, MarginalInputs(torch.ones(3), torch.ones(3, dtype=torch.bool), {}))


def test_a_distribution_of_another_shape_is_refused():
    def short(inputs):
        return inputs.importance[1:]

    with pytest.raises(ShapeError, match=r"'short' returned shape \(4,\); want one number per channel"):
        marginal(short, inputs_of([1.0] * 5))


@pytest.mark.parametrize("masses", [[-0.1, 1.1], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]])
def test_masses_that_are_no_masses_are_refused(masses):
    def broken(inputs):
        return torch.tensor(masses)

    with pytest.raises(NumericalError, match="'broken' returned negative, NaN, infinite or only zero masses"):
        marginal(broken, inputs_of([1.0, 2.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in distributions.names() if name not in ("uniform", "radical")])
def test_scores_that_are_not_finite_are_refused(name, value):
    with pytest.raises(NumericalError, match="NaN|not finite"):
        marginal(name, inputs_of([1.0, value, 2.0]))


def test_an_unknown_distribution_suggests_the_nearest():
    with pytest.raises(RegistryError, match="Unknown distribution 'unifrom'. Did you mean 'uniform'"):
        marginal("unifrom", inputs_of([1.0]))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("comprehensive", dict.fromkeys(STATISTICS, 0.125)),
        ("conservative", {"max": 0.4, "consistency": 0.3, "p95": 0.3}),
        ("balanced", {"max": 0.4, "mean": 0.3, "structural": 0.3}),
        ("aggressive", {"mean": 0.3, "structural": 0.4, "mutual_information": 0.3}),
    ],
)
def test_every_mixture_is_the_weighted_sum_of_its_statistics(name, weights):
    statistics = dict(random_inputs(3).statistics)
    with untouched(*statistics.values()):
        got = mixtures[name](statistics)
    expected = [sum(weight * float(statistics[key][j]) for key, weight in weights.items()) for j in range(9)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert math.isclose(sum(weights.values()), 1)


def test_every_registered_mixture_is_tested_above():
    assert mixtures.names() == ["comprehensive", "conservative", "balanced", "aggressive"]


@pytest.mark.parametrize("name", mixtures.names())
def test_a_mixture_without_its_statistics_names_the_first_that_is_missing(name):
    with pytest.raises(ShapeError, match="Unknown weight-level statistic '(mean|max)'. .*Known: share"):
        mixtures[name]({"share": torch.ones(3)})


@pytest.mark.parametrize("name", list(strategies))
def test_every_strategy_names_registered_parts(name):
    strategy = strategies[name]
    assert strategy.statistics in mixtures
    assert strategy.source_distribution in distributions
    assert strategy.target_distribution in distributions


def test_a_strategy_of_ones_own_can_be_registered_once(monkeypatch):
    monkeypatch.setattr(marginals, "strategies", dict(strategies))
    mine = Strategy("balanced", "uniform", "robust")
    register_strategy("mine", mine)
    assert marginals.strategies["mine"] == mine
    assert "mine" not in strategies
    with pytest.raises(RegistryError, match="The strategy 'mine' is registered already. Choose another name"):
        register_strategy("mine", mine)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("balancd", "uniform", "robust"), "Unknown statistics 'balancd'. Did you mean 'balanced'"),
        (("balanced", "unifor", "robust"), "Unknown distribution 'unifor'"),
        (("balanced", "uniform", "robst"), "Unknown distribution 'robst'. Did you mean 'robust'"),
    ],
)
def test_a_strategy_of_unknown_parts_is_refused(parts, message):
    with pytest.raises(RegistryError, match=message):
        register_strategy("another", Strategy(*parts))
    assert "another" not in strategies
