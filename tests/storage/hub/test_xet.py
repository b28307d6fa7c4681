"""R2: the same over Xet, which is what users get by default, through a store that is a folder."""

import importlib.util

import pytest

from tests.storage.hub.conftest import contents
from tests.storage.hub.state import Fault
from tests.storage.hub.test_faults import KINDS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")

XET = {"HF_HUB_DISABLE_XET": "0"}
STEPS = ("create", "yaml", "preupload", "commit")


@pytest.fixture
def worker(hub, worker_of, tmp_path_factory):
    hub.reset(xet=tmp_path_factory.mktemp("store"))
    return worker_of(**XET)


def check_pulled(hub, worker, saved, cache) -> None:
    """One commit, its weights in the Xet store, and equal bytes when they are read from there."""
    repository = hub.state.repositories["me/x"]
    assert len(repository.commits) == 2
    assert repository.commits[repository.refs["main"]]["model.safetensors"][0] == "xet"
    answer = worker("verify", repo_id="me/x", cache_dir=str(cache))
    assert answer.errors == [], answer.message
    snapshot = next(cache.glob("models--me--x/snapshots/*"))
    listed = {name: data for name, data in contents(snapshot).items() if name != ".gitattributes"}
    assert listed == contents(saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_over_xet_survives_a_fault_in_any_request(hub, worker, saved, tmp_path, step, kind, record_figure):
    record_figure("R2")
    hub.state.faults.append(Fault(step, kind, headers=KINDS[kind]))
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert hub.state.faults[0].times == 0, "the fault was never met"
    assert answer.errors == [], answer.message
    check_pulled(hub, worker, saved, tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_over_xet_that_keeps_failing_can_be_repeated(hub, worker, saved, tmp_path, step, kind, record_figure):
    record_figure("R2")
    hub.state.faults.append(Fault(step, kind, times=-1, headers=KINDS[kind]))
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=300.0)
    if (step, kind) != ("commit", "answer lost"):
        assert "HubUnavailableError" in answer.errors
    hub.state.faults.clear()
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    check_pulled(hub, worker, saved, tmp_path / "cache")


@pytest.mark.slow  # the Xet client waits in earnest
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_for_the_store_that_fails_once_is_asked_for_again(hub, worker, saved, tmp_path, kind, record_figure):
    record_figure("R2")
    hub.state.faults.append(Fault("xet-token", kind, headers={}))
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert answer.errors == [], answer.message
    check_pulled(hub, worker, saved, tmp_path / "cache")


def test_a_hub_without_xet_is_told_with_the_way_around(hub, worker, saved):
    hub.state.xet = None
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=8.0)
    assert answer.errors[0] in ("HubUnavailableError", "HubTimeoutError")
    assert "HF_HUB_DISABLE_XET=1" in answer.message


def test_a_store_that_hangs_ends_at_the_deadline(hub, worker, saved):
    hub.state.faults.append(Fault("xet-token", "delay", seconds=3.0))
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=1.0)
    assert answer.errors[0] == "HubTimeoutError"
    assert "HF_HUB_DISABLE_XET=1" in answer.message
    assert answer.seconds < 2.5
    assert len(hub.state.repositories["me/x"].commits) == 1
