"""Perplexity of methods × ratios × seeds, in one run, on any model and data: JSON, a table and a plot.

    python benchmarks/quality.py --output benchmarks/results/demo-model.json   # the model that the package carries
    python benchmarks/quality.py --model FOLDER --calibration seen.txt --evaluation unseen.txt --output OUT.json

An interrupted run goes on where it stopped: the result file is written after every cell, and what is in it is not
measured again unless the settings, the data, the versions or the code changed, or with --fresh.

`excess` is ln(perplexity / dense perplexity), the mean over seeds; its share of FLAP's excess is that of the same run.
"""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from _cells import (
    ABLATION,
    BASELINES,
    DEFAULT,
    METHODS,
    VARIANTS,
    Store,
    Subject,
    add_arguments,
    draw,
    environment,
    evaluate,
    heading,
    load_subject,
    measure,
    number,
    problems_part,
    summarize,
    table,
)

from optimum_otprune.models.perplexity import PROTOCOL

Results = dict[str, dict[str, Any]]  # by variant, then by ratio


def measure_all(store: Store, subject: Subject, plan: Mapping[str, Sequence[float]], args: argparse.Namespace) -> None:
    """Every cell of the plan that is not in the store; seed by seed, so that all methods are soon there with one."""
    for seed in args.seeds:
        samples = draw(subject.calibration, args.num_samples, seed)
        for name, ratios in plan.items():
            for ratio in ratios:
                options = {"multiple_of": args.multiple_of, **VARIANTS[name], "pruning_ratio": ratio, "seed": seed}
                store.get(
                    f"{name} @ {ratio} # {seed}",
                    options,
                    lambda options=options, samples=samples: measure(subject, options, samples),
                )


def results(store: Store, subject: Subject, plan: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> Results:
    """The seeds together, and every excess as a share of FLAP's."""
    cells = store.content["measurements"]
    found: Results = {
        name: {
            str(ratio): summarize([cells[f"{name} @ {ratio} # {seed}"] for seed in seeds], cells["dense"], subject)
            for ratio in ratios
        }
        for name, ratios in plan.items()
    }
    for by_ratio in found.values():
        for ratio, summary in by_ratio.items():
            flap = found.get("flap", {}).get(ratio, {}).get("excess")
            if flap and "excess" in summary:
                summary["share_of_flap_excess"] = summary["excess"] / flap
    return found


def checks(found: Results) -> dict[str, Any]:
    """Whether the default's perplexity rises with the ratio, and stays below every baseline's; with the violations."""
    default = {float(ratio): summary for ratio, summary in found.get(DEFAULT, {}).items() if "mean" in summary}
    ratios = sorted(default)
    falls = [
        f"{low:.0%} to {high:.0%}"
        for low, high in zip(ratios, ratios[1:])
        if float(default[high]["mean"]) < float(default[low]["mean"])
    ]
    beaten = [
        f"{name} at {ratio:.0%} ({float(summary['mean']):.2f} against {float(default[ratio]['mean']):.2f})"
        for name in BASELINES
        for ratio in ratios
        if "mean" in (summary := found.get(name, {}).get(str(ratio), {}))
        and float(summary["mean"]) <= float(default[ratio]["mean"])
    ]
    failed = [f"{float(ratio):.0%}" for ratio, summary in found.get(DEFAULT, {}).items() if "error" in summary]
    return {"falls": falls, "baselines_not_beaten": beaten, "failed": failed}


def check_lines(found: Results) -> str:
    outcome = checks(found)
    falls, beaten = outcome["falls"], outcome["baselines_not_beaten"]
    if DEFAULT not in found:
        return "- Not checked: the default was not measured."
    compared = [name for name in BASELINES if name in found]
    below = f"no: {'; '.join(beaten)}" if beaten else "yes" if compared else "not checked, none was measured"
    rises = f"no: {'; '.join(falls)}" if falls else "yes"
    lost = f" (without {', '.join(outcome['failed'])}, where it failed)" if outcome["failed"] else ""
    return "\n".join(
        (
            f"- Perplexity of the default rises with the ratio: {rises}{lost}.",
            f"- Default below every baseline at every ratio: {below}{lost}.",
        )
    )


def perplexity_table(found: Results, names: Sequence[str], ratios: Sequence[float]) -> str:
    rows = [[name, *(number(found[name][str(ratio)]) for ratio in ratios)] for name in names]
    return table(["perplexity", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def share_table(found: Results, names: Sequence[str], ratios: Sequence[float]) -> str:
    rows = [[name, *(_share(found[name][str(ratio)]) for ratio in ratios)] for name in names]
    return table(["share of FLAP's excess", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def _share(summary: Mapping[str, Any]) -> str:
    return f"{summary['share_of_flap_excess']:.2f}" if "share_of_flap_excess" in summary else "–"


def cost_table(found: Results, names: Sequence[str], ratios: Sequence[float]) -> str:
    """What a method took out, gave back and cost, at the ratio nearest to a half."""
    ratio = str(min(ratios, key=lambda ratio: abs(ratio - 0.5)))
    rows = []
    for name in names:
        summary = found[name][ratio]
        if "error" in summary:
            rows.append([name, "–", "–", "–", "–"])
            continue
        removed = f"{summary['parameters_removed']:,}", f"{summary['share_removed']:.1%}"
        rows.append([name, *removed, f"{summary['rescue_ratio']:.3f}", f"{summary['seconds']:.1f}"])
    header = [f"at {float(ratio):.0%}", "parameters removed", "of all", "rescue ratio", "seconds to prune"]
    return table(header, rows)


def page(store: Store, found: Results, args: argparse.Namespace) -> str:
    """The Markdown file."""
    parts = [
        f"# Quality: {store.content['subject']['model']['name']}\n",
        heading(
            store,
            args.seeds,
            f"{min(args.num_samples, store.content['subject']['calibration']['windows'])} windows out of",
        ),
    ]
    if args.output.with_suffix(".png").exists():
        parts.append(f"![Perplexity against parameters removed]({args.output.with_suffix('.png').name})\n")
    parts += [
        perplexity_table(found, args.variants, args.ratios),
        f"*Excess* is ln(perplexity / dense perplexity).\n\n{share_table(found, args.variants, args.ratios)}",
        cost_table(found, args.variants, args.ratios),
    ]
    if args.ablation_ratios:
        names = list(ABLATION)
        parts.append(
            "## Step by step\n\nThe same selection (OBS) in every line; excess as a share of FLAP's where FLAP was "
            f"measured at that ratio.\n\n{perplexity_table(found, names, args.ablation_ratios)}\n"
            + share_table(found, names, args.ablation_ratios)
        )
    parts.append(f"## Checks\n\n{check_lines(found)}\n")
    parts += problems_part((name, summary) for name, by_ratio in found.items() for summary in by_ratio.values())
    return "\n".join(parts)


def plot(store: Store, found: Results, args: argparse.Namespace) -> None:
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (extra `bench`)")
        return
    if not any("mean" in summary for name in args.variants for summary in found[name].values()):
        print("no plot: no method works with this model")
        return
    from _plots import quality_plot

    quality_plot(
        {name: found[name] for name in args.variants},
        float(store.content["measurements"]["dense"]["perplexity"]),
        store.content["subject"]["model"],
        args.output.with_suffix(".png"),
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    ratios = [round(0.1 * tenth, 1) for tenth in range(1, 8)]
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--ablation-ratios", type=float, nargs="*", default=[0.2, 0.5], help="of the ablation table")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    args = parser.parse_args(argv)
    args.ratios, args.ablation_ratios = sorted(set(args.ratios)), sorted(set(args.ablation_ratios))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    plan: dict[str, list[float]] = {name: list(args.ratios) for name in args.variants}
    for name in ABLATION if args.ablation_ratios else ():
        plan[name] = sorted({*plan.get(name, ()), *args.ablation_ratios})
    subject, dense = load_subject(args)
    header = {
        "subject": subject.description,
        "settings": {"num_samples": args.num_samples, "dtype": args.dtype, "perplexity": PROTOCOL},
        "environment": environment(dense),
    }
    store = Store(args.output, header, args.fresh)
    store.get("dense", {}, lambda: evaluate(subject, dense))
    measure_all(store, subject, plan, args)
    found = results(store, subject, plan, args.seeds)
    store.write(results=found, seeds=args.seeds, checks=checks(found))
    plot(store, found, args)
    text = page(store, found, args)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{perplexity_table(found, args.variants, args.ratios)}\n{check_lines(found)}")


if __name__ == "__main__":
    main()
