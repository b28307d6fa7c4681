"""Outputs that would harm what is a user's are refused before any work, and nothing is touched."""

import os

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import OutputError
from optimum_otprune.storage import outputs
from optimum_otprune.storage.outputs import check_output_file, check_output_folder, noted_places, output_path
from tests.conftest import run_command as run
from tests.crashes import hashes

FILES = {
    "thesis.txt": "dear",
    ".git/HEAD": "ref: refs/heads/main",
    "data/train.txt": "w1 w2 w3",
    "models/dense/config.json": "{}",
    "models/dense/model.safetensors": "weights",
    "offload/index.json": "{}",
    "spill/0": "hidden",
    "run/state.json": "{}",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder of somebody who has more in it than a model."""
    project = tmp_path / "home" / "project"
    for name, text in FILES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    (tmp_path / "home" / "letters.txt").write_text("dear")
    (project / "to-here").symlink_to(project)
    (project / "to-models").symlink_to(project / "models")
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return project


OPTIONS = {
    "source_model": "models/dense",
    "calibration_data": "data/train.txt",
    "evaluation_data": "data/train.txt",
    "state": "run",
    "spill_folder": "spill",
    "offload_folder": "offload",
}
REFUSED = (
    ("", "names nothing"),
    ("  ", "names nothing"),
    (".", "contains, the working folder"),
    ("./", "contains, the working folder"),
    ("..", "contains, the working folder"),
    ("../..", "contains, the working folder"),
    ("data/..", "contains, the working folder"),
    ("../project", "contains, the working folder"),
    ("{cwd}", "contains, the working folder"),
    ("{cwd}/../project//", "contains, the working folder"),
    ("to-here/../project", "contains, the working folder"),
    ("to-models/..", "contains, the working folder"),
    ("~", "contains, the working folder"),
    ("~/project", "contains, the working folder"),
    ("/", "root of a file system"),
    ("{cwd}/../../../../../../../../..", "root of a file system"),
    ("models", "contains, the source model"),
    ("models/dense", "contains, the source model"),
    ("models/dense/", "contains, the source model"),
    ("to-models/dense", "contains, the source model"),
    ("models/dense/pruned", "inside the source model"),
    ("to-models/dense/a/b", "inside the source model"),
    ("data", "contains, the calibration data"),
    ("data/train.txt", "contains, the calibration data"),
    ("run", "contains, the state"),
    ("run/out", "inside the state"),
    ("spill", "contains, the spill folder"),
    ("offload", "contains, the offload folder"),
    ("offload/out", "inside the offload folder"),
    ("to-here", "contains, the working folder"),
    ("to-empty", "is a link"),
    ("to-empty/", "is a link"),
    ("thesis.txt", "is a file"),
    ("thesis.txt/out", "is not writable"),
    ("to-nowhere/out", "is not writable"),
    ("o" * 256, "has 256 bytes; this file system has room for 229"),
    ("ö" * 120, "has 240 bytes; this file system has room for 229"),
    ("o" * 230, "has 230 bytes"),
    (f"{'o' * 256}/out", "has 256 bytes"),
    ("/".join(["o" * 200] * 20), "would pass the system's limit of 4096"),
    ("a\0b", "characters that are no text"),
    ("a\udc80b", "characters that are no text"),
)


@pytest.mark.parametrize(("name", "message"), REFUSED, ids=[name[:20].replace("\0", "0") for name, _ in REFUSED])
def test_an_output_that_would_harm_or_cannot_be_written_is_refused_and_nothing_is_touched(
    project, name, message, record_figure
):
    (project / "to-nowhere").symlink_to(project / "to-nowhere")
    (project / "empty").mkdir()
    (project / "to-empty").symlink_to(project / "empty")
    before = hashes(project.parent)
    with pytest.raises(OutputError, match=message) as caught:
        check_output_folder(output_path(name.format(cwd=project)), True, places=noted_places(**OPTIONS))
    assert str(project.parent) not in str(caught.value)
    assert hashes(project.parent) == before
    record_figure("R13", tried=1, ok=1)


@pytest.mark.parametrize("name", ["result/out", "result/a/b", "to-result/out"])
def test_an_output_inside_an_earlier_result_is_refused(project, name, capsys):
    """The result could be neither verified nor replaced with another in it."""
    (project / "result").mkdir()
    (project / "result" / "otprune_manifest.json").write_text("{}")
    (project / "to-result").symlink_to(project / "result")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="lies inside 'result', which holds a saved model"):
            check_output_folder(output_path(name), overwrite)
    with pytest.raises(OutputError, match="lies inside 'dense', which holds a saved model"):
        check_output_folder(output_path("models/dense/out"), False)
    assert run("tune", "nobody/nothing", "-o", "result/best.json") == 1
    assert "lies inside 'result'" in capsys.readouterr().err
    check_output_folder(output_path("models/out"), False)


@pytest.mark.parametrize("given", [None, 3, b"out"])
def test_an_output_that_is_no_path_is_refused(given):
    with pytest.raises(
        OutputError, match=f"The output is {given!r}, which names nothing. Give the name of a new file"
    ):
        output_path(given)


@pytest.mark.parametrize("name", ["out", "spill/out", "data/out", "models/pruned", "~/out", "new/er/out", "o" * 229])
def test_an_output_beside_what_is_the_users_is_allowed(project, name):
    check_output_folder(output_path(name), False, places=noted_places(**OPTIONS))


def test_a_home_folder_is_refused_from_elsewhere(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="contains, the home folder"):
        check_output_folder(output_path("~"), True)


def test_another_spelling_of_the_same_folder_is_refused(project, monkeypatch):
    """As where case does not count."""
    (project / "models" / "DENSE").mkdir()
    original = os.path.samefile
    monkeypatch.setattr(outputs.os.path, "samefile", lambda one, other: original(str(one).lower(), str(other).lower()))
    with pytest.raises(OutputError, match="contains, the source model"):
        check_output_folder(project / "models" / "DENSE", True, places=noted_places(source_model="models/dense"))


def test_a_name_of_the_hub_is_no_place(project):
    check_output_folder(output_path("user"), False, places=noted_places(source_model="user/model"))


@pytest.mark.parametrize("name", ["", ".", "models/dense/config.json", "data/train.txt", "a\0b", "o" * 250])
def test_a_file_that_would_harm_or_cannot_be_written_is_refused(project, name, record_figure):
    before = hashes(project)
    with pytest.raises(OutputError):
        check_output_file(output_path(name), True, noted_places(**OPTIONS))
    assert hashes(project) == before
    record_figure("R13", tried=1, ok=1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("prune", "models/dense", "-o", ""), "names nothing"),
        (("prune", "models/dense", "-o", ".", "--overwrite"), "working folder"),
        (("prune", "models/dense", "-o", "models", "--overwrite"), "source model"),
        (("prune", "models/dense", "-o", "..", "--overwrite", "--dry-run"), "working folder"),
        (("prune", "models/dense", "-o", "/", "--overwrite", "--resume"), "root of a file system"),
        (("prune", "models/dense", "-o", "out", "--resume=out/state"), "the state"),
        (("prune", "models/dense", "-o", "run", "--overwrite", "--spill-folder", "run"), "spill folder"),
        (("prune", "models/dense", "-o", "run", "--overwrite", "--offload-folder", "run"), "offload folder"),
        (("prune", "models/dense", "-o", "data", "--overwrite", "--calibration-data", "data"), "calibration data"),
        (("prune", "models/dense", "-o", "data", "--eval", "--eval-data", "data"), "evaluation data"),
        (("prune", "models/dense", "-o", "o" * 250, "--resume"), "has 250 bytes"),
        (("tune", "models/dense", "-o", "models/dense/config.json", "--overwrite"), "inside the source model"),
        (("tune", "models/dense", "-o", "best.json", "--study", "best.json", "--overwrite"), "the study"),
        (("demo", "-o", ".", "--overwrite"), "working folder"),
        (("demo", "-o", ""), "names nothing"),
        (("benchmark", "models/dense", "models/dense", "--json", "models/dense/config.json"), "source model"),
        (("benchmark", "models/dense", "models/dense", "--json", ""), "names nothing"),
    ],
)
def test_every_command_refuses_before_a_model_is_loaded(project, command, message, monkeypatch, capsys, record_figure):
    monkeypatch.setattr(OTPruner, "from_pretrained", None)
    before = hashes(project.parent)
    assert run(*command) == (2 if "" in command else 1)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert hashes(project.parent) == before
    record_figure("R13", tried=1, ok=1)


def test_a_pruner_remembers_what_it_must_not_replace(llama_folder, tokens, tmp_path, monkeypatch, record_figure):
    (tmp_path / "data").mkdir()
    save_file({"input_ids": tokens}, tmp_path / "data" / "ids.safetensors")
    monkeypatch.chdir(tmp_path)
    pruner = OTPruner.from_pretrained("dense", OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    (tmp_path / "spill").mkdir()
    pruner.prune("data/ids.safetensors", progress=False, resume_from="run", spill_folder="spill")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = hashes(tmp_path)
    refused = ("", ".", "..", "../dense", "../dense/pruned", "../data", "../run", "../run/out", "../spill")
    for name in refused:
        with pytest.raises(OutputError, match="names nothing|must not be replaced|nothing may be added"):
            pruner.save_pretrained(name, overwrite=True)
    assert hashes(tmp_path) == before
    record_figure("R13", tried=len(refused), ok=len(refused))
    assert pruner.save_pretrained("../elsewhere/out/../out").name == "out"


def test_a_folder_that_only_the_tokenizer_is_from_is_not_replaced(llama, llama_folder, monkeypatch):
    monkeypatch.chdir(llama_folder.parent)
    tokenizer = AutoTokenizer.from_pretrained("dense")
    before = hashes(llama_folder)
    pruner = OTPruner(llama, tokenizer=tokenizer)
    with pytest.raises(OutputError, match=r"is, or contains, the tokenizer \('dense'\)"):
        pruner.save_pretrained("dense", overwrite=True)
    assert hashes(llama_folder) == before


def test_a_home_folder_is_written_as_a_tilde_in_every_argument(llama_folder, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"input_ids": tokens}, tmp_path / "ids.safetensors")
    (tmp_path / "spill").mkdir()
    data = ("--calibration-data", tmp_path / "ids.safetensors", "--quiet", "--spill-folder", "~/spill")
    half = ("--pruning-ratio", "0.5", "--multiple-of", "1")
    assert run("prune", "~/dense", "-o", "~/out", *data, *half, "--resume=~/run") == 0
    assert run("verify", "~/out") == run("report", "~/out") == run("card", "~/out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ids.safetensors", "out", "spill"]
