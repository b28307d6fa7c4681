"""R12: what goes over the wire is what the Hub's protocol says, request by request."""

import json
import re

from tests.storage.hub.conftest import contents

# The requests of a push in order, each with the names that its JSON body must hold.
PUSH = (
    ("create", "POST", {"name", "organization"}),
    ("info", "GET", set()),
    ("info", "GET", set()),
    ("tree", "GET", set()),
    ("yaml", "POST", {"content", "repoType"}),
    ("preupload", "POST", {"files"}),
    ("batch", "POST", {"operation", "transfers", "objects", "hash_algo"}),
    ("PUT", "PUT", None),
    ("verify", "POST", {"oid", "size"}),
    ("commit", "POST", None),
)
READS = {"info", "tree", "resolve"}


def requests_of(hub) -> list[dict]:
    return [request for request in hub.state.requests if "agent-harnesses" not in request["path"]]


def test_a_push_sends_what_the_protocol_says_in_one_commit(hub, worker, saved, record_figure):
    record_figure("R12", tried=len(PUSH))
    assert worker("push", folder=str(saved), repo_id="me/x", private=True).errors == []
    sent = requests_of(hub)
    assert [(request["step"], request["method"]) for request in sent] == [line[:2] for line in PUSH]
    for request, (step, _, fields) in zip(sent, PUSH):
        assert request["headers"].get("authorization") == (None if step == "PUT" else "Bearer hf_write")
        assert "chunked" not in str(request["headers"].get("transfer-encoding"))
        if fields:
            assert fields <= set(json.loads(request["body"])), step
        if step == "create":
            assert json.loads(request["body"])["visibility"] == "private"
    assert re.fullmatch(r"/api/models/me/x/preupload/main", sent[5]["path"])
    assert json.loads(sent[6]["body"])["transfers"] == ["basic", "multipart"]
    lines = [json.loads(line) for line in sent[-1]["body"].splitlines()]
    assert lines[0]["key"] == "header"
    assert set(lines[0]["value"]) >= {"summary", "description", "parentCommit"}
    kinds = {line["value"]["path"]: line["key"] for line in lines[1:]}
    assert kinds == {name: "lfsFile" if name.endswith(".safetensors") else "file" for name in contents(saved)}


def test_a_push_of_what_is_there_only_reads(hub, worker, saved, record_figure):
    record_figure("R12", tried=1)
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    hub.state.requests.clear()
    assert not worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    assert [request["step"] for request in requests_of(hub)] == ["create", "info", "info", "tree"]


def test_parts_are_sent_in_order_and_completed(hub, worker, saved, record_figure):
    record_figure("R12", tried=1)
    hub.reset(part_size=10_000)
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    steps = [request["step"] for request in requests_of(hub)]
    assert steps[6:] == ["batch", "part", "part", "part", "complete", "verify", "commit"]
    parts = [request["path"].rsplit("/", 1)[-1] for request in requests_of(hub) if request["step"] == "part"]
    assert parts == ["1", "2", "3"]


def test_a_pull_reads_one_commit_throughout(hub, worker, tmp_path, record_figure):
    record_figure("R12", tried=1)
    assert worker("push_model", repo_id="me/x").errors == []
    hub.state.requests.clear()
    answer = worker("load", repo_id="me/x", cache_dir=str(tmp_path))
    assert answer.errors == [], answer.message
    pulled = requests_of(hub)
    assert {request["step"] for request in pulled} <= READS
    assert {request["method"] for request in pulled} == {"GET", "HEAD"}
    head = hub.state.repositories["me/x"].refs["main"]
    revisions = [re.search(r"/resolve/([^/]+)/(.+)", r["path"]) for r in pulled if r["step"] == "resolve"]
    wanted = [found[1] for found in revisions if found is not None and found[2] != "otprune_manifest.json"]
    assert wanted
    assert set(wanted) == {head}
