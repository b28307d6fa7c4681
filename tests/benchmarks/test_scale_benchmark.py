"""The benchmark of scale in small: its figures, its targets, what it writes and how it ends."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import memory
import scale
from _rows import Row, at_most, told

WITHOUT_CHILDREN = [part for part in scale._TITLES if part != "memory"]


def test_every_part_prints_its_figures_beside_their_targets(tmp_path, capsys):
    output = tmp_path / "out" / "scale.json"
    assert scale.main(["--quick", "--parts", *WITHOUT_CHILDREN, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert list(content["parts"]) == WITHOUT_CHILDREN
    page = output.with_suffix(".md").read_text()
    for rows in content["parts"].values():
        assert any(row["ok"] is not None for row in rows)
        for row in rows:
            assert str(Row(**row)) in printed
            assert f"| {row['name'].strip()} | {row['value']:.4g} |" in page
    assert content["environment"]["machine"] in page
    assert all(f"## {scale._TITLES[part]}" in page for part in WITHOUT_CHILDREN)


@pytest.mark.slow
def test_peak_memory_is_measured_in_processes_of_their_own():
    rows = {row.name: row for row in memory.rows(quick=True)}
    (baseline,) = (row.value for name, row in rows.items() if name.startswith("import baseline"))
    few, many = (rows[f"peak, {layers} layers"].value for layers in memory.QUICK.layers)
    assert 100 < baseline < few
    assert many == pytest.approx(few, rel=0.1)
    assert rows["growth of the peak, 2 to 8 layers"].ok


@pytest.mark.parametrize(
    ("few", "many", "fits", "grows"), [(900, 950, True, True), (900, 1000, True, False), (1100, 1201, False, True)]
)
def test_memory_may_be_a_share_of_the_weights_and_may_not_grow_with_layers(few, many, fits, grows):
    rows = {row.name: row for row in memory.judged_rows(1500.0, 500.0, few, many, (10, 40))}
    assert rows["peak, 40 layers"].target == "≤ 1175"
    assert rows["peak, 40 layers"].ok is fits
    assert rows["growth of the peak, 10 to 40 layers"].ok is grows
    assert rows["peak, 10 layers"].ok is None


def test_parts_of_an_earlier_run_stay_and_one_miss_is_exit_code_one(tmp_path, monkeypatch, capsys):
    output = tmp_path / "scale.json"
    slow, fast = at_most("cost", 5.0, "s", 4.0), at_most("cost", 3.0, "s", 4.0)
    for part, row, code in (("time", slow, 1), ("speed", told("share", 1.0, ""), 0), ("time", fast, 0)):
        monkeypatch.setattr(scale, "parts", lambda args, part=part, row=row: {part: lambda: [row]})
        assert scale.main(["--parts", part, "--output", str(output)]) == code
        assert ("MISSED" in capsys.readouterr().out) == bool(code)
    assert set(json.loads(output.read_text())["parts"]) == {"time", "speed"}
    assert "| cost | 3 | s | ≤ 4 | ok |" in output.with_suffix(".md").read_text()
    monkeypatch.setattr(scale, "environment", lambda: {**json.loads(output.read_text())["environment"], "threads": 99})
    assert scale.main(["--parts", "time", "--output", str(output)]) == 0
    assert "its figures are left behind" in capsys.readouterr().out
    assert set(json.loads(output.read_text())["parts"]) == {"time"}
