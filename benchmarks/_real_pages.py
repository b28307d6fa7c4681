"""What `real.py` writes: excesses, tables, the page and the curves of the plot."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from _cells import table
from _real_plan import DENSE, DOMAINS, METHODS, flap_beside

_LABELS = {DENSE: DENSE, **{name: method.label for name, method in METHODS.items()}}
_SECONDS = ("cpu_seconds", "wall_seconds")


_OF_BLOCKS = (
    "Here the ratio is a share of the parameters of all blocks. A third of the heads goes from every block; FFN "
    "channels make up the rest.\n\n"
)


def told(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    first, second = (float(result["domains"][name]["perplexity"]) for name in DOMAINS)
    return f"perplexity {first:.2f}, of the second domain {second:.2f}"


def parted(cells: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cells of FFNs alone, and those in which heads go, too; the dense one in both."""
    heads = {name for name in cells if name != DENSE and METHODS[name.partition(":")[0]].heads is not None}
    return (
        {name: cell for name, cell in cells.items() if name not in heads},
        {name: cell for name, cell in cells.items() if name in heads or name == DENSE},
    )


def done(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Measured cells by name, in the table's order."""
    names = [DENSE, *(f"{name}:{ratio:g}" for ratio in _ratios(cells) for name in METHODS)]
    return {name: cells[name] for name in names if name in cells and "error" not in cells[name]}


def _ratios(cells: Mapping[str, Any]) -> list[float]:
    return sorted({float(name.partition(":")[2]) for name in cells if name != DENSE})


def results(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The excess of each cell in both domains, and what it is as a share of FLAP's at the same ratio."""
    measured = done(cells)
    if DENSE not in measured:
        return {}

    def excesses(cell: Mapping[str, Any]) -> dict[str, float]:
        return {
            domain: cell["domains"][domain]["nll"] - measured[DENSE]["domains"][domain]["nll"] for domain in DOMAINS
        }

    found: dict[str, Any] = {}
    for name, cell in measured.items():
        excess = excesses(cell)
        found[name] = {"excess": excess}
        method, _, ratio = name.partition(":")
        flap = measured.get(f"{flap_beside(method)}:{ratio}") if ratio else None
        if flap is not None:
            most = excesses(flap)
            found[name]["share_of_flap_excess"] = {
                domain: excess[domain] / most[domain] if most[domain] > 0 else None for domain in DOMAINS
            }
    return found


def curves(cells: Mapping[str, Any]) -> dict[str, list[tuple[float, list[float]]]]:
    """Of each method by label: ratios with the perplexities of both domains; the dense model at ratio 0."""
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    for name, cell in done(parted(cells)[0]).items():
        method, _, ratio = name.partition(":")
        point = [float(cell["domains"][domain]["perplexity"]) for domain in DOMAINS]
        curves.setdefault(_LABELS[method], []).append((float(ratio or 0), point))
    return {label: sorted(curves[label]) for label in _LABELS.values() if label in curves}


def page(content: Mapping[str, Any], picture: Path) -> str:
    """The Markdown file."""
    cells = content["measurements"]
    parts = [f"# A real model: {content['model']['name']}\n", _protocol_lines(content)]
    if picture.exists():
        parts.append(f"![Perplexity against channels removed, in two domains]({picture.name})\n")
    ffns, heads = parted(cells)
    sections = {"Against the dense model": quality_table(ffns)}
    if _ratios(heads):
        sections["FFNs and heads"] = _OF_BLOCKS + quality_table(heads)
    sections["Cost"] = cost_table(cells)
    if _ratios(cells):
        sections = {"Perplexity": overview_table(ffns, content["titles"]), **sections}
        sections["Commands"] = _commands(cells, content["protocol"])
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    problems = [f"- {name}: {cell['error']}" for name, cell in cells.items() if "error" in cell]
    if problems:
        parts.append("## Not possible with this model\n\n" + "\n".join(sorted(problems)) + "\n")
    return "\n".join(parts)


def _protocol_lines(content: Mapping[str, Any]) -> str:
    dense, protocol, titles = content["measurements"][DENSE], content["protocol"], content["titles"]
    seqlen, samples = protocol["seqlen"], protocol["samples"]
    counts = [dense["domains"][domain]["windows"] for domain in DOMAINS]
    lines = [
        f"{dense['parameters']:,} parameters, {dense['ffn_parameters']:,} of them in {dense['ffn_layers']} FFN layers "
        f"of {dense['intermediate_size']:,} channels; {content['model']['dtype']}.\n",
        f"- Calibration: samples of {seqlen} tokens. Baselines get {samples} of them ({samples * seqlen:,} tokens) "
        f"from {titles['calibration']}. `otprune` gets fewer from there; the dense model writes others (see below).",
        f"- Evaluation: the first {counts[0]} windows of {seqlen} tokens of {titles['evaluation']}.",
        f"- 2nd domain, which nothing is calibrated on: the first {counts[1]} windows of {titles['second']}.",
        f"- {protocol['perplexity'].capitalize()}. Seed {protocol['seed']}; widths are rounded to multiples of "
        f"{protocol['multiple_of']}.",
    ]
    changed = {**protocol["options"], **({"recovery": protocol["recovery"]} if protocol["recovery"] else {})}
    if changed:
        lines.append(f"- A quick run, with other options than a user gets: `{json.dumps(changed)}`.")
    return "\n".join((*lines, *_made_by(content["measurements"]))) + "\n"


def _made_by(cells: Mapping[str, Any]) -> Iterator[str]:
    """Versions and code; where there are several, the cells of each."""
    by: dict[str, list[str]] = {}
    for name, cell in cells.items():
        where = cell["environment"]
        libraries = ", ".join(f"{library} {version}" for library, version in where["versions"].items())
        text = f"{libraries}; code {where['code']}; {where['device']}, threads: {where['threads']}"
        by.setdefault(text, []).append(name)
    for text, names in by.items():
        yield f"- {text}" + (f": {', '.join(names)}." if len(by) > 1 else ".")


def overview_table(cells: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Perplexity alone: a row for each method, a column for each ratio and domain."""
    measured, ratios = done(cells), _ratios(cells)
    lines = []
    for name, label in _labels(measured).items():
        row = [label]
        for domain in DOMAINS:
            found = [measured.get(name if name == DENSE else f"{name}:{ratio:g}") for ratio in ratios]
            row += ["–" if cell is None else perplexity(cell["domains"][domain]["perplexity"]) for cell in found]
        lines.append(row)
    columns = [f"{titles[domain]}, {ratio:.0%}" for domain in DOMAINS for ratio in ratios]
    return table(["perplexity", *columns], lines)


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Of the methods with a cell, in the table's order."""
    there = {name.partition(":")[0] for name in names}
    return {name: label for name, label in _LABELS.items() if name in there}


def quality_table(cells: Mapping[str, Any]) -> str:
    """What is lost: perplexity, share of FLAP's excess, agreement and KL, each in both domains."""
    found = results(cells)
    lines = []
    for name, cell in done(cells).items():
        domains = [cell["domains"][domain] for domain in DOMAINS]
        shares = found[name].get("share_of_flap_excess", {})
        lines.append(
            [
                *_row_name(name),
                *(perplexity(domain["perplexity"]) for domain in domains),
                *("–" if shares.get(domain) is None else f"{shares[domain]:.2f}" for domain in DOMAINS),
                *(f"{domain['agreement']:.1%}" for domain in domains),
                *(f"{domain['kl']:.3f}" for domain in domains),
            ]
        )
    names = ("perplexity", "share of FLAP's excess", "agreement", "KL")
    columns = ["method", "removed", *(column for name in names for column in (name, "2nd domain"))]
    return (
        table(columns, lines)
        + "\n*Excess* is ln(perplexity / dense perplexity). *Agreement* is the share of tokens for which the model "
        "finds the same next token\nmost likely as the dense one. *KL* is the mean divergence from the dense model's "
        "predictions, in nats.\n"
    )


def cost_table(cells: Mapping[str, Any]) -> str:
    """What it takes: parameters left, seconds and memory."""
    lines = []
    for name, cell in done(cells).items():
        spent = [cell[part] for part in ("pruning", "recovering") if part in cell]
        lines.append(
            [
                *_row_name(name),
                f"{cell['parameters']:,}",
                _calibration(cell),
                *(f"{sum(part[kind] for part in spent):,.0f}" if spent else "–" for kind in _SECONDS),
                f"{cell['peak_memory'] / 1e9:.1f} GB",
            ]
        )
    columns = ["method", "removed", "parameters", "samples", "CPU seconds", "seconds", "peak memory"]
    passes = cells[DENSE]["evaluating"]
    return (
        table(columns, lines)
        + f"\nTo read the evaluation text once, the dense model takes {passes['cpu_seconds']:,.0f} CPU seconds. Peak "
        "memory is that of the process until\npruning or recovery ends; of the dense model, until it is evaluated.\n"
    )


def named(name: str) -> tuple[str, float]:
    """A cell's method in words, and its ratio; 0 of the dense one."""
    method, _, ratio = name.partition(":")
    return _LABELS[method], float(ratio or 0)


def _row_name(name: str) -> tuple[str, str]:
    label, ratio = named(name)
    return label, f"{ratio:.0%}" if ratio else "–"


def _calibration(cell: Mapping[str, Any]) -> str:
    """How many samples were given, and how many the dense model wrote."""
    if "calibration" not in cell:
        return "–"
    written = cell["calibration"].get("written_samples", 0)
    return f"{cell['calibration']['num_samples']}" + (f" + {written} written" if written else "")


def _commands(cells: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What a user types for each row."""
    lines = []
    for name in _labels(cells):
        if name != DENSE:
            samples = round(METHODS[name].share_given * protocol["samples"])
            options = f"--num-samples {samples} {METHODS[name].command}".strip()
            budget = "--pruning-ratio R" if METHODS[name].heads is None else "--target-parameters N"
            command = f"otprune prune MODEL -o OUT --calibration-data DATA {budget} {options}"
            lines.append(f"| {_LABELS[name]} | `{command}` |")
    size = f"`--seqlen {protocol['seqlen']} --multiple-of {protocol['multiple_of']}`"
    return "\n".join((f"{size} is added to each.\n", "| row | command |", "|---|---|", *lines)) + "\n"


def perplexity(value: float | str) -> str:
    return f"{float(value):.2f}" if float(value) < 1000 else f"{float(value):,.0f}"
