"""`otprune demo`: prune the model that the package carries, on the documentation that every CPython carries."""

import statistics
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_otprune.commands.demo_texts import documentation_texts
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.functional.ratios import rescued_share
from optimum_otprune.pruner import OTPruner
from optimum_otprune.storage.outputs import check_output_folder

PROMPT = "Return a new"
_METHODS = (
    ("otprune", "default"),
    ("wanda_sp", "plain dropping"),
    ("structured_afr_with_intrafusion", "reference"),
)
_SEQLEN = 256
_NUM_SAMPLES = 64
_NEW_TOKENS = 24
_SETTINGS = (
    f"Pruned on {_NUM_SAMPLES} windows of text so that it takes seconds; the table in docs/results.md is of 128, so "
    "its figures differ.\nThe data are this Python's documentation, which changes with its version."
)


class DemoResult(NamedTuple):
    """One line of the table.

    Attributes:
        name: The name of the method, or `dense`.
        perplexity: The perplexity on the validation documents.
        parameters: Number of parameters of the whole model.
        tokens_per_second: The speed of a forward pass.
        rescue_ratio: The rescue ratio; None for the dense model.
    """

    name: str
    perplexity: float
    parameters: int
    tokens_per_second: float
    rescue_ratio: float | None


def run_demo(pruning_ratio: float, output: Path | None, overwrite: bool = False) -> list[DemoResult]:
    """Prune the embedded model by three methods, print the results, save and reload that of the default.

    Args:
        pruning_ratio: Share of every FFN's channels to remove.
        output: Folder for the pruned model; None makes a temporary one.
        overwrite: Replace the folder if it is not empty.

    Returns:
        The table's lines, the dense model first.
    """
    if output is not None:
        check_output_folder(output, overwrite)
    _tell("Loading the model, and reading Python's documentation")
    pruners = _pruners(pruning_ratio)
    print(
        f"Model: a Llama of {pruners['dense'].model.num_parameters():,} parameters, trained on Python's documentation."
    )
    print(f"Task: remove {pruning_ratio:.0%} of its FFN channels. No network is used.\n")
    train, validation = documentation_texts("train"), documentation_texts("validation")
    for method, _ in _METHODS:
        _tell(f"Pruning by {method}")
        pruners[method].prune(train, progress=False)
    perplexities = {}
    for name, pruner in pruners.items():
        _tell(f"Evaluating {name}")
        perplexities[name] = pruner.evaluate(validation, progress=False)["perplexity"]
    _tell("Measuring speed")
    speeds = _tokens_per_second({name: pruner.model for name, pruner in pruners.items()})
    results = [
        DemoResult(
            name,
            perplexities[name],
            pruner.model.num_parameters(),
            speeds[name],
            None if pruner.report is None else pruner.report.rescue_ratio,
        )
        for name, pruner in pruners.items()
    ]
    _print_table(results)
    print(_SETTINGS)
    best = pruners["otprune"]
    print(f"\n{best.report}\n")
    target = Path(tempfile.mkdtemp(prefix="otprune-demo-")) / "pruned" if output is None else output
    best.save_pretrained(target, overwrite=overwrite)
    _reload(target, best.model, pruners["dense"].model)
    return results


def _tell(stage: str) -> None:
    """Print a line on standard error, since a stage takes seconds."""
    print(f"{stage} ...", file=sys.stderr, flush=True)


def _pruners(pruning_ratio: float) -> dict[str, OTPruner]:
    """Yield the embedded model, once for itself and once for each method."""

    def load(method: str) -> OTPruner:
        config = OTPruningConfig(
            method=method, pruning_ratio=pruning_ratio, seqlen=_SEQLEN, num_samples=_NUM_SAMPLES, multiple_of=32
        )
        return OTPruner.from_pretrained(folder, config, dtype="float32")

    with as_file(files("optimum_otprune.commands") / "demo_model") as folder:
        return {"dense": load("otprune"), **{method: load(method) for method, _ in _METHODS}}


@torch.no_grad()
def _tokens_per_second(models: dict[str, PreTrainedModel], rounds: int = 5) -> dict[str, float]:
    """Return medians of forward passes over 8 windows, the models taking turns, after one warm-up round."""
    ids: Tensor = torch.zeros(8, _SEQLEN, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / statistics.median(taken[1:]) for name, taken in seconds.items()}


def _print_table(results: list[DemoResult]) -> None:
    labels = dict(_METHODS)
    print(f"{'method':<50}{'perplexity':>12}{'parameters':>13}{'tokens/s':>11}{'rescued':>22}")
    for result in results:
        name = f"{result.name} ({labels[result.name]})" if result.name in labels else result.name
        rescued = "" if result.rescue_ratio is None else rescued_share(result.rescue_ratio).split(",")[0]
        print(
            f"{name:<50}{result.perplexity:>12.2f}{result.parameters:>13,}{result.tokens_per_second:>11,.0f}{rescued:>22}"
        )


@torch.no_grad()
def _reload(folder: Path, in_memory: PreTrainedModel, dense: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    difference = (model(**inputs).logits - in_memory(**inputs).logits).abs().max().item()
    print(f"Saved to {folder} and loaded again by AutoModelForCausalLM: largest difference of logits {difference:g}.")
    for when, writer in [("before", dense), ("after", model)]:
        ids = cast(Any, writer).generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)[0]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        print(f"It writes, {when}: {' '.join(text.split())}")
