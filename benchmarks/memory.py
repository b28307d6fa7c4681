"""Peak memory of pruning a model whose weights are on disk, against its size and for more layers.

    python benchmarks/memory.py [--quick] [--output memory.json]

Random Llama weights in float32, loaded with all layers offloaded to disk, pruned by half in closed form with all
hidden states in files, and saved. Every measurement is that of a process of its own: the maximum resident set size as
the kernel counts it, read by `/usr/bin/time -v` where that is installed. `import baseline` is a process that imports
what the others do, and ends.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from _rows import Row, shown, told, write_json

_GNU_TIME = Path("/usr/bin/time")
# The kernel counts what a process was before it became another program: hence one that is small.
_SMALL_PARENT = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
open(sys.argv[1], "w").write(str(peak))
sys.exit(done.returncode)
"""
_SHARE = 0.45  # of the weights' size, beside the import baseline
_GROWTH = 0.10
_SMALLEST = 1500  # MB of weights


class Shape(NamedTuple):
    """Of the model, and of its calibration data."""

    hidden: int
    width: int
    layers: tuple[int, int]  # few, many
    vocabulary: int
    samples: int
    seqlen: int


FULL = Shape(1024, 2048, (10, 40), 4096, samples=16, seqlen=256)
QUICK = Shape(64, 128, (2, 8), 128, samples=8, seqlen=32)
_VARIANTS = {
    "quality balanced, 5 steps": {"quality": "balanced", "reconstruction_steps": 5},
    "method fo_snip": {"method": "fo_snip", "quality": "fast"},
}


def rows(quick: bool = False) -> Iterator[Row]:
    """All figures of this script; all sizes are in MB."""
    shape = QUICK if quick else FULL
    few, many = shape.layers
    counted = "/usr/bin/time -v" if _GNU_TIME.exists() else "getrusage"
    with tempfile.TemporaryDirectory(prefix="otprune-memory-") as folder:
        work = Path(folder)
        _peak(work, "build", shape)
        weights = sum(file.stat().st_size for file in (work / str(many)).glob("*.safetensors")) / 1e6
        yield Row("weights", weights, "MB", f"≥ {_SMALLEST:g}", weights >= _SMALLEST)
        baseline = _peak(work, "baseline", shape)
        yield told(f"import baseline ({counted})", baseline, "MB")
        smaller, larger = (_peak(work, "prune", shape, str(layers), {"quality": "fast"}) for layers in shape.layers)
        yield from judged_rows(weights, baseline, smaller, larger, shape.layers)
        for variant, options in {} if quick else _VARIANTS.items():
            yield told(f"peak, {few} layers, {variant}", _peak(work, "prune", shape, str(few), options), "MB")


def judged_rows(weights: float, baseline: float, few: float, many: float, layers: tuple[int, int]) -> Iterator[Row]:
    """Peaks against what they may be; all sizes in MB."""
    allowed, growth = baseline + _SHARE * weights, many / few - 1
    yield told(f"peak, {layers[0]} layers", few, "MB")
    yield Row(f"peak, {layers[1]} layers", many, "MB", f"≤ {allowed:.0f}", many <= allowed)
    yield told("  beyond the import baseline, in units of the weights", (many - baseline) / weights, "")
    yield Row(f"growth of the peak, {layers[0]} to {layers[1]} layers", growth, "", f"< {_GROWTH}", growth < _GROWTH)


def _peak(work: Path, kind: str, shape: Shape, model: str = "", options: Mapping = MappingProxyType({})) -> float:
    """Run this script as a process of its own; its maximum resident set size in MB."""
    arguments = [kind, str(work / model), json.dumps(dict(options)), json.dumps(shape)]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    told_in = work / "peak"
    if _GNU_TIME.exists():
        measured = [str(_GNU_TIME), "-v", "-o", str(told_in), *command]
    else:
        measured = [sys.executable, "-I", "-S", "-c", _SMALL_PARENT, str(told_in), *command]
    done = subprocess.run(measured, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nThe process that was to be measured ({kind}) failed, see above.")
    text = told_in.read_text(encoding="utf-8")
    return (gnu_time_peak(text) if _GNU_TIME.exists() else int(text)) / 1e6


def gnu_time_peak(text: str) -> int:
    """Bytes, from what GNU time writes."""
    found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", text)
    if found is None:
        raise SystemExit(f"{_GNU_TIME} -v does not tell the maximum resident set size: is it GNU time?")
    return int(found[1]) * 1024


def _child(kind: str, folder: Path, options: dict, shape: Shape) -> None:
    """What a process that is measured does; it imports what pruning imports, and no more."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "build":
        for layers in shape.layers:
            LlamaForCausalLM(_model_config(shape, layers)).save_pretrained(folder / str(layers))
        return
    import datasets  # noqa: F401
    import ot  # noqa: F401

    from optimum_otprune import pruner  # noqa: F401
    from optimum_otprune.checkpoints.card import render  # noqa: F401
    from optimum_otprune.pruning import pipeline  # noqa: F401

    if kind == "baseline":
        return
    samples = torch.randint(shape.vocabulary, (shape.samples, shape.seqlen))
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        subject = pruner.OTPruner.from_pretrained(
            folder,
            {"pruning_ratio": 0.5, "multiple_of": 1, **options},
            device_map=places | {"model.layers": "disk"},
            offload_folder=f"{work}/offload",
        )
        subject.prune(samples, batch_size=4, progress=False, max_hidden_memory=0, spill_folder=work)
        subject.save_pretrained(f"{work}/pruned")


def _model_config(shape: Shape, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        bos_token_id=0,
        eos_token_id=1,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models; their figures mean little")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, folder, options, shape = args.child
        _child(kind, Path(folder), json.loads(options), Shape(*json.loads(shape)))
        return
    write_json(shown(rows(args.quick)), args.output)


if __name__ == "__main__":
    main()
