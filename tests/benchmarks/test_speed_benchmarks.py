"""The benchmarks of speed in small: their figures, their targets, and what they write."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import speed

from optimum_otprune.commands.speed import Speed, SpeedComparison


def test_speed_prints_each_figure_beside_its_target(tmp_path, capsys):
    speed.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "speed.json")])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "speed.json").read_text())["figures"]
    assert len(lines) == len(rows) == 7
    judged = [row for row in rows if row["ok"] is not None]
    assert [row["name"].partition(":")[0][-6:] for row in judged] == ["-> 384", "-> 256", "-> 128"]
    assert all(row["ok"] == (row["value"] >= 0.85) for row in judged)
    assert all(line.endswith(("ok", "MISSED")) for line, row in zip(lines, rows) if row["ok"] is not None)


def test_a_share_below_the_target_is_missed():
    dense, slow, fast = (
        Speed(seconds, 1.0, None, None, 0, flops) for seconds, flops in ((1.0, 2), (0.6, 1), (0.5, 1))
    )
    for pruned, ok in ((slow, False), (fast, True)):
        row = speed._share_rows(SpeedComparison(1, 8, dense, pruned), "8 -> 4")[0]
        assert row.ok is ok
        assert str(row).endswith("ok" if ok else "MISSED")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so_in_one_sentence():
    with pytest.raises(SystemExit, match="There is no CUDA device here"):
        gpu.main([])


def test_the_gpu_benchmark_writes_a_table_with_the_devices_name(tmp_path, capsys):
    gpu.main(["--shape", "tiny", "--device", "cpu", "--samples", "4", "--output-folder", str(tmp_path)])
    (file,) = tmp_path.glob("tiny-*.json")
    content = json.loads(file.read_text())
    names = [stage["name"] for stage in content["stages"]]
    assert names[:4] == ["dense forward pass", "prune, quality fast", "prune, quality balanced", "save"]
    assert names[4:] == [
        f"{step}, 256 -> 128" for step in ("elimination", "transport by nearest", "transport by sinkhorn")
    ]
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in content["stages"])
    page = file.with_suffix(".md").read_text()
    assert page.startswith(f"# tiny on {content['device']}\n")
    assert page.count("\n| ") == len(names) + 1
