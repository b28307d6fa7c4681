"""Width rounding, top importance and greedy elimination."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from optimum_otprune.errors import ConfigurationError, NumericalError, ShapeError
from optimum_otprune.functional import elimination, selection
from optimum_otprune.functional.gram import gram_statistics
from optimum_otprune.functional.linalg import symmetric
from optimum_otprune.functional.selection import (
    kept_width,
    obs_channels,
    rounded_multiple,
    sensible_multiple,
    top_channels,
)
from tests.functional.helpers import law, normal, permutation, seeds, untouched

many = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ((10, 0.3), 7),
        ((5, 0.5), 3),  # 2.5: halves are rounded up
        ((172, 0.5), 86),
        ((11008, 0.2, 128), 8832),  # 8806.4 is 68.8 multiples
        ((100, 0.01, 64), 64),  # the nearest multiple, 128, would be wider than the layer
        ((100, 0.999, 16), 16),
        ((7, 0.999), 1),
        ((7, 0.0, 100), 7),
    ],
)
def test_the_kept_width_by_hand(arguments, kept):
    assert kept_width(*arguments) == kept


@law
@given(n=many, ratio=st.floats(0, 1, exclude_min=True, exclude_max=True), multiple=many)
def test_the_kept_width_is_the_nearest_multiple_that_fits(n, ratio, multiple):
    assume(multiple <= n)
    kept = kept_width(n, ratio, multiple)
    assert kept % multiple == 0
    assert multiple <= kept <= n
    candidates = range(multiple, n + 1, multiple)
    wanted = (1 - ratio) * n
    assert abs(kept - wanted) <= min(abs(candidate - wanted) for candidate in candidates) + 1e-9 * n


@law
@given(n=many, multiple=many)
def test_ratio_zero_keeps_the_width_whatever_the_multiple(n, multiple):
    assert kept_width(n, 0.0, multiple) == n


@law
@given(n=many, ratios=st.tuples(st.floats(0.001, 0.999), st.floats(0.001, 0.999)), multiple=st.integers(1, 256))
def test_a_higher_ratio_never_keeps_more(n, ratios, multiple):
    assume(multiple <= n)
    assert kept_width(n, max(ratios), multiple) <= kept_width(n, min(ratios), multiple)


def test_a_multiple_wider_than_the_layer_is_refused():
    with pytest.raises(ConfigurationError, match="`multiple_of` is 49, but the layer has only 48 channels.*such as 3"):
        kept_width(48, 0.5, 49)


@law
@given(n=many, multiple=st.integers(1, 4096))
def test_a_sensible_multiple_moves_the_width_by_at_most_a_thirty_second(n, multiple):
    sensible = sensible_multiple(n, multiple)
    assert 1 <= sensible <= multiple
    assert sensible == 1 or sensible / 2 <= n / 32
    if multiple <= n // 16:
        assert sensible == multiple


@law
@given(n=many, ratio=st.floats(0.01, 0.95))
def test_a_number_that_programs_like_moves_the_width_by_at_most_a_thirty_second(n, ratio):
    chosen, lowered = rounded_multiple(n, ratio, 128), sensible_multiple(n, 128)
    assert chosen % lowered == 0
    if chosen != lowered:
        assert chosen in (256, 64, 32)
        assert lowered < 128
        assert abs(kept_width(n, ratio, chosen) - (1 - ratio) * n) <= n / 32


@law
@given(n=many, ratios=st.tuples(st.floats(0.01, 0.95), st.floats(0.01, 0.95)))
def test_with_numbers_that_programs_like_a_higher_ratio_never_keeps_more(n, ratios):
    fewer, more = (kept_width(n, ratio, rounded_multiple(n, ratio, 128)) for ratio in (max(ratios), min(ratios)))
    assert fewer <= more


@pytest.mark.parametrize(
    ("n", "ratio", "width"), [(1536, 0.5, 768), (1536, 0.31, 1024), (1536, 0.3, 1088), (400, 0.5, 192), (48, 0.5, 24)]
)
def test_the_default_prefers_256_then_64_then_32_where_it_must_be_lowered(n, ratio, width):
    assert kept_width(n, ratio, rounded_multiple(n, ratio, 128)) == width


def test_the_channels_with_the_highest_importance_stay_sorted():
    assert top_channels(torch.tensor([5.0, -1.0, 9.0, 2.0, 7.0]), 3).tolist() == [0, 2, 4]


@law
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=12), share=st.floats(0, 1))
def test_top_channels_agree_with_a_stable_sort_in_python(scores, share):
    kept = max(1, round(share * len(scores)))
    order = sorted(range(len(scores)), key=lambda j: -scores[j])  # Python's sort is stable: of equal ones, the first
    importance = torch.tensor(scores, dtype=torch.float64)
    with untouched(importance):
        assert top_channels(importance, kept).tolist() == sorted(order[:kept])


@law
@given(seed=seeds)
def test_permuting_importances_permutes_the_top_channels(seed):
    importance, order = normal(seed, 12), permutation(seed, 12)
    kept, moved = top_channels(importance, 5), top_channels(importance[order], 5)
    assert sorted(order[moved].tolist()) == kept.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_top_channels_are_long_on_the_same_device_for_every_dtype(dtype):
    importance = torch.tensor([1.0, 3.0, 2.0], dtype=dtype)
    kept = top_channels(importance, 2)
    assert kept.dtype == torch.long
    assert kept.device == importance.device
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("kept", [0, 4])
def test_more_channels_than_there_are_or_none_cannot_be_kept(kept):
    with pytest.raises(ShapeError, match=rf"Cannot keep {kept} channels by an importance of shape \(3,\)"):
        top_channels(torch.ones(3), kept)


def test_an_importance_that_is_no_vector_is_refused():
    with pytest.raises(ShapeError, match=r"of shape \(3, 2\)"):
        top_channels(torch.ones(3, 2), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_importance_that_is_not_finite_is_refused(value):
    with pytest.raises(NumericalError, match="importance of a channel is NaN or infinite"):
        top_channels(torch.tensor([1.0, value]), 1)


def layer(seed, n=9, d=4, tokens=40):
    hidden = normal(seed, tokens, n) @ (torch.eye(n).double() + 0.5 * normal(seed + 1, n, n))
    return hidden, hidden.T @ hidden, normal(seed + 2, d, n)


def refit_error(gram, down, kept):
    """Least Σ ‖W h − W' h_K‖² over W', from scratch."""
    total = ((down @ gram) * down).sum()
    cross = down @ gram[:, kept]
    return float(total - (cross * torch.linalg.solve(gram[kept][:, kept], cross.T).T).sum())


def greedy(gram, down, kept_size):
    """Remove, each time, the channel without which the others can be refitted best."""
    damped = gram + elimination._DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    alive = list(range(len(gram)))
    while len(alive) > kept_size:
        errors = {j: refit_error(damped, down, [k for k in alive if k != j]) for j in alive}
        alive.remove(min(errors, key=errors.get))
    return alive


@law
@given(seed=seeds, kept_size=st.integers(1, 8))
def test_elimination_agrees_with_refitting_from_scratch_after_every_removal(seed, kept_size):
    _, gram, down = layer(seed)
    with untouched(gram, down):
        kept = obs_channels(gram, down, kept_size)
    assert kept.tolist() == greedy(gram, down, kept_size)


def test_orthogonal_channels_go_by_their_output_energy():
    gram = torch.diag(torch.tensor([4.0, 1.0, 9.0, 1.0], dtype=torch.float64))
    down = torch.tensor([[1.0, 3.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)  # energies 4, 9, 9, 2
    assert obs_channels(gram, down, 3).tolist() == [0, 1, 2]
    assert obs_channels(gram, down, 2).tolist() == [1, 2]


def test_of_equal_costs_the_least_important_channel_goes_first():
    gram, down = torch.eye(4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    importance = torch.tensor([3.0, 1.0, 4.0, 2.0])
    with untouched(importance):
        assert obs_channels(gram, down, 3, importance).tolist() == [0, 2, 3]
        assert obs_channels(gram, down, 2, importance).tolist() == [0, 2]


def test_importance_decides_nothing_but_ties():
    _, gram, down = layer(5)
    assert torch.equal(obs_channels(gram, down, 4), obs_channels(gram, down, 4, normal(1, 9)))


@law
@given(seed=seeds)
def test_permuting_channels_permutes_what_elimination_keeps(seed):
    _, gram, down = layer(seed)
    order = permutation(seed, 9)
    moved = obs_channels(gram[order][:, order], down[:, order], 4)
    assert sorted(order[moved].tolist()) == obs_channels(gram, down, 4).tolist()


@law
@given(seed=seeds, scale=st.sampled_from([1e-6, 1e6]))
def test_the_scale_of_a_layer_changes_nothing(seed, scale):
    _, gram, down = layer(seed)
    kept = obs_channels(gram, down, 4).tolist()
    assert obs_channels(scale * gram, down, 4).tolist() == kept
    assert obs_channels(gram, scale * down, 4).tolist() == kept


def duplicates(seed):
    """Six different channels, each there twice, with down columns of their own."""
    hidden = normal(seed, 60, 6).repeat_interleave(2, dim=1)
    return hidden, hidden.T @ hidden, normal(seed + 1, 5, 12)


def is_one_of_each_pair(kept):
    return sorted(channel // 2 for channel in kept.tolist()) == list(range(6))


@law
@given(seed=seeds)
def test_of_exact_duplicates_one_stays(seed):
    _, gram, down = duplicates(seed)
    assert is_one_of_each_pair(obs_channels(gram, down, 6))


def wide_layer(kind, seed, n=150, d=43):
    """Hidden activations and down projection of a layer on which greedy elimination is tried in blocks."""
    hidden = normal(seed, 60 if kind == "few tokens" else 3 * n, n)
    if kind == "correlated":
        hidden = hidden @ (normal(seed + 1, n, 20) @ normal(seed + 2, 20, n) / 10 + 0.2 * torch.eye(n).double())
    if kind == "duplicates":
        hidden = hidden[:, : n // 2].repeat_interleave(2, dim=1)
    if kind == "dead":
        hidden[:, permutation(seed, n)[:40]] = 0
    return hidden, normal(seed + 3, d, n)


def one_by_one(gram, down, count):
    """Greedy elimination by its formulas, a whole matrix at a time."""
    inverse = torch.linalg.inv(gram + elimination._DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double())
    removed, costs, down = [], [], down.clone()
    for _ in range(count):
        cost = down.square().sum(dim=0) / inverse.diagonal()
        cost[removed] = torch.inf
        worst = int(cost.argmin())
        removed.append(worst)
        costs.append(float(cost[worst]))
        row = inverse[worst] / inverse[worst, worst]
        down -= torch.outer(down[:, worst], row)
        inverse -= torch.outer(inverse[worst], row)
        inverse[removed, removed] = 1.0
    return removed, costs


@pytest.mark.parametrize("kind", ["random", "correlated", "duplicates", "dead", "few tokens"])
@pytest.mark.parametrize(("block", "rows", "dead"), [(1, 16, 0.0), (7, 16, 1 / 16), (16, 150, 0.5), (64, 32, 1.0)])
def test_blocks_remove_what_one_at_a_time_removes(monkeypatch, kind, block, rows, dead):
    monkeypatch.setattr(elimination, "_BLOCK", block)
    monkeypatch.setattr(elimination, "_MOST_DEAD", dead)
    monkeypatch.setattr(symmetric, "_LEAST_ROWS", rows)
    monkeypatch.setattr(symmetric, "_PIVOTS", block + 3)
    hidden, down = wide_layer(kind, block)
    gram = hidden.T @ hidden
    with untouched(gram, down):
        found = selection.obs_elimination(gram, down, 150)
    channels, costs = one_by_one(gram, down, 150)
    assert sorted(found.channels.tolist()) == list(range(150))
    scale = float(((down @ gram) * down).sum())
    torch.testing.assert_close(found.costs, torch.tensor(costs).double(), rtol=1e-6, atol=1e-9 * scale)
    damped = gram + elimination._DAMPING * gram.diagonal().mean() * torch.eye(150).double()
    for kept_size in (10, 75, 120):
        mine, theirs = (
            refit_error(damped, down, sorted(part[150 - kept_size :])) for part in (found.channels.tolist(), channels)
        )
        assert mine <= theirs * (1 + 1e-6) + 1e-9 * scale


def test_one_of_every_pair_of_duplicates_is_left_when_blocks_hold_both(monkeypatch):
    monkeypatch.setattr(elimination, "_BLOCK", 5)
    hidden, gram, down = duplicates(0)
    kept = obs_channels(gram, down, 6)
    assert is_one_of_each_pair(kept)
    targets = hidden @ down.T
    refitted = torch.linalg.lstsq(hidden[:, kept], targets).solution
    torch.testing.assert_close(hidden[:, kept] @ refitted, targets, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kept_size", [1, 4, 8])
def test_fewer_tokens_than_channels_are_enough_for_a_choice(kept_size):
    _, gram, down = layer(2, tokens=3)
    kept = obs_channels(gram, down, kept_size).tolist()
    assert len(set(kept)) == kept_size
    assert kept == sorted(kept)


def test_channels_that_are_never_active_go_first():
    hidden, _, down = layer(4)
    hidden[:, [2, 6]] = 0
    assert obs_channels(hidden.T @ hidden, down, 7).tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_a_layer_that_is_never_active_still_gets_its_width():
    assert len(obs_channels(torch.zeros(6, 6), torch.ones(3, 6), 2)) == 2


def test_keeping_all_channels_keeps_all():
    _, gram, down = layer(1)
    assert obs_channels(gram, down, 9).tolist() == list(range(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gives_the_choice_of_the_same_numbers_in_float64(dtype):
    _, gram, down = layer(6)
    gram, down = gram.float(), down.to(dtype)
    kept = obs_channels(gram, down, 4)
    assert kept.dtype == torch.long
    assert torch.equal(kept, obs_channels(gram.double(), down.double(), 4))


def test_elimination_keeps_better_channels_than_output_energy_on_correlated_ones():
    errors = []
    for seed in range(5):
        hidden, gram, down = layer(seed, n=16, tokens=200)
        statistics = gram_statistics(hidden, hidden @ down.T)
        energy = gram.diagonal() * down.square().sum(dim=0)
        for kept in (obs_channels(gram, down, 8), top_channels(energy, 8)):
            errors.append(refit_error(statistics.gram, down, kept.tolist()))
    assert sum(errors[0::2]) < sum(errors[1::2])


def test_a_gram_matrix_of_another_width_is_refused():
    with pytest.raises(ShapeError, match=r"has shape \(4, 4\), but `down` has 5 channels: want \(5, 5\)"):
        obs_channels(torch.eye(4), torch.ones(3, 5), 2)


def test_a_gram_matrix_that_is_not_finite_is_refused():
    gram = torch.eye(5)
    gram[2, 2] = float("nan")
    with pytest.raises(NumericalError, match="the Gram matrix of the channels is NaN or infinite"):
        obs_channels(gram, torch.ones(3, 5), 2)


def test_the_costs_of_elimination_add_up_to_the_error_of_the_best_refit():
    hidden = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = hidden.T @ hidden
    found = selection.obs_elimination(gram, down, 4)
    damped = gram + elimination._DAMPING * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    kept = torch.tensor([channel for channel in range(7) if channel not in found.channels])
    refit = down @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    error = down - refit @ torch.eye(7, dtype=torch.float64)[kept]
    torch.testing.assert_close(found.costs.sum(), ((error @ damped) * error).sum())
    assert sorted(kept.tolist()) == selection.obs_channels(gram, down, 3).tolist()


def test_elimination_may_take_every_channel_or_none():
    gram, down = torch.eye(5, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)[None] + 1
    assert selection.obs_elimination(gram, down, 5).channels.tolist() == [0, 1, 2, 3, 4]
    assert len(selection.obs_elimination(gram, down, 0).channels) == 0
