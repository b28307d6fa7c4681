"""What the benchmarks share: the variants, the measurement of one cell, and a store that survives an interruption.

A cell is one variant at one ratio with one seed. The store is the result file itself, written anew after every cell;
a cell that is in it already is not measured again while protocol, data, model, versions and code are the same.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import optimum_otprune
from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.demo_texts import documentation_texts
from optimum_otprune.errors import OTPruneError
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.perplexity import PROTOCOL
from optimum_otprune.pruning.calibration.data import calibration_tokens, evaluation_tokens
from optimum_otprune.pruning.versions import versions

DEFAULT = "otprune"
_FAST = {"quality": "fast"}
_REFIT = {**_FAST, "target_correction": 0.0, "intercept": "never"}
_ADAPTIVE = {"allocation": "adaptive"}

# The presets, as a user gets them.
METHODS: dict[str, dict] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "fo_snip": {"method": "fo_snip"},
    "wanda_sp": {"method": "wanda_sp"},
    "flap": {"method": "flap"},
    "reference": {"method": "structured_afr_with_intrafusion"},
    "least_squares": {"method": "least_squares"},
    "otprune, fast": _FAST,
    DEFAULT: {},
    "otprune, adaptive": _ADAPTIVE,
}
# From dropping to the default and beyond: one more step in every line.
ABLATION: dict[str, dict] = {
    "drop": {**_FAST, "compensation": "none", "fuse": []},
    "transport only": {**_FAST, "compensation": "none"},
    "refit to zero": {**_REFIT, "fuse": [], "ridge_prior": "zero"},
    "refit to identity": {**_REFIT, "fuse": [], "ridge_prior": "identity"},
    "refit to transport": _REFIT,
    "otprune, fast": _FAST,
    DEFAULT: {},
    "otprune, best": {"quality": "best"},
    "otprune, fast, adaptive": {**_FAST, **_ADAPTIVE},
    "otprune, adaptive": _ADAPTIVE,
}
# Measured only where asked for by name.
OTHERS: dict[str, dict] = {
    "fo_snip, signed": {"method": "fo_snip", "aggregation": "signed"},
    "reference, corrected": {"method": "structured_afr_with_intrafusion", "normalization": "corrected"},
}
VARIANTS: dict[str, dict] = {**METHODS, **ABLATION, **OTHERS}
# What the default has to beat: presets that are not it.
BASELINES = tuple(name for name in METHODS if not name.startswith(DEFAULT))


class Subject(NamedTuple):
    """What is pruned and on which data.

    Attributes:
        source: Folder or Hub id.
        calibration: All windows to draw from, LongTensor `(num_windows, seqlen)`.
        evaluation: LongTensor `(num_windows, seqlen)`.
        ffn_parameters: Of all FFN layers.
        loading: Options of `OTPruner.from_pretrained`.
        description: For the result file: names and digests of model and data, no paths.
    """

    source: str
    calibration: Tensor
    evaluation: Tensor
    ffn_parameters: int
    loading: dict[str, Any]
    description: dict[str, Any]

    @property
    def intermediate_size(self) -> int:
        """Channels of a layer."""
        return self.description["model"]["intermediate_size"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that both benchmarks have."""
    parser.add_argument("--model", help="folder or Hub id (default: the embedded demo model)")
    parser.add_argument("--calibration", help="text, token ids or Hub dataset (default: Python's documentation)")
    parser.add_argument("--evaluation", help="text, token ids or Hub dataset (default: Python's documentation)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--multiple-of", type=int, default=1, help="round the kept width to a multiple of this")
    parser.add_argument("--max-windows", type=int, help="evaluate only the first so many windows")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device-map", help="as in transformers (default: CPU)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); table and plot go beside it")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file holds already")


def load_subject(args: argparse.Namespace) -> tuple[Subject, OTPruner]:
    """Read model and data once; the pruner holds the dense model."""
    source = args.model or str(files("optimum_otprune.commands") / "demo_model")
    loading = {"dtype": args.dtype, "device_map": args.device_map}
    dense = OTPruner.from_pretrained(source, every_window(args), **loading)
    data = read_data(args, dense)
    blocks = ffn_blocks(dense.model)
    ffn = sum(part.numel() for block in blocks for part in block.read() if part is not None)
    description = {
        "model": {
            "name": shown_name(args.model) if args.model else "embedded demo model",
            "parameters": dense.model.num_parameters(),
            "ffn_parameters": ffn,
            "intermediate_size": blocks[0].intermediate_size,
            "layers": len(blocks),
            "sha256": digest(dense.model.state_dict().values()),
        },
        **data.description,
    }
    return Subject(source, data.calibration, data.evaluation, ffn, loading, description), dense


class Data(NamedTuple):
    """Windows to calibrate on and to evaluate, with their description for the result file."""

    calibration: Tensor
    evaluation: Tensor
    description: dict[str, Any]


def every_window(args: argparse.Namespace) -> OTPruningConfig:
    """A configuration that reads all there is to calibrate on."""
    return OTPruningConfig(seqlen=args.seqlen, num_samples=2**31 - 1)


def read_data(args: argparse.Namespace, dense: OTPruner) -> Data:
    """Read what the command line names, or Python's documentation, with the model's tokenizer."""
    read = (every_window(args), dense.tokenizer, dense.limits)
    calibration = calibration_tokens(_data(args.calibration, "train"), *read).tokens
    evaluation = evaluation_tokens(_data(args.evaluation, "validation"), *read, args.max_windows).tokens
    description = {
        "calibration": _describe(args.calibration, "train", calibration),
        "evaluation": _describe(args.evaluation, "validation", evaluation),
    }
    return Data(calibration, evaluation, description)


def draw(windows: Tensor, count: int, seed: int) -> Tensor:
    """A random subset of windows; the same one that `prune` draws from text with this seed."""
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return windows[chosen]


def measure(
    subject: Subject,
    options: Mapping[str, Any],
    samples: Tensor,
    also: Callable[[PreTrainedModel], dict[str, Any]] = lambda _: {},
) -> dict[str, Any]:
    """Prune and evaluate; what the method cannot do with this model is a result too, with the message as `error`.

    Args:
        subject: The model and its data.
        options: Of the configuration.
        samples: The calibration windows.
        also: What else is told of the pruned model.
    """
    pruner = OTPruner.from_pretrained(subject.source, OTPruningConfig(**options), **subject.loading)
    start = time.perf_counter()
    try:
        report = pruner.prune(samples, progress=False)
        seconds = time.perf_counter() - start
        metrics = evaluate(subject, pruner)
    except OTPruneError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        **metrics,
        "parameters": report.parameters_after,
        "rescue_ratio": report.rescue_ratio,
        "dilution_ratio": report.dilution_ratio,
        "seconds": round(seconds, 1),
        **also(pruner.model),
    }


def evaluate(subject: Subject, pruner: OTPruner) -> dict[str, Any]:
    """Perplexity of the model as it is now; infinity as `"inf"`, since JSON has none."""
    metrics = pruner.evaluate(subject.evaluation, progress=False)
    perplexity = metrics["perplexity"] if math.isfinite(metrics["perplexity"]) else "inf"
    return {"nll": metrics["nll"], "perplexity": perplexity}


def environment(dense: OTPruner) -> dict[str, Any]:
    """What a number depends on besides its settings."""
    package = Path(optimum_otprune.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    device = dense.model.device
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "code": code.hexdigest()[:16],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


class Store:
    """Measurements by name, in a file that is complete after every one of them."""

    def __init__(self, path: Path, header: Mapping[str, Any], fresh: bool = False):
        self.path = path
        self.content: dict[str, Any] = {**header, "measurements": {}}
        if fresh or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in header.items() if found.get(name) != value]
        if changed:
            print(f"{path.name}: {', '.join(changed)} changed; everything is measured again", flush=True)
        else:
            self.content["measurements"] = found["measurements"]

    def get(self, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A measurement from the file if it was made with these settings, else a new one."""
        if not self.holds(name, settings):
            found = self.keep(name, settings, make())
            value = found.get("error") or f"perplexity {float(found['perplexity']):.2f}"
            print(f"{name}: {value}", flush=True)
        return self.content["measurements"][name]

    def holds(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether there is a measurement that was made with these settings."""
        found = self.content["measurements"].get(name)
        return found is not None and found["settings"] == settings

    def keep(self, name: str, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
        """Put a measurement into the file."""
        found = self.content["measurements"][name] = {"settings": dict(settings), **measured}
        self.write()
        return found

    def write(self, **results: Any) -> None:
        """Write the file; it appears complete or not at all."""
        self.content.update(results)
        text = json.dumps(self.content, indent=1, sort_keys=True, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def summarize(cells: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """One line of a table: the seeds of one variant together; the sample standard deviation, None for one seed."""
    errors = [cell["error"] for cell in cells if "error" in cell]
    if errors:
        return {"error": errors[0]}
    perplexities = [float(cell["perplexity"]) for cell in cells]
    removed = subject.description["model"]["parameters"] - statistics.fmean(cell["parameters"] for cell in cells)
    spread = statistics.stdev if len(cells) > 1 and all(map(math.isfinite, perplexities)) else lambda _: None
    mean = statistics.fmean(perplexities)
    rescue = [cell["rescue_ratio"] for cell in cells if "rescue_ratio" in cell]  # who removes no channels has none
    rescued = {"rescue_ratio": statistics.fmean(rescue)} if rescue else {}
    return {
        "perplexity": [cell["perplexity"] for cell in cells],
        "mean": mean if math.isfinite(mean) else "inf",
        "std": spread(perplexities),
        "excess": statistics.fmean(cell["nll"] for cell in cells) - dense["nll"],
        "parameters_removed": round(removed),
        "ffn_share_removed": removed / subject.ffn_parameters,
        "share_removed": removed / subject.description["model"]["parameters"],
        **rescued,
        "seconds": round(statistics.fmean(cell["seconds"] for cell in cells), 1),
    }


def number(summary: Mapping[str, Any]) -> str:
    """Mean ± standard deviation for a table."""
    if "error" in summary:
        return "–"
    mean = float(summary["mean"])
    digits = 2 if mean < 1000 else 0
    if summary["std"] is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {summary['std']:.{digits}f}"


def heading(store: "Store", seeds: Sequence[int], drawn: str, parts: str = "") -> str:
    """First lines of a result page: what was measured, on what, with what.

    Args:
        store: The result file.
        seeds: The seeds.
        drawn: How much of the calibration data each of them takes.
        parts: What the model is made of, where it is more than FFN layers of one width.
    """
    subject, where = store.content["subject"], store.content["environment"]
    model, calibration, evaluation = (subject[key] for key in ("model", "calibration", "evaluation"))
    dense = store.content["measurements"]["dense"]
    parts = parts or f"in {model['layers']} FFN layers of {model['intermediate_size']:,} channels"
    libraries = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join(
        (
            f"{model['parameters']:,} parameters, {model['ffn_parameters']:,} of them {parts}; "
            f"dense perplexity **{float(dense['perplexity']):.2f}**.\n",
            f"- Calibration: {drawn} {calibration['windows']:,} windows of {calibration['seqlen']} tokens: "
            f"{calibration['data']}.",
            f"- Evaluation: {evaluation['data']}, {evaluation['windows']:,} windows of {evaluation['seqlen']} tokens; "
            f"{PROTOCOL}.",
            f"- Seeds {', '.join(map(str, seeds))}: each draws its own calibration windows (where there are more than "
            "are used) and makes its own random choices; mean ± sample standard deviation.",
            f"- {libraries}; {where['device']}, threads: {where['threads']}.\n",
        )
    )


def problems_part(problems: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The part of a page on what the model cannot have; none where there is nothing.

    Args:
        problems: Names of methods, each with the summary of one of its cells.
    """
    lines = {f"- {name}: {summary['error']}" for name, summary in problems if "error" in summary}
    return ["## Not possible with this model\n\n" + "\n".join(sorted(lines)) + "\n"] if lines else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _data(given: str | None, split: str) -> Any:
    return given or documentation_texts(split)


def shown_name(given: str) -> str:
    """A Hub id as it is; of a path the last part only."""
    return Path(given).resolve().name if Path(given).exists() else given


def _describe(given: str | None, split: str, tokens: Tensor) -> dict[str, Any]:
    name = shown_name(given) if given else f"the documentation of Python {platform.python_version()}, {split} split"
    return {"data": name, "windows": tokens.shape[0], "seqlen": tokens.shape[1], "sha256": digest([tokens])}


def digest(tensors: Any) -> str:
    """Half of the SHA-256 of tensors' bytes, one after the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
