"""`otprune demo`: prune the model that the package carries, on the documentation that every CPython carries."""

import statistics
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_otprune.checkpoint import check_output_folder
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.documentation import documentation_texts
from optimum_otprune.pruner import OTPruner

PROMPT = "Return a new"
_METHODS = (
    ("otprune", "default"),
    ("wanda_sp", "plain dropping"),
    ("structured_afr_with_intrafusion", "reference"),
)
_SEQLEN = 256
_NUM_SAMPLES = 64


class DemoResult(NamedTuple):
    """One line of the table.

    Attributes:
        name: Method, or `dense`.
        perplexity: On the validation documents.
        parameters: Of the whole model.
        tokens_per_second: Of a forward pass.
        rescue_ratio: None for the dense model.
    """

    name: str
    perplexity: float
    parameters: int
    tokens_per_second: float
    rescue_ratio: float | None


def run_demo(pruning_ratio: float, output: Path | None, overwrite: bool = False) -> list[DemoResult]:
    """Prune the embedded model by three methods, print what came of it, save and reload the default's result.

    Args:
        pruning_ratio: Share of every FFN's channels to remove.
        output: Folder for the pruned model; None makes a temporary one.
        overwrite: Replace the folder if it is not empty.

    Returns:
        The table's lines, the dense model first.
    """
    if output is not None:
        check_output_folder(output, overwrite)
    train, validation = documentation_texts("train"), documentation_texts("validation")
    with as_file(files("optimum_otprune") / "demo_model") as folder:
        dense = OTPruner.from_pretrained(folder, _config("otprune", pruning_ratio), dtype="float32")
        print(
            f"Model: a Llama of {dense.model.num_parameters():,} parameters, trained on the documentation of Python."
        )
        print(f"Task: remove {pruning_ratio:.0%} of its FFN channels. No network is used.\n")
        results = [_measure("dense", dense, validation)]
        pruners = {}
        for method, _ in _METHODS:
            pruners[method] = OTPruner.from_pretrained(folder, _config(method, pruning_ratio), dtype="float32")
            pruners[method].report = pruners[method].prune(train, progress=False)
            results.append(_measure(method, pruners[method], validation))
    _print_table(results)
    best = pruners["otprune"]
    print(f"\n{best.report}\n")
    target = Path(tempfile.mkdtemp(prefix="otprune-demo-")) / "pruned" if output is None else output
    best.save_pretrained(target, overwrite=overwrite)
    _reload(target, best.model)
    return results


def _config(method: str, pruning_ratio: float) -> OTPruningConfig:
    return OTPruningConfig(
        method=method, pruning_ratio=pruning_ratio, seqlen=_SEQLEN, num_samples=_NUM_SAMPLES, multiple_of=32
    )


def _measure(name: str, pruner: OTPruner, validation: list[str]) -> DemoResult:
    metrics = pruner.evaluate(validation, progress=False)
    return DemoResult(
        name,
        metrics["perplexity"],
        pruner.model.num_parameters(),
        _tokens_per_second(pruner.model),
        None if pruner.report is None else pruner.report.rescue_ratio,
    )


@torch.no_grad()
def _tokens_per_second(model: PreTrainedModel, runs: int = 5) -> float:
    """Median of a few forward passes over 8 windows, after one to warm up."""
    ids: Tensor = torch.zeros(8, _SEQLEN, dtype=torch.long)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        seconds.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(seconds[1:])


def _print_table(results: list[DemoResult]) -> None:
    labels = dict(_METHODS)
    print(f"{'method':<50}{'perplexity':>12}{'parameters':>13}{'tokens/s':>11}{'rescued':>10}")
    for result in results:
        name = f"{result.name} ({labels[result.name]})" if result.name in labels else result.name
        rescued = "" if result.rescue_ratio is None else f"{result.rescue_ratio:.1%}"
        print(
            f"{name:<50}{result.perplexity:>12.2f}{result.parameters:>13,}{result.tokens_per_second:>11,.0f}{rescued:>10}"
        )


@torch.no_grad()
def _reload(folder: Path, in_memory: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    difference = (model(**inputs).logits - in_memory(**inputs).logits).abs().max().item()
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    print(f"Saved to {folder} and loaded again by AutoModelForCausalLM: largest difference of logits {difference:g}.")
    print(f"It writes: {' '.join(text.split())}")
