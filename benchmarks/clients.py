"""What other programs compute from pruned models: their logits beside those of transformers, one line for each client.

    make test-clients

A model of a few layers (SmolLM2-135M-Instruct's first ones, or those of `--model`) is pruned into three forms: plain,
with an intercept (biases), and padded (layers of different widths, filled up with zeros). Each client gets each form.
The environments that `make test-clients` makes are in the folder `--environments`.
"""

import argparse
import importlib
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from _smollm2 import plain_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints.export.export import export_folder

FORMS = {
    "plain": {"intercept": "never"},
    "intercept": {"intercept": "always"},
    "padded": {"intercept": "never", "layer_ratios": {0: 0.25}},
}
TOKENS = 16
# The most that a logit may differ, as a share of the largest: of float32 weights, and of weights in 8 bits.
EXACT, EIGHT_BITS = 1e-3, 0.1


def make_forms(source: Path, layers: int, folder: Path) -> dict[str, Path]:
    """Save a model's first layers, and pruned forms of it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    dense = folder / "dense"
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(source).save_pretrained(dense)
    samples = torch.randint(model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    forms = {}
    for name, options in FORMS.items():
        pruner = OTPruner.from_pretrained(
            dense, OTPruningConfig(pruning_ratio=0.5, quality="fast", self_calibration=0, **options)
        )
        pruner.prune(samples, progress=False)
        pruner.save_pretrained(folder / name)
        forms[name] = folder / name
    return forms


class Sample:
    """A saved form, token ids, and what transformers computes for them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        self.logits = self.of(self.model)

    def of(self, model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return model(self.ids).logits[0].float().numpy()

    def difference(self, found: np.ndarray) -> float:
        return float(np.abs(found - self.logits).max())


def with_tool(target: str, kind: str, tool: Path) -> Callable[[Sample, Path], float]:
    """A client that reads what `otprune export` writes."""
    return lambda sample, folder: (
        export_folder(sample.folder, target, folder / target, kind, str(tool)).largest_difference
    )


def ctranslate2(sample: Sample, folder: Path) -> float:
    library = importlib.import_module("ctranslate2")
    converted = library.converters.TransformersConverter(str(sample.folder)).convert(str(folder / "ct2"))
    generator = library.Generator(converted, device="cpu", compute_type="float32")
    words = AutoTokenizer.from_pretrained(sample.folder).convert_ids_to_tokens(sample.ids[0].tolist())
    return sample.difference(np.array(generator.forward_batch([words]))[0])


def torchao(sample: Sample, folder: Path) -> float:
    """Weights in 8 bits, saved and loaded again."""
    scheme = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    model = AutoModelForCausalLM.from_pretrained(
        sample.folder, dtype=torch.float32, quantization_config=TorchAoConfig(scheme)
    )
    model.save_pretrained(folder / "torchao")
    again = AutoModelForCausalLM.from_pretrained(folder / "torchao", dtype=torch.float32)
    assert np.array_equal(sample.of(model), sample.of(again)), "what torchao saves is not what it loads"
    return sample.difference(sample.of(again))


def peft(sample: Sample, folder: Path) -> float:
    """An adapter with weights, merged, saved and loaded: how far that is from the adapter beside the model."""
    library = importlib.import_module("peft")
    model = AutoModelForCausalLM.from_pretrained(sample.folder, dtype=torch.float32)
    adapted = library.get_peft_model(
        model, library.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    beside = sample.of(adapted)
    assert sample.difference(beside) > 0, "the adapter does nothing"
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    return float(np.abs(sample.of(merged) - beside).max())


def lm_eval(sample: Sample, folder: Path) -> float:
    del folder
    harness = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(sample.folder), device="cpu", dtype="float32"
    )
    return sample.difference(harness._model_call(sample.ids)[0].float().numpy())


def converter_in(environments: Path) -> Path:
    """llama.cpp's converter, out of the source archive that `make test-clients` unpacks."""
    return next(environments.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))


def clients(environments: Path) -> dict[str, tuple[str, float, Callable[[Sample, Path], float]]]:
    """Package, the most that a logit may differ, and the check, by the client's name."""
    converter = converter_in(environments)
    onnx, openvino = (environments / name / "bin" / "optimum-cli" for name in ("onnx", "openvino"))
    return {
        "ONNX Runtime": ("onnxruntime", EXACT, with_tool("onnx", "f32", onnx)),
        "OpenVINO": ("openvino", EXACT, with_tool("openvino", "f32", openvino)),
        "OpenVINO, int8": ("openvino", EIGHT_BITS, with_tool("openvino", "int8", openvino)),
        "llama.cpp": ("llama-cpp-python", EXACT, with_tool("gguf", "f32", converter)),
        "llama.cpp, q8_0": ("llama-cpp-python", EIGHT_BITS, with_tool("gguf", "q8_0", converter)),
        "CTranslate2": ("ctranslate2", EXACT, ctranslate2),
        "torchao, int8": ("torchao", EIGHT_BITS, torchao),
        "PEFT, merged": ("peft", EXACT, peft),
        "lm-eval": ("lm_eval", EXACT, lm_eval),
    }


def rows(environments: Path, forms: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """One line for each client and form, and whether the difference is within its limit."""
    samples = {form: Sample(folder) for form, folder in forms.items()}
    for name, (package, limit, check) in clients(environments).items():
        for form, sample in samples.items():
            with tempfile.TemporaryDirectory() as folder:
                found = check(sample, Path(folder))
            largest = float(np.abs(sample.logits).max())
            is_near = found <= limit * largest
            words = f"{name:16} {package + ' ' + version(package):26} {form:10} {found:10.2g} {largest:10.3g}"
            yield words + ("" if is_near else "  TOO FAR"), is_near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="folder that `make test-clients` filled")
    parser.add_argument(
        "--model", type=Path, help="folder of a model with `model.layers` (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--layers", type=int, default=4, help="layers that are kept (default: 4)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        forms = make_forms(args.model or plain_smollm2(args.environments), args.layers, Path(folder))
        print(f"{'client':16} {'version':26} {'form':10} {'difference':>10} {'logit':>10}", flush=True)
        near = []
        for line, is_near in rows(args.environments, forms):
            print(line, flush=True)
            near.append(is_near)
    print(f"{sum(near)} passed, {len(near) - sum(near)} failed")
    if not all(near):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
