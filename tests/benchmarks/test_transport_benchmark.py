"""The transport benchmark in small: its rows, their targets, and what it writes."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import transport


def test_a_quick_run_prints_figures_beside_targets_and_writes_them(tmp_path, capsys):
    output = tmp_path / "out" / "transport.json"
    arguments = ["--quick", "--sizes", "64", "--costs", "weight", "--output", str(output), "--threads", "1"]
    rows = transport.main(arguments)
    names = [row.name.split(":")[0] for row in rows]
    assert {"exact, seconds", "exact, cost beside ot.emd", "sinkhorn, gap to the least cost"} <= set(names)
    same = rows[names.index("exact, cost beside ot.emd")]
    assert same.ok
    assert same.target == "≤ 1e-09"
    assert str(same) in capsys.readouterr().out
    written = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["figures"]] == [row.name for row in rows]
    assert written["threads"] == 1


def test_without_an_exact_cost_the_gap_is_to_a_lower_bound():
    rows = transport.main(
        ["--sizes", "64", "--costs", "weight", "--marginals", "uniform", "--solvers", "sinkhorn", "--repeats", "1"]
    )
    gap = next(row for row in rows if "gap" in row.name)
    assert 0 <= gap.value < 0.01


def test_a_figure_that_misses_its_target_says_so():
    assert str(transport.at_most("time", 70, "s", 60)).split() == ["time", "70", "s", "≤", "60", "MISSED"]
    assert str(transport.at_least("speed", 12, "×", 10)).split() == ["speed", "12", "×", "≥", "10", "ok"]
    assert str(transport.at_least("speed", 2, "×", None)).split() == ["speed", "2", "×"]
