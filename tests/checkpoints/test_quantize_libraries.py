"""torchao and bitsandbytes themselves: pruned, quantized, and loaded in a fresh process by plain transformers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.storage.manifest import verify_folder
from tests.conftest import make_llama

SCHEMES = {"int8": ("torchao", 0.03), "int4": ("torchao", 0.3), "nf4": ("bitsandbytes", 0.3)}
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(30)[None]
with torch.no_grad():
    plain, quantized = (AutoModelForCausalLM.from_pretrained(name)(ids).logits for name in sys.argv[1:])
assert "optimum_otprune" not in sys.modules
print(json.dumps(float((quantized - plain).norm() / plain.norm())))
"""


def run(*arguments) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model, the pruned one, and token ids."""
    folder = tmp_path_factory.mktemp("quantize")
    model = make_llama(hidden_size=64, intermediate_size=256, initializer_range=0.05)
    model.save_pretrained(folder / "dense")
    ids = torch.randint(64, (8, 20), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of="int4", method="magnitude", seqlen=20)
    pruner = OTPruner(model, config)
    pruner.prune(ids, progress=False)
    pruner.save_pretrained(folder / "half")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_folder_is_loaded_by_plain_transformers_and_compared(scheme, place, tmp_path):
    library, most = SCHEMES[scheme]
    if find_spec(library) is None:
        pytest.skip(f"{library} is of the extra `quantize`")
    otprune, out = ("-m", "optimum_otprune"), tmp_path / "out"
    printed = run(*otprune, "quantize", place / "half", "-o", out, "--scheme", scheme, "--quiet")
    assert f"Quantization: {scheme} by {library}" in printed
    assert verify_folder(out)
    assert 0 < json.loads(run("-c", LOAD, place / "half", out)) < most
    data = ("--data", place / "ids.safetensors", "--no-prompts", "--quiet")
    assert "pruned  out: " in run(*otprune, "compare", place / "dense", out, *data)
