"""What is in a state folder is checked like any other input, by hypothesis too."""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from optimum_otprune.errors import StateError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.gradients import GradientScores
from optimum_otprune.pruning.calibration.samples import Samples
from optimum_otprune.pruning.layer_store import PREPARED_FILE, FinishedLayer, FolderStore, NoStore, prepared_file
from optimum_otprune.pruning.preparation import (
    Expected,
    Prepared,
    WrittenText,
    from_layer,
    from_shared,
    layer_tensors,
    shared_tensors,
)
from optimum_otprune.storage.state_folder import STATE_FILE, StateFolder
from tests.pruning.test_resume import assert_same, make_pruner, prune
from tests.reports import layer_report

DENSE = FFNWeights(up=torch.ones(4, 3), down=torch.ones(3, 4), gate=torch.ones(4, 3))
SMALL = DENSE.select(torch.tensor([0, 2]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def state(tmp_path):
    with StateFolder.opened(tmp_path / "state") as state:
        state.begin({})
        yield state


def finished_layer(index=0, weights=SMALL):
    return FinishedLayer(weights, layer_report(index, before=4, after=2))


def test_a_layer_comes_back_as_it_was_saved_infinity_and_biases_included(state):
    store, saved = FolderStore(state), finished_layer(weights=SMALL._replace(down_bias=torch.zeros(3).double()))
    assert store.finished(0, DENSE, 2) is None
    store.save(saved)
    found = store.finished(0, DENSE, 2)
    assert found.report == saved.report
    assert found.weights.down_bias.dtype == torch.float64
    assert all(torch.equal(one, other) for one, other in zip(found.weights, saved.weights) if one is not None)
    assert store.finished(1, DENSE, 2) is None


def test_without_a_folder_nothing_is_kept():
    NoStore().save(finished_layer())
    assert NoStore().finished(0, DENSE, 2) is None


@pytest.mark.parametrize(
    ("weights", "report", "message"),
    [
        (SMALL._replace(gate=None), {}, "lacks weights of this layer, or has others"),
        (SMALL._replace(down=torch.ones(3, 3)), {}, r"'down' has the shape \(3, 3\)"),
        (SMALL._replace(up=torch.ones(2, 3).long()), {}, "or is no floating-point tensor"),
        (SMALL._replace(up=torch.full((2, 3), float("nan"))), {}, "'up' is not finite"),
        (SMALL, {"layer": 1}, "no report of this layer"),
        (SMALL, {"kept_channels": [0, 4]}, "no report of a layer"),
        (SMALL, {"intercept": 1}, "no report of a layer"),
        (SMALL, {"self_share": "1"}, "no report of a layer"),
        (SMALL, {"self_share": 10**400}, "no report of a layer"),
        (SMALL, {"energies": [1]}, "no report of a layer"),
        (SMALL, {"else": 1}, "no report of this layer"),
    ],
)
def test_a_layer_that_does_not_fit_is_done_again_though_its_checksum_is_right(state, weights, report, message):
    tensors = {name: part for name, part in weights._asdict().items() if part is not None}
    line = json.dumps({**finished_layer().report.to_dict(), **report}).encode()
    state.write({"layer-00000.safetensors": save(tensors), "layer-00000.json": line})
    with pytest.warns(UserWarning, match=f"Layer 0 of the interrupted run is damaged and done again: .*{message}"):
        assert FolderStore(state).finished(0, DENSE, 2) is None


PREPARED = Prepared(
    [2, 4],
    Samples(torch.arange(6).reshape(2, 3), torch.zeros(6, dtype=torch.bool)),
    [GradientScores(*(WeightScores(DENSE.up, DENSE.up, DENSE.up),) * 2)] * 2,
    [torch.eye(3).double()] * 2,
)
# One given sample, and one that the model wrote.
WRITTEN = WrittenText(num_samples=1, seqlen=3, vocab_size=6, seed=0)
EXPECTED = Expected.of([DENSE, DENSE], PREPARED.samples.tokens[:1], WRITTEN, has_scores=True, has_moments=True)


def tensors_of(prepared):
    """All tensors of a preparation by name."""
    layers = [layer_tensors(prepared.part(layer)) for layer in range(len(prepared.widths))]
    own = {f"{layer}: {name}": tensor for layer, part in enumerate(layers) for name, tensor in part.items()}
    return {**shared_tensors(prepared), **own}


def test_a_preparation_comes_back_as_it_was_saved_a_layer_a_file(state):
    assert FolderStore(state).prepared(lambda: PREPARED, lambda: EXPECTED, TensorSpill()) is PREPARED
    assert state.names == {PREPARED_FILE, prepared_file(0), prepared_file(1)}
    found = FolderStore(state).prepared(None, lambda: EXPECTED, TensorSpill())
    assert (found.widths, len(found.scores), len(found.moments)) == ([2, 4], 2, 2)
    assert tensors_of(found).keys() == tensors_of(PREPARED).keys()
    assert all(torch.equal(tensor, tensors_of(PREPARED)[name]) for name, tensor in tensors_of(found).items())


def test_what_was_found_waits_in_files_where_there_is_no_memory_for_it(state, tmp_path):
    FolderStore(state).prepared(lambda: PREPARED, lambda: EXPECTED, TensorSpill())
    spill = TensorSpill(limit=0, folder=tmp_path)
    found = FolderStore(state).prepared(None, lambda: EXPECTED, spill)
    own = [tensor for layer in (0, 1) for tensor in layer_tensors(PREPARED.part(layer)).values()]
    assert spill.spilled_bytes == sum(tensor.numel() * tensor.element_size() for tensor in own)
    assert torch.equal(found.scores[1].fo.gate, PREPARED.scores[1].fo.gate)


def test_a_preparation_of_which_a_layer_is_damaged_is_made_again(state):
    FolderStore(state).prepared(lambda: PREPARED, lambda: EXPECTED, TensorSpill())
    (state.folder / prepared_file(1)).write_bytes(b"")
    made = PREPARED._replace(widths=[1, 1])
    with pytest.warns(UserWarning, match="'prepared-00001.safetensors' of the interrupted run is damaged"):
        assert FolderStore(state).prepared(lambda: made, lambda: EXPECTED, TensorSpill()) is made
    assert FolderStore(state).prepared(None, lambda: EXPECTED, TensorSpill()).widths == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": None}, r"lacks 'widths', or has it too many"),
        ({"moments.0": torch.eye(3)}, r"lacks 'moments\.0', or has it too many"),  # as earlier versions wrote it
        ({"widths": torch.tensor([2, 5])}, "another shape or kind"),
        ({"widths": torch.tensor([2])}, "another shape or kind"),
        ({"tokens": torch.arange(6).reshape(2, 3) + 1}, "another shape or kind"),
        ({"tokens": torch.tensor([[0, 1, 2], [3, 4, 6]])}, "another shape or kind"),  # beyond the vocabulary
        ({"tokens": torch.tensor([[0, 1, 2], [3, 4, -1]])}, "another shape or kind"),
        ({"tokens": torch.arange(9).reshape(3, 3)}, "another shape or kind"),
        ({"is_heldout": torch.zeros(5, dtype=torch.bool)}, "another shape or kind"),
    ],
)
def test_a_preparation_that_does_not_fit_is_refused(change, message):
    tensors = {name: tensor for name, tensor in {**shared_tensors(PREPARED), **change}.items() if tensor is not None}
    with pytest.raises(StateError, match=message):
        from_shared(tensors, EXPECTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": None}, r"lacks 'moments', or has it too many"),
        ({"moment": torch.eye(3)}, r"lacks 'moment', or has it too many"),
        ({"moments": torch.eye(4)}, "another shape or kind"),
        ({"scores.fo.gate": torch.ones(4, 3).long()}, "another shape or kind"),
    ],
)
def test_a_layer_of_a_preparation_that_does_not_fit_is_refused(change, message):
    own = layer_tensors(PREPARED.part(0))
    tensors = {name: tensor for name, tensor in {**own, **change}.items() if tensor is not None}
    with pytest.raises(StateError, match=message):
        from_layer(tensors, EXPECTED.shapes[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A straight run, and the state of the same one before it is saved."""
    tokens = torch.randint(64, (4, 20), generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("finished") / "state"
    torch.set_num_threads(1)
    return prune(make_pruner(), tokens, folder), tokens, folder


def replaced(draw, value):
    """JSON with one part of it, at any depth, replaced, removed or repeated."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        copy = value.copy()
        how = draw(st.sampled_from(["inside", "inside", "inside", "remove", "swap"]))
        if how == "remove":
            del copy[key]
        elif how == "swap":
            copy[key] = copy[draw(st.sampled_from(keys))]
        else:
            copy[key] = replaced(draw, value[key])
        return copy
    return draw(JSON)


def damaged(draw, content):
    """Bytes with a bit flipped, some cut off, or some added."""
    kind = draw(st.sampled_from(["flip", "cut", "add"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    return content[:place] if kind == "cut" else content + draw(st.binary(min_size=1, max_size=8))


@st.composite
def attack(draw):
    """A change of one file of a state folder, and whether the index is made to agree with it."""
    name = draw(
        st.sampled_from([STATE_FILE, STATE_FILE, "layer-00001.json", "layer-00001.safetensors", PREPARED_FILE])
    )
    is_agreed = name != STATE_FILE and draw(st.booleans())
    is_json = name.endswith(".json") and draw(st.integers(0, 3)) > 0

    def change(content):
        return json.dumps(replaced(draw, json.loads(content))).encode() if is_json else damaged(draw, content)

    return name, is_agreed, change


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_in_the_state_the_run_is_refused_or_ends(data, finished, tmp_path_factory, record_figure):
    straight, tokens, original = finished
    folder = tmp_path_factory.mktemp("fuzz") / "state"
    shutil.copytree(original, folder)
    name, is_agreed, change = data.draw(attack())
    content = change((folder / name).read_bytes())
    (folder / name).write_bytes(content)
    if is_agreed:
        index = json.loads((folder / STATE_FILE).read_text())
        index["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / STATE_FILE).write_text(json.dumps(index))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a layer is done again
            resumed = prune(make_pruner(), tokens, folder)
    except StateError:
        resumed = None
    if resumed is not None and not is_agreed:  # else there may be other numbers, which nobody can tell
        assert_same(resumed, straight)
    record_figure("State files damaged at random")
    shutil.rmtree(folder.parent)
