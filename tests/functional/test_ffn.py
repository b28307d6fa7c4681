"""One feed-forward network as tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import NumericalError, OTPruneError, ShapeError
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, check_weights, ffn_forward
from tests.functional.helpers import law, make_ffn, normal, permutation, seeds, untouched

silu = torch.nn.functional.silu


def test_sizes_are_read_from_up_and_down():
    weights = make_ffn(n=12, d=5)
    assert (weights.intermediate_size, weights.hidden_size) == (12, 5)


def test_a_gated_layer_by_hand():
    weights = FFNWeights(
        up=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
        down=torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]]),
        gate=torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]]),
    )
    inputs = torch.tensor([[1.0, 2.0]])
    # up: 1, 4, 3; gate: 3, -1, 2; relu: 3, 0, 2
    assert torch.equal(channel_activations(weights, inputs, torch.relu), torch.tensor([[3.0, 0.0, 6.0]]))
    assert torch.equal(ffn_forward(weights, inputs, torch.relu), torch.tensor([[-3.0, 0.0]]))


def test_a_layer_without_a_gate_by_hand_with_biases():
    weights = FFNWeights(
        up=torch.tensor([[1.0], [-1.0]]),
        down=torch.tensor([[2.0, 3.0]]),
        up_bias=torch.tensor([1.0, 1.0]),
        down_bias=torch.tensor([10.0]),
    )
    inputs = torch.tensor([[2.0]])  # up: 3, -1
    assert torch.equal(channel_activations(weights, inputs, torch.relu), torch.tensor([[3.0, 0.0]]))
    assert torch.equal(ffn_forward(weights, inputs, torch.relu), torch.tensor([[16.0]]))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_forward_pass_agrees_with_a_loop_over_tokens_and_channels(gated, biases):
    weights, inputs = make_ffn(n=7, d=4, gated=gated, biases=biases), normal(9, 6, 4)

    def sigmoid_unit(x):
        return x / (1 + math.exp(-x))

    rows = []
    for x in inputs.tolist():
        output = [0.0] * 4 if weights.down_bias is None else weights.down_bias.tolist()
        for j in range(7):
            up = sum(w * v for w, v in zip(weights.up[j].tolist(), x))
            up += 0.0 if weights.up_bias is None else float(weights.up_bias[j])
            if gated:
                gate = sum(w * v for w, v in zip(weights.gate[j].tolist(), x))
                gate += 0.0 if weights.gate_bias is None else float(weights.gate_bias[j])
                hidden = sigmoid_unit(gate) * up
            else:
                hidden = sigmoid_unit(up)
            output = [o + hidden * w for o, w in zip(output, weights.down[:, j].tolist())]
        rows.append(output)
    expected = torch.tensor(rows, dtype=torch.float64)
    with untouched(*weights, inputs):
        torch.testing.assert_close(ffn_forward(weights, inputs, silu), expected, rtol=1e-12, atol=1e-12)


@law
@given(seed=seeds, gated=st.booleans(), biases=st.booleans())
def test_the_order_of_the_channels_does_not_matter(seed, gated, biases):
    weights, inputs = make_ffn(seed, gated=gated, biases=biases), normal(seed, 6, 5)
    order = permutation(seed, 12)
    permuted = weights.select(order)
    hidden = channel_activations(weights, inputs, silu)
    torch.testing.assert_close(channel_activations(permuted, inputs, silu), hidden[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ffn_forward(permuted, inputs, silu), ffn_forward(weights, inputs, silu), rtol=1e-10, atol=1e-10
    )


@law
@given(seed=seeds, gated=st.booleans())
def test_selecting_and_its_complement_add_up_to_the_whole(seed, gated):
    weights, inputs = make_ffn(seed, gated=gated), normal(seed, 6, 5)
    order = permutation(seed, 12)
    parts = [ffn_forward(weights.select(part), inputs, silu) for part in (order[:5], order[5:])]
    torch.testing.assert_close(sum(parts), ffn_forward(weights, inputs, silu), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [True, False])
def test_selection_takes_rows_and_columns_in_the_given_order_and_keeps_the_output_bias(gated):
    weights, channels = make_ffn(gated=gated, biases=True), torch.tensor([7, 2, 9])
    with untouched(*weights, channels):
        selected = weights.select(channels)
    for position, channel in enumerate([7, 2, 9]):
        assert torch.equal(selected.up[position], weights.up[channel])
        assert torch.equal(selected.down[:, position], weights.down[:, channel])
        assert selected.up_bias[position] == weights.up_bias[channel]
        if gated:
            assert torch.equal(selected.gate[position], weights.gate[channel])
            assert selected.gate_bias[position] == weights.gate_bias[channel]
    assert (selected.gate is None) is (not gated)
    assert selected.down_bias is weights.down_bias


def test_a_function_is_mapped_over_what_is_there_and_none_stays_none():
    weights = make_ffn(gated=False, biases=True)
    with untouched(*weights):
        mapped = weights.map(lambda tensor: 2 * tensor)
    assert mapped.gate is None
    assert mapped.gate_bias is None
    for name in ("up", "down", "up_bias", "down_bias"):
        assert torch.equal(getattr(mapped, name), 2 * getattr(weights, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_kept(dtype):
    weights, inputs = make_ffn(dtype=dtype, biases=True), normal(1, 6, 5, dtype=dtype)
    outputs = ffn_forward(weights, inputs, silu)
    assert outputs.dtype == dtype
    assert outputs.device == inputs.device
    assert weights.select(torch.tensor([1, 4])).down.dtype == dtype
    exact = ffn_forward(weights.map(torch.Tensor.double), inputs.double(), silu)
    assert (outputs.double() - exact).norm() / exact.norm() < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_weights_that_fit_together_pass_the_check(gated, biases):
    assert check_weights(make_ffn(gated=gated, biases=biases)) is None


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("down", (12, 5), r"\(5, 12\)"),
        ("gate", (5, 12), r"\(12, 5\)"),
        ("up_bias", (5,), r"\(12,\)"),
        ("gate_bias", (11,), r"\(12,\)"),
        ("down_bias", (12,), r"\(5,\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_what_it_should_be(name, shape, wanted):
    weights = make_ffn(biases=True)._replace(**{name: torch.zeros(shape)})
    with pytest.raises(ShapeError, match=rf"`{name}` of layer 3 has shape .* wants {wanted}.*channel-first"):
        check_weights(weights, "layer 3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["up", "down", "gate", "up_bias", "gate_bias", "down_bias"])
def test_values_that_are_not_finite_are_counted_and_their_tensor_named(name, value):
    weights = make_ffn(biases=True)
    getattr(weights, name).view(-1)[:2] = value
    with pytest.raises(NumericalError, match=f"`{name}` of the FFN holds 2 values that are NaN or infinite") as caught:
        check_weights(weights)
    assert isinstance(caught.value, OTPruneError)
    assert isinstance(caught.value, ArithmeticError)
