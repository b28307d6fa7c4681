"""The programs that write other formats: where they are, how they are called, and what they said where they failed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optimum_otprune.checkpoints.export import llama_runtime
from optimum_otprune.errors import ExportError, UsageError
from optimum_otprune.storage.untrusted import visible

_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_OPTIMUM = "optimum-cli"
_PACKAGES = {"onnx": "optimum-onnx", "openvino": "optimum-intel"}  # that add the format to `optimum-cli`
_ENVIRONMENTS = {
    "onnx": "pip install torch 'optimum-onnx[onnxruntime]'",
    "openvino": "pip install torch 'optimum-intel[openvino]'",
}
_WEIGHTS = {"f32": "fp32", "f16": "fp16", "int8": "int8"}  # as OpenVINO's exporter calls them
_SHOWN = 300  # characters of what a program said last


def find_tool(target: str, given: str | None) -> Path:
    """Return the program that writes a format.

    Args:
        target: `gguf`, `onnx` or `openvino`.
        given: Its path, from the user; None looks on the search path for llama.cpp's converter, and in this
            environment for the others.

    Raises:
        UsageError: If there is no such file, or it cannot be run.
        ExportError: If none was given and none found; the message says what to install.
    """
    if given is not None:
        path = Path(os.path.expanduser(given)).absolute()
        if not path.is_file() or not (path.suffix == ".py" or os.access(path, os.X_OK)):
            raise UsageError(
                f"`--tool` is {visible(given, 60)!r}, which is no program. Give the path of {_wanted(target)}."
            )
        return path
    if target == "gguf":
        for name in _CONVERTERS:
            found = shutil.which(name)
            if found is not None:
                return Path(found)
        raise ExportError(
            "llama.cpp's converter was not found. Give its path, which is that of `convert_hf_to_gguf.py` in a "
            "checkout of llama.cpp, with `--tool`."
        )
    beside = Path(sys.executable).with_name(_OPTIMUM)
    if _is_installed(_PACKAGES[target]) and beside.is_file():
        return beside
    raise ExportError(
        f"{_PACKAGES[target]} is not installed here; it wants an older transformers, so give it an environment of its "
        f"own: python -m venv {target}-env && {target}-env/bin/{_ENVIRONMENTS[target]}. Then add `--tool "
        f"{target}-env/bin/{_OPTIMUM}`."
    )


def arguments(target: str, folder: Path, output: Path, kind: str) -> list[str]:
    """Return the arguments with which a program exports a folder.

    Args:
        target: `gguf`, `onnx` or `openvino`.
        folder: The saved model.
        output: The folder to write into.
        kind: The type of the weights, one of those of that format.
    """
    if target == "gguf":
        return [str(folder), "--outfile", str(output / llama_runtime.FILE), "--outtype", kind]
    named = ["export", target, "--model", str(folder), "--task", "text-generation-with-past"]
    weights = ["--weight-format", _WEIGHTS[kind]] if target == "openvino" else []
    return [*named, *weights, str(output)]


def run_tool(tool: Path, given: Sequence[str]) -> None:
    """Run a program to its end; a Python file runs in this environment, anything else in its own.

    Args:
        tool: The program.
        given: Its arguments.

    Raises:
        ExportError: If it fails; the message has its last line, and `output` all that it said.
    """
    is_script = tool.suffix == ".py"
    hidden = () if is_script else ("PYTHONPATH", "PYTHONHOME")  # of this environment, which another must not see
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [*([sys.executable] if is_script else []), str(tool), *given]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise ExportError(
            f"{visible(tool.name, 60)!r} could not be started ({error.strerror}). Give the path of another."
        ) from error
    if done.returncode:
        said = done.stdout.decode(errors="replace")
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
        raise ExportError(
            f"{visible(tool.name, 60)!r} ended with exit code {done.returncode}; it said last: "
            f"{visible(last.strip(), _SHOWN)}",
            output=said,
        )


def _wanted(target: str) -> str:
    if target == "gguf":
        return "llama.cpp's `convert_hf_to_gguf.py`"
    return f"`{_OPTIMUM}` in an environment with {_PACKAGES[target]}"


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
