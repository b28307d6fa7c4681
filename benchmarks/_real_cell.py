"""One cell of `real.py`, in a process of its own: prune, recover if asked, and compare with the dense model.

    python benchmarks/_real_cell.py CELL.json RESULT.json

The process's own peak memory is read when pruning has ended, before the dense model comes beside the pruned one.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _cells import digest, environment
from _real_plan import DOMAINS
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError, NumericalError, UnsupportedModelError
from optimum_otprune.models.agreement import evaluate_model
from optimum_otprune.models.defaults import BATCH_SIZE
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.pruning.calibration.data import evaluation_tokens

_NOT_POSSIBLE = (ConfigurationError, UnsupportedModelError, NumericalError)  # a result, too


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one cell; what the method cannot do with this model is told as `error`."""
    pruner = OTPruner.from_pretrained(cell["model"], OTPruningConfig(**cell["options"]), **cell["loading"])
    if "of_blocks" in cell:
        target = _target(pruner.model, cell["of_blocks"])
        pruner.config = OTPruningConfig(**cell["options"], target_parameters=target)
    where = {"environment": environment(pruner)}
    windows = _windows(cell, pruner)  # before the work, so that bad data lose none of it
    if cell["dense"]:
        return {**_dense(pruner, windows), **where}
    try:
        pruner, spent = _pruned(cell, pruner)
    except _NOT_POSSIBLE as error:
        return {"error": f"{type(error).__name__}: {error}", **where}
    peak = peak_memory()
    dense = OTPruner.from_pretrained(cell["model"], **cell["loading"])
    assert pruner.report is not None
    return {
        "domains": {name: compared(dense.model, pruner.model, tokens) for name, tokens in windows.items()},
        "parameters": pruner.report.parameters_after,
        "calibration": {key: value for key, value in pruner.report.calibration.items() if key != "passages"},
        "peak_memory": peak,
        **spent,
        **where,
    }


def _pruned(cell: Mapping[str, Any], pruner: OTPruner) -> tuple[OTPruner, dict[str, Any]]:
    """The pruned model, recovered if asked, with the seconds of what was done here.

    What recovery goes on with is kept in a folder, since pruning may take an hour.
    """
    done: dict[str, Any] = {}
    calibration, kept, recovery = cell["data"]["calibration"], cell["pruned"], cell.get("recovery")
    if recovery is not None and Path(kept).exists():
        pruner = OTPruner.from_pretrained(kept, **cell["loading"])
    else:
        with _spent() as done["pruning"]:
            pruner.prune(calibration, progress=False)
        if kept is not None:
            pruner.save_pretrained(kept, overwrite=True)
    if recovery is not None:
        with _spent() as done["recovering"]:
            report = pruner.recover(calibration, base_model=cell["model"], progress=False, **recovery)
        done["recovery_report"] = report.to_dict()
    return pruner, done


def _target(model: PreTrainedModel, share: float) -> int:
    """The parameters that are left when a share of those of all blocks is gone."""
    modules = {block.module for block in ffn_blocks(model)}
    in_blocks = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return model.num_parameters() - round(share * in_blocks)


def _windows(cell: Mapping[str, Any], pruner: OTPruner) -> dict[str, Tensor]:
    """The windows of both domains, LongTensors `(windows, seqlen)`."""
    second = cell["data"]["second"] or language_reference()
    read = (pruner.config, pruner.tokenizer, pruner.limits)
    return {
        name: evaluation_tokens(data, *read, cell["windows"][name]).tokens
        for name, data in zip(DOMAINS, (cell["data"]["evaluation"], second))
    }


def language_reference() -> list[str]:
    """The topics of the language reference that every CPython carries for `help()`, 0.5 MB of text."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise SystemExit("This Python has no `pydoc_data.topics`: name another text by --second.") from None
    return [topics[name] for name in sorted(topics)]


def _dense(dense: OTPruner, windows: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dense model itself, with what the others are measured against."""
    with _spent() as spent:
        domains = {"evaluation": compared(None, dense.model, windows["evaluation"])}
    domains["second"] = compared(None, dense.model, windows["second"])
    blocks = ffn_blocks(dense.model)
    return {
        "domains": domains,
        "parameters": dense.model.num_parameters(),
        "ffn_parameters": sum(part.numel() for block in blocks for part in block.read() if part is not None),
        "ffn_layers": len(blocks),
        "intermediate_size": blocks[0].intermediate_size,
        "digests": {name: digest([tokens]) for name, tokens in windows.items()},
        "evaluating": spent,
        "peak_memory": peak_memory(),
    }


def compared(dense: PreTrainedModel | None, model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
    """What `evaluate_model` says of a model, with `"inf"` for a perplexity that is; the dense one agrees with itself.

    Args:
        dense: The dense model; None if `model` is it.
        model: The model that is measured.
        tokens: Windows, LongTensor `(windows, seqlen)`.
    """
    found = evaluate_model(model, dense, tokens, BATCH_SIZE, progress=False)
    perplexity = found["perplexity"] if math.isfinite(found["perplexity"]) else "inf"
    shared = {"kl": found.get("kl", 0.0), "agreement": found.get("agreement", 1.0)}
    return {"nll": found["nll"], "perplexity": perplexity, **shared, "windows": len(tokens)}


@contextmanager
def _spent() -> Iterator[dict[str, float]]:
    """Processor and wall-clock seconds of what is inside, in the mapping when it ends."""
    spent: dict[str, float] = {}
    wall, processor = time.perf_counter(), time.process_time()
    yield spent
    spent["cpu_seconds"] = round(time.process_time() - processor, 1)
    spent["wall_seconds"] = round(time.perf_counter() - wall, 1)


def peak_memory() -> int:
    """Bytes of the largest resident set so far, of this program alone.

    Linux says so in `/proc`; what `getrusage` counts there includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        peak = next((line for line in lines if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    cell, result = map(Path, sys.argv[1:])
    measured = measure(json.loads(cell.read_text(encoding="utf-8")))
    result.write_text(json.dumps(measured, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
