"""Reconstruction lowers the error of a layer, and never raises it on the held-out tokens."""

import pytest
import torch

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.ffn import FFNWeights, ffn_forward
from optimum_otprune.functional.reconstruction import (
    ReconstructionSettings,
    TokenSet,
    TrainingTokens,
    output_error,
    reconstruct,
)

ACTIVATION = torch.nn.functional.silu


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weights(gated: bool = True, biases: bool = False) -> FFNWeights:
    weights = FFNWeights(up=normal(12, 5), down=normal(5, 12, seed=1), gate=normal(12, 5, seed=2) if gated else None)
    return weights._replace(up_bias=normal(12, seed=3), down_bias=normal(5, seed=4)) if biases else weights


def make_tokens(dense: FFNWeights, count: int, seed: int) -> TokenSet:
    inputs = normal(count, 5, seed=seed)
    return TokenSet(inputs, ffn_forward(dense, inputs, ACTIVATION), torch.ones(count))


def run(weights, dense, steps=200, seed=0, **settings):
    fit, heldout = make_tokens(dense, 400, seed=5), make_tokens(dense, 100, seed=6)
    generator = torch.Generator().manual_seed(seed)
    settings = ReconstructionSettings(steps, batch_tokens=64, **settings)
    return reconstruct(weights, TrainingTokens(fit, heldout), ACTIVATION, settings, generator)


@pytest.mark.parametrize(("gated", "biases"), [(True, False), (False, False), (True, True), (False, True)])
def test_a_layer_that_lost_channels_gets_closer_to_the_dense_one_on_fresh_tokens(gated, biases):
    dense = make_weights(gated, biases)
    start = dense.select(torch.arange(8))
    before = [None if part is None else part.clone() for part in start]
    result = run(start, dense)
    fresh = make_tokens(dense, 300, seed=7)
    assert output_error(result.weights, fresh, ACTIVATION) < 0.7 * output_error(start, fresh, ACTIVATION)
    assert result.best_step > 0
    assert result.heldout_error_after < result.heldout_error_before
    for part, old, new in zip(start, before, result.weights):
        assert (part is None) == (new is None)
        assert part is None or torch.equal(part, old)  # inputs are untouched
        assert new is None or not new.requires_grad


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32_weights():
    dense = make_weights()
    start = dense.select(torch.arange(8))
    seen = []

    def noted(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.dtype)
        return ACTIVATION(inputs)

    fit, heldout = make_tokens(dense, 400, seed=5), make_tokens(dense, 100, seed=6)
    settings = ReconstructionSettings(200, batch_tokens=64, mixed_precision=True)
    result = reconstruct(start, TrainingTokens(fit, heldout), noted, settings, torch.Generator().manual_seed(0))
    assert seen.count(torch.bfloat16) == 200
    assert seen.count(torch.float32) == 21  # the start and twenty checks on held-out tokens
    assert result.weights.up.dtype == torch.float32
    assert result.heldout_error_after < 0.7 * result.heldout_error_before


def test_a_perfect_layer_stays_as_it_is():
    dense = make_weights()
    result = run(dense, dense)
    assert result.best_step == 0
    assert all(torch.equal(one, other) for one, other in zip(result.weights, dense) if one is not None)


def test_steps_that_ruin_the_layer_are_not_kept():
    dense = make_weights()
    start = dense.select(torch.arange(11))
    result = run(start, dense, learning_rate=1e4)
    assert result.heldout_error_after <= result.heldout_error_before


def test_the_error_that_is_reported_is_that_of_the_weights():
    dense = make_weights()
    result = run(dense.select(torch.arange(6)), dense)
    heldout = make_tokens(dense, 100, seed=6)
    assert output_error(result.weights, heldout, ACTIVATION) == pytest.approx(result.heldout_error_after, rel=1e-6)


def test_the_same_seed_gives_the_same_bits():
    dense = make_weights()
    first, second, third = (run(dense.select(torch.arange(6)), dense, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.weights.up, second.weights.up)
    assert not torch.equal(first.weights.up, third.weights.up)


def test_scaling_a_channel_and_back_changes_the_function_little():
    dense = make_weights(gated=False)
    start = dense.select(torch.arange(8))
    scaled = start._replace(up=start.up * 1e3, down=start.down / 1e3)
    relu = torch.nn.functional.relu
    fit, heldout = make_tokens(dense, 400, seed=5), make_tokens(dense, 100, seed=6)
    settings = ReconstructionSettings(50, batch_tokens=64)
    errors = [
        reconstruct(
            weights, TrainingTokens(fit, heldout), relu, settings, torch.Generator().manual_seed(0)
        ).heldout_error_after
        for weights in (start, scaled)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_an_error_that_is_not_finite_is_refused():
    dense = make_weights()
    broken = dense._replace(up=torch.full_like(dense.up, float("nan")))
    with pytest.raises(NumericalError, match="NaN or infinite before reconstruction"):
        run(broken, dense)
