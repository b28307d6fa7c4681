"""Importance of channels, and the statistics of their weight scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import NumericalError, RegistryError, ShapeError
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.importance import (
    ChannelStatistics,
    WeightScores,
    aggregate,
    channel_importance,
    combined_statistics,
    importances,
    standardize,
    weight_level_statistics,
)
from tests.functional.helpers import law, make_ffn, normal, permutation, random_numbers, seeds, untouched

silu = torch.nn.functional.silu
DETERMINISTIC = [name for name in importances.names() if name != "random"]
INVARIANT = ["wanda", "fluctuation", "snip", "fo", "fo_snip"]


def gradient_scores(weights: FFNWeights, loss) -> WeightScores:
    """Weight × gradient of a loss of the layer."""
    leaves = weights.map(lambda tensor: tensor.clone().requires_grad_())
    loss(leaves).backward()
    scores = leaves.map(lambda tensor: (tensor * tensor.grad).detach())
    return WeightScores(scores.up, scores.down.T, scores.gate)


def statistics_of(weights: FFNWeights, seed: int, aggregation: str = "absolute") -> ChannelStatistics:
    """What a calibration pass over random inputs would collect."""
    inputs = normal(seed + 10, 30, weights.hidden_size)
    targets = normal(seed + 11, 30, weights.hidden_size)
    hidden = channel_activations(weights, inputs, silu)
    return ChannelStatistics(
        weights=weights,
        hidden_mean=hidden.mean(dim=0),
        hidden_second_moment=hidden.square().mean(dim=0),
        num_tokens=30,
        snip=gradient_scores(weights, lambda leaves: (ffn_forward(leaves, inputs, silu) - targets).square().mean()),
        fo=gradient_scores(weights, lambda leaves: torch.linalg.svdvals(ffn_forward(leaves, inputs, silu)).mean()),
        aggregation=aggregation,
        generator=random_numbers(seed),
    )


def tensors_of(statistics: ChannelStatistics) -> list:
    moments = [statistics.hidden_mean, statistics.hidden_second_moment]
    return [*statistics.weights, *moments, *statistics.snip, *statistics.fo]


# By hand: two channels, hidden size 2


@pytest.fixture
def two_channels() -> ChannelStatistics:
    weights = FFNWeights(
        up=torch.tensor([[1.0, -2.0], [0.0, 3.0]]),
        down=torch.tensor([[1.0, -2.0], [2.0, 0.0]]),
        gate=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
    )
    scores = WeightScores(
        up=torch.tensor([[1.0, -1.0], [2.0, 2.0]]),
        down=torch.tensor([[0.0, 3.0], [-1.0, 0.0]]),
        gate=torch.tensor([[-4.0, 0.0], [1.0, 1.0]]),
    )
    return ChannelStatistics(
        weights, torch.tensor([1.0, 3.0]), torch.tensor([4.0, 9.0]), 10, snip=scores, fo=scores._replace(gate=None)
    )


@pytest.mark.parametrize(
    ("name", "aggregation", "expected"),
    [
        ("magnitude", "absolute", [3 + 3 + 2, 3 + 2 + 2]),
        ("magnitude", "signed", [-1 + 3 + 2, 3 - 2 - 2]),
        ("wanda", "absolute", [3 * 2, 2 * 3]),
        ("fluctuation", "absolute", [5 * 3, 4 * 0]),
        ("snip", "absolute", [2 + 3 + 4, 4 + 1 + 2]),
        ("snip", "signed", [0 + 3 - 4, 4 - 1 + 2]),
        ("fo", "absolute", [5, 5]),
        ("fo", "signed", [3, 3]),
        ("fo_snip", "absolute", [0 + 1, 0 - 1]),
        ("fo_snip", "signed", [0 - 1, 0 + 1]),
    ],
)
def test_every_importance_by_hand(two_channels, name, aggregation, expected):
    got = channel_importance(name, two_channels._replace(aggregation=aggregation))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype))


def test_random_importance_repeats_with_its_generator_and_differs_without():
    weights = make_ffn()
    draws = [
        channel_importance("random", ChannelStatistics(weights, generator=random_numbers(seed))) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert ((draws[0] >= 0) & (draws[0] < 1)).all()


def test_fluctuation_is_the_loss_when_the_mean_stands_in_for_a_channel():
    weights, inputs = make_ffn(), normal(1, 40, 5)
    hidden = channel_activations(weights, inputs, silu)
    moments = ChannelStatistics(weights, hidden.mean(dim=0), hidden.square().mean(dim=0), 40)
    expected = []
    for j in range(12):
        replaced = hidden.clone()
        replaced[:, j] = hidden[:, j].mean()
        expected.append(((hidden - replaced) @ weights.down.T).square().sum(dim=1).mean())
    got = channel_importance("fluctuation", moments).double()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_a_constant_channel_does_not_fluctuate_even_when_rounding_says_so():
    mean = torch.full((12,), 0.1)
    statistics = ChannelStatistics(make_ffn(), mean, mean.square() * (1 - 1e-7))
    assert torch.equal(channel_importance("fluctuation", statistics), torch.zeros(12))


# Laws over every registered importance


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("aggregation", ["absolute", "signed"])
@pytest.mark.parametrize("name", importances.names())
def test_every_importance_gives_one_finite_score_per_channel_and_changes_nothing(name, aggregation, gated):
    statistics = statistics_of(make_ffn(gated=gated), 0, aggregation)
    with untouched(*tensors_of(statistics)):
        importance = channel_importance(name, statistics)
    assert importance.shape == (12,)
    assert importance.is_floating_point()
    assert torch.isfinite(importance).all()
    assert importance.device == statistics.weights.up.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_low_precision_is_summed_in_float32_at_least(name, dtype):
    exact = statistics_of(make_ffn(), 0)
    weights = exact.weights.map(lambda tensor: tensor.to(dtype))
    low = exact._replace(
        weights=weights,
        hidden_mean=exact.hidden_mean.float(),
        hidden_second_moment=exact.hidden_second_moment.float(),
        snip=WeightScores(*(part.to(dtype) for part in exact.snip)),
        fo=WeightScores(*(part.to(dtype) for part in exact.fo)),
    )
    got, expected = channel_importance(name, low).double(), channel_importance(name, exact).double()
    assert channel_importance(name, low).dtype in (torch.float32, torch.float64)
    assert (got - expected).norm() / expected.norm() < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("aggregation", ["absolute", "signed"])
@pytest.mark.parametrize("name", DETERMINISTIC)
@law
@given(seed=seeds)
def test_permuting_channels_permutes_every_importance(name, aggregation, seed):
    weights, order = make_ffn(seed), permutation(seed, 12)
    plain = channel_importance(name, statistics_of(weights, seed, aggregation))
    permuted = channel_importance(name, statistics_of(weights.select(order), seed, aggregation))
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-5)


def scaled(weights: FFNWeights, scale: torch.Tensor) -> FFNWeights:
    """The same layer with the channels' up rows scaled, and their down columns inversely."""
    return weights._replace(up=weights.up * scale[:, None], down=weights.down / scale)


@pytest.mark.parametrize("name", INVARIANT)
@law
@given(seed=seeds, exponents=st.lists(st.floats(-2, 2), min_size=12, max_size=12))
def test_scaling_up_and_inversely_down_changes_no_invariant_importance(name, seed, exponents):
    weights = make_ffn(seed)
    other = scaled(weights, torch.tensor([10.0**exponent for exponent in exponents], dtype=torch.float64))
    before, after = (channel_importance(name, statistics_of(each, seed)) for each in (weights, other))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_magnitude_is_not_invariant_to_scaling():
    weights = make_ffn()
    other = scaled(weights, torch.linspace(0.1, 10.0, 12).double())
    before, after = (channel_importance("magnitude", ChannelStatistics(each)) for each in (weights, other))
    assert not torch.allclose(before, after, rtol=0.1)


# Standardization


@law
@given(seed=seeds, shift=st.floats(-10, 10), scale=st.floats(0.01, 100))
def test_standardized_scores_have_zero_mean_unit_variance_and_forget_shift_and_scale(seed, shift, scale):
    scores = normal(seed, 9)
    standard = standardize(scores * scale + shift)
    assert abs(float(standard.mean())) < 1e-9
    assert abs(float(standard.std(correction=0)) - 1) < 1e-9
    torch.testing.assert_close(standard, standardize(scores), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(standardize(scores), (scores - np.mean(scores.numpy())) / np.std(scores.numpy()))


@law
@given(value=st.floats(-1e4, 1e4, width=32), size=st.integers(1, 50))
def test_standardized_constants_are_zeros(value, size):
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(standardize(torch.full((size,), value, dtype=dtype)), torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_standardization_neither_underflows_nor_overflows_in_float32(scale):
    scores = torch.tensor([1.0, 3.0, 8.0])
    torch.testing.assert_close(standardize(scores * scale), standardize(scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_standardization_works_in_float32_at_least(dtype, expected):
    scores = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    with untouched(scores):
        assert standardize(scores).dtype == expected


# Aggregation


@law
@given(seed=seeds, gated=st.booleans(), aggregation=st.sampled_from(["absolute", "signed"]))
def test_aggregation_agrees_with_a_loop(seed, gated, aggregation):
    scores = WeightScores(normal(seed, 4, 3), normal(seed + 1, 4, 3), normal(seed + 2, 4, 3) if gated else None)
    expected = [0.0] * 4
    for matrix in scores.matrices():
        for j in range(4):
            expected[j] += sum(abs(v) if aggregation == "absolute" else v for v in matrix[j].tolist())
    torch.testing.assert_close(aggregate(scores, aggregation), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_signed_aggregation_cancels_and_absolute_aggregation_does_not():
    scores = WeightScores(torch.tensor([[5.0, -5.0]]), torch.tensor([[1.0, -1.0]]))
    assert aggregate(scores, "signed").tolist() == [0.0]
    assert aggregate(scores, "absolute").tolist() == [12.0]


# Errors


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("wanda", "hidden_second_moment"),
        ("fluctuation", "hidden_second_moment"),
        ("fluctuation", "hidden_mean"),
        ("snip", "snip"),
        ("fo", "fo"),
        ("fo_snip", "fo"),
        ("fo_snip", "snip"),
    ],
)
def test_a_statistic_that_was_not_collected_is_named(name, field):
    statistics = statistics_of(make_ffn(), 0)._replace(**{field: None})
    with pytest.raises(ShapeError, match=f"needs `{field}`, which this calibration pass did not collect"):
        channel_importance(name, statistics)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.ones(11), r"shape \(11,\)"),
        (torch.ones(12, 1), r"shape \(12, 1\)"),
        ([1.0] * 12, "a list"),
        (None, "a NoneType"),
        (torch.ones(12, dtype=torch.complex64), "a tensor that is complex"),
        (torch.ones(12).to_sparse(), "a tensor that is not dense"),
    ],
)
def test_an_importance_of_another_shape_is_refused(result, got):
    def mine(statistics):
        return result

    with pytest.raises(ShapeError, match=rf"'mine' returned {got}; want one score per channel, shape \(12,\)"):
        channel_importance(mine, ChannelStatistics(make_ffn()))


def test_an_importance_that_is_not_finite_counts_the_channels():
    def broken(statistics):
        return torch.tensor([float("nan"), float("inf")] + [1.0] * 10)

    with pytest.raises(NumericalError, match="'broken' is NaN or infinite for 2 of 12 channels"):
        channel_importance(broken, ChannelStatistics(make_ffn()))


@pytest.mark.parametrize("name", ["snip", "fo", "fo_snip"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_score_that_is_not_finite_is_not_hidden(name, value):
    statistics = statistics_of(make_ffn(), 0)
    statistics.snip.up[3, 1] = statistics.fo.up[3, 1] = value
    with pytest.raises(NumericalError, match=f"'{name}' is NaN or infinite"):
        channel_importance(name, statistics)


def test_an_unknown_importance_suggests_the_nearest():
    with pytest.raises(RegistryError, match="Unknown importance 'wandaa'. Did you mean 'wanda'"):
        channel_importance("wandaa", ChannelStatistics(make_ffn()))


# Weight-level statistics


def test_weight_level_statistics_by_hand():
    scores = WeightScores(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 4.0]]))
    got = weight_level_statistics(scores)
    # channel 0: 1 2 3 2, matrix sums 3 and 5; channel 1: 0 0 0 4, sums 0 and 4; all: mean 1.5, std 1.414
    expected = {
        "mean": [2.0, 1.0],
        "max": [3.0, 4.0],
        "std": [math.sqrt(0.5), math.sqrt(3.0)],
        "p95": [2.85, 3.4],
        "consistency": [-1.0, -2.0],
        "share": [0.25, 0.25],
    }
    for name, values in expected.items():
        torch.testing.assert_close(got[name], torch.tensor(values), msg=name)
    torch.testing.assert_close(got["structural"][1], torch.tensor(4.0))
    torch.testing.assert_close(got["mutual_information"], torch.zeros(2), rtol=0, atol=1e-6)


@law
@given(seed=seeds, gated=st.booleans())
def test_weight_level_statistics_agree_with_numpy(seed, gated):
    scores = WeightScores(normal(seed, 6, 5), normal(seed + 1, 6, 5), normal(seed + 2, 6, 5) if gated else None)
    with untouched(*scores):
        got = weight_level_statistics(scores)
    blocks = [np.stack([matrix[j].numpy() for matrix in scores.matrices()]) for j in range(6)]
    flat = np.stack([block.ravel() for block in blocks])
    correlation = np.abs(np.corrcoef(flat))
    expected = {
        "mean": flat.mean(axis=1),
        "max": flat.max(axis=1),
        "std": flat.std(axis=1),
        "p95": np.percentile(flat, 95, axis=1),
        "consistency": [-np.std(block.sum(axis=1)) for block in blocks],
        "structural": [np.linalg.svd(block)[1][0] for block in blocks],
        "mutual_information": (correlation.sum(axis=1) - 1) / 5,
        "share": (flat > flat.mean() + flat.std()).mean(axis=1),
    }
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@law
@given(seed=seeds)
def test_permuting_channels_permutes_weight_level_statistics(seed):
    scores, order = WeightScores(normal(seed, 6, 5), normal(seed + 1, 6, 5)), permutation(seed, 6)
    plain = weight_level_statistics(scores)
    permuted = weight_level_statistics(WeightScores(scores.up[order], scores.down[order]))
    for name, values in plain.items():
        torch.testing.assert_close(permuted[name], values[order], rtol=1e-4, atol=1e-5)


def test_channels_without_any_score_and_a_single_channel_have_finite_statistics():
    for scores in (
        WeightScores(torch.zeros(3, 2), torch.zeros(3, 2)),
        WeightScores(torch.ones(1, 2), torch.ones(1, 2)),
    ):
        for name, values in weight_level_statistics(scores).items():
            assert torch.isfinite(values).all(), name


def test_combined_statistics_add_the_standardized_statistics_of_both_scores():
    first, second = (WeightScores(normal(seed, 6, 5), normal(seed + 1, 6, 5)) for seed in (1, 3))
    combined = combined_statistics(first, second)
    of_first, of_second = weight_level_statistics(first), weight_level_statistics(second)
    assert combined.keys() == of_first.keys()
    for name, values in combined.items():
        expected = sum((part - part.mean()) / part.std(correction=0) for part in (of_first[name], of_second[name]))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
