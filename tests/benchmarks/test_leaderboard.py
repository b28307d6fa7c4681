"""The page of all results: every row of the committed files, its command, and shares that can be computed by hand."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from optimum_otprune.commands.parser import PruneCommand

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import leaderboard

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def found():
    return leaderboard.subjects(RESULTS)


def test_the_committed_page_is_that_of_the_committed_results(found):
    committed = (RESULTS / "leaderboard.html").read_text(encoding="utf-8")
    assert committed == leaderboard.page(found), "run `make leaderboard`"


def test_every_pruned_model_of_the_result_files_is_a_row(found):
    rows = {subject.file: {(row.method, row.ratio) for row in subject.rows} for subject in found}
    assert {"smollm2", "demo-model", "experts"} <= rows.keys()
    assert "scale" not in rows
    content = json.loads((RESULTS / "demo-model.json").read_text())["results"]
    assert rows["demo-model"] == {(name, float(ratio)) for name, ratios in content.items() for ratio in ratios}
    cells = json.loads((RESULTS / "smollm2.json").read_text())["measurements"]
    assert len(rows["smollm2"]) == sum(name != "dense" and "error" not in cell for name, cell in cells.items())


def test_every_command_is_one_that_the_command_line_takes_with_the_ratio_of_its_row(found):
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    for row in (row for subject in found for row in subject.rows):
        words = shlex.split(row.command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        assert words[:2] == ["otprune", "prune"]
        parsed = parser.parse_args(words[2:])
        kinds = dict(parsed.kind_ratios or ())
        assert row.ratio == kinds.get("experts", parsed.pruning_ratio) or parsed.target_parameters is not None


def test_the_command_of_recovery_and_of_rows_with_heads_say_so():
    settings = {"options": {"method": "flap", "kind_ratios": {"attention": 0.34}}, "of_blocks": 0.2}
    heads = leaderboard._real_command({"settings": settings, "parameters": 1000})
    assert "--kind-ratios attention=0.34" in heads
    assert "--target-parameters 1000" in heads
    assert "--pruning-ratio" not in heads
    settings = {"options": {"pruning_ratio": 0.5}, "recovery": {"num_tokens": 250_000}}
    assert leaderboard._real_command({"settings": settings, "parameters": 1}).endswith("--recover 250000")


def test_excess_at_equal_parameters_is_read_off_straight_lines_of_the_baseline():
    curve = [(0.0, 0.0), (100.0, 0.1), (300.0, 0.5)]
    assert leaderboard.excess_at(curve, 50) == pytest.approx(0.05)
    assert leaderboard.excess_at(curve, 200) == pytest.approx(0.3)
    assert leaderboard.excess_at(curve, 300) == pytest.approx(0.5)
    assert leaderboard.excess_at(curve, 310) == pytest.approx(0.52)  # a little beyond
    assert leaderboard.excess_at(curve, 400) is None
    assert leaderboard.excess_at([(0.0, 0.0)], 50) is None


def test_the_baseline_is_1_and_half_its_excess_is_a_half(found):
    (subject,) = (subject for subject in found if subject.file == "smollm2")
    for row in subject.rows:
        if row.method == "flap":
            assert (row.at_ratio, row.at_parameters) == (1.0, pytest.approx(1.0))
    flap = next(row for row in subject.rows if row.method == "flap" and row.ratio == 0.5)
    own = next(row for row in subject.rows if row.method == "otprune" and row.ratio == 0.5)
    assert own.at_ratio == pytest.approx(own.excess / flap.excess)


def test_the_page_asks_nothing_of_a_network_and_shows_names_as_they_are(found):
    row = found[0].rows[0]._replace(method="<b>x</b>")
    text = leaderboard.page([found[0]._replace(rows=[row])])
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for name, value in attributes if name in ("src", "href"))

    Links().feed(text)
    assert links == []
    assert "default-src 'none'" in text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_sorts_the_rows_by_a_column_and_picks_a_model_and_a_ratio(found, tmp_path):
    column = [name for name, _, _ in leaderboard.COLUMNS].index("excess")
    clicks = (
        f"heads[{column}].firstChild.click(); heads[{column}].firstChild.click();"
        "document.getElementById('model').value = 'SmolLM2-135M-Instruct';"
        "document.getElementById('ratio').value = '0.5'; choose();"
    )
    file = tmp_path / "page.html"
    file.write_text(leaderboard.page(found).replace("\nchoose();\n", f"\n{clicks}\n"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, file.as_uri()], capture_output=True, text=True, timeout=120)
    shown = re.findall(r"<tr(?: class=\"own\")?>(<td class=\"model\".*?)</tr>", done.stdout)
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in shown]
    rows = [row for row in rows if row]
    expected = [row for row in found[0].rows if row.ratio == 0.5]
    assert {row[0] for row in rows} == {"SmolLM2-135M-Instruct"}
    assert len(rows) == len(expected)
    excesses = [float(row[column]) for row in rows]
    assert excesses == sorted(excesses, reverse=True)
    assert f"{len(expected)} rows" in done.stdout
