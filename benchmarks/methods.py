"""Perplexity of every method at the same ratio, in one run, on any model and token files.

    python benchmarks/methods.py                                     # the model that the package carries
    python benchmarks/methods.py --model FOLDER --calibration calibration.pt --evaluation heldout.pt --seqlen 256 \
        --max-windows 400 --multiple-of 1

`excess` is ln(perplexity / dense perplexity); the last column is its share of FLAP's excess in the same run.
"""

import argparse
import json
import math
import time
from importlib.resources import as_file, files
from pathlib import Path

import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.documentation import documentation_texts
from optimum_otprune.report import versions

# What is compared: the presets, and the steps between dropping and the default.
VARIANTS: dict[str, dict] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "fo_snip signed": {"method": "fo_snip", "aggregation": "signed"},
    "fo_snip absolute": {"method": "fo_snip"},
    "wanda_sp": {"method": "wanda_sp"},
    "flap": {"method": "flap"},
    "reference (source)": {"method": "structured_afr_with_intrafusion"},
    "reference (corrected)": {"method": "structured_afr_with_intrafusion", "normalization": "corrected"},
    "least_squares": {"method": "least_squares"},
    "least_squares, obs": {"method": "least_squares", "selection": "obs"},
    "obs, drop": {"compensation": "none", "fuse": []},
    "obs, transport only": {"compensation": "none"},
    "obs, ridge to identity": {"fuse": [], "ridge_prior": "identity", "target_correction": 0.0, "intercept": "never"},
    "obs, ridge to transport": {"target_correction": 0.0, "intercept": "never"},
    "otprune": {},
    "otprune, 300 steps": {"reconstruction_steps": 300},
}


def measure(model: Path, variant: dict, ratio: float, data: dict, args: argparse.Namespace) -> dict:
    config = OTPruningConfig(
        pruning_ratio=ratio, multiple_of=args.multiple_of, seqlen=args.seqlen, num_samples=args.num_samples, **variant
    )
    pruner = OTPruner.from_pretrained(model, config, dtype="float32")
    start = time.perf_counter()
    report = pruner.prune(data["calibration"], progress=False)
    seconds = time.perf_counter() - start
    metrics = pruner.evaluate(data["evaluation"], max_windows=args.max_windows, progress=False)
    return {
        "perplexity": metrics["perplexity"],
        "num_tokens": metrics["num_tokens"],
        "protocol": metrics["protocol"],
        "parameters": report.parameters_after,
        "rescue_ratio": report.rescue_ratio,
        "dilution_ratio": report.dilution_ratio,
        "seconds": round(seconds, 1),
    }


def run(model: Path, args: argparse.Namespace) -> dict:
    data = {
        "calibration": args.calibration or documentation_texts("train"),
        "evaluation": args.evaluation or documentation_texts("validation"),
    }
    dense = OTPruner.from_pretrained(model, OTPruningConfig(seqlen=args.seqlen), dtype="float32")
    baseline = dense.evaluate(data["evaluation"], max_windows=args.max_windows, progress=False)
    print(f"dense perplexity {baseline['perplexity']:.2f} on {baseline['num_tokens']:,} tokens", flush=True)
    results = {}
    for ratio in args.ratios:
        for name in args.variants:
            results[f"{name} @ {ratio}"] = measure(model, VARIANTS[name], ratio, data, args)
            print(f"{ratio:.0%} {name}: {results[f'{name} @ {ratio}']['perplexity']:.2f}", flush=True)
    return {
        "model": args.model.name if args.model else "embedded demo model",
        "dense": baseline,
        "settings": {"multiple_of": args.multiple_of, "seqlen": args.seqlen, "num_samples": args.num_samples},
        "results": results,
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def table(outcome: dict, ratios: list[float], variants: list[str]) -> str:
    dense = outcome["dense"]["perplexity"]
    lines = ["| method | " + " | ".join(f"{ratio:.0%} | of FLAP's excess" for ratio in ratios) + " |"]
    lines.append("|---" * (1 + 2 * len(ratios)) + "|")
    for name in variants:
        cells = []
        for ratio in ratios:
            perplexity = outcome["results"][f"{name} @ {ratio}"]["perplexity"]
            flap = outcome["results"].get(f"flap @ {ratio}")
            share = math.log(perplexity / dense) / math.log(flap["perplexity"] / dense) if flap else math.nan
            cells.append(f"{perplexity:.2f} | {share:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder (default: the embedded demo model)")
    parser.add_argument("--calibration", help="file of text or token ids (default: Python's documentation)")
    parser.add_argument("--evaluation", help="file of text or token ids (default: Python's documentation)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--output", type=Path, help="JSON file for the results; the table goes beside it as .md")
    args = parser.parse_args()
    with as_file(files("optimum_otprune") / "demo_model") as embedded:
        outcome = run(args.model or embedded, args)
    text = table(outcome, args.ratios, args.variants)
    print(f"\n{text}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(outcome, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        header = f"{outcome['model']}, dense perplexity {outcome['dense']['perplexity']:.2f}\n\n"
        args.output.with_suffix(".md").write_text(header + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
