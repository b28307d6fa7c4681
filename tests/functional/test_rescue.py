"""Rescue and dilution: what they measure on layers of which the answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.ratios import (
    RescueEnergies,
    diluted_share,
    dilution_ratio,
    outliers,
    pooled,
    rescue_ratio,
    rescued_share,
)
from optimum_otprune.functional.rescue import rescue_energies, self_share, transported_mass
from tests.functional.helpers import law, make_ffn, normal, permutation, seeds, untouched

silu = torch.nn.functional.silu
KEPT = torch.tensor([1, 4, 5, 9])


def measure(
    dense: FFNWeights, compressed: FFNWeights, inputs: torch.Tensor, kept=KEPT, token_weights=None
) -> RescueEnergies:
    return rescue_energies(
        outputs=ffn_forward(dense, inputs, silu),
        hidden=channel_activations(dense, inputs, silu),
        compressed=[(ffn_forward(compressed, inputs, silu), channel_activations(compressed, inputs, silu))],
        down=dense.down,
        kept_channels=kept,
        token_weights=torch.ones(len(inputs)) if token_weights is None else token_weights,
    )[0]


def test_energies_of_one_token_by_hand():
    hidden, down = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    energies, untouched_channels = rescue_energies(
        outputs=torch.tensor([[7.0, 5.0]]),
        hidden=hidden,
        compressed=[(torch.tensor([[7.0, 4.0]]), torch.tensor([[3.5, 0.0]])), (torch.tensor([[7.0, 4.0]]), None)],
        down=down,
        kept_channels=torch.tensor([2, 0]),
        token_weights=torch.ones(1),
    )
    # pruned: channel 1, 2 · (0, 1); kept: 5 · 9 + 1 · 1; shift: 5 · 0.25 + 1 · 1
    assert energies == RescueEnergies(output=74.0, pruned=4.0, error=1.0, kept=46.0, shift=2.25)
    assert untouched_channels == energies._replace(shift=0.0)
    assert rescue_ratio(energies) == 0.75
    assert dilution_ratio(energies) == 2.25 / 46


@law
@given(seed=seeds)
def test_energies_agree_with_a_loop(seed):
    dense = make_ffn(seed)
    compressed = make_ffn(seed + 1, n=4)
    inputs = normal(seed, 7, 5)
    outputs, fewer = ffn_forward(dense, inputs, silu), ffn_forward(compressed, inputs, silu)
    hidden, moved = channel_activations(dense, inputs, silu), channel_activations(compressed, inputs, silu)
    with untouched(*dense, *compressed, inputs, KEPT):
        energies = measure(dense, compressed, inputs)
    expected = dict.fromkeys(RescueEnergies._fields, 0.0)
    for t in range(7):
        lost = sum(hidden[t, j] * dense.down[:, j] for j in range(12) if j not in KEPT.tolist())
        expected["output"] += float(outputs[t] @ outputs[t])
        expected["pruned"] += float(lost @ lost)
        expected["error"] += float(sum((outputs[t] - fewer[t]) ** 2))
        for place, k in enumerate(KEPT.tolist()):
            norm = float(dense.down[:, k] @ dense.down[:, k])
            expected["kept"] += norm * float(hidden[t, k]) ** 2
            expected["shift"] += norm * float(moved[t, place] - hidden[t, k]) ** 2
    for name, value in expected.items():
        assert math.isclose(getattr(energies, name), value, rel_tol=1e-9), name


@law
@given(seed=seeds, gated=st.booleans(), biases=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_plain_dropping_scores_zero_and_dilutes_nothing(seed, gated, biases, dtype):
    dense = make_ffn(seed, gated=gated, biases=biases, dtype=dtype)
    energies = measure(dense, dense.select(KEPT), normal(seed, 20, 5, dtype=dtype))
    assert rescue_ratio(energies) == 0.0
    assert dilution_ratio(energies) < 1e-10  # products of other shapes may round otherwise


@law
@given(seed=seeds, gated=st.booleans())
def test_a_perfect_layer_scores_one(seed, gated):
    dense = make_ffn(seed, gated=gated)
    pruned = torch.tensor([j for j in range(12) if j not in KEPT.tolist()])
    copies = KEPT[torch.arange(8) % 4]  # every pruned channel is a copy of a kept one
    up, gate = dense.up.clone(), None if dense.gate is None else dense.gate.clone()
    up[pruned] = up[copies]
    if gate is not None:
        gate[pruned] = gate[copies]
    dense = dense._replace(up=up, gate=gate)
    down = dense.down[:, KEPT] + dense.down[:, pruned[:4]] + dense.down[:, pruned[4:]]
    energies = measure(dense, dense.select(KEPT)._replace(down=down), normal(seed, 20, 5))
    assert abs(rescue_ratio(energies) - 1) < 1e-12
    assert dilution_ratio(energies) < 1e-20


@law
@given(seed=seeds)
def test_a_harmful_fusion_is_negative(seed):
    dense, inputs = make_ffn(seed), normal(seed, 20, 5)
    dropped = dense.select(KEPT)
    harmful = dropped._replace(down=dropped.down + 30 * normal(seed + 1, 5, 4))
    assert rescue_ratio(measure(dense, harmful, inputs)) < 0


@law
@given(seed=seeds)
def test_a_token_of_weight_two_counts_as_two_tokens(seed):
    dense, compressed, inputs = make_ffn(seed), make_ffn(seed + 1, n=4), normal(seed, 6, 5)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0, 3.0, 1.0])
    weighed = measure(dense, compressed, inputs, token_weights=weights)
    repeated = measure(dense, compressed, inputs[torch.repeat_interleave(weights.long())])
    assert weighed == pytest.approx(repeated, rel=1e-5)


def test_a_token_with_massive_activations_does_not_decide_the_ratio():
    """The fit hardly heeds it, so that its output is wrong by more than all others'."""
    dense, inputs = make_ffn(0), normal(1, 40, 5)
    inputs[0] *= 1000
    hidden = channel_activations(dense, inputs, silu)
    outputs, dropped = hidden @ dense.down.T, hidden[:, KEPT] @ dense.down[:, KEPT].T
    errors = 0.5 * (outputs - dropped)
    errors[0] *= 40
    weights = 1 / outputs.square().sum(dim=1)  # as where the output is long because the hidden state is
    weights[0] *= 1e-3
    ratios = [
        rescue_ratio(rescue_energies(outputs, hidden, [(outputs - errors, None)], dense.down, KEPT, counts)[0])
        for counts in (torch.ones(40), weights)
    ]
    assert ratios[0] < -100
    assert ratios[1] == pytest.approx(0.75, abs=0.01)


@law
@given(seed=seeds, share=st.floats(0, 1))
def test_delivering_a_share_of_what_was_pruned_scores_one_minus_the_rest_squared(seed, share):
    hidden, down = normal(seed, 20, 12), normal(seed + 1, 5, 12)
    outputs, dropped = hidden @ down.T, hidden[:, KEPT] @ down[:, KEPT].T
    compressed = [(dropped + share * (outputs - dropped), hidden[:, KEPT])]
    energies = rescue_energies(outputs, hidden, compressed, down, KEPT, torch.ones(20))[0]
    assert math.isclose(rescue_ratio(energies), 1 - (1 - share) ** 2, abs_tol=2e-5)


@law
@given(seed=seeds)
def test_permuting_channels_changes_no_energy(seed):
    dense, inputs, order = make_ffn(seed), normal(seed, 20, 5), permutation(seed, 12)
    compressed = make_ffn(seed + 1, n=4)
    place = torch.argsort(order)[KEPT]
    plain = measure(dense, compressed, inputs)
    permuted = measure(dense.select(order), compressed, inputs, place)
    for one, other in zip(plain, permuted):
        assert math.isclose(one, other, rel_tol=1e-9)


@law
@given(seed=seeds, first=st.integers(1, 19))
def test_batches_and_layers_pool_to_the_whole(seed, first):
    dense, compressed, inputs = make_ffn(seed), make_ffn(seed + 1, n=4), normal(seed, 20, 5)
    parts = [measure(dense, compressed, part) for part in (inputs[:first], inputs[first:])]
    whole = measure(dense, compressed, inputs)
    for one, other, added in zip(pooled(parts), whole, parts[0] + parts[1]):
        assert math.isclose(one, other, rel_tol=1e-9)
        assert math.isclose(added, other, rel_tol=1e-9)


def test_pooling_weighs_layers_by_their_energy_by_hand():
    layers = [RescueEnergies(10.0, 4.0, 1.0, 8.0, 2.0), RescueEnergies(5.0, 1.0, 2.0, 2.0, 0.5)]
    together = pooled(iter(layers))
    assert together == RescueEnergies(15.0, 5.0, 3.0, 10.0, 2.5)
    assert rescue_ratio(together) == 1 - 3 / 5  # not the mean of 0.75 and -1
    assert dilution_ratio(together) == 0.25


def test_pooling_nothing_is_nothing():
    assert pooled([]) == RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        (RescueEnergies(10.0, 0.0, 0.0, 1.0, 0.0), 1.0),  # nothing lost, output intact
        (RescueEnergies(10.0, 0.0, 1.0, 1.0, 0.0), 0.0),  # nothing to rescue, output damaged
        (RescueEnergies(10.0, 1e-13, 1e-13, 1.0, 0.0), 1.0),  # rounding
        (RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0), 1.0),
        (RescueEnergies(10.0, 4.0, 4.0000004, 1.0, 0.0), 0.0),  # dropping, but for rounding
        (RescueEnergies(10.0, 4.0, 8.0, 1.0, 0.0), -1.0),
        (RescueEnergies(10.0, 4.0, 0.0, 1.0, 0.0), 1.0),
    ],
)
def test_the_rescue_ratio_at_its_edges(energies, expected):
    assert rescue_ratio(energies) == expected


def test_a_layer_whose_kept_channels_are_never_active_is_not_diluted():
    assert dilution_ratio(RescueEnergies(1.0, 1.0, 1.0, 0.0, 0.0)) == 0.0


def test_keeping_every_channel_is_perfect():
    dense = make_ffn()
    energies = measure(dense, dense, normal(1, 20, 5), torch.arange(12))
    assert (energies.pruned, energies.error, energies.shift) == (0.0, 0.0, 0.0)
    assert rescue_ratio(energies) == 1.0


def test_bfloat16_layers_are_measured():
    dense = make_ffn(dtype=torch.bfloat16)
    inputs = normal(1, 50, 5, dtype=torch.bfloat16)
    exact = dense.map(torch.Tensor.double)
    low = measure(dense, dense.select(KEPT), inputs)
    high = measure(exact, exact.select(KEPT), inputs.double())
    for one, other in zip(low, high):
        assert math.isclose(one, other, rel_tol=0.05, abs_tol=1e-6)
    assert abs(rescue_ratio(low)) < 0.05


def test_transported_mass_by_hand():
    plan = torch.tensor([[0.3, 0.0], [0.1, 0.0], [0.05, 0.05], [0.0, 0.3]])
    source = torch.tensor([0.3, 0.2, 0.2, 0.3])
    with untouched(plan, source):
        assert math.isclose(transported_mass(plan, source, torch.tensor([1, 2])), 0.5, rel_tol=1e-6)
        assert math.isclose(transported_mass(plan, source, torch.tensor([1])), 0.5, rel_tol=1e-6)
        assert math.isclose(transported_mass(plan, source, torch.tensor([0, 3])), 1.0, rel_tol=1e-6)


def test_of_no_pruned_channels_or_none_with_mass_everything_was_transported():
    plan = torch.zeros(3, 2)
    assert transported_mass(plan, torch.tensor([0.5, 0.5, 0.0]), torch.tensor([], dtype=torch.long)) == 1.0
    assert transported_mass(plan, torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2])) == 1.0


def test_the_share_that_channels_keep_on_themselves_by_hand():
    fusion_map = torch.tensor([[0.5, 0.25, 0.0, -0.25], [0.0, 0.0, 0.0, 2.0]])
    with untouched(fusion_map):
        assert self_share(fusion_map, torch.tensor([0, 3])) == 0.75
        assert self_share(fusion_map, torch.tensor([3, 0])) == 0.125


def test_the_share_of_a_map_that_only_selects_is_one_and_of_an_empty_map_zero():
    assert self_share(torch.eye(12)[KEPT], KEPT) == 1.0
    assert self_share(torch.zeros(4, 12), KEPT) == 0.0


@pytest.mark.parametrize(
    ("ratios", "far"),
    [
        ([], []),
        ([0.5], []),
        ([0.6, -80.2, 0.7, 0.5], [1]),
        ([0.6, 0.62, 0.61, 0.59, 0.1], [4]),
        ([0.5, -0.01, 0.3], [1]),
        ([-0.5, -0.6, -0.4], []),
        ([0.1, 0.3, 0.5, 0.7, 0.9], []),
        ([0.30, 0.31, 0.32, 0.33, 0.99], [4]),
    ],
)
def test_layers_far_from_the_others_are_found(ratios, far):
    assert outliers(ratios) == far


def test_a_share_that_says_nothing_becomes_a_word():
    assert rescued_share(-211.794) == "harmful, below -100%"
    assert rescued_share(-0.606) == "-60.6%"
    assert diluted_share(25.0) == "high, above 100%"
