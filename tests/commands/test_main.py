"""The command line under its other names."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest

from tests.test_docs import DOCS, ROOT, blocks

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PAGE = DOCS / "reference" / "command-line.md"
REAL_PYTHON = sys.executable


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """Run the real `hf` of somebody who did what the page says."""
    module, _, function = SCRIPTS["hf-otprune"].partition(":")
    script = tmp_path / "bin" / "hf-otprune"
    script.parent.mkdir()
    script.write_text(f"#!{REAL_PYTHON}\nfrom {module} import {function}\n{function}()\n")
    script.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    (block,) = (block for block in blocks(PAGE) if block.language == "python")
    exec(compile(block.code, PAGE, "exec"), {})
    environment = {**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        line = [REAL_PYTHON, "-m", "huggingface_hub.cli.hf", *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    return run


def test_hf_runs_the_command_as_its_extension_with_arguments_and_exit_code(hf):
    assert hf("otprune", "--version").stdout.strip() == f"otprune {version('optimum_otprune')}"
    wrong = hf("otprune", "verify", "no-such-folder")
    assert wrong.returncode == 1
    assert "otprune verify: error: There is no folder 'no-such-folder' here" in wrong.stderr
    assert "structured pruning by optimal transport" in hf("--help").stdout.lower()
