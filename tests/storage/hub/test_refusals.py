"""What cannot work is said in one sentence of a class of its own, before hours of work where it can be known."""

import pytest

from optimum_otprune.storage.manifest import write_manifest
from tests.storage.hub.conftest import contents
from tests.storage.hub.state import Fault

CASES = [
    ("no token", {"repo_id": "me/x", "token": "hf_expired"}, "HubAuthenticationError", "not valid any more"),
    ("a token that may only read", {"repo_id": "me/x", "token": "hf_read"}, "HubPermissionError", "role 'write'"),
    ("somebody else's name", {"repo_id": "you/x"}, "HubPermissionError", "you"),
    ("somebody else's repository", {"repo_id": "you/open"}, "HubPermissionError", "you/open"),
    ("a hidden repository", {"repo_id": "you/hidden"}, "HubPermissionError", "you/hidden"),
    ("public, though private was wanted", {"repo_id": "me/open", "private": True}, "HubRejectedError", "is public"),
    ("a name that is none", {"repo_id": "me/../x"}, "HubRejectedError", "Give 'user/name'"),
    ("a path", {"repo_id": "/home/me/x"}, "HubRejectedError", "Give 'user/name'"),
]


@pytest.fixture
def hub(hub):
    for name, private in (("you/open", False), ("you/hidden", True), ("me/open", False), ("me/fine", False)):
        hub.state.add_repository(name, private)
    return hub


@pytest.mark.parametrize("check", [True, False], ids=["checked before", "pushed"])
@pytest.mark.parametrize(("case", "arguments", "error", "message"), CASES, ids=[case[0] for case in CASES])
def test_what_cannot_work_is_refused(hub, worker, saved, check, case, arguments, error, message):
    answer = worker("check", **arguments) if check else worker("push", folder=str(saved), **arguments)
    assert answer.errors[0] == error, answer
    assert "OTPruneError" in answer.errors
    assert "OSError" in answer.errors
    assert message in answer.message or not check
    assert "hf_" not in answer.message
    assert "\n" not in answer.message
    assert answer.waits == []
    assert "me/x" not in hub.state.repositories
    assert all(len(repository.commits) == 1 for repository in hub.state.repositories.values())


def test_a_check_changes_nothing_and_returns_the_full_name(hub, worker):
    assert worker("check", repo_id="new").result == "me/new"
    assert worker("check", repo_id="team/new").result == "team/new"
    assert worker("check", repo_id="me/open", revision="absent").result == "me/open"
    assert "me/new" not in hub.state.repositories
    assert {request["step"] for request in hub.state.requests} == {"whoami", "info", "preupload"}
    assert worker("check", repo_id="guests/new").errors[0] == "HubPermissionError"


def test_a_fine_grained_token_may_write_where_it_says(hub, worker, saved):
    assert worker("check", repo_id="me/fine", token="hf_fine").result == "me/fine"
    assert worker("check", repo_id="me/open", token="hf_fine").errors[0] == "HubPermissionError"


@pytest.mark.parametrize(
    ("step", "status", "error"),
    [
        ("preupload", "401", "HubAuthenticationError"),
        ("commit", "401", "HubAuthenticationError"),
        ("commit", "403", "HubPermissionError"),
        ("commit", "409", "HubConflictError"),
        ("commit", "412", "HubConflictError"),
        ("commit", "404", "HubNotFoundError"),
        ("commit", "400", "HubRejectedError"),
        ("batch", "403", "HubPermissionError"),
        ("PUT", "403", "HubPermissionError"),
        ("whoami", "401", "HubAuthenticationError"),
    ],
)
def test_a_refusal_in_the_middle_is_not_retried_and_a_second_push_completes(hub, worker, saved, step, status, error):
    hub.state.faults.append(Fault(step, status, times=-1))
    arguments = {} if step == "whoami" else {"folder": str(saved)}
    answer = worker("push" if arguments else "check", repo_id="me/x", **arguments)
    assert answer.errors[0] == error, answer
    assert answer.waits == []
    assert sum(request["step"] == step for request in hub.state.requests) == 1
    assert "local is lost" in answer.message
    hub.state.faults.clear()
    assert worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    assert hub.state.files("me/x") == contents(saved)
    assert len(hub.state.repositories["me/x"].commits) == 2


def test_an_existing_repository_is_used(hub, worker, saved):
    assert worker("push", folder=str(saved), repo_id="me/open").result["changed"]
    assert hub.state.files("me/open") == contents(saved)


def test_metadata_that_the_hub_refuses_is_told_before_an_upload(hub, worker, saved):
    (saved / "README.md").write_text("---\nbase_model: /home/alice/model\n---\n")
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert answer.errors[0] == "HubRejectedError"
    assert "Invalid metadata in README.md" in answer.message
    assert not {"preupload", "PUT", "commit"} & {request["step"] for request in hub.state.requests}


def test_offline_mode_and_a_hub_that_is_away_are_told(hub, worker_of, saved):
    offline = worker_of(HF_HUB_OFFLINE="1")
    for job in (("check", {}), ("push", {"folder": str(saved)})):
        answer = offline(job[0], repo_id="me/x", **job[1])
        assert answer.errors[0] == "HubUnavailableError"
        assert "offline mode is on" in answer.message
        assert answer.waits == []
    away = worker_of(HF_ENDPOINT="http://127.0.0.1:9")
    answer = away("push", folder=str(saved), repo_id="me/x")
    assert answer.errors[0] == "HubUnavailableError"
    assert "no connection" in answer.message
    assert answer.waits == [1, 2, 4, 8, 16]
    assert hub.state.requests == []


def test_without_a_token_nothing_is_asked(hub, worker_of, saved):
    answer = worker_of(HF_TOKEN="")("check", repo_id="me/x")
    assert answer.errors[0] == "HubAuthenticationError"
    assert "hf auth login" in answer.message


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"repo_id": "me/absent"}, "HubNotFoundError"),
        ({"repo_id": "you/hidden"}, "HubNotFoundError"),
        ({"repo_id": "me/open", "revision": "absent"}, "HubNotFoundError"),
        ({"repo_id": "me/open", "local_files_only": True}, "HubNotFoundError"),
        ({"repo_id": "me/open", "token": "hf_expired"}, "HubAuthenticationError"),
    ],
)
def test_what_cannot_be_verified_is_told(hub, worker, arguments, error):
    answer = worker("verify", **arguments)
    assert answer.errors[0] == error, answer


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model.safetensors", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("is_same", [True, False], ids=["of the same content", "of another"])
def test_a_link_is_refused_and_what_it_leads_to_is_not_sent(
    hub, worker, saved, tmp_path, name, is_same, record_figure
):
    (saved / "additional_chat_templates").mkdir()
    (saved / "additional_chat_templates" / "a.jinja").write_text("a template")
    write_manifest(saved)
    linked = saved / name.split("/")[0]
    linked.rename(tmp_path / "secret")
    if linked.suffix and not is_same:
        (tmp_path / "secret").write_text("a private key")
    linked.symlink_to(tmp_path / "secret")
    answer = worker("push", folder=str(saved), repo_id="me/new")
    assert answer.errors[0] == "IntegrityError"
    assert f"'{name}' is a link or no plain file" in answer.message
    assert not hub.state.requests
    record_figure("R13", tried=1, ok=1)
