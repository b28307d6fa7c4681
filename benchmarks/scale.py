"""Every figure of scale and speed beside its target, on one page: memory, time, transport, elimination, prefill.

    python benchmarks/scale.py [--parts memory time] [--quick] [--widths 576 1152]

Ends with exit code 0 only if all figures are within their targets. Writes JSON, and a table beside it; parts that are
not measured stay there as they are, unless machine, threads or versions differ.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import elimination
import memory
import passes
import speed
import torch
import transport
from _rows import Row, environment, shown, table

_RESULTS = Path(__file__).parent / "results" / "scale.json"
_TITLES = {
    "memory": "Memory: a model on disk, pruned and saved",
    "time": "Time of closed-form pruning",
    "scoring": "Time of scoring by gradients",
    "transport": "Transport of n channels to n/2",
    "elimination": "Elimination, choice of λ and second moments of one layer",
    "speed": "Prefill of the pruned model",
}


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Iterable[Row]]]:
    """What can be measured, by name."""
    quick, widths = args.quick, args.widths
    eliminated = elimination.QUICK_WIDTHS if quick else widths or elimination.WIDTHS
    return {
        "memory": lambda: memory.rows(quick),
        "time": lambda: passes.rows(quick, widths or passes.WIDTHS, args.tokens_per_channel),
        "scoring": lambda: passes.scoring_rows(quick, widths or passes.SCORED_WIDTHS),
        "transport": lambda: transport.rows(widths, quick),
        "elimination": lambda: elimination.rows(eliminated),
        "speed": lambda: speed.rows(quick),
    }


def is_within(measured: Mapping[str, Sequence[Row]]) -> bool:
    """Whether no figure misses its target."""
    return all(row.ok is not False for rows in measured.values() for row in rows)


def known(output: Path, where: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What an earlier run measured under the same conditions."""
    if not output.exists():
        return {}
    content = json.loads(output.read_text(encoding="utf-8"))
    if content["environment"] != where:
        print(f"{output.name}: machine, threads or versions changed; its figures are left behind")
        return {}
    return {name: [Row(**row) for row in rows] for name, rows in content["parts"].items()}


def save(output: Path, where: Mapping[str, Any], measured: Mapping[str, Sequence[Row]]) -> None:
    """Write JSON, and the page beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: [row._asdict() for row in rows] for name, rows in measured.items()}
    content = {"environment": where, "parts": figures}
    output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(page(where, measured), encoding="utf-8")


def page(where: Mapping[str, Any], measured: Mapping[str, Sequence[Row]]) -> str:
    """The Markdown file."""
    libraries = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# Scale and speed\n",
        f"{where['machine']}, {where['cores']} cores, {where['memory_bytes'] / 1e9:.0f} GB of memory; threads: "
        f"{where['threads']}; {libraries}. Made by `make bench-scale`.\n",
    ]
    for name, title in _TITLES.items():
        if name in measured:
            lines += [f"## {title}\n", table(measured[name])]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(_TITLES), default=list(_TITLES))
    parser.add_argument("--widths", type=int, nargs="+", help="of time, scoring and elimination; default: all of each")
    parser.add_argument("--tokens-per-channel", type=float, help="calibration tokens of `time`, in units of n")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds; the targets then mean nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: in results/; none with --quick)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 if all is within its targets."""
    args = arguments(argv)
    output = args.output or (None if args.quick else _RESULTS)
    where = environment()
    measured = {} if output is None else known(output, where)
    made = {}
    torch.manual_seed(0)
    for name in args.parts:
        start = time.perf_counter()
        print(f"{_TITLES[name]}; threads: {where['threads']}", flush=True)
        made[name] = shown(parts(args)[name]())
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
        measured[name] = made[name]
        if output is not None:
            save(output, where, measured)
    if args.quick:
        print("These are tiny sizes; the targets are those of the full run.")
        return 0
    print("All figures are within their targets." if is_within(made) else "Figures MISSED their targets, see above.")
    return 0 if is_within(made) else 1


if __name__ == "__main__":
    sys.exit(main())
