"""What is pushed is what is pulled: bytes and logits, without this package, over LFS and Xet."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.storage.manifest import verify_folder, write_manifest
from tests.conftest import run_command
from tests.reports import lm_eval_content
from tests.storage.hub.conftest import ROOT, contents, environment
from tests.storage.hub.state import Fault, git_oid

XET = {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture
def pruned(llama, tokens, tokenizer, tmp_path) -> Path:
    pruner = OTPruner.from_pretrained(
        llama, OTPruningConfig(method="flap", pruning_ratio=0.5, multiple_of=1), tokenizer=tokenizer
    )
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "pruned", max_shard_size="20KB")


def logits_digest(folder: Path) -> str:
    with torch.no_grad():
        logits = OTPruner.from_pretrained(folder).model(input_ids=torch.arange(12)[None]).logits
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_push_and_pull_without_this_package_give_equal_bytes_and_logits(
    hub, worker_of, pruned, tmp_path, record_figure
):
    record_figure("R2", tried=2)
    hub.reset(xet=tmp_path / "store")
    for repo_id, variables in (("me/over-lfs", {}), ("me/over-xet", XET)):
        answer = worker_of(**variables)("push", folder=str(pruned), repo_id=repo_id)
        assert answer.errors == [], answer.message
        assert len(hub.state.repositories[repo_id].commits) == 2
    kinds = {
        name: {kind for kind, _ in repository.commits[repository.refs["main"]].values()}
        for name, repository in hub.state.repositories.items()
    }
    assert kinds == {"me/over-lfs": {"regular", "lfs"}, "me/over-xet": {"regular", "xet"}}
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "storage" / "hub" / "pull.py", *kinds],
        env=environment(hub, tmp_path / "home", **XET),
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here = {name: hashlib.sha256(content).hexdigest() for name, content in contents(pruned).items()}
    for repo_id, there in json.loads(done.stdout).items():
        assert there["files"] == here, repo_id
        assert there["logits"] == logits_digest(pruned), repo_id


def test_results_that_were_added_are_pushed_shown_under_the_new_name_and_pulled_verified(
    hub, worker, pruned, tmp_path, llama
):
    (tmp_path / "results.json").write_text(json.dumps(lm_eval_content(num_parameters=llama.num_parameters())))
    assert run_command("card", pruned, "--lm-eval", tmp_path / "results.json") == 0
    answer = worker("command", arguments=["push", str(pruned), "me/x"])
    assert answer.result == 0
    files = hub.state.files("me/x")
    assert files[".eval_results/lm_eval.yaml"] == (pruned / ".eval_results" / "lm_eval.yaml").read_bytes()
    assert "| arc\\_easy | acc ↑ |" in files["README.md"].decode()
    assert "# x\n" in files["README.md"].decode()
    assert worker("verify", repo_id="me/x").errors == []


def test_a_model_in_memory_is_pushed_and_pulled_verified(hub, worker, tmp_path):
    answer = worker("push_model", repo_id="x", private=True)
    assert answer.errors == [], answer.message
    assert answer.result["repo_id"] == "me/x"
    assert hub.state.repositories["me/x"].private
    assert "# x\n" in hub.state.files("me/x")["README.md"].decode()
    assert len(hub.state.repositories["me/x"].commits) == 2
    loaded = worker("load", repo_id="me/x", cache_dir=str(tmp_path))
    assert loaded.errors == [], loaded.message
    assert not worker("push_model", repo_id="me/x").result["changed"]
    assert len(hub.state.repositories["me/x"].commits) == 2


def assert_pushed(files: dict[str, bytes], folder: Path, repo_id: str, *added: str) -> None:
    """The folder's files; only the card, and so the manifest, name the repository in place of the folder."""
    saved = contents(folder)
    assert files.keys() == {*saved, *added}
    assert {name for name in saved if files[name] != saved[name]} == {"README.md", "otprune_manifest.json"}
    assert f'from_pretrained("{repo_id}")' in files["README.md"].decode()
    listed = json.loads(files["otprune_manifest.json"])["files"]["README.md"]
    assert listed["sha256"] == hashlib.sha256(files["README.md"]).hexdigest()


def test_saving_can_push_in_the_same_call_and_is_refused_before_anything_is_written(hub, worker, tmp_path):
    refused = worker("save", folder=str(tmp_path / "x"), push_to_hub=True, token="hf_read")
    assert "HubPermissionError" in refused.errors
    assert not (tmp_path / "x").exists()
    assert hub.state.repositories == {}
    answer = worker("save", folder=str(tmp_path / "x"), push_to_hub=True, commit_message="First")
    assert answer.errors == [], answer.message
    assert_pushed(hub.state.files("me/x"), tmp_path / "x", "me/x")
    header = json.loads(hub.state.requests[-1]["body"].splitlines()[0])
    assert header["value"]["summary"] == "First"
    assert header["value"]["parentCommit"]


def test_a_push_that_fails_leaves_the_saved_folder(hub, worker, tmp_path):
    hub.state.faults.append(Fault("commit", "500", times=-1))
    assert "HubUnavailableError" in worker("save", folder=str(tmp_path / "x"), push_to_hub=True).errors
    verify_folder(tmp_path / "x")
    hub.state.faults.clear()
    assert worker("push", folder=str(tmp_path / "x"), repo_id="me/x").result["changed"]
    assert hub.state.files("me/x") == contents(tmp_path / "x")


def test_options_of_pushing_without_pushing_are_refused(llama, tmp_path):
    pruner = OTPruner.from_pretrained(llama)
    with pytest.raises(ConfigurationError, match="`repo_id` would be ignored without `push_to_hub=True`"):
        pruner.save_pretrained(tmp_path / "x", repo_id="me/x")
    with pytest.raises(ConfigurationError, match="Did you mean 'private'"):
        pruner.save_pretrained(tmp_path / "x", push_to_hub=True, privat=True)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_is_pushed_alone_and_read_again(hub, worker, tmp_path):
    text = OTPruningConfig(pruning_ratio=0.25).to_json_string()
    for repo_id, folder in (("me/one", None), ("me/two", str(tmp_path / "two"))):
        answer = worker("push_config", repo_id=repo_id, folder=folder)
        assert answer.errors == [], answer.message
        assert answer.result == text
        assert hub.state.files(repo_id) == {"otprune_config.json": text.encode()}


def test_only_listed_files_are_sent_and_only_stale_weights_are_deleted(hub, worker, saved):
    (saved / "notes.md").write_text("private")
    (saved / ".env").write_text("secret")
    state = hub.state
    state.add_repository("me/x")
    state.blobs[git_oid(b"old")] = b"old"
    old = dict.fromkeys(
        ("pytorch_model.bin", "model.safetensors.index.json", "plot.png"), ("regular", git_oid(b"old"))
    )
    state.add_commit("me/x", "main", old)
    assert worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    listed = {name: data for name, data in contents(saved).items() if name not in ("notes.md", ".env")}
    assert state.files("me/x") == {**listed, "plot.png": b"old"}
    assert len(state.repositories["me/x"].commits) == 3


@pytest.mark.parametrize("damaged", [False, True])
def test_files_of_an_earlier_push_that_are_gone_are_deleted(hub, worker, saved, tmp_path, damaged):
    (saved / "tokenizer.json").write_text("{}")
    write_manifest(saved)
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    hub.state.blobs[git_oid(b"notes")] = b"notes"
    hub.state.add_commit("me/x", "main", {"notes.txt": ("regular", git_oid(b"notes"))})
    if damaged:
        hub.state.add_commit("me/x", "main", {"otprune_manifest.json": ("regular", git_oid(b"notes"))})
    (saved / "tokenizer.json").unlink()
    write_manifest(saved)
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert answer.errors == [], answer.message
    kept = {"notes.txt": b"notes"} | ({"tokenizer.json": b"{}"} if damaged else {})
    assert hub.state.files("me/x") == {**contents(saved), **kept}
    verified = worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache"))
    assert verified.errors[:1] == (["IntegrityError"] if damaged else []), verified.message


def test_an_edited_card_is_sent_with_a_manifest_that_fits_it(hub, worker, saved, tmp_path):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# Edited\n")
    before = contents(saved)
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    assert contents(saved) == before
    assert b"Edited" in hub.state.files("me/x")["README.md"]
    assert worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache")).errors == []
    assert not worker("push", folder=str(saved), repo_id="me/x").result["changed"]


def test_a_damaged_folder_is_not_sent(hub, worker, saved):
    (saved / "model.safetensors").write_bytes(b"\0" * 30_000)
    answer = worker("push", folder=str(saved), repo_id="me/x")
    assert "IntegrityError" in answer.errors
    assert hub.state.requests == []


def test_a_branch_is_made_where_it_does_not_exist(hub, worker, saved):
    for changed in (True, False):
        answer = worker("push", folder=str(saved), repo_id="me/x", revision="trial")
        assert answer.errors == [], answer.message
        assert answer.result["changed"] is changed
    assert hub.state.files("me/x", "trial") == contents(saved)
    assert hub.state.files("me/x") == {}


def test_a_pull_request_leaves_the_main_branch(hub, worker, saved):
    hub.state.add_repository("me/x")
    answer = worker("push", folder=str(saved), repo_id="me/x", create_pr=True)
    assert answer.result["url"].endswith("/me/x/discussions/1")
    assert hub.state.files("me/x", "refs/pr/1") == contents(saved)
    assert hub.state.files("me/x") == {}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_byte_that_flips_on_the_way_is_told(hub, worker, saved, tmp_path, name, record_figure):
    record_figure("R3")
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    there = hub.state.large if name == "model.safetensors" else hub.state.blobs
    oid = next(oid for oid, data in there.items() if data == (saved / name).read_bytes())
    there[oid] = there[oid][:-1] + bytes([there[oid][-1] ^ 1])
    answer = worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache"))
    assert "IntegrityError" in answer.errors
    assert f"changed: '{name}'" in answer.message
    assert "IntegrityError" in worker("load", repo_id="me/x", cache_dir=str(tmp_path / "cache")).errors


def test_stale_weights_in_a_repository_are_told(hub, worker, saved, tmp_path):
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    hub.state.add_commit("me/x", "main", {"pytorch_model.bin": ("regular", git_oid(b"stale"))})
    hub.state.blobs[git_oid(b"stale")] = b"stale"
    answer = worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache"))
    assert "extra: 'pytorch_model.bin'" in answer.message


def test_a_repository_without_a_manifest_cannot_be_checked(hub, worker, tmp_path):
    hub.state.add_repository("me/x")
    answer = worker("verify", repo_id="me/x", cache_dir=str(tmp_path))
    assert "IntegrityError" in answer.errors
    assert "has no otprune_manifest.json" in answer.message


def test_what_was_downloaded_is_verified_offline(hub, worker, worker_of, saved, tmp_path):
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    cache = tmp_path / "cache"
    assert worker("verify", repo_id="me/x", cache_dir=str(cache)).errors == []
    offline = worker_of(HF_HUB_OFFLINE="1")
    hub.state.requests.clear()
    answer = offline("verify", repo_id="me/x", cache_dir=str(cache))
    assert answer.result == hub.state.repositories["me/x"].refs["main"], answer.message
    weights = next(cache.glob("models--me--x/snapshots/*/model.safetensors")).resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    answer = offline("verify", repo_id="me/x", cache_dir=str(cache))
    assert "changed: 'model.safetensors'" in answer.message
    assert "`hf cache rm`" in answer.message
    assert hub.state.requests == []


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(hub, worker, saved, tmp_path):
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    (tmp_path / "cache").write_text("a file")
    answer = worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache"))
    assert "HubError" in answer.errors
    assert "a file of this machine could not be read or written" in answer.message
    assert str(tmp_path) not in answer.message


@pytest.mark.parametrize("kind", ["500", "503", "truncate", "cut before"])
def test_a_verified_download_survives_a_fault(hub, worker, saved, tmp_path, kind):
    assert worker("push", folder=str(saved), repo_id="me/x").errors == []
    hub.state.faults.append(Fault("resolve", kind, times=2))
    answer = worker("verify", repo_id="me/x", cache_dir=str(tmp_path / "cache"))
    assert answer.errors == [], answer.message


def test_the_command_line_pushes_and_verifies(hub, worker, saved, tmp_path):
    assert worker("command", arguments=["push", str(saved), "me/x", "--private"]).result == 0
    assert hub.state.repositories["me/x"].private
    assert worker("command", arguments=["push", str(saved), "me/x"]).result == 0
    verify = ["verify", "me/x", "--cache-dir", str(tmp_path / "cache")]
    assert worker("command", arguments=verify).result == 0
    assert worker("command", arguments=["verify", str(saved)]).result == 0
    (saved / "config.json").write_text("{}")
    assert worker("command", arguments=["verify", str(saved)]).result == 1
    assert worker("command", arguments=["push", str(saved / "absent"), "me/x"]).result == 2


def test_the_command_line_prunes_and_pushes_what_it_saved(hub, worker, llama_folder, tokens, tmp_path):
    torch.save(tokens, tmp_path / "ids.pt")
    arguments = ["prune", str(llama_folder), "-o", str(tmp_path / "out"), "--pruning-ratio", "0.5", "--quiet"]
    arguments += [
        "--method",
        "flap",
        "--multiple-of",
        "1",
        "--calibration-data",
        str(tmp_path / "ids.pt"),
        "--push-to-hub",
        "half",
    ]
    assert worker("command", arguments=arguments).result == 0
    assert_pushed(hub.state.files("me/half"), tmp_path / "out", "me/half", "notebook.ipynb")
    card = hub.state.files("me/half")["README.md"].decode()
    assert "base_model" not in card.split("---")[1]  # a folder of this machine is no model of the Hub


def test_the_command_line_refuses_a_push_before_it_loads_a_model(hub, worker, tmp_path):
    arguments = ["prune", "nobody/nothing", "-o", str(tmp_path / "out"), "--push-to-hub", "you/x"]
    assert worker("command", arguments=arguments).result == 1
    assert {request["step"] for request in hub.state.requests} == {"whoami", "info"}
    assert worker("command", arguments=[*arguments[:-2], "--private"]).result == 2


def test_a_manifest_made_anew_is_pushed_like_any_other_change(hub, worker, saved):
    assert worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    (saved / "config.json").write_text('{"model_type": "llama", "a": 1}\n')
    write_manifest(saved)
    assert worker("push", folder=str(saved), repo_id="me/x").result["changed"]
    sent = [json.loads(line) for line in hub.state.requests[-1]["body"].splitlines()[1:]]
    assert {line["value"]["path"] for line in sent} == {"config.json", "otprune_manifest.json"}
