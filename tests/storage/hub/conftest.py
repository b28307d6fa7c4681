"""One Hub for all tests of a process, emptied before each; a worker process per way to upload, started when needed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from optimum_otprune.storage.manifest import write_manifest
from tests.storage.hub.server import Hub

ROOT = Path(__file__).parents[3]


def environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    """Variables for a process that takes the tests' server for the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    hub_variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_write",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    return {**kept, **hub_variables, **changes}


class Answer(NamedTuple):
    """What a job came to; `errors` are the names of the error's classes."""

    result: Any
    errors: list[str]
    message: str
    waits: list[float]
    seconds: float


class Worker:
    """See `tests/storage/hub/worker.py`; its working folder is empty, so no folder is taken for a repository."""

    def __init__(self, variables: dict[str, str], folder: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.storage.hub.worker"],
            env=variables,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str, **arguments: Any) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"name": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the worker ended; see its standard error"
        return Answer(**{"result": None, "errors": [], "message": "", **json.loads(line)})

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def _server():
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(_server):
    _server.reset()
    return _server


@pytest.fixture(scope="session")
def worker_of(_server, tmp_path_factory):
    """Make workers by the variables that differ; each is started once."""
    workers: dict[tuple, Worker] = {}

    def get(**changes: str) -> Worker:
        key = tuple(sorted(changes.items()))
        if key not in workers:
            home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("empty")
            workers[key] = Worker(environment(_server, home, **changes), folder)
        return workers[key]

    yield get
    for worker in workers.values():
        worker.close()


@pytest.fixture
def worker(worker_of):
    return worker_of()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder as `save_pretrained` leaves it, with random weights."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(30_000))
    write_manifest(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
