"""Perplexity by number of calibration tokens, from half the FFN width up: JSON, a table and a plot.

    python benchmarks/short_calibration.py --output benchmarks/results/demo-model-calibration.json

Every variant selects channels in the same way on the same tokens; they differ in what is done for the removed ones.
T tokens are cut as eight samples of T / 8 tokens, or as more samples of `--seqlen` tokens where that is less.

An interrupted run goes on where it stopped, as that of quality.py does.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from _cells import (
    ABLATION,
    DEFAULT,
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

_SAMPLES = 8  # at least so many, so that whole samples can be held out
Results = dict[str, list[dict[str, Any]]]  # by variant, one entry for every number of tokens


def shape(tokens: int, seqlen: int) -> tuple[int, int]:
    """Samples and tokens of each that make up so many calibration tokens.

    Example:
        >>> shape(256, seqlen=256), shape(32_768, seqlen=256)
        ((8, 32), (128, 256))
    """
    length = min(seqlen, max(2, tokens // _SAMPLES))
    return tokens // length, length


def measure_all(store: Store, subject: Subject, sizes: Sequence[int], args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for tokens in sizes:
            count, length = shape(tokens, args.seqlen)
            samples = draw(subject.calibration, count, seed)[:, :length]
            for name in args.variants:
                options = {
                    "multiple_of": args.multiple_of,
                    **ABLATION[name],
                    "pruning_ratio": args.ratio,
                    "seed": seed,
                }
                store.get(
                    f"{name} @ {tokens} tokens # {seed}",
                    {**options, "samples": count, "seqlen": length},
                    lambda options=options, samples=samples: measure(subject, options, samples),
                )


def results(store: Store, subject: Subject, sizes: Sequence[int], args: argparse.Namespace) -> Results:
    """The seeds together, in the order of the sizes."""
    cells = store.content["measurements"]
    found: Results = {}
    for name in args.variants:
        found[name] = []
        for tokens in sizes:
            count, length = shape(tokens, args.seqlen)
            seeds = [cells[f"{name} @ {tokens} tokens # {seed}"] for seed in args.seeds]
            summary = summarize(seeds, cells["dense"], subject)
            found[name].append({"tokens": count * length, "samples": count, "seqlen": length, **summary})
    return found


def checks(found: Results) -> dict[str, Any]:
    """Where more calibration hurts the default, and where something else is better than it."""
    default = [entry for entry in found.get(DEFAULT, ()) if "mean" in entry]
    rises = [
        f"{few['tokens']:,} to {many['tokens']:,} tokens ({float(few['mean']):.2f} to {float(many['mean']):.2f})"
        for few, many in zip(default, default[1:])
        if float(many["mean"]) > float(few["mean"])
    ]
    means = {entry["tokens"]: float(entry["mean"]) for entry in default}
    better = [
        f"{name} on {entry['tokens']:,} tokens ({float(entry['mean']):.2f} against {means[entry['tokens']]:.2f})"
        for name, entries in found.items()
        for entry in entries
        if name != DEFAULT and "mean" in entry and float(entry["mean"]) < means.get(entry["tokens"], 0.0)
    ]
    return {"rises": rises, "better_than_default": better}


def check_lines(found: Results) -> str:
    if DEFAULT not in found:
        return "- Not checked: the default was not measured."
    outcome = checks(found)
    rises, better = outcome["rises"], outcome["better_than_default"]
    return "\n".join(
        (
            f"- More calibration never hurts the default: {'no: ' + '; '.join(rises) if rises else 'yes'}.",
            f"- Default best at every number of tokens: {'no: ' + '; '.join(better) if better else 'yes'}.",
        )
    )


def perplexity_table(found: Results, width: int) -> str:
    names = list(found)
    rows = []
    for entries in zip(*found.values()):
        first = entries[0]
        size = f"{first['tokens']:,} ({first['tokens'] / width:.3g} n)"
        rows.append([size, f"{first['samples']} × {first['seqlen']}", *map(number, entries)])
    return table(["calibration tokens", "samples", *names], rows)


def page(store: Store, found: Results, left_out: Sequence[int], args: argparse.Namespace) -> str:
    """The Markdown file."""
    model = store.content["subject"]["model"]
    parts = [
        f"# Calibration: {model['name']}, {args.ratio:.0%} of the channels removed\n",
        heading(store, args.seeds, "as many tokens as each line says out of"),
    ]
    if args.output.with_suffix(".png").exists():
        parts.append(f"![Perplexity against calibration tokens]({args.output.with_suffix('.png').name})\n")
    parts.append(
        "Perplexity; n is the number of channels of a layer. Every column selects channels in the same way on the "
        "same tokens and differs in what is done for the removed ones.\n\n"
        + perplexity_table(found, model["intermediate_size"])
    )
    if left_out:
        sizes = ", ".join(f"{tokens:,}" for tokens in left_out)
        parts.append(f"Not measured, since the calibration data hold fewer tokens: {sizes}.\n")
    parts.append(f"## Checks\n\n{check_lines(found)}\n")
    parts += problems_part((name, entry) for name, entries in found.items() for entry in entries)
    return "\n".join(parts)


def plot(store: Store, found: Results, args: argparse.Namespace) -> None:
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (extra `bench`)")
        return
    if not any("mean" in entry for entries in found.values() for entry in entries):
        print("no plot: no variant works with this model")
        return
    from _plots import calibration_plot

    model = store.content["subject"]["model"]
    calibration_plot(
        found,
        float(store.content["measurements"]["dense"]["perplexity"]),
        f"{model['name']}: {args.ratio:.0%} of the FFN channels removed",
        model["intermediate_size"],
        args.output.with_suffix(".png"),
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    multiples = [0.5, 1, 2, 4, 8, 16, 32, 64]
    parser.add_argument("--multiples", type=float, nargs="+", default=multiples, help="tokens, in FFN widths")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    names = ["drop", "refit to zero", "refit to identity", DEFAULT]
    parser.add_argument("--variants", nargs="+", choices=list(ABLATION), default=names, metavar="NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    subject, dense = load_subject(args)
    asked = [round(multiple * subject.intermediate_size) for multiple in sorted(set(args.multiples))]
    sizes = [tokens for tokens in asked if shape(tokens, args.seqlen)[0] <= len(subject.calibration)]
    left_out = [tokens for tokens in asked if tokens not in sizes]
    header = {
        "subject": subject.description,
        "settings": {"ratio": args.ratio, "dtype": args.dtype, "perplexity": PROTOCOL},
        "environment": environment(dense),
    }
    store = Store(args.output, header, args.fresh)
    store.get("dense", {}, lambda: evaluate(subject, dense))
    measure_all(store, subject, sizes, args)
    found = results(store, subject, sizes, args)
    store.write(results=found, seeds=args.seeds, checks=checks(found), left_out=left_out)
    plot(store, found, args)
    args.output.with_suffix(".md").write_text(page(store, found, left_out, args), encoding="utf-8")
    print(f"\n{perplexity_table(found, subject.intermediate_size)}\n{check_lines(found)}")


if __name__ == "__main__":
    main()
