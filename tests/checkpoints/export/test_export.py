"""Exports: what is refused before any work, what is compared, and what stays."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner
from optimum_otprune.checkpoints.export import export as module
from optimum_otprune.checkpoints.export import tools
from optimum_otprune.checkpoints.export.export import RUNTIMES, Runtime
from optimum_otprune.errors import ExportError
from tests.conftest import make_llama, run_command

# Writes what it was called with; with FAIL in the environment, it fails.
TOOL = """
import os, sys
if "FAIL" in os.environ:
    print("first")
    print("no such thing")
    sys.exit(3)
at = sys.argv.index("--outfile") + 1 if "--outfile" in sys.argv else -1
target = sys.argv[at] if "--outfile" in sys.argv else os.path.join(sys.argv[at], "model.onnx")
with open(target, "w") as file:
    file.write(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def tool(tmp_path):
    file = tmp_path / "convert_hf_to_gguf.py"
    file.write_text(TOOL)
    return file


@pytest.fixture
def runtime(llama_folder, monkeypatch):
    """A program that reads exports and computes what the folder does, plus `error`."""
    settings = {"error": 0.0, "seen": []}

    def logits(folder, ids):
        settings["seen"] += [path.name for path in folder.iterdir()]
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy() + np.float32(settings["error"])

    for target in RUNTIMES:
        monkeypatch.setitem(RUNTIMES, target, Runtime("numpy", lambda: None, logits))
    return settings


def test_an_export_is_compared_described_and_replaced(llama_folder, tool, runtime, tmp_path, capsys):
    arguments = ["export", llama_folder, "--to", "gguf", "-o", tmp_path / "out", "--tool", tool]
    runtime["error"] = 1e-5
    assert run_command(*arguments) == 0
    printed = capsys.readouterr().out
    assert "with weights in f32" in printed
    assert "the largest difference of a logit is 1e-05" in printed
    assert "16 of 16 next tokens are the same" in printed
    assert runtime["seen"] == ["model.gguf"]
    assert "--outtype f32" in (tmp_path / "out" / "model.gguf").read_text()
    told = json.loads((tmp_path / "out" / "otprune_export.json").read_text())
    assert (told["source"], told["target"], told["kind"], told["same_tokens"]) == ("dense", "gguf", "f32", 16)
    assert run_command(*arguments) == 1
    assert "is not empty" in capsys.readouterr().err
    assert run_command(*arguments, "--overwrite", "--type", "q8_0") == 0
    assert "--outtype q8_0" in (tmp_path / "out" / "model.gguf").read_text()


def test_the_weights_have_the_folders_type_where_the_format_has_it(runtime, llama_folder, tool, tmp_path):
    make_llama().to(torch.bfloat16).save_pretrained(llama_folder)
    for target, kind in (("gguf", "bf16"), ("onnx", "f32"), ("openvino", "f32")):
        assert module.export_folder(llama_folder, target, tmp_path / target, tool=str(tool)).kind == kind


def test_what_computes_something_else_or_cannot_be_made_leaves_nothing(
    llama_folder, tool, runtime, tmp_path, capsys, monkeypatch
):
    arguments = ["export", llama_folder, "--to", "onnx", "-o", tmp_path / "out", "--tool", tool]
    runtime["error"] = 1.0
    assert run_command(*arguments) == 1
    assert "computes something else than the folder: numpy" in capsys.readouterr().err
    runtime["error"] = float("nan")
    assert run_command(*arguments) == 1
    assert "computes something else" in capsys.readouterr().err
    monkeypatch.setenv("FAIL", "1")
    assert run_command(*arguments) == 1
    told = capsys.readouterr().err
    assert "ended with exit code 3; it said last: no such thing" in told
    assert "first\n" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert_hf_to_gguf.py", "dense"]


def test_logits_of_another_shape_are_no_success(llama_folder, tool, runtime, tmp_path, monkeypatch):
    broken = Runtime("numpy", lambda: None, lambda folder, ids: np.zeros((len(ids), 3)))
    monkeypatch.setitem(RUNTIMES, "gguf", broken)
    with pytest.raises(ExportError, match=r"have shape \(16, 3\); want \(16, 64\)"):
        module.export_folder(llama_folder, "gguf", tmp_path / "out", tool=str(tool))


def test_folders_that_no_other_program_reads_are_refused_before_the_work(
    llama_folder, tool, runtime, tokens, tmp_path, capsys
):
    options = {"pruning_ratio": 0.5, "layer_ratios": {0: 0.25}, "quality": "fast", "multiple_of": 1}
    pruner = OTPruner.from_pretrained(llama_folder, options | {"non_uniform_format": "per_layer_config"})
    pruner.prune(tokens, progress=False)
    pruner.save_pretrained(tmp_path / "uneven")
    refused = {"different widths.*'pad'": tmp_path / "uneven", "is empty": tmp_path / "nothing"}
    for field, value, words in (
        ("architectures", ["LlamaForSequenceClassification"], "no causal language model"),
        ("quantization_config", {"quant_method": "torchao"}, "quantized"),
    ):
        folder = tmp_path / field
        make_llama().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        refused[words] = folder
    (tmp_path / "nothing").mkdir()
    for words, folder in refused.items():
        assert run_command("export", folder, "--to", "gguf", "-o", tmp_path / "out", "--tool", tool) == 1
        assert re.search(words, capsys.readouterr().err), words
    assert not runtime["seen"]


def test_a_missing_program_is_named_with_what_to_install(llama_folder, tool, runtime, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    monkeypatch.setattr(tools, "_is_installed", lambda package: False)
    start = ["export", llama_folder, "-o", tmp_path / "out", "--to"]
    for target, words in (
        ("gguf", "`convert_hf_to_gguf.py` in a checkout of llama.cpp, with `--tool`"),
        ("onnx", "onnx-env/bin/pip install torch 'optimum-onnx[onnxruntime]'. Then add `--tool onnx-env/bin/optimum-"),
        ("openvino", "optimum-intel is not installed here; it wants an older transformers"),
    ):
        assert run_command(*start, target) == 1
        assert words in capsys.readouterr().err
    assert run_command(*start, "gguf", "--tool", tmp_path / "nothing") == 2
    assert "which is no program. Give the path of llama.cpp's `convert_hf_to_gguf.py`." in capsys.readouterr().err
    assert run_command(*start, "onnx", "--type", "q8_0") == 2
    assert "`--type q8_0` is not written to onnx; want one of f32." in capsys.readouterr().err
    monkeypatch.setattr(tools.shutil, "which", lambda name: str(tool) if name.endswith(".py") else None)
    assert tools.find_tool("gguf", None) == tool


@pytest.mark.parametrize(
    ("target", "library", "extra"),
    [("gguf", "llama_cpp", "gguf"), ("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_a_missing_runtime_is_named_with_its_extra(
    target, library, extra, llama_folder, tool, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)
    assert run_command("export", llama_folder, "--to", target, "-o", tmp_path / "out", "--tool", tool) == 1
    assert f"pip install 'optimum_otprune[{extra}]'" in capsys.readouterr().err
