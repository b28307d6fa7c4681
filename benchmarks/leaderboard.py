"""One page of all results that are committed: every pruned model by model, method and ratio, sortable by any column.

    python benchmarks/leaderboard.py --output benchmarks/results/leaderboard.html

Reads every JSON file in --results that holds pruned models by ratio. Files of other things (calibration budgets,
memory, speed) are left out. The page needs no network. *At equal parameters* sets a row's excess beside that of the
baseline of its file (FLAP, or dropping where there is no FLAP) with as many parameters removed, by straight lines
between the baseline's ratios.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from _real_pages import done, named, results
from _real_plan import DENSE, DOMAINS
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from optimum_otprune.checkpoints.card.reproduction import Rerun, command
from optimum_otprune.storage.files import save_text

RESULTS = Path(__file__).with_name("results")
BASELINES = ("flap", "drop")
_BEYOND = 0.05  # as a share of the baseline's most parameters: so far its last straight line is followed
# Defaults of the code that a file was made with, where they are others today.
_DEFAULTS_THEN: Mapping[str, Mapping[str, Any]] = {"b2db77f098a4b285": {"self_calibration": 0}}


class Row(NamedTuple):
    """One pruned model.

    Attributes:
        model: The dense model's name.
        method: What the method is called in the table of its file.
        ratio: The share of FFN channels, of experts, or of the parameters of all blocks that was to go.
        removed: The number of parameters removed.
        share_removed: The same as a share of all parameters.
        perplexity: On the evaluation data.
        excess: ln(perplexity / dense perplexity).
        second_perplexity: On text of another domain, where that was measured.
        second_excess: The same as an excess.
        seconds: From the dense to the pruned model, recovery included.
        command: What makes the row.
        at_ratio: The excess as a share of the baseline's at the same ratio.
        at_parameters: The excess as a share of the baseline's at as many parameters removed.
    """

    model: str
    method: str
    ratio: float
    removed: int
    share_removed: float
    perplexity: float
    excess: float
    second_perplexity: float | None
    second_excess: float | None
    seconds: float
    command: str
    at_ratio: float | None = None
    at_parameters: float | None = None


class Subject(NamedTuple):
    """A result file: its model, data and how it is measured again."""

    model: str
    file: str
    parameters: int
    dense: float
    calibration: str
    evaluation: str
    made_by: str
    command: str
    rows: list[Row]


def subjects(folder: Path) -> list[Subject]:
    """The files of a folder that hold pruned models by ratio, by the size of their dense models, the largest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "second" in content:
            found.append(_real(path, content))
        elif "subject" in content and all(isinstance(rows, dict) for rows in content["results"].values()):
            found.append(_by_ratio(path, content))
    return sorted(found, key=lambda subject: -subject.parameters)


def _real(path: Path, content: Mapping[str, Any]) -> Subject:
    """What `real.py` wrote."""
    cells, excesses = done(content["measurements"]), results(content["measurements"])
    dense, rows = cells[DENSE], []
    for name, cell in cells.items():
        if name == DENSE:
            continue
        (first, second), (excess, second_excess) = (
            [float(cell["domains"][domain]["perplexity"]) for domain in DOMAINS],
            [excesses[name]["excess"][domain] for domain in DOMAINS],
        )
        label, ratio = named(name)
        removed = dense["parameters"] - cell["parameters"]
        seconds = sum(cell[part]["wall_seconds"] for part in ("pruning", "recovering") if part in cell)
        asked = _real_command(cell)
        share = removed / dense["parameters"]
        rows.append(
            Row(
                content["model"]["name"],
                label,
                ratio,
                removed,
                share,
                first,
                excess,
                second,
                second_excess,
                seconds,
                asked,
            )
        )
    titles, versions = content["titles"], dense["environment"]["versions"]
    return Subject(
        content["model"]["name"],
        path.stem,
        dense["parameters"],
        float(dense["domains"][DOMAINS[0]]["perplexity"]),
        titles["calibration"],
        f"{titles['evaluation']}; other text: {titles['second']}",
        _versions(versions),
        "make bench-real",
        _beside_baseline(rows),
    )


def _real_command(cell: Mapping[str, Any]) -> str:
    settings = cell["settings"]
    options = dict(settings["options"])
    if "of_blocks" in settings:
        options["target_parameters"] = cell["parameters"]
    line = _command(options)
    return line if "recovery" not in settings else f"{line} --recover {settings['recovery']['num_tokens']}"


def _by_ratio(path: Path, content: Mapping[str, Any]) -> Subject:
    """What `quality.py` and `experts.py` wrote."""
    subject, cells, model = content["subject"], content["measurements"], content["subject"]["model"]
    then = _DEFAULTS_THEN.get(content["environment"]["code"], {})
    has_experts = "experts" in model
    target, rows = "bench-experts" if has_experts else "bench-quality", []
    for method, by_ratio in content["results"].items():
        for ratio, summary in by_ratio.items():
            if "error" in summary:
                continue
            settings = cells[f"{method} @ {ratio} # {content['seeds'][0]}"]["settings"]
            if "ratio" in settings:  # whole experts, which `otprune` does not remove
                asked = f'make {target} BENCH_ARGS="--variants {method!r} --ratios {ratio}"'
            else:
                own = {} if settings.get("quality") == "best" else then
                asked = _command({**own, **settings, "num_samples": content["settings"]["num_samples"]})
            perplexity = float(summary["mean"])
            removed, share = summary["parameters_removed"], summary["share_removed"]
            measured = (perplexity, summary["excess"], None, None, summary["seconds"])
            rows.append(Row(model["name"], method, float(ratio), removed, share, *measured, asked))
    return Subject(
        model["name"],
        path.stem,
        model["parameters"],
        float(cells["dense"]["perplexity"]),
        subject["calibration"]["data"],
        subject["evaluation"]["data"],
        _versions(content["environment"]["versions"]),
        f"make {target}" if path.stem in ("demo-model", "experts") else f"make {target} MODEL={model['name']}",
        _beside_baseline(rows),
    )


def _command(options: Mapping[str, Any]) -> str:
    line = command(options, Rerun("MODEL", "OUT", "DATA"))
    return " ".join(line.replace("\\\n", " ").split())


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{library} {version}" for library, version in sorted(versions.items()))


def _beside_baseline(rows: Sequence[Row]) -> list[Row]:
    """The rows with both shares of the baseline's excess; the baseline itself has 1."""
    methods = {row.method for row in rows}
    name = next((name for name in BASELINES if name in methods), None)
    baseline = {row.ratio: row for row in rows if row.method == name}
    curve = sorted([(0.0, 0.0), *((float(row.removed), row.excess) for row in baseline.values())])
    return [
        row._replace(
            at_ratio=_share(row.excess, baseline[row.ratio].excess) if row.ratio in baseline else None,
            at_parameters=_share(row.excess, excess_at(curve, row.removed)),
        )
        for row in rows
    ]


def excess_at(curve: Sequence[tuple[float, float]], removed: float) -> float | None:
    """The excess of a curve with a number of parameters removed; None beyond where it was measured."""
    if len(curve) < 2 or not 0 < removed <= curve[-1][0] * (1 + _BEYOND):
        return None
    (left, low), (right, high) = next(
        (pair for pair in pairwise(curve) if pair[1][0] >= removed), (curve[-2], curve[-1])
    )
    return low + (high - low) * (removed - left) / (right - left)


def _share(excess: float, baseline: float | None) -> float | None:
    return excess / baseline if baseline is not None and baseline > 0 else None


COLUMNS = (
    ("model", "model", ""),
    ("method", "method", ""),
    ("ratio", "ratio", "{:.0%}"),
    ("share_removed", "parameters removed", "{:.1%}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("excess", "excess", "{:.3f}"),
    ("at_ratio", "of baseline's, same ratio", "{:.2f}"),
    ("at_parameters", "of baseline's, equal parameters", "{:.2f}"),
    ("second_perplexity", "other text", "{:,.2f}"),
    ("second_excess", "excess, other text", "{:.3f}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("command", "command", ""),
)


def _cells(row: Row) -> Iterator[tuple[str, object, str]]:
    """Column, what it is sorted by, and what is shown."""
    for name, _, form in COLUMNS:
        value = getattr(row, name)
        if value is None:
            yield name, "", "–"
        else:
            yield name, value, form.format(value) if form else value


def page(found: Sequence[Subject]) -> str:
    """The page as HTML."""
    rows = [row for subject in found for row in subject.rows]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("leaderboard.html").render(
        subjects=found,
        columns=[(name, title) for name, title, _ in COLUMNS],
        rows=[list(_cells(row)) for row in rows],
        ratios=sorted({row.ratio for row in rows}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=RESULTS / "leaderboard.html")
    args = parser.parse_args(argv)
    found = subjects(args.results)
    save_text(args.output, page(found), overwrite=True)
    print(f"{sum(len(subject.rows) for subject in found)} rows of {len(found)} models: {args.output}")


if __name__ == "__main__":
    main()
