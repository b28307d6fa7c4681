"""No token, user name, host or local path gets into a file, a log or an error; nothing is unpickled."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints import load as loading
from optimum_otprune.config.options import OPTIONS
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import CalibrationDataError, ModelLoadError, OTPruneError, without_credentials
from optimum_otprune.pruning.calibration import documents
from optimum_otprune.storage.hub.client import HubClient, _WithoutSignatures
from optimum_otprune.storage.hub.retries import Deadline

CANARIES = ("alice-canary", "hf_canaryToken123", "canary-host")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("alice-canary")


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`otprune` as a user whose name, home, host and token are canaries, at the most talkative level."""
    environment = os.environ | {
        "HOME": str(home),
        "USER": "alice-canary",
        "LOGNAME": "alice-canary",
        "HOSTNAME": "canary-host",
        "HF_HOME": str(home / "hub"),
        "HF_TOKEN": "hf_canaryToken123",
        "HF_HUB_VERBOSITY": "debug",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "optimum_otprune", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def leaks(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text]


def test_a_run_of_the_command_line_leaks_nothing(home, llama_folder, tokens, record_figure):
    llama_folder.rename(home / "dense")
    torch.save(tokens, home / "tokens.pt")
    options = ("--pruning-ratio", "0.5", "--multiple-of", "2", "--calibration-data", "tokens.pt")
    done = run(home, "prune", "dense", "-o", "out", *options, "--eval", "--eval-data", "tokens.pt")
    assert done.returncode == 0, done.stderr
    written = [path for path in (home / "out").rglob("*") if path.is_file()]
    assert len(written) > 5
    found = {path.name: hit for path in written if (hit := leaks(path.read_bytes().decode("latin-1")))}
    assert found == {}
    others = [
        run(home, "report", "out"),
        run(home, "card", "out"),
        run(home, "verify", "out"),
        run(home, "evaluate", "out", "--data", "tokens.pt"),
        run(home, "prune", "dense", "-o", "out", *options),  # exists already
        run(home, "prune", "missing", "-o", "new", *options),
        run(home, "prune", "dense", "-o", "new", "--calibration-data", "missing.pt"),
        run(home, "prune", "out/rescue.png", "-o", "new", *options),
    ]
    for made in (done, *others):
        assert leaks(made.stdout + made.stderr) == [], made.args
    assert [made.returncode for made in others] == [0, 0, 0, 0, 1, 1, 1, 1]
    record_figure("R10", tried=len(written) + 2 * (1 + len(others)))


@pytest.mark.figure("R10")
@pytest.mark.parametrize("damage", ["config", "weights", "no weights", "index"])
def test_errors_of_damaged_folders_name_no_path(home, llama, tmp_path, damage):
    folder = tmp_path / "alice-canary" / damage
    llama.save_pretrained(folder)
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"x")
    else:
        (folder / "model.safetensors").unlink()
        if damage == "index":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelLoadError) as caught:
        OTPruner.from_pretrained(folder)
    assert leaks(str(caught.value)) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://me:s3cret@hub.example/api?x=1 failed", "GET https://hub.example/api?x=1 failed"),
        ("http://me:p@ss@localhost:8080: refused", "http://localhost:8080: refused"),
        ("https://token@hub.example", "https://hub.example"),
        ("https://hub.example/a@b and me@mail.example", "https://hub.example/a@b and me@mail.example"),
        ("Invalid port: 's3cret@hub.example'", "Invalid port: '***@hub.example'"),
        ("auth=('me', 'a/b')", "auth=('me', 'a/b')"),
    ],
)
def test_credentials_of_an_address_are_in_no_error(monkeypatch, text, shown):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:s3cret@hub.example")
    assert without_credentials(text) == shown
    assert str(OTPruneError(text)) == shown
    assert str(ModelLoadError(text)) == shown
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s", (text.replace("?x=1", ""),), None)
    assert _WithoutSignatures().filter(record)
    assert record.getMessage() == shown.replace("?x=1", "")


def test_credentials_of_the_hub_are_in_no_address_and_no_warning_while_loading(llama_folder, monkeypatch, caplog):
    client = HubClient("me/x", None, Deadline(1.0))
    monkeypatch.setattr(client._api, "endpoint", "https://alice-canary:hf_canaryToken123@hub.example")
    assert client.url == "https://hub.example/me/x"

    def fail(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("GET %s/api failed", client._api.endpoint)
        raise OSError(f"We could not connect to {client._api.endpoint}/api")

    monkeypatch.setattr(loading.transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with caplog.at_level("WARNING"), pytest.raises(ModelLoadError, match="connect to https://hub.example") as caught:
        OTPruner.from_pretrained(llama_folder)
    monkeypatch.setattr(documents.datasets, "load_dataset", fail)
    with (
        caplog.at_level("WARNING"),
        pytest.raises(CalibrationDataError, match="connect to https://hub.example") as data,
    ):
        documents._hub_table("user/data", None, "train")
    assert leaks(str(caught.value) + str(data.value) + caplog.text) == []


def test_weights_that_could_hold_code_are_not_loaded(llama, tmp_path):
    folder = tmp_path / "dense"
    llama.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(llama.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="weights must be safetensors files"):
        OTPruner.from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../outside.safetensors"}}', r"names a file outside the folder: '\.\./outside"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names a file outside the folder"),
        ('{"weight_map": {"a": "..\\\\outside.safetensors"}}', "names a file outside the folder"),
        ('{"weight_map": {"a": 1}}', "is damaged"),
        ('{"weight_map": []}', "is damaged"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_an_index_leads_to_no_file_outside_the_folder(llama, tmp_path, index, message):
    folder = llama.save_pretrained(tmp_path / "dense") or tmp_path / "dense"
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelLoadError, match=message):
        OTPruner.from_pretrained(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from([option.name for option in OPTIONS]), ANYTHING, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_of_anything_is_right_or_an_error_of_ours(changes):
    try:
        config = OTPruningConfig.from_dict({**OTPruningConfig().to_dict(), **changes})
    except OTPruneError:
        return
    assert OTPruningConfig.from_dict(config.to_dict()) == config


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), cut=st.integers(0, 400))
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_file_of_anything_is_right_or_an_error_of_ours(content, cut, tmp_path):
    whole = OTPruningConfig().to_json_string().encode()
    (tmp_path / CONFIG_FILE).write_bytes(whole[:cut] + content + whole[cut:])
    try:
        config = OTPruningConfig.from_pretrained(tmp_path)
    except OTPruneError:
        return
    assert isinstance(config, OTPruningConfig)
