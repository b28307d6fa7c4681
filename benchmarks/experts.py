"""Perplexity of a mixture of experts: channels inside the experts against whole experts; JSON, a table and a plot.

    python benchmarks/experts.py --output benchmarks/results/experts.json
    python benchmarks/experts.py --model FOLDER --calibration seen.txt --evaluation unseen.txt --output OUT.json

Without --model, `examples/train_tiny_moe.py` trains one in `.bench` the first time, some minutes on one core.

The lines with a REAP in their name remove whole routed experts (see `_reap.py`), the others the same share of channels
of every routed expert. Each says how many parameters of routed experts and of other modules it removed.

An interrupted run goes on where it stopped, as that of quality.py does.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _cells import (
    DEFAULT,
    VARIANTS,
    Store,
    Subject,
    add_arguments,
    digest,
    draw,
    environment,
    evaluate,
    every_window,
    heading,
    measure,
    number,
    problems_part,
    read_data,
    shown_name,
    summarize,
    table,
)
from _reap import remove_experts, sparse_layers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_otprune import OTPruner
from optimum_otprune.models.perplexity import PROTOCOL

CACHE = Path(__file__).resolve().parents[1] / ".bench"
_TRAINING = Path(__file__).resolve().parents[1] / "examples" / "train_tiny_moe.py"
DROP = "drop"
# Whole experts, by REAP's score and by that times the routed frequency.
REAP: dict[str, dict[str, bool]] = {"reap": {"by_frequency": False}, "reap × frequency": {"by_frequency": True}}
CHANNELS = (DROP, "wanda_sp", "least_squares", "otprune, fast", DEFAULT)
_TARGET_RATIO, _TARGET_SHARE = 0.5, 0.4  # the default's excess there, as a share of dropping's

Results = dict[str, dict[str, Any]]  # by variant, then by ratio


def trained_model(cache: Path) -> Path:
    """Return the folder of the small model; it is trained the first time, complete or not at all."""
    folder = cache / "tiny-moe"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="tiny-moe.", dir=cache))
        try:
            subprocess.run([sys.executable, str(_TRAINING), "--output", str(unfinished)], check=True)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load(args: argparse.Namespace) -> tuple[Subject, OTPruner]:
    """Read model and data once; the pruner holds the dense model."""
    source = args.model or str(trained_model(CACHE))
    loading = {"dtype": args.dtype, "device_map": args.device_map}
    model = AutoModelForCausalLM.from_pretrained(source, **loading)
    layers = sparse_layers(model)
    if not layers:
        raise SystemExit(
            f"{shown_name(source)} has no routed experts with stacked weights; see benchmarks/quality.py."
        )
    dense = OTPruner(model, every_window(args), AutoTokenizer.from_pretrained(source))
    data, kinds = read_data(args, dense), by_kind(model)
    description = {
        "model": {
            "name": shown_name(source),
            "parameters": model.num_parameters(),
            "ffn_parameters": kinds["routed_parameters"],
            "intermediate_size": layers[0].experts.down_proj.shape[2],
            "layers": len(layers),
            "experts": layers[0].num_experts,
            "sha256": digest(model.state_dict().values()),
        },
        **data.description,
    }
    return Subject(source, data.calibration, data.evaluation, kinds["routed_parameters"], loading, description), dense


def by_kind(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of routed experts, and of all that is none (shared experts, dense layers, routers, attention, …)."""
    routed = sum(weight.numel() for layer in sparse_layers(model) for weight in layer.experts.parameters())
    return {"routed_parameters": routed, "other_parameters": model.num_parameters() - routed}


def options_of(name: str, ratio: float, seed: int, multiple_of: int) -> dict[str, Any]:
    """The configuration of a method that removes channels, of routed experts alone."""
    kinds = {"pruning_ratio": 0.0, "kind_ratios": {"experts": ratio}}
    return {"multiple_of": multiple_of, **VARIANTS[name], **kinds, "seed": seed}


def measure_reap(subject: Subject, samples: Tensor, ratio: float, by_frequency: bool) -> dict[str, Any]:
    """Remove whole experts and evaluate."""
    model = AutoModelForCausalLM.from_pretrained(subject.source, **subject.loading)
    start = time.perf_counter()
    kept = remove_experts(model, samples, ratio, by_frequency)
    seconds = time.perf_counter() - start
    return {
        **evaluate(subject, OTPruner(model)),
        "parameters": model.num_parameters(),
        "kept_experts": kept,
        "seconds": round(seconds, 1),
        **by_kind(model),
    }


def measure_all(store: Store, subject: Subject, args: argparse.Namespace) -> None:
    """Every cell that is not in the store; seed by seed, the cheap ones first."""
    for seed in args.seeds:
        samples = draw(subject.calibration, args.num_samples, seed)
        for name in sorted(args.variants, key=lambda name: name not in REAP):
            for ratio in args.ratios:
                cell = f"{name} @ {ratio} # {seed}"
                if name in REAP:
                    settings: dict[str, Any] = {"ratio": ratio, "seed": seed, **REAP[name]}
                    reap = (subject, samples, ratio, REAP[name]["by_frequency"])
                    store.get(cell, settings, lambda reap=reap: measure_reap(*reap))
                else:
                    settings = options_of(name, ratio, seed, args.multiple_of)
                    channels = (subject, settings, samples, by_kind)
                    store.get(cell, settings, lambda channels=channels: measure(*channels))


def results(store: Store, subject: Subject, args: argparse.Namespace) -> Results:
    """The seeds together, with what was removed by kind, and every excess as a share of dropping's."""
    cells = store.content["measurements"]
    kinds = ("routed_parameters", "other_parameters")
    found: Results = {}
    for name in args.variants:
        for ratio in args.ratios:
            seeds = [cells[f"{name} @ {ratio} # {seed}"] for seed in args.seeds]
            summary = found.setdefault(name, {})[str(ratio)] = summarize(seeds, cells["dense"], subject)
            if "error" not in summary:
                summary |= {
                    f"{kind}_removed": round(cells["dense"][kind] - sum(cell[kind] for cell in seeds) / len(seeds))
                    for kind in kinds
                }
    for by_ratio in found.values():
        for ratio, summary in by_ratio.items():
            dropped = found.get(DROP, {}).get(ratio, {}).get("excess")
            if dropped and "excess" in summary:
                summary["share_of_drop_excess"] = summary["excess"] / dropped
    return found


def checks(found: Results) -> dict[str, Any]:
    """The default's excess at one half as a share of dropping's, beside its target; None where it was not measured."""
    at_half = found.get(DEFAULT, {}).get(str(_TARGET_RATIO), {})
    share = at_half.get("share_of_drop_excess")
    better = [
        f"{name} at {float(ratio):.0%} ({float(summary['mean']):.2f} against {float(default['mean']):.2f})"
        for name, by_ratio in found.items()
        for ratio, summary in by_ratio.items()
        if "mean" in summary
        and "mean" in (default := found.get(DEFAULT, {}).get(ratio, {}))
        and float(summary["mean"]) < float(default["mean"])
    ]
    return {"share_of_drop_excess": share, "target": _TARGET_SHARE, "better_than_default": better}


def check_lines(found: Results) -> str:
    outcome = checks(found)
    share, better = outcome["share_of_drop_excess"], outcome["better_than_default"]
    if share is None:
        return "- Not checked: the default or dropping was not measured at 50%."
    within = "yes" if share <= _TARGET_SHARE else "no"
    return "\n".join(
        (
            f"- The default's excess at {_TARGET_RATIO:.0%} is at most {_TARGET_SHARE} of dropping's: "
            f"{within} ({share:.2f}).",
            f"- Default best at every ratio: {'no: ' + '; '.join(better) if better else 'yes'}.",
        )
    )


def perplexity_table(found: Results, ratios: Sequence[float]) -> str:
    rows = [[name, *(number(by_ratio[str(ratio)]) for ratio in ratios)] for name, by_ratio in found.items()]
    return table(["perplexity", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def share_table(found: Results, ratios: Sequence[float]) -> str:
    rows = [[name, *(_share(by_ratio[str(ratio)]) for ratio in ratios)] for name, by_ratio in found.items()]
    return table(["share of dropping's excess", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def _share(summary: Mapping[str, Any]) -> str:
    return f"{summary['share_of_drop_excess']:.2f}" if "share_of_drop_excess" in summary else "–"


def removed_table(found: Results, ratio: float) -> str:
    """What each method took, from routed experts and from elsewhere."""
    rows = []
    for name, by_ratio in found.items():
        summary = by_ratio[str(ratio)]
        if "error" in summary:
            rows.append([name, "–", "–", "–", "–"])
            continue
        counts = (f"{summary[f'{kind}_parameters_removed']:,}" for kind in ("routed", "other"))
        rows.append([name, *counts, f"{summary['share_removed']:.1%}", f"{summary['seconds']:.1f}"])
    return table([f"parameters removed at {ratio:.0%}", "routed experts", "others", "of all", "seconds"], rows)


def page(store: Store, found: Results, args: argparse.Namespace) -> str:
    """The Markdown file."""
    model, calibration = store.content["subject"]["model"], store.content["subject"]["calibration"]
    drawn = f"{min(args.num_samples, calibration['windows'])} windows out of"
    experts = f"in {model['layers']} × {model['experts']} routed experts of {model['intermediate_size']:,} channels"
    parts = [f"# Experts: {model['name']}\n", heading(store, args.seeds, drawn, experts)]
    if args.output.with_suffix(".png").exists():
        parts.append(f"![Perplexity against parameters removed]({args.output.with_suffix('.png').name})\n")
    parts += [
        "`reap` and `reap × frequency` remove whole routed experts, by the score of "
        "[Lasby et al., 2025](https://arxiv.org/abs/2510.13999) and by that times the number of routed tokens; all "
        "others remove channels of all of them.\n\n" + perplexity_table(found, args.ratios),
        f"*Excess* is ln(perplexity / dense perplexity).\n\n{share_table(found, args.ratios)}",
        *(removed_table(found, ratio) for ratio in args.ratios),
        f"## Checks\n\n{check_lines(found)}\n",
    ]
    parts += problems_part((name, summary) for name, by_ratio in found.items() for summary in by_ratio.values())
    return "\n".join(parts)


def plot(store: Store, found: Results, args: argparse.Namespace) -> None:
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (extra `bench`)")
        return
    if not any("mean" in summary for by_ratio in found.values() for summary in by_ratio.values()):
        print("no plot: no method works with this model")
        return
    from _plots import quality_plot

    dense, model = store.content["measurements"]["dense"]["perplexity"], store.content["subject"]["model"]
    quality_plot(found, float(dense), model, args.output.with_suffix(".png"))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    names = [*CHANNELS, *REAP]
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *REAP], default=names, metavar="NAME")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    args = parser.parse_args(argv)
    args.ratios = sorted(set(args.ratios))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    subject, dense = load(args)
    header = {
        "subject": subject.description,
        "settings": {"num_samples": args.num_samples, "dtype": args.dtype, "perplexity": PROTOCOL},
        "environment": environment(dense),
    }
    store = Store(args.output, header, args.fresh)
    store.get("dense", {}, lambda: {**evaluate(subject, dense), **by_kind(dense.model)})
    measure_all(store, subject, args)
    found = results(store, subject, args)
    store.write(results=found, seeds=args.seeds, checks=checks(found))
    plot(store, found, args)
    args.output.with_suffix(".md").write_text(page(store, found, args), encoding="utf-8")
    print(f"\n{perplexity_table(found, args.ratios)}\n{check_lines(found)}")


if __name__ == "__main__":
    main()
