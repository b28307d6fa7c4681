"""What the benchmarks of scale and speed share: a figure beside its target."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from optimum_otprune.pruning.versions import versions


class Row(NamedTuple):
    """One figure: its name, value and unit, what it should be, and whether it is; None where there is no target."""

    name: str
    value: float
    unit: str
    target: str
    ok: bool | None

    def __str__(self) -> str:
        return f"{self.name:<66} {self.value:>10.4g} {self.unit:<14} {self.target:<8} {verdict(self)}".rstrip()


def at_most(name: str, value: float, unit: str, limit: float) -> Row:
    """A figure with an upper limit."""
    return Row(name, value, unit, f"≤ {limit:g}", value <= limit)


def told(name: str, value: float, unit: str) -> Row:
    """A figure without a target."""
    return Row(name, value, unit, "", None)


def shown(rows: Iterable[Row]) -> list[Row]:
    """Print every figure as soon as it is there."""
    found = []
    for row in rows:
        print(row, flush=True)
        found.append(row)
    return found


def write_json(rows: Iterable[Row], path: Path | None) -> None:
    """Write figures with what they depend on, where a file is asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**environment(), "figures": [row._asdict() for row in rows]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verdict(row: Row) -> str:
    return {True: "ok", False: "MISSED", None: ""}[row.ok]


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [
        f"| {row.name.strip()} | {row.value:.4g} | {row.unit} | {row.target} | {verdict(row)} |".replace("|  |", "| |")
        for row in rows
    ]
    return "\n".join(("| figure | value | unit | target | |", "|---|--:|---|---|---|", *lines)) + "\n"


def environment() -> dict[str, Any]:
    """What figures depend on besides the code."""
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": platform.python_version(), **versions()},
    }


def _processor() -> str:
    """Its name where the system tells."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
