"""torchao and bitsandbytes themselves: pruned, quantized, and loaded in a fresh process by plain transformers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from tests.conftest import make_llama

SCHEMES = {"int8": ("torchao", 0.02), "int4": ("torchao", 0.3), "nf4": ("bitsandbytes", 0.3)}
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
def pruned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "half"
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of="int4", method="magnitude", seqlen=20)
    pruner = OTPruner(make_llama(hidden_size=64, intermediate_size=256), config)
    pruner.prune(torch.randint(64, (8, 20), generator=torch.Generator().manual_seed(0)), progress=False)
    return pruner.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_folder_is_loaded_by_plain_transformers(scheme, pruned_folder, tmp_path):
    library, most = SCHEMES[scheme]
    if find_spec(library) is None:
        pytest.skip(f"{library} is of the extra `quantize`")
    otprune = ("-m", "optimum_otprune")
    printed = run(*otprune, "quantize", pruned_folder, "-o", tmp_path / "out", "--scheme", scheme, "--quiet")
    assert f"Quantization: {scheme} by {library}" in printed
    assert 0 < json.loads(run("-c", LOAD, pruned_folder, tmp_path / "out")) < most
    run(*otprune, "verify", tmp_path / "out")
    shown = run(*otprune, "compare", pruned_folder, tmp_path / "out", "--help")
    assert "DENSE" in shown
