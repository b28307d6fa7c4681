"""R1: a fault in any request of a push, once or for good, ends in exactly one good state."""

import time

import pytest

from tests.storage.hub.conftest import contents
from tests.storage.hub.state import Fault

STEPS = ("create", "yaml", "preupload", "batch", "PUT", "part", "verify", "commit")
KINDS = {
    "500": {},
    "503": {"Retry-After": "7"},
    "429": {"RateLimit": '"api";r=0;t=9'},
    "cut before": {},
    "cut body": {},
    "answer lost": {},
}
# The work was done although nobody said so; the next attempt finds it there.
ARRIVES_ALL_THE_SAME = {
    ("PUT", "answer lost"),
    ("commit", "answer lost"),
    *(("verify", kind) for kind in KINDS),
}


def prepare(hub, step: str) -> None:
    hub.reset(part_size=10_000 if step == "part" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_survives_a_fault_in_any_request(hub, worker, saved, step, kind, record_figure):
    record_figure("R1")
    prepare(hub, step)
    hub.state.faults.append(Fault(step, kind, headers=KINDS[kind]))
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert hub.state.faults[0].times == 0, "the fault was never met"
    assert answer.errors == [], answer.message
    assert answer.result["changed"]
    assert len(hub.state.repositories["me/x"].commits) == 2  # the one that made it, and ours
    assert hub.state.files("me/x") == contents(saved)
    asked_for = {"503": 7, "429": 9}.get(kind)
    assert asked_for is None or any(asked_for <= wait <= asked_for + 1 for wait in answer.waits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_keeps_failing_says_so_and_can_be_repeated(hub, worker, saved, step, kind, record_figure):
    record_figure("R1")
    prepare(hub, step)
    hub.state.faults.append(Fault(step, kind, times=-1, headers=KINDS[kind]))
    before = contents(saved)
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=300.0)
    assert hub.state.faults[0].times < -1, "the fault was not met again"
    assert answer.seconds < 20
    if (step, kind) in ARRIVES_ALL_THE_SAME:
        assert answer.errors == [], answer.message
    else:
        assert "HubUnavailableError" in answer.errors
        assert "Nothing local is lost" in answer.message
        assert not any(secret in answer.message for secret in ("hf_write", str(saved.parent), "127.0.0.1"))
    assert contents(saved) == before
    hub.state.faults.clear()
    again = worker("push", folder=str(saved), repo_id="me/x")
    assert again.errors == [], again.message
    assert len(hub.state.repositories["me/x"].commits) == 2
    assert hub.state.files("me/x") == before


def test_a_proxys_error_page_in_place_of_json_is_retried(hub, worker, saved):
    hub.state.faults.append(Fault("yaml", "html"))
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    assert hub.state.files("me/x") == contents(saved)


@pytest.mark.parametrize("kind", ["answer lost", "500"])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, worker, saved, kind):
    hub.state.add_repository("me/x")
    hub.state.faults.append(Fault("commit", kind))
    answer = worker("push", folder=str(saved), repo_id="me/x", create_pr=True)
    assert answer.errors == [], answer.message
    assert answer.result["url"] == f"{hub.url}/me/x/discussions/1"
    assert set(hub.state.repositories["me/x"].refs) == {"main", "refs/pr/1"}
    assert hub.state.files("me/x", "refs/pr/1") == contents(saved)
    assert hub.state.files("me/x") == {}


def test_somebody_elses_commit_meanwhile_is_told_and_the_next_push_goes_on_top(hub, worker, saved):
    hub.state.faults.append(Fault("commit", "other commit"))
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert "HubConflictError" in answer.errors
    head = hub.state.repositories["me/x"].refs["main"]
    assert f"changed by somebody else meanwhile: its head is now {head[:12]}" in answer.message
    assert worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    assert hub.state.files("me/x") == {**contents(saved), "other.txt": b"other"}


def test_a_push_that_hangs_ends_at_its_deadline_and_never_commits_later(hub, worker, saved):
    hub.state.faults.append(Fault("PUT", "delay", seconds=1.5))
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=0.6)
    assert "HubTimeoutError" in answer.errors
    assert "TimeoutError" in answer.errors
    assert "set HF_HUB_DISABLE_XET=1" in answer.message
    assert answer.seconds < 1.4
    end = time.monotonic() + 10
    while hub.state.requests[-1]["step"] != "verify" and time.monotonic() < end:
        time.sleep(0.05)  # the upload that nobody waits for any more goes on
    time.sleep(0.3)
    assert hub.state.requests[-1]["step"] == "verify"
    again = worker("push", folder=str(saved), repo_id="me/x")
    assert again.result["changed"]
    assert len(hub.state.repositories["me/x"].commits) == 2


def test_no_wait_is_longer_than_five_minutes(hub, worker, saved):
    hub.state.faults.append(Fault("create", "503", headers={"Retry-After": "100000"}))
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert answer.errors == [], answer.message
    assert answer.waits == [300]


def test_a_wait_that_would_pass_the_deadline_is_not_begun(hub, worker, saved):
    hub.state.faults.append(Fault("create", "503", headers={"Retry-After": "100"}))
    answer = worker("push", folder=str(saved), repo_id="me/x", deadline=50.0)
    assert "HubTimeoutError" in answer.errors
    assert answer.waits == []


def test_a_hub_that_cannot_be_reached_is_not_asked_by_the_client_and_by_us(worker_of):
    """The client tries six times to connect for a download; six times as often would take minutes."""
    answer = worker_of(HF_ENDPOINT="http://127.0.0.1:9")("command", arguments=["verify", "me/x"])
    assert answer.result == 1
    assert len(answer.waits) == 5
