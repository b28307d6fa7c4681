"""Pruning of large random models on a GPU: time by stage, peak memory, share of the matrix-multiply limit.

    python benchmarks/gpu.py                                  # the shapes of Llama 3, 8B, and of two blocks of 70B
    python benchmarks/gpu.py --shape llama-3-8b --layers 8    # fewer layers where the memory is small
    python benchmarks/gpu.py --shape tiny --device cpu        # in seconds, to see that the script works

Weights are random, in bfloat16, and made on the device; speed and memory depend on shapes alone. Writes a table and
JSON with the device's name into `--output-folder`.
"""

import argparse
import gc
import json
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.functional.selection import obs_channels
from optimum_otprune.functional.solvers import solve_transport
from optimum_otprune.models.flops import forward_flops
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import forward_seconds, matmul_rate, wait_for_devices
from optimum_otprune.pruning.versions import versions

_RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    """Of a model, and of its calibration data."""

    hidden: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    samples: int
    seqlen: int
    batch_size: int


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, samples=128, seqlen=2048, batch_size=4),
    "llama-3-70b-blocks": Shape(8192, 28672, 2, 64, 8, 4096, samples=128, seqlen=2048, batch_size=4),
    "tiny": Shape(64, 256, 2, 4, 2, 128, samples=8, seqlen=32, batch_size=4),
}


class Stage(NamedTuple):
    """One call of the public interface, or one step of it.

    Attributes:
        name: What was done.
        seconds: Wall-clock time.
        peak_bytes: Of the device, while it ran; on a CPU of the whole process, so far.
        share_of_limit: Operations of the matrix products that cannot be left out, a second, by what the device
            reaches in a large one of the model's dtype; None where that says nothing.
    """

    name: str
    seconds: float
    peak_bytes: int
    share_of_limit: float | None


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, shape.seqlen),
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def timed(name: str, device: torch.device, work: Callable[[], Any], flops: float = 0, limit: float = 1) -> Stage:
    """Run it once."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    wait_for_devices([device])
    start = time.perf_counter()
    work()
    wait_for_devices([device])
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stage = Stage(name, seconds, peak, flops / seconds / limit if flops else None)
    print(stage_line(stage), flush=True)
    return stage


def fast_stages(shape: Shape, device: torch.device, dtype: torch.dtype, limit: float, ratio: float) -> list[Stage]:
    """One dense forward pass over the calibration tokens, then pruning in closed form."""
    tokens = torch.randint(shape.vocabulary, (shape.samples, shape.seqlen))
    model = random_model(shape, device, dtype)
    forward_seconds(model, (shape.batch_size, shape.seqlen))  # to warm up
    one = forward_flops(PrunableModel.of(model), shape.samples, shape.seqlen, shape.seqlen)
    # The hidden states of the dense and of the pruned model, those that the refit reads, and the second moments.
    needed = 3 * (one.total - one.head) + shape.layers * 2 * tokens.numel() * shape.width**2
    pruner = OTPruner.from_pretrained(model, _config(ratio, "fast", shape))
    return [
        timed("dense forward pass", device, lambda: forward(model, tokens, shape), one.total, limit),
        timed("prune, quality fast", device, lambda: prune(pruner, tokens, shape), needed, limit),
    ]


def balanced_stages(shape: Shape, device: torch.device, dtype: torch.dtype, ratio: float) -> list[Stage]:
    """Pruning with reconstruction, and saving."""
    tokens = torch.randint(shape.vocabulary, (shape.samples, shape.seqlen))
    pruner = OTPruner.from_pretrained(random_model(shape, device, dtype), _config(ratio, "balanced", shape))
    stages = [timed("prune, quality balanced", device, lambda: prune(pruner, tokens, shape))]
    with tempfile.TemporaryDirectory() as folder:
        stages.append(timed("save", device, lambda: pruner.save_pretrained(Path(folder) / "pruned")))
    return stages


def _config(ratio: float, quality: str, shape: Shape) -> OTPruningConfig:
    return OTPruningConfig(pruning_ratio=ratio, quality=quality, multiple_of=min(128, shape.width // 16))


def prune(pruner: OTPruner, tokens: torch.Tensor, shape: Shape) -> None:
    pruner.prune(tokens, batch_size=shape.batch_size, progress=False)


@torch.no_grad()
def forward(model: LlamaForCausalLM, tokens: torch.Tensor, shape: Shape) -> None:
    for batch in tokens.split(shape.batch_size):
        model(input_ids=batch.to(model.device), use_cache=False)


def step_stages(shape: Shape, device: torch.device, solvers: Sequence[str]) -> list[Stage]:
    """Elimination and transport of one layer, n -> n/2, by themselves."""
    n, kept = shape.width, shape.width // 2
    hidden = torch.randn(2 * n, n, device=device)
    gram = hidden.T @ hidden
    down = torch.randn(shape.hidden, n, device=device)
    points = hidden[: shape.hidden].T
    cost = torch.cdist(points, points[:kept])
    del hidden, points
    uniform = [torch.full((size,), 1 / size, device=device, dtype=torch.float64) for size in (n, kept)]
    stages = [timed(f"elimination, {n} -> {kept}", device, lambda: obs_channels(gram, down, kept))]
    for name in solvers:
        work = partial(solve_transport, name, cost, *uniform)
        stages.append(timed(f"transport by {name}, {n} -> {kept}", device, work))
    return stages


def stage_line(stage: Stage) -> str:
    share = "" if stage.share_of_limit is None else f"{stage.share_of_limit:.1%} of the limit"
    return f"{stage.name:<40} {stage.seconds:>10.3f} s {stage.peak_bytes / 1e9:>8.2f} GB  {share}".rstrip()


def page(name: str, device: str, shape: Shape, limit: float, stages: Sequence[Stage], dtype: torch.dtype) -> str:
    """The Markdown file."""
    rows = [
        f"| {stage.name} | {stage.seconds:,.2f} | {stage.peak_bytes / 1e9:,.2f} | "
        f"{'–' if stage.share_of_limit is None else f'{stage.share_of_limit:.1%}'} |"
        for stage in stages
    ]
    model = f"{shape.layers} layers, hidden size {shape.hidden:,}, width {shape.width:,}"
    data = f"{shape.samples} calibration samples of {shape.seqlen:,} tokens, {shape.batch_size} at a time"
    return "\n".join(
        (
            f"# {name} on {device}\n",
            f"Random weights in {str(dtype).removeprefix('torch.')}: {model}; {data}. A large matrix product reaches "
            f"{limit / 1e12:,.2f} TFLOP/s, the limit.\n",
            "| stage | seconds | peak GB | share of the limit |\n|---|--:|--:|--:|",
            *rows,
            "\nPeak: of the device's memory; on a CPU that of the whole process so far. Share: of pruning, three "
            "forward passes and the channels' second moments are counted as work, nothing else.\n",
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["llama-3-8b", "llama-3-70b-blocks"])
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--samples", type=int, help="calibration samples, in place of the shape's own")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--solvers", nargs="*", default=["nearest", "sinkhorn"], metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output-folder", type=Path, default=_RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: run this on a machine with one, or try `--shape tiny --device cpu`.")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    for name in args.shape:
        given = {"layers": args.layers, "samples": args.samples}
        shape = SHAPES[name]._replace(**{key: value for key, value in given.items() if value is not None})
        torch.manual_seed(0)
        side = min(8192, 4 * shape.width)
        limit = matmul_rate(device, dtype, (side, side, side), 0.5)
        print(f"{name} on {label}: limit {limit / 1e12:.2f} TFLOP/s")
        stages = [
            *fast_stages(shape, device, dtype, limit, args.ratio),
            *balanced_stages(shape, device, dtype, args.ratio),
            *step_stages(shape, device, args.solvers),
        ]
        file = args.output_folder / f"{name}-{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}.json"
        content = {
            "shape": shape._asdict(),
            "device": label,
            "dtype": args.dtype,
            "limit_flops": limit,
            "stages": [stage._asdict() for stage in stages],
            "versions": versions(),
        }
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(page(name, label, shape, limit, stages, dtype), encoding="utf-8")
        print(f"Saved to {file.with_suffix('.md').name}.")


if __name__ == "__main__":
    main()
