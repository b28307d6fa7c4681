"""Reports, configurations, manifests and states of strangers: read, or refused in one line; never a traceback."""

import copy
import dataclasses
import json
import logging
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.load import load_checkpoint
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ConfigurationError, IntegrityError, ModelLoadError, ReportError, StateError
from optimum_otprune.pruning.report import REPORT_FILE, LayerReport, PruningReport
from optimum_otprune.storage.manifest import MANIFEST_FILE, read_manifest, write_manifest
from optimum_otprune.storage.state_folder import STATE_FILE, StateFolder
from optimum_otprune.storage.untrusted import parse_json, read_json, visible
from tests.conftest import run_command as run
from tests.hostile import HOSTILE
from tests.reports import layer_report, make_report

ESCAPES = "evil\x1b]0;title\x07\x1b[2J\x9b31m\u202etxt.\u2066exe\r\nline\u2028\x00\ud800"


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


BAD_VALUES = (
    *(None, True, -1, 0, 3.5, -0.5, float("nan"), float("inf"), float("-inf"), 10**18, 10**400, "", "x", "9" * 5000),
    *([], {}, [-1], [0, 0, 1, 1], [1.5], ["a"], {"a": 1}, [[]], nested(40), nested(900)),
    *(ESCAPES, "A" * 100_000, *HOSTILE[::12]),
)


def places(value, path=()) -> list[tuple]:
    """Paths of all entries below a value of JSON."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    entries = entries if len(path) < 8 else ()
    return [place for key, inner in entries for place in ((*path, key), *places(inner, (*path, key)))]


def damaged(content: dict, chance: random.Random) -> str:
    """The text of an object with one or two entries replaced, taken out, repeated or added."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 2))):
        *outer, last = chance.choice(places(content))
        where = content
        for key in outer:
            where = where[key]
        kind = chance.randrange(6)
        if kind == 0:
            del where[last]
        elif kind == 1 and isinstance(where, list):
            where.append(copy.deepcopy(where[last]))
        elif kind == 2 and isinstance(where, dict):
            where[chance.choice(("telepathy", ESCAPES, "", "layer", "A" * 10_000))] = chance.choice(BAD_VALUES)
        else:
            where[last] = chance.choice(BAD_VALUES)
        if not content:
            break
    text = json.dumps(content, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.1:
        text = text[: chance.randrange(len(text))]
    elif chance.random() < 0.1:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text


def write(path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def assert_told_in_a_line(code: int, captured) -> None:
    """Done, or one line of our own; and nothing that a terminal would obey."""
    assert code in (0, 1)
    assert all(c.isprintable() or c == "\n" for c in captured.out + captured.err)
    lines = captured.err.splitlines()
    assert all(line.startswith(("warning: ", "otprune ")) and len(line) < 2500 for line in lines)
    assert sum(line.startswith("otprune ") for line in lines) == (code == 1)


@pytest.fixture
def folder(tmp_path):
    """What the commands that read need of a saved folder."""
    config = OTPruningConfig(pruning_ratio=0.5)
    config.save_pretrained(tmp_path / "out")
    make_report(config).save(tmp_path / "out" / REPORT_FILE)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "commands", "times"),
    [(REPORT_FILE, ("report", "card"), 200), (CONFIG_FILE, ("card",), 120), (MANIFEST_FILE, ("verify",), 120)],
)
def test_damaged_files_are_printed_cleanly_or_refused_in_a_line(folder, capsys, name, commands, times):
    chance, codes = random.Random(name), set()
    whole = json.loads((folder / name).read_text())
    for _ in range(times):
        write(folder / name, damaged(whole, chance))
        for command in commands:
            code = run(command, folder)
            codes.add(code)
            assert_told_in_a_line(code, capsys.readouterr())
    assert codes == {0, 1}


@pytest.mark.filterwarnings("ignore")
def test_damaged_states_are_opened_or_refused(tmp_path):
    with StateFolder.opened(tmp_path / "state") as state:
        state.begin({"model": "3f", "device type": "cpu", "pruning_ratio": 0.5})
        state.write({"layer-00000.json": json.dumps(layer_report().to_dict()).encode()})
    whole, chance, told = json.loads((tmp_path / "state" / STATE_FILE).read_text()), random.Random(0), []
    for _ in range(120):
        write(tmp_path / "state" / STATE_FILE, damaged(whole, chance))
        try:
            with StateFolder.opened(tmp_path / "state"):
                pass
        except StateError as error:
            told.append(str(error))
    assert 40 < len(told) < 120
    assert all(message.isprintable() for message in told)


def changed(layer: dict | None = None, **top) -> dict:
    values = make_report().to_dict()
    values["layers"][1] |= layer or {}
    return values | top


ENERGIES = layer_report(1, rescue=0.25).energies._asdict()


def evaluated(**changes) -> dict:
    return changed(evaluations=[{**make_report().evaluations[0], **changes}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed({"kept_channels": [0, 1, 2]}), r"`layers\[1\]` of the report kept 3 channels, where 4 of 8 are said"),
        (
            changed({"kept_channels": [-1, 1, 2, 3]}),
            r"`layers\[1\].kept_channels` of the report holds -1, which is no",
        ),
        (changed({"kept_channels": [0, 1, 2, 8]}), r"holds 8, which is none of 8 channels"),
        (changed({"kept_channels": [0, 1, 2, 2]}), r"holds one twice of 8 channels"),
        (changed({"kept_channels": [0, 1, 2, True]}), r"holds True, which is none"),
        (changed({"kept_channels": 4}), r"`layers\[1\].kept_channels` of the report is 4; want list"),
        (changed({"intermediate_size_after": 9, "kept_channels": list(range(9))}), "kept 9 channels, where 9 of 8"),
        (changed({"intermediate_size_before": -8}), r"`layers\[1\].intermediate_size_before` .* is -8; want int >= 0"),
        (changed({"rescue_ratio": float("nan")}), r"`layers\[1\].rescue_ratio` of the report is nan; want float"),
        (changed({"rescue_ratio": 10**400}), "Exceeds|is 1000000000000"),
        (changed({"ridge_lambda": "nan"}), r"`layers\[1\].ridge_lambda` of the report is 'nan'; want float >= 0"),
        (changed({"ridge_lambda": -1.0}), "want float >= 0"),
        (changed({"energies": [1, 2]}), r"`layers\[1\].energies` of the report is \[1, 2\]; want Mapping"),
        (changed({"layer": 0}), "`layers` of the report are not in order, each once"),
        (changed(parameters_before=-1), "`parameters_before` of the report is -1; want int >= 0"),
        (changed(parameters_after=1.5), "`parameters_after` of the report is 1.5; want int"),
        (changed(layers={}), "`layers` of the report is {}; want list"),
        (changed(layers=[{}] * 200_000), "The report is of 200,000 layers; want at most 100,000"),
        (
            changed(evaluations=[{**make_report().evaluations[0], "stage": "x"}]),
            r"evaluations\[0\].stage` .* is 'x'; ",
        ),
        (changed({"rescue_ratio": 0.999}), r"`layers\[1\].rescue_ratio` of the report is 0.999, but .* give 0.25"),
        (changed({"rescue_ratio": 1e308}), r"`layers\[1\].rescue_ratio` of the report is 1e\+308; want float"),
        (changed({"dilution_ratio": 0.2}), r"`layers\[1\].dilution_ratio` of the report is 0.2, but .* give 0.1"),
        (changed({"relative_error_after_reconstruction": 0.0}), "_reconstruction` of the report is 0.0, but .* give"),
        (changed({"energies": {**ENERGIES, "error": 300.0}}), r"rescue_ratio` of the report is 0.25, but .* give -74"),
        (
            changed({"energies": {**ENERGIES, "error": 1e308}}),
            r"`layers\[1\].energies.error` .* is 1e\+308; want float",
        ),
        (changed(pruning_ratio=0.9), "`pruning_ratio` of the report is 0.9, but its other numbers give 0.5"),
        (changed(rescue_ratio="x"), "`rescue_ratio` of the report is 'x'; want float"),
        (changed(median_rescue_ratio=0.9), "`median_rescue_ratio` of the report is 0.9, but .* give 0.375"),
        (changed(parameters_after=1001), "The report has 1,001 parameters after and 1,000 before"),
        (changed({"intercept": True}, parameters_after=2001), "The report has 2,001 parameters after"),
        (changed(padding_parameters=1), "`padding_parameters` of the report is 1, more than fill up its layers"),
        (evaluated(seen_windows=21), r"`evaluations\[0\]` of the report has 20 windows, fewer than it has seen"),
        (evaluated(max_windows=19), "has 20 windows, fewer than it has seen or more than it was to have"),
        (evaluated(num_windows=0, num_tokens=0), r"`evaluations\[0\].num_windows` of the report is 0; want int >= 1"),
        (evaluated(num_tokens=40_001), "has 40001 tokens, which are not those of 20 windows of 2001"),
        (evaluated(perplexity=0.0), r"`evaluations\[0\].perplexity` of the report is 0.0; want float >= 1"),
        (changed(versions={"torch": 2}), "`versions` of the report is 2; want str"),
        (
            changed(calibration={"data": "texts", "num_samples": 4, "seqlen": 10, "num_tokens": 41}),
            "has 41 tokens, which are not 4 samples of 10",
        ),
        ({"config": {}}, "`report` of the report has no entry `layers`"),
        ({"weights": 1}, "This is no pruning report"),
        ([], "This is no pruning report"),
    ],
)
def test_a_report_that_cannot_be_true_is_refused_by_name(values, message):
    with pytest.raises(ReportError, match=message):
        PruningReport.from_dict(values)


def test_what_a_later_version_wrote_is_left_out_with_a_warning():
    values = changed({"telepathy": 1}, **{"mind\x1b": 2})
    values["layers"][0]["energies"]["aura"] = 3
    with pytest.warns(UserWarning, match=r"does not know, 3 in all, such as `report.mind\\x1b`. .* upgrade to read"):
        assert PruningReport.from_dict(values) == make_report()
    with pytest.warns(UserWarning, match=r"such as `layer.telepathy`"):
        LayerReport.from_dict({**layer_report().to_dict(), "telepathy": 1})


def test_biases_and_zeros_that_fill_up_may_come_to_a_report():
    layers = (layer_report(0), dataclasses.replace(layer_report(1, after=8), intercept=True))
    report = make_report(layers=layers, parameters_after=1100, padding_parameters=366)
    assert PruningReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(
    "file",
    sorted((Path(__file__).parents[2] / "model_cards").glob(f"*/{REPORT_FILE}")),
    ids=lambda file: file.parent.name,
)
def test_reports_of_this_repository_are_read(file):
    assert PruningReport.load(file).layers


def test_a_report_of_an_earlier_version_is_read():
    values = make_report().to_dict()
    for name in ("token_weighting", "median_rescue_ratio", "median_dilution_ratio", "padding_parameters", "base_card"):
        del values[name]
    report = PruningReport.from_dict(values)
    assert (report.token_weighting, report.padding_parameters, report.base_card) == ("uniform", 0, {})
    assert report.median_rescue_ratio == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b'{"a": NaN}', "it is not valid JSON .NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "a number is out of range"),
        (b'{"a": 1, "a": 2}', "an object has a name twice"),
        (b"[" * 50_000, "it is nested too deeply"),
        (b"[" * 40 + b"]" * 40, "it is nested too deeply"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "it is nested too deeply"),
        (b"[" + b"{}," * 200_000 + b"{}]", "it holds more than 100,000 objects and lists"),
        (b"\xff\xfe", "it is not valid JSON"),
        (b"", "it is not valid JSON"),
        (b"9" * 10_000, "it is not valid JSON"),
    ],
)
def test_json_of_strangers_is_read_strictly_and_at_once(blob, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        parse_json(blob)
    assert time.monotonic() - start < 5


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path):
    (tmp_path / "a").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a", 9) == [1, 2, 3]
    with pytest.raises(ValueError, match="it is larger than 0.0 MB"):
        read_json(tmp_path / "a", 8)
    with pytest.raises(ValueError, match="it cannot be read .Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("content", ['{"seed": NaN}', "3", '{"seed": 1, "seed": 2}', "[" * 5000, "{}" * 200_000])
def test_a_configuration_is_read_as_strictly(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ConfigurationError, match=f"'{CONFIG_FILE}' (is no pruning configuration: |holds a int)"):
        OTPruningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"layer_ratios": {"9" * 5000: 0.5}}, {"optimum_otprune_version": "²"}, {"optimum_otprune_version": "9" * 5000}],
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_no_machine_holds_are_no_traceback(values):
    with pytest.raises(ConfigurationError, match="`layer_ratios` is|`target_parameters=") as caught:
        OTPruningConfig.from_dict({**OTPruningConfig().to_dict(), **values, "target_parameters": 10**400})
    assert len(str(caught.value)) < 6000


def test_a_manifest_is_read_as_strictly(tmp_path):
    (tmp_path / MANIFEST_FILE).write_text('{"format": 1, "files": {}, "files": {}}')
    with pytest.raises(IntegrityError, match="is damaged: it is not valid JSON .an object has a name twice"):
        read_manifest(tmp_path)


def test_names_of_strangers_steer_no_terminal(folder, capsys):
    report = make_report()
    evaluations = [{**report.evaluations[0], "data": ESCAPES, "dtype": ESCAPES, "protocol": ESCAPES}]
    changes = {
        "evaluations": evaluations,
        "model_type": ESCAPES,
        "base_model": ESCAPES,
        "versions": {ESCAPES: ESCAPES},
    }
    make_report(**changes).save(folder / REPORT_FILE)
    for command in (["report", folder], ["report", folder, "--json"], ["card", folder], ["verify", folder]):
        assert_told_in_a_line(run(*command), capsys.readouterr())
    assert run("report", folder.parent / "absent\x1b[2J") == 1
    assert r"\x1b[2J" in capsys.readouterr().err


def test_what_libraries_log_of_strangers_steers_no_terminal(llama_folder, tmp_path, caplog):
    weights = load_file(llama_folder / "model.safetensors")
    save_file({**weights, "\x1b[31mEVIL\x1b[2J": torch.ones(1)}, llama_folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 100)
    assert run("evaluate", llama_folder, "--data", tmp_path / "text.txt", "--max-windows", 1, "--seqlen", 8) == 0
    assert r"EVIL\x1b[2J " in caplog.text
    assert "\x1b" not in caplog.text
    assert logging.getLogRecordFactory() is logging.LogRecord


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ESCAPES},
        {"quantization_config": {"quant_method": ESCAPES}},
        {"hidden_size": ESCAPES},
        {"hidden_act": ESCAPES},
    ],
)
def test_no_message_about_a_model_carries_what_cannot_be_seen(llama_folder, change):
    config = json.loads((llama_folder / "config.json").read_text())
    write(llama_folder / "config.json", json.dumps({**config, **change}))
    with pytest.raises(ModelLoadError, match="could not be loaded|is quantized") as caught:
        load_checkpoint(str(llama_folder), check_loading_options({}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_visible_text_is_printable_and_plain_text_stays(text):
    assert visible(text, 20_000).isprintable()
    assert visible(text, 10) == visible(text[:9] + "…") or len(text) <= 10
    if text.isprintable():
        assert visible(text, 20_000) == text


def test_a_report_of_as_many_layers_as_there_may_be_is_read_at_once():
    report = make_report(layers=tuple(layer_report(index) for index in range(10_000)))
    start = time.monotonic()
    assert len(str(PruningReport.from_dict(report.to_dict()))) < 2000
    assert time.monotonic() - start < 8
    assert report.energies is report.energies
