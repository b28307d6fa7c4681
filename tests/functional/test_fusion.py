"""Fusion maps: what they keep, and what the reference's normalization does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import ShapeError, TransportError
from optimum_otprune.functional.costs import CostInputs, transport_cost
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.fusion import (
    FusionMaps,
    barycentric_projection,
    fuse,
    fusion_maps,
    mass_projection,
    selection_map,
    with_identity,
)
from optimum_otprune.functional.solvers import SolverSettings, solve_transport
from tests.functional.helpers import (
    first_of_each,
    law,
    make_ffn,
    normal,
    permutation,
    probabilities,
    random_numbers,
    repeat_channels,
    seeds,
    untouched,
)

silu = torch.nn.functional.silu
ALL = ("gate", "up", "down")
CLUSTERS = torch.tensor([0, 1, 2, 0, 0, 1, 3, 0])  # four, two, one and one channel
PLAN = torch.tensor([[0.2, 0.0], [0.1, 0.1], [0.0, 0.6]], dtype=torch.float64)


def random_plan(seed, n=9, m=4):
    plan = torch.rand(n, m, generator=random_numbers(seed), dtype=torch.float64)
    return plan / plan.sum()


def relative(compressed: FFNWeights, dense: FFNWeights, inputs: torch.Tensor) -> float:
    outputs = ffn_forward(dense, inputs, silu)
    return float((ffn_forward(compressed, inputs, silu) - outputs).norm() / outputs.norm())


# The two projections


def test_both_projections_by_hand():
    inward = torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 7, 6 / 7]], dtype=torch.float64)
    outward = torch.tensor([[1, 0.5, 0], [0, 0.5, 1]], dtype=torch.float64)
    with untouched(PLAN):
        torch.testing.assert_close(barycentric_projection(PLAN), inward)
        torch.testing.assert_close(mass_projection(PLAN), outward)


@law
@given(seed=seeds)
def test_projections_sum_to_one_and_agree_with_a_loop(seed):
    plan = random_plan(seed)
    inward, outward = barycentric_projection(plan), mass_projection(plan)
    torch.testing.assert_close(inward.sum(dim=1), torch.ones(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(outward.sum(dim=0), torch.ones(9).double(), rtol=0, atol=1e-12)
    for j in range(9):
        for k in range(4):
            assert abs(float(inward[k, j]) - float(plan[j, k] / sum(plan[:, k]))) < 1e-12
            assert abs(float(outward[k, j]) - float(plan[j, k] / sum(plan[j]))) < 1e-12


@law
@given(seed=seeds, scale=st.floats(1e-6, 1e6))
def test_projections_forget_the_total_mass(seed, scale):
    plan = random_plan(seed)
    torch.testing.assert_close(barycentric_projection(scale * plan), barycentric_projection(plan))
    torch.testing.assert_close(mass_projection(scale * plan), mass_projection(plan))


@law
@given(seed=seeds)
def test_permuting_channels_permutes_the_projections(seed):
    plan, rows, columns = random_plan(seed), permutation(seed, 9), permutation(seed + 1, 4)
    for projection in (barycentric_projection, mass_projection):
        torch.testing.assert_close(projection(plan[rows][:, columns]), projection(plan)[columns][:, rows])


def test_what_a_partial_plan_left_behind_stays_behind_when_the_marginal_is_given():
    source = torch.tensor([0.4, 0.2, 0.6], dtype=torch.float64)
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(mass_projection(PLAN, source), expected)


def test_a_channel_that_had_no_mass_and_sends_none_is_left_behind():
    plan, source = PLAN.clone(), torch.tensor([0.0, 0.2, 0.6], dtype=torch.float64)
    plan[0] = 0
    expected = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(mass_projection(plan, source), expected)


def test_a_kept_channel_without_mass_is_named_in_the_error():
    plan = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    with pytest.raises(TransportError, match=r"1 of 2 kept channels receive no mass \(first: \[1\]\).*0 / 0"):
        barycentric_projection(plan)


def test_a_channel_that_sends_no_mass_is_named_in_the_error():
    plan = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(TransportError, match=r"2 of 3 channels send no mass \(first: \[1, 2\]\).*`source_marginal`"):
        mass_projection(plan)


def test_at_most_five_channels_are_named():
    with pytest.raises(TransportError, match=r"7 of 7 channels send no mass \(first: \[0, 1, 2, 3, 4\]\)"):
        mass_projection(torch.zeros(7, 2))


# Plans and maps


def test_kept_channels_keep_their_own_mass_by_hand():
    pruned_plan = torch.tensor([[0.25, 0.25], [0.5, 0.0]], dtype=torch.float64)
    with untouched(pruned_plan):
        plan = with_identity(pruned_plan, torch.tensor([0, 3]), torch.tensor([1, 2]), (0.6, 0.4))
    expected = torch.tensor([[0.3, 0.0], [0.1, 0.1], [0.2, 0.0], [0.0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected)


@law
@given(seed=seeds, m=st.integers(1, 8))
def test_kept_channels_are_handed_to_themselves_alone(seed, m):
    order = permutation(seed, 9)
    kept, pruned = order[:m].sort().values, order[m:].sort().values
    plan = with_identity(random_plan(seed, 9 - m, m), kept, pruned, (m / 9, 1 - m / 9))
    assert abs(float(plan.sum()) - 1) < 1e-12
    outward = fusion_maps(plan, "identity").outward
    torch.testing.assert_close(outward[:, kept], torch.eye(m).double(), rtol=0, atol=1e-12)


def test_maps_are_barycentric_inwards_and_keep_mass_outwards_but_for_source():
    plan = random_plan(0)
    for normalization in ("identity", "corrected"):
        maps = fusion_maps(plan, normalization)
        torch.testing.assert_close(maps.inward, barycentric_projection(plan))
        torch.testing.assert_close(maps.outward, mass_projection(plan))
    maps = fusion_maps(plan, "source")
    torch.testing.assert_close(maps.inward, mass_projection(plan))
    torch.testing.assert_close(maps.outward, mass_projection(plan))


@pytest.mark.parametrize("normalization", ["identity", "corrected", "source"])
def test_a_gain_multiplies_the_outward_map_alone(normalization):
    plan, gain = random_plan(0), normal(1, 9, 4)
    with untouched(plan, gain):
        with_gain = fusion_maps(plan, normalization, gain)
    without = fusion_maps(plan, normalization)
    torch.testing.assert_close(with_gain.inward, without.inward)
    torch.testing.assert_close(with_gain.outward, without.outward * gain.T)


def test_a_source_marginal_is_what_the_outward_map_divides_by():
    plan, source = random_plan(0), probabilities(1, 9) + 0.2
    maps = fusion_maps(plan, "identity", source_marginal=source)
    torch.testing.assert_close(maps.outward, (plan / source[:, None]).T)


def test_the_selection_map_is_plain_dropping():
    weights, kept, inputs = make_ffn(biases=True), torch.tensor([1, 4, 9]), normal(1, 6, 5)
    selected = selection_map(kept, 12)
    assert selected.dtype == torch.float64
    assert selected.nonzero().tolist() == [[0, 1], [1, 4], [2, 9]]
    fused = fuse(weights, FusionMaps(selected, selected), kept, ALL)
    for one, other in zip(fused, weights.select(kept)):
        assert torch.equal(one, other)
    torch.testing.assert_close(ffn_forward(fused, inputs, silu), ffn_forward(weights.select(kept), inputs, silu))


# Application


@pytest.mark.parametrize("projections", [(), ("down",), ("gate", "up"), ALL])
@pytest.mark.parametrize("gated", [True, False])
def test_projections_that_are_not_fused_are_selected(projections, gated):
    weights, kept = make_ffn(gated=gated, biases=True), torch.tensor([1, 4, 5, 9])
    maps = FusionMaps(normal(1, 4, 12), normal(2, 4, 12))
    with untouched(*weights, *maps, kept):
        fused = fuse(weights, maps, kept, projections)
    selected = weights.select(kept)
    for name in ("gate", "up"):
        for part in (name, f"{name}_bias"):
            tensor = getattr(weights, part)
            if tensor is None:
                assert getattr(fused, part) is None
            elif name in projections:
                expected = torch.stack([sum(maps.inward[k, j] * tensor[j] for j in range(12)) for k in range(4)])
                torch.testing.assert_close(getattr(fused, part), expected, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(getattr(fused, part), getattr(selected, part))
    down = weights.down @ maps.outward.T if "down" in projections else selected.down
    torch.testing.assert_close(fused.down, down, rtol=1e-12, atol=1e-12)
    assert fused.down_bias is weights.down_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weights_have_the_dtype_of_the_weights_and_are_summed_in_float64(dtype):
    weights, kept = make_ffn(biases=True, dtype=dtype), torch.tensor([1, 4, 5, 9])
    maps = FusionMaps(normal(1, 4, 12), normal(2, 4, 12))
    fused = fuse(weights, maps, kept, ALL)
    exact = fuse(weights.map(torch.Tensor.double), maps, kept, ALL)
    for one, other in zip(fused, exact):
        assert one.dtype == dtype
        assert one.device == weights.up.device
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("which", ["inward", "outward"])
def test_a_map_that_does_not_fit_is_refused(which):
    maps = FusionMaps(torch.ones(4, 12).double(), torch.ones(4, 12).double())._replace(**{which: torch.ones(12, 4)})
    with pytest.raises(ShapeError, match=r"A fusion map has shape \(12, 4\); want \(kept, all\) = \(4, 12\)"):
        fuse(make_ffn(), maps, torch.arange(4), ALL)


# Networks of duplicated channels


def fuse_identity(weights: FFNWeights, inputs: torch.Tensor, kept: torch.Tensor, solver: str = "nearest"):
    """Activation cost, identity on kept channels, only down is fused: the default transport."""
    n, m = weights.intermediate_size, len(kept)
    hidden = channel_activations(weights, inputs, silu)
    cost = transport_cost("activation", CostInputs(weights, hidden.T @ hidden, len(inputs)), kept)
    pruned = torch.tensor([j for j in range(n) if j not in kept.tolist()])
    source = torch.full((n - m,), 1 / (n - m), dtype=torch.float64)
    target = torch.full((m,), 1 / m, dtype=torch.float64)
    plan = solve_transport(solver, cost.matrix[pruned], source, target).matrix
    plan = with_identity(plan, kept, pruned, (m / n, 1 - m / n))
    return fuse(weights, fusion_maps(plan, "identity", cost.gain), kept, ("down",))


def fuse_weights(weights: FFNWeights, kept: torch.Tensor, normalization: str, solver: str, target=None, source=None):
    """Weight cost over all channels, all projections are fused: the reference's transport."""
    n, m = weights.intermediate_size, len(kept)
    cost = transport_cost("weight", CostInputs(weights), kept).matrix
    source = torch.full((n,), 1 / n, dtype=torch.float64) if source is None else source
    target = torch.full((m,), 1 / m, dtype=torch.float64) if target is None else target
    plan = solve_transport(solver, cost, source, target, SolverSettings()).matrix
    return fuse(weights, fusion_maps(plan, normalization), kept, ALL)


@law
@given(seed=seeds, gated=st.booleans(), biases=st.booleans(), tokens=st.sampled_from([6, 40]))
def test_exact_duplicates_are_pruned_without_any_change_of_output(seed, gated, biases, tokens):
    weights = repeat_channels(make_ffn(seed, n=4, gated=gated, biases=biases), CLUSTERS, same_down=False, seed=seed)
    inputs = normal(seed, tokens, 5)
    fused = fuse_identity(weights, inputs, first_of_each(CLUSTERS))
    assert fused.intermediate_size == 4
    assert relative(fused, weights, inputs) <= 1e-10
    assert relative(fused, weights, normal(seed + 1, 50, 5)) <= 1e-10  # and on tokens that were not seen


@law
@given(seed=seeds)
def test_scaled_and_mirrored_duplicates_are_pruned_without_any_change_of_output(seed):
    weights = repeat_channels(make_ffn(seed, n=4), CLUSTERS, same_down=False, seed=seed)
    factors = torch.tensor([1.0, 1.0, 1.0, -1.0, 3.0, -0.2, 1.0, 50.0], dtype=torch.float64)
    weights = weights._replace(up=weights.up * factors[:, None])
    inputs = normal(seed, 40, 5)
    assert relative(fuse_identity(weights, inputs, first_of_each(CLUSTERS)), weights, inputs) <= 1e-8


@law
@given(seed=seeds, gated=st.booleans(), biases=st.booleans())
def test_corrected_normalization_leaves_duplicates_as_they_were_when_mass_follows_the_assignment(seed, gated, biases):
    weights = repeat_channels(make_ffn(seed, n=4, gated=gated, biases=biases), CLUSTERS)
    inputs, kept = normal(seed, 30, 5), first_of_each(CLUSTERS)
    fused = fuse_weights(weights, kept, "corrected", "nearest")
    assert relative(fused, weights, inputs) <= 1e-10
    uneven = fuse_weights(weights, kept, "corrected", "nearest", source=probabilities(seed, 8))
    assert relative(uneven, weights, inputs) <= 1e-10
    sizes = torch.bincount(CLUSTERS[kept], weights=torch.bincount(CLUSTERS)[CLUSTERS[kept]].double())
    matching = fuse_weights(weights, kept, "corrected", "emd", target=sizes / 8)
    assert relative(matching, weights, inputs) <= 1e-10


def test_uniform_target_mass_on_unequal_clusters_does_not_leave_them_as_they_were():
    weights = repeat_channels(make_ffn(0, n=4), CLUSTERS)
    fused = fuse_weights(weights, first_of_each(CLUSTERS), "corrected", "emd")
    assert relative(fused, weights, normal(0, 30, 5)) > 0.1


@pytest.mark.parametrize("copies", [2, 3])
def test_source_normalization_scales_up_the_output_of_duplicated_networks(copies):
    weights = repeat_channels(make_ffn(0, n=4), torch.arange(4).repeat(copies))
    inputs, kept = normal(0, 30, 5), torch.arange(4)
    fused = fuse_weights(weights, kept, "source", "nearest")

    def linear(hidden):
        return hidden

    # gate, up and down are each `copies` times too large; one of the three replaces the channels that went
    torch.testing.assert_close(
        ffn_forward(fused, inputs, linear), copies**2 * ffn_forward(weights, inputs, linear), rtol=1e-10, atol=1e-10
    )
    assert ffn_forward(fused, inputs, silu).norm() > copies * ffn_forward(weights, inputs, silu).norm()


@pytest.mark.parametrize("solver", ["nearest", "emd", "sinkhorn"])
@law
@given(seed=seeds)
def test_permuting_channels_changes_no_output_of_the_fused_layer(solver, seed):
    weights, inputs, order = make_ffn(seed), normal(seed, 40, 5), permutation(seed, 12)
    kept = torch.tensor([1, 4, 5, 9])
    place = torch.argsort(order)[kept].sort().values
    plain = fuse_identity(weights, inputs, kept, solver)
    permuted = fuse_identity(weights.select(order), inputs, place, solver)
    torch.testing.assert_close(
        ffn_forward(permuted, inputs, silu), ffn_forward(plain, inputs, silu), rtol=1e-6, atol=1e-6
    )


@law
@given(seed=seeds)
def test_transport_with_gain_never_costs_more_on_the_tokens_than_its_cost_says_for_one_pruned_channel(seed):
    weights, inputs, kept = make_ffn(seed), normal(seed, 4000, 5), torch.arange(11)
    hidden = channel_activations(weights, inputs, silu)
    cost = transport_cost("activation", CostInputs(weights, hidden.T @ hidden, 10**12), kept)
    plan = with_identity(
        solve_transport("nearest", cost.matrix[[11]], torch.ones(1), torch.full((11,), 1 / 11)).matrix,
        kept,
        torch.tensor([11]),
        (11 / 12, 1 / 12),
    )
    fused = fuse(weights, fusion_maps(plan, "identity", cost.gain), kept, ("down",))
    error = (ffn_forward(fused, inputs, silu) - ffn_forward(weights, inputs, silu)).square().sum()
    torch.testing.assert_close(error, cost.matrix[11].min(), rtol=1e-6, atol=1e-6)
