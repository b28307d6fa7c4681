"""One layer: every combination of names gives a usable FFN, and the laws of the refit hold."""

import itertools

import pytest
import torch

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError, NumericalError, ShapeError
from optimum_otprune.functional.costs import centroid_cost, costs
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.gram import gram_statistics
from optimum_otprune.functional.importance import WeightScores, importances
from optimum_otprune.functional.marginals import distributions, mixtures, strategies
from optimum_otprune.functional.solvers import solvers
from optimum_otprune.pruning.compress import LayerInputs, compress
from optimum_otprune.pruning.recipe import Recipe

WIDTH, HIDDEN, KEPT = 20, 7, 9
ACTIVATION = torch.nn.functional.silu


def make_weights(seed: int = 0) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FFNWeights(up=normal(WIDTH, HIDDEN), down=normal(HIDDEN, WIDTH), gate=normal(WIDTH, HIDDEN))


def make_inputs(weights: FFNWeights, num_tokens: int = 400, can_hold_intercept: bool = True) -> LayerInputs:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)

    def measure(compressed: FFNWeights | None):
        parts = []
        for tokens in (data[num_tokens // 4 :], data[: num_tokens // 4]):
            targets = channel_activations(weights, tokens, ACTIVATION) @ weights.down.T
            parts.append(gram_statistics(channel_activations(compressed or weights, tokens, ACTIVATION), targets))
        return parts

    scores = [
        WeightScores(*(torch.randn(WIDTH, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(3)))
        for _ in range(2)
    ]
    return LayerInputs(weights, *measure(None), *scores, 0, can_hold_intercept, measure)


def run(weights=None, functions=None, can_hold_intercept=True, **options):
    weights = make_weights() if weights is None else weights
    recipe = Recipe.resolve(OTPruningConfig(pruning_ratio=0.5, **options), functions or {})
    return compress(make_inputs(weights, can_hold_intercept=can_hold_intercept), recipe, KEPT)


def error(weights: FFNWeights, dense: FFNWeights) -> float:
    data = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return float((ffn_forward(weights, data, ACTIVATION) - ffn_forward(dense, data, ACTIVATION)).square().sum())


def assert_usable(compression) -> None:
    weights = compression.weights
    assert (weights.up.shape, weights.gate.shape, weights.down.shape) == (
        (KEPT, HIDDEN),
        (KEPT, HIDDEN),
        (HIDDEN, KEPT),
    )
    assert all(torch.isfinite(part).all() for part in weights if part is not None)
    kept = compression.kept_channels.tolist()
    assert kept == sorted(set(kept))
    assert 0 <= compression.self_share <= 1 + 1e-9
    assert 0 <= compression.transported_mass <= 1 + 1e-6


@pytest.mark.parametrize("solver", solvers.names())
@pytest.mark.parametrize("cost", costs.names())
@pytest.mark.parametrize("normalization", ["identity", "corrected", "source"])
def test_every_solver_cost_and_normalization_go_together(solver, cost, normalization):
    fuse = ("down",) if normalization == "identity" else ("gate", "up", "down")
    assert_usable(run(solver=solver, cost=cost, normalization=normalization, fuse=fuse, compensation="none"))


@pytest.mark.parametrize(("source", "target"), [*itertools.product(distributions.names(), repeat=2)])
def test_every_pair_of_distributions_is_transported(source, target):
    method = "structured_afr_with_intrafusion"
    assert_usable(run(method=method, source_distribution=source, target_distribution=target))


@pytest.mark.parametrize("strategy", strategies)
@pytest.mark.parametrize("normalization", ["source", "corrected"])
def test_every_strategy_runs_with_either_normalization(strategy, normalization):
    assert_usable(run(method="structured_afr_with_intrafusion", strategy=strategy, normalization=normalization))


@pytest.mark.parametrize("importance", importances.names())
@pytest.mark.parametrize("selection", ["top", "obs"])
def test_every_importance_selects(importance, selection):
    assert_usable(run(importance=importance, selection=selection))


@pytest.mark.parametrize("statistics", mixtures.names())
def test_every_mixture_weighs_a_distribution(statistics):
    assert_usable(run(statistics=statistics, solver="emd", target_distribution="importance"))


@pytest.mark.parametrize("cost", ["weight", "weight_l2"])
@pytest.mark.parametrize("compensation", ["none", "bias", "ridge"])
def test_centroids_are_a_target(cost, compensation):
    options = {"normalization": "corrected", "fuse": ("gate", "up", "down"), "compensation": compensation}
    assert_usable(run(target="cluster_centroid", cost=cost, solver="emd", target_distribution="uniform", **options))


def weight(inputs, kept):
    """Of the user's own, by the name of a registered one."""
    return costs["weight"](inputs, kept)


@pytest.mark.parametrize("given", [weight, costs["weight_l2"], "of_a_plugin", "activation"])
@pytest.mark.parametrize("cost", ["weight", {"name": "weight_l2"}])
def test_a_cost_that_centroids_would_ignore_is_refused(given, cost):
    config = OTPruningConfig(target="cluster_centroid", normalization="corrected", cost=cost)
    assert Recipe.resolve(config, {"cost": cost}).functions["cost"].name == config.cost
    costs.register("of_a_plugin")(lambda inputs, kept: costs["weight"](inputs, kept))
    try:
        with pytest.raises(
            ConfigurationError, match=r"contradicts `cost='\w+'`: .* Use cost='weight' or cost='weight_l2'"
        ):
            Recipe.resolve(config, {"cost": given})
        with pytest.raises(
            ConfigurationError, match="contradicts `cost='of_a_plugin'`: centroids .* would be ignored"
        ):
            config.replace(cost="of_a_plugin")
    finally:
        costs.unregister("of_a_plugin")


def test_centroids_of_well_separated_clusters_are_found():
    base = torch.eye(4, HIDDEN, dtype=torch.float64) * 5
    noise = 0.01 * torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = base.repeat_interleave(5, dim=0) + noise
    cost, representatives = centroid_cost(FFNWeights(up=rows, down=rows.T, gate=rows), 4, seed=1, cost="weight")
    assert sorted(channel // 5 for channel in representatives.tolist()) == [0, 1, 2, 3]
    assert (cost.matrix.argmin(dim=1).reshape(4, 5) == torch.arange(4)[:, None]).all()


@pytest.mark.parametrize("prior", ["zero", "identity", "transport"])
def test_a_refit_is_better_than_what_it_started_from_on_fresh_data(prior):
    dense = make_weights()
    refitted = run(dense, ridge_prior=prior, target_correction=0.0)
    assert error(refitted.weights, dense) < error(refitted.fused, dense)
    assert refitted.ridge is not None


def test_a_refit_of_fused_gates_uses_the_fused_channels():
    dense = make_weights()
    options = {"method": "structured_afr_with_intrafusion", "compensation": "ridge", "normalization": "corrected"}
    refitted = run(dense, **options)
    assert error(refitted.weights, dense) < error(refitted.fused, dense)


def test_an_intercept_is_added_only_where_the_architecture_can_hold_one():
    assert run(can_hold_intercept=False).weights.down_bias is None
    assert run(intercept="always").weights.down_bias is not None


@pytest.mark.parametrize("returned", [1.0, [1.0] * WIDTH, torch.ones(3)])
def test_functions_that_return_no_vector_are_refused(returned):
    for field in ("target_distribution", "statistics"):
        with pytest.raises(ShapeError, match="want one number per channel"):
            run(solver="emd", functions={field: lambda inputs: returned})


def test_a_mixture_that_is_not_finite_is_named():
    def broken(statistics):
        return torch.full((WIDTH,), float("nan"))

    with pytest.raises(NumericalError, match=f"mixture 'broken' is NaN or infinite for {WIDTH} of {WIDTH} channels"):
        run(solver="emd", functions={"statistics": broken})


def test_a_kept_channel_that_was_never_active_keeps_its_weights():
    dense = make_weights()
    dense = dense._replace(up=dense.up.index_fill(0, torch.tensor([0]), 0.0))

    def first(statistics):
        return -torch.arange(WIDTH, dtype=torch.float64)

    fused = run(dense, {"importance": first}, selection="top", compensation="none")
    assert fused.kept_channels[0] == 0
    assert torch.equal(fused.weights.down[:, 0], dense.down[:, 0])


def test_gradients_are_asked_for_only_where_something_reads_them():
    def needs(**options) -> bool:
        return Recipe.resolve(OTPruningConfig(**options), {}).needs_gradients

    assert not needs()
    assert not needs(method="flap")
    assert needs(method="fo_snip")
    assert needs(solver="emd", target_distribution="weight_aware")
    assert Recipe.resolve(OTPruningConfig(), {"importance": lambda statistics: None}).needs_gradients


def test_a_function_in_place_of_another_leaves_no_number_without_a_reader():
    config = OTPruningConfig(solver="sinkhorn", epsilon=0.3)
    with pytest.raises(ConfigurationError, match="`epsilon=0.3` would be ignored: the solver 'nearest' does not read"):
        Recipe.resolve(config, {"solver": "nearest"})
    for solver in (None, "sinkhorn", lambda cost, source, target, settings: None):
        assert Recipe.resolve(config, {"solver": solver})
    assert Recipe.resolve(OTPruningConfig(solver="sinkhorn"), {"solver": "nearest"})
