"""Transport costs and gains."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from optimum_otprune.errors import NumericalError, RegistryError, ShapeError
from optimum_otprune.functional.costs import CostInputs, TransportCost, channel_vectors, costs, transport_cost
from optimum_otprune.functional.ffn import FFNWeights, channel_activations
from tests.functional.helpers import law, make_ffn, normal, permutation, seeds, untouched

KEPT = torch.tensor([1, 4, 5, 9])
silu = torch.nn.functional.silu


def inputs_of(seed=0, tokens=50, gated=True, dtype=torch.float64):
    """Inputs of the cost functions, and the activations behind them."""
    weights = make_ffn(seed, gated=gated)
    hidden = channel_activations(weights, normal(seed + 9, tokens, 5), silu)
    low = weights.map(lambda tensor: tensor.to(dtype))
    return CostInputs(low, (hidden.T @ hidden).to(torch.promote_types(dtype, torch.float32)), tokens), hidden


def test_activation_cost_by_hand():
    weights = FFNWeights(up=torch.ones(3, 1), down=torch.tensor([[1.0, 2.0, 3.0]]))
    gram = torch.tensor([[4.0, 2.0, 0.0], [2.0, 9.0, 3.0], [0.0, 3.0, 2.0]])
    cost = transport_cost("activation", CostInputs(weights, gram, 10**9), torch.tensor([0, 1]))
    expected = [[0.0, 1 * (4 - 4 / 9)], [4 * (9 - 4 / 4), 0.0], [9 * 2.0, 9 * (2 - 9 / 9)]]
    torch.testing.assert_close(cost.matrix, torch.tensor(expected, dtype=torch.float64))
    gain = torch.tensor([[1.0, 2 / 9], [0.5, 1.0], [0.0, 3 / 9]], dtype=torch.float64)
    torch.testing.assert_close(cost.gain, gain, rtol=1e-6, atol=0)


@law
@given(seed=seeds)
def test_activation_cost_is_the_least_output_error_of_any_gain(seed):
    inputs, hidden = inputs_of(seed)
    cost = transport_cost("activation", inputs._replace(num_tokens=10**12), KEPT)
    for j in range(12):
        for column, k in enumerate(KEPT.tolist()):
            gain = torch.linalg.lstsq(hidden[:, [k]], hidden[:, [j]]).solution
            residual = (hidden[:, [j]] - hidden[:, [k]] * gain) @ inputs.weights.down[:, [j]].T
            energy = inputs.gram[j, j] * inputs.weights.down[:, j].square().sum()
            torch.testing.assert_close(cost.matrix[j, column], residual.square().sum(), rtol=1e-9, atol=1e-9 * energy)
            torch.testing.assert_close(cost.gain[j, column], gain.squeeze(), rtol=1e-5, atol=1e-5)


@law
@given(seed=seeds, tokens=st.integers(1, 200))
def test_gains_are_shrunk_by_what_chance_explains(seed, tokens):
    inputs, _ = inputs_of(seed, tokens=40)
    gain = transport_cost("activation", inputs._replace(num_tokens=tokens), KEPT).gain
    gram = inputs.gram.numpy()
    for j in range(12):
        for column, k in enumerate(KEPT.tolist()):
            squared = gram[j, k] ** 2 / (gram[j, j] * gram[k, k])
            factor = max(0.0, 1 - 6 * math.log(12) * (1 - squared) / (tokens * squared))
            assert math.isclose(gain[j, column], factor * gram[j, k] / gram[k, k], rel_tol=1e-7, abs_tol=1e-9)


@law
@given(seed=seeds, tokens=st.integers(1, 60))
def test_a_duplicate_stands_in_with_its_full_gain_and_at_no_cost_however_few_the_tokens(seed, tokens):
    weights = make_ffn(seed)
    factors = torch.tensor([1.0, -2.0, 0.01])
    up = weights.up.clone()
    gate = weights.gate.clone()
    for j, factor in zip((0, 2, 3), factors):  # copies of channel 1, scaled
        up[j], gate[j] = factor * up[1], gate[1]
    weights = weights._replace(up=up, gate=gate)
    hidden = channel_activations(weights, normal(seed, tokens, 5), silu)
    cost = transport_cost("activation", CostInputs(weights, hidden.T @ hidden, tokens), KEPT)
    torch.testing.assert_close(cost.gain[[0, 2, 3], 0], factors.double(), rtol=1e-8, atol=1e-8)
    energy = hidden.square().sum(dim=0) * weights.down.square().sum(dim=0)
    assert (cost.matrix[[0, 2, 3], 0] <= 1e-12 * energy[[0, 2, 3]]).all()


def test_a_channel_that_is_never_active_explains_nothing_and_costs_nothing():
    inputs, hidden = inputs_of()
    hidden[:, [4, 7]] = 0
    cost = transport_cost("activation", inputs._replace(gram=hidden.T @ hidden), KEPT)
    assert torch.isfinite(cost.gain).all()
    assert torch.equal(cost.gain[:, 1], torch.zeros(12).double())
    assert torch.equal(cost.matrix[7], torch.zeros(4).double())
    energy = hidden.square().sum(dim=0) * inputs.weights.down.square().sum(dim=0)
    torch.testing.assert_close(cost.matrix[:, 1], energy)


def test_a_layer_that_is_never_active_has_finite_costs_and_gains():
    cost = transport_cost("activation", CostInputs(make_ffn(), torch.zeros(12, 12), 0), KEPT)
    assert torch.equal(cost.matrix, torch.zeros(12, 4).double())
    assert torch.equal(cost.gain, torch.zeros(12, 4).double())


@law
@given(seed=seeds, exponents=st.lists(st.floats(-2, 2), min_size=12, max_size=12))
def test_scaling_up_and_inversely_down_leaves_the_activation_cost_as_it_was(seed, exponents):
    inputs, hidden = inputs_of(seed)
    scale = torch.tensor([10.0**exponent for exponent in exponents], dtype=torch.float64)
    weights = inputs.weights._replace(up=inputs.weights.up * scale[:, None], down=inputs.weights.down / scale)
    scaled = hidden * scale
    before = transport_cost("activation", inputs, KEPT)
    after = transport_cost("activation", CostInputs(weights, scaled.T @ scaled, 50), KEPT)
    torch.testing.assert_close(after.matrix, before.matrix, rtol=1e-6, atol=1e-6)
    contribution = after.gain * scale[KEPT] / scale[:, None]
    torch.testing.assert_close(contribution, before.gain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "metric"), [("weight", "cityblock"), ("weight_l2", "euclidean")])
@law
@given(seed=seeds, gated=st.booleans())
def test_weight_costs_agree_with_scipy(name, metric, seed, gated):
    inputs, _ = inputs_of(seed, gated=gated)
    weights = inputs.weights
    parts = [weights.gate, weights.up, weights.down.T] if gated else [weights.up, weights.down.T]
    vectors = np.concatenate([part.numpy() for part in parts], axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cost = transport_cost(name, inputs, KEPT)
    assert cost.gain is None
    np.testing.assert_allclose(cost.matrix, cdist(vectors, vectors[KEPT], metric), rtol=1e-12, atol=1e-12)


def test_weight_costs_by_hand():
    weights = FFNWeights(up=torch.tensor([[3.0], [0.0]]), down=torch.tensor([[4.0, 2.0]]))  # unit: (.6, .8), (0, 1)
    kept = torch.tensor([1])
    l1 = transport_cost("weight", CostInputs(weights), kept).matrix
    l2 = transport_cost("weight_l2", CostInputs(weights), kept).matrix
    torch.testing.assert_close(l1, torch.tensor([[0.8], [0.0]], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(l2, torch.tensor([[math.sqrt(0.4)], [0.0]], dtype=torch.float64), rtol=0, atol=1e-15)


@law
@given(seed=seeds, gated=st.booleans())
def test_channel_vectors_have_length_one_and_forget_a_channels_scale(seed, gated):
    weights, scale = make_ffn(seed, gated=gated), normal(seed, 12).abs() + 0.1
    vectors = channel_vectors(weights)
    assert vectors.shape == (12, 15 if gated else 10)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12).double(), rtol=0, atol=1e-12)
    scaled = weights._replace(
        up=weights.up * scale[:, None],
        down=weights.down * scale,
        gate=weights.gate * scale[:, None] if gated else None,
    )
    torch.testing.assert_close(channel_vectors(scaled), vectors, rtol=1e-12, atol=1e-12)


def test_the_vector_of_a_channel_of_zeros_stays_zero():
    weights = make_ffn(gated=False)
    weights.up[3], weights.down[:, 3] = 0, 0
    assert torch.equal(channel_vectors(weights)[3], torch.zeros(10).double())
    assert torch.isfinite(transport_cost("weight", CostInputs(weights), torch.tensor([3, 5])).matrix).all()


# Laws over every registered cost


@pytest.mark.parametrize("name", costs.names())
@law
@given(seed=seeds, gated=st.booleans())
def test_every_cost_is_finite_non_negative_and_zero_for_a_channel_itself(name, seed, gated):
    inputs, _ = inputs_of(seed, gated=gated)
    with untouched(*inputs.weights, inputs.gram, KEPT):
        cost = transport_cost(name, inputs, KEPT)
    assert cost.matrix.shape == (12, 4)
    assert cost.matrix.dtype == torch.float64
    assert cost.matrix.device == inputs.weights.up.device
    assert torch.isfinite(cost.matrix).all()
    assert (cost.matrix >= 0).all()
    own = cost.matrix[KEPT, torch.arange(4)]
    torch.testing.assert_close(own, torch.zeros(4).double(), rtol=0, atol=1e-12 * float(cost.matrix.max()))


@pytest.mark.parametrize("name", costs.names())
@law
@given(seed=seeds)
def test_permuting_channels_permutes_every_cost(name, seed):
    inputs, _ = inputs_of(seed)
    order = permutation(seed, 12)
    permuted = CostInputs(inputs.weights.select(order), inputs.gram[order][:, order], inputs.num_tokens)
    place = torch.argsort(order)  # channel j of the plain layer is channel place[j] of the permuted one
    plain, moved = transport_cost(name, inputs, KEPT), transport_cost(name, permuted, place[KEPT])
    torch.testing.assert_close(moved.matrix[place], plain.matrix, rtol=1e-10, atol=1e-10)
    if plain.gain is not None:
        torch.testing.assert_close(moved.gain[place], plain.gain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", costs.names())
def test_low_precision_weights_are_computed_in_float64(name, dtype):
    low, _ = inputs_of(dtype=dtype)
    exact = CostInputs(low.weights.map(torch.Tensor.double), low.gram.double(), low.num_tokens)
    cost = transport_cost(name, low, KEPT)
    assert cost.matrix.dtype == torch.float64
    torch.testing.assert_close(cost.matrix, transport_cost(name, exact, KEPT).matrix, rtol=0, atol=0)


# A cost of one's own


def test_a_bare_matrix_is_a_cost_without_gains():
    def mine(inputs, kept_channels):
        return torch.ones(12, len(kept_channels))

    cost = transport_cost(mine, CostInputs(make_ffn()), KEPT)
    assert isinstance(cost, TransportCost)
    assert cost.gain is None
    assert torch.equal(cost.matrix, torch.ones(12, 4))


def test_a_cost_of_another_shape_is_refused():
    def transposed(inputs, kept_channels):
        return torch.ones(len(kept_channels), 12)

    with pytest.raises(ShapeError, match=r"'transposed' returned shape \(4, 12\); want \(12, 4\)"):
        transport_cost(transposed, CostInputs(make_ffn()), KEPT)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "a NoneType; want a tensor"),
        ([[1.0] * 4] * 12, "a list; want a tensor"),
        (TransportCost([1.0]), r"a list; want \(12, 4\)"),
        (TransportCost(torch.ones(12, 4), torch.ones(4)), r"as its gain, returned shape \(4,\); want \(12, 4\)"),
    ],
)
def test_what_is_no_cost_is_refused(returned, message):
    with pytest.raises(ShapeError, match=message):
        transport_cost(lambda inputs, kept_channels: returned, CostInputs(make_ffn()), KEPT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gains_that_are_not_finite_are_refused(value):
    def broken(inputs, kept_channels):
        gain = torch.ones(12, len(kept_channels))
        gain[5, 1] = value
        return TransportCost(torch.ones(12, len(kept_channels)), gain)

    with pytest.raises(NumericalError, match="'broken' returned gains that are NaN or infinite"):
        transport_cost(broken, CostInputs(make_ffn()), KEPT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
def test_a_cost_that_cannot_be_transported_is_refused(value):
    def broken(inputs, kept_channels):
        matrix = torch.ones(12, len(kept_channels))
        matrix[3, 2] = value
        return TransportCost(matrix)

    with pytest.raises(NumericalError, match="'broken' returned NaN, infinite or negative entries"):
        transport_cost(broken, CostInputs(make_ffn()), KEPT)


def test_activation_cost_without_a_gram_matrix_says_what_is_missing():
    with pytest.raises(ShapeError, match="'activation' needs the Gram matrix of the channel activations"):
        transport_cost("activation", CostInputs(make_ffn()), KEPT)


def test_an_unknown_cost_suggests_the_nearest():
    with pytest.raises(RegistryError, match="Unknown cost 'weights'. Did you mean 'weight'"):
        transport_cost("weights", CostInputs(make_ffn()), KEPT)
