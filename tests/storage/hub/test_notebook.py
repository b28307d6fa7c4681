"""The notebook that a push adds: of the repository's name, listed and verified, and in nobody's way."""

import json

import pytest

from optimum_otprune import OTPruner, OTPruningConfig
from tests.conftest import run_command
from tests.storage.hub.conftest import contents, environment

NOTEBOOK = "notebook.ipynb"


@pytest.fixture
def pruned(llama, tokens, tokenizer, tmp_path):
    llama.name_or_path = llama.config.name_or_path = "me/dense"
    config = OTPruningConfig(method="flap", pruning_ratio=0.5, multiple_of=1)
    pruner = OTPruner.from_pretrained(llama, config, tokenizer=tokenizer)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "pruned")


def push(worker, folder, repo_id: str) -> int:
    answer = worker("command", arguments=["push", str(folder), repo_id])
    assert answer.errors == [], answer.message
    return answer.result


def test_a_push_adds_a_notebook_that_the_manifest_lists(hub, worker, pruned):
    assert push(worker, pruned, "x") == 0  # a name alone is the token's own user's
    files = hub.state.files("me/x")
    assert 'MODEL = \\"me/x\\"' in files[NOTEBOOK].decode()
    assert 'from_pretrained("me/x")' in files["README.md"].decode()
    assert NOTEBOOK in json.loads(files["otprune_manifest.json"])["files"]
    assert worker("verify", repo_id="me/x").errors == []
    assert NOTEBOOK not in contents(pruned)
    assert push(worker, pruned, "me/x") == 0
    assert len(hub.state.repositories["me/x"].commits) == 2


def test_a_folder_that_was_pulled_is_pushed_under_another_name(hub, worker, pruned, tmp_path):
    push(worker, pruned, "me/x")
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub.state.files("me/x").items():
        (pulled / name).write_bytes(content)
    assert run_command("verify", pulled) == 0
    push(worker, pulled, "me/y")
    assert 'MODEL = \\"me/y\\"' in hub.state.files("me/y")[NOTEBOOK].decode()
    assert worker("verify", repo_id="me/y").errors == []


def test_a_notebook_of_ones_own_stays_in_the_repository_and_in_the_folder(hub, worker, pruned, tmp_path):
    mine = tmp_path / NOTEBOOK
    mine.write_text("{}")
    assert worker("put", file=str(mine), repo_id="me/x").errors == []
    for _ in range(2):
        assert push(worker, pruned, "me/x") == 0
        files = hub.state.files("me/x")
        assert files[NOTEBOOK] == b"{}"
        assert NOTEBOOK not in json.loads(files["otprune_manifest.json"])["files"]
        assert worker("verify", repo_id="me/x").errors == []
    assert len(hub.state.repositories["me/x"].commits) == 3
    mine.rename(pruned / NOTEBOOK)
    push(worker, pruned, "me/y")
    assert NOTEBOOK not in hub.state.files("me/y")
    assert (pruned / NOTEBOOK).read_text() == "{}"


@pytest.mark.slow
def test_it_runs_in_jupyter_from_the_first_cell_to_the_last(hub, worker, pruned, llama_folder, tokenizer, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    OTPruner.from_pretrained(llama_folder).save_pretrained(tmp_path / "dense-saved")
    push(worker, tmp_path / "dense-saved", "me/dense")
    push(worker, pruned, "me/x")
    notebook = nbformat.reads(hub.state.files("me/x")[NOTEBOOK].decode(), as_version=4)
    nbformat.validate(notebook)
    (tmp_path / "empty").mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "empty"}}
    )
    client.execute(env=environment(hub, tmp_path / "home"))
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    said = "\n".join(printed)
    assert said.count("parameters") == 2
    assert "perplexity of the base model: " in said
    assert "both find the same next token most likely: " in said
    assert "base:   w" in said or "base:   [UNK]" in said
