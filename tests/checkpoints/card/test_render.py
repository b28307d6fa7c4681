"""Cards say what was done and what it costs, and no string from outside becomes structure."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_otprune.checkpoints.card.base_card import LICENSES
from optimum_otprune.checkpoints.card.markdown import plain_text
from optimum_otprune.checkpoints.card.metadata import card_metadata
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.checkpoints.card.results import PASSAGE, hub_name
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import OTPruneError
from optimum_otprune.pruning.calibration import overlap
from optimum_otprune.pruning.report import PruningReport
from tests.hostile import HOSTILE
from tests.reports import Page, evaluation, layer_report, make_report

ROOT = Path(__file__).parents[3]
CONFIG = OTPruningConfig(pruning_ratio=0.5)
ELEMENTS = {
    *("h1", "h2", "p", "strong", "code", "pre", "a", "ul", "li", "blockquote", "details", "summary"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
STRUCTURE = ("h1", "h2", "table", "tr", "td", "pre", "details", "ul", "li", "img", "strong", "blockquote")
SITES = ("https://huggingface.co/", "https://arxiv.org/abs/", "https://doi.org/", "https://jmlr.org/papers/")
KEYS = {
    *("base_model", "license", "license_name", "license_link", "language", "library_name", "pipeline_tag"),
    *("datasets", "metrics", "tags", "otprune", "model-index"),
}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def words(card: str) -> str:
    return " ".join(Page(card).text.split())


def assert_harmless(card: str, has_plot: bool = False) -> Page:
    """Only the template's elements and addresses are there, and every character can be seen."""
    page = Page(card)
    assert set(page.elements) <= ELEMENTS | ({"img"} if has_plot else set())
    for element, name, value in page.attributes:
        assert (element, name) in {
            ("a", "href"),
            ("img", "src"),
            ("img", "alt"),
            ("code", "class"),
            ("th", "style"),
            ("td", "style"),
        }
        assert name != "href" or value.startswith(SITES)
        assert name != "src" or value == "rescue.png"
        assert name != "style" or value == "text-align:right"
    assert all(character.isprintable() or character == "\n" for character in card)
    return page


def test_a_card_says_which_versions_load_the_folder():
    assert "loads with transformers 4.57 and newer" in words(model_card(CONFIG, make_report(model_type="llama"), "x"))
    misread = words(model_card(CONFIG, make_report(model_type="llama"), "x", older_names=False))
    assert "4.57" not in misread
    assert "older versions do not read all of its configuration" in misread
    unknown = words(model_card(CONFIG, make_report(model_type="mine", versions={"transformers": "5.9.0"}), "x"))
    assert "saved with transformers 5.9.0; models of this type were not tested with older versions" in unknown
    config = OTPruningConfig(pruning_ratio=0.5, non_uniform_format="per_layer_config")
    layers = (layer_report(0, after=4), layer_report(1, after=6))
    assert "needs transformers 5.15 or newer" in words(model_card(config, make_report(layers=layers), "x"))


def test_the_first_lines_say_what_it_is_and_what_it_costs():
    text = words(model_card(CONFIG, make_report(), "user/llama-half"))
    assert (
        "meta-llama/Llama-3.2-1B with 50.0 % of its FFN channels and 30.0 % of its parameters removed by "
        "optimum_otprune, method otprune, without fine-tuning. That raises its perplexity from 10.00 to 12.00 (×1.20)"
        ", measured on Salesforce/wikitext (wikitext-2-raw-v1, split test)."
    ) in text
    for row in (
        "Parameters 1,000 700 −30.0 %",
        "Size of the weights 4.00 MB 2.80 MB −30.0 %",
        "Perplexity 10.00 12.00 +20.0 %",
    ):
        assert row in text


def test_names_of_the_hub_are_links():
    links = [
        value for element, name, value in Page(model_card(CONFIG, make_report(), "x")).attributes if element == "a"
    ]
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in links
    assert "https://huggingface.co/datasets/Salesforce/wikitext" in links


def test_the_command_of_a_report_that_lists_too_few_options_reads_the_configuration_instead():
    assert "--config otprune_config.json" not in model_card(CONFIG, make_report(config=CONFIG), "x")
    for listed in (("pruning_ratio",), ("method",)):
        assert "--config otprune_config.json" in model_card(CONFIG, make_report(config=CONFIG, options=listed), "x")


def test_a_perplexity_that_falls_or_was_not_measured_is_said_so():
    falls = make_report(evaluations=(evaluation("dense", 10.0), evaluation("pruned", 9.0)))
    assert "Its perplexity falls from 10.00 to 9.00" in words(model_card(CONFIG, falls, "x"))
    unknown = words(model_card(CONFIG, make_report(evaluations=()), "x"))
    assert "What that does to its perplexity was not measured." in unknown
    assert "It was not evaluated: no perplexity is claimed." in unknown


def test_agreement_with_the_dense_model_is_shown_where_it_was_measured():
    against = evaluation("pruned", 12.0, dense_perplexity=10.0, kl=0.12345, agreement=0.8123)
    text = words(model_card(CONFIG, make_report(evaluations=(against, evaluation("pruned", 14.0, data="x/y"))), "x"))
    assert "from 10.00 to 12.00 (×1.20)" in text  # without an evaluation of the dense model by itself
    assert "×1.200 81.2 % 0.1235 40,000" in text
    assert "14.00 – – – 40,000" in text
    assert "81.2 %" in text.split("How to load")[0]
    assert "agreement" not in words(model_card(CONFIG, make_report(), "x"))


def test_how_to_load_has_the_name_and_a_tokenizer_where_there_is_one():
    card = model_card(CONFIG, make_report(), "user/llama-half")
    assert 'AutoModelForCausalLM.from_pretrained("user/llama-half")' in card
    assert 'AutoTokenizer.from_pretrained("user/llama-half")' in card
    assert "trust_remote_code" not in card
    without = model_card(CONFIG, make_report(), "x", has_tokenizer=False)
    assert "AutoTokenizer" not in without
    assert "There is no tokenizer here" in without


def test_a_model_that_needs_remote_code_is_loaded_with_it_and_a_warning():
    report = make_report()
    layers = (report.layers[0], layer_report(1, after=3))
    report, config = dataclasses.replace(report, layers=layers), CONFIG.replace(non_uniform_format="per_layer_config")
    assert "remote code is needed" in model_card(config, make_report(), "user/x")  # all layers have the same width
    assert "remote code is needed" in model_card(CONFIG, report, "user/x")  # filled up
    card = model_card(config, report, "user/x")
    assert 'from_pretrained("user/x", trust_remote_code=True)' in card
    assert "Read it before you trust it" in card
    assert "no remote code is needed" not in card


def test_the_python_that_loads_is_valid_for_any_name():
    for name in HOSTILE:
        block = re.findall(
            r"^(`{3,})python\n(.*?)^\1$", model_card(CONFIG, make_report(), name), re.DOTALL | re.MULTILINE
        )
        assert block
        for _, code in block:
            compile(code, "card", "exec")


def test_a_negative_rescue_is_warned_of_at_the_top():
    text = words(model_card(CONFIG, make_report(layers=(layer_report(rescue=-0.5),)), "x"))
    assert text.index("Warning: the rescue ratio is negative") < text.index("How to load")
    assert "further from the dense ones than plain dropping" in text


def test_of_text_that_was_partly_calibrated_on_the_part_is_said():
    some = make_report(evaluations=(evaluation("dense", 10.0), evaluation("pruned", 12.0, seen_windows=2)))
    text = words(model_card(CONFIG, some, "x"))
    warning = "Warning: part of the evaluation text (2 of 20 windows) was calibrated on."
    assert text.index(warning) < text.index("How to load")
    assert "2 of the 20 evaluated windows share 32 or more tokens in a row with the calibration text." in text
    assert "calibration data." not in text
    assert overlap._LENGTH == PASSAGE
    short = {"data": "texts", "num_samples": 1, "seqlen": 9, "num_tokens": 9}
    assert "share 9 or more tokens" in words(model_card(CONFIG, dataclasses.replace(some, calibration=short), "x"))


def test_evaluation_on_calibration_data_is_warned_of_at_the_top():
    seen = make_report(evaluations=(evaluation("pruned", 12.0, seen_windows=11),))
    text = words(model_card(CONFIG, seen, "x"))
    assert text.index("Warning: the evaluation data are calibration data") < text.index("How to load")
    assert "11 of the 20 evaluated windows share 32 or more tokens in a row with the calibration text." in text
    same_split = words(model_card(CONFIG, make_report(OTPruningConfig(evaluation_split="train")), "x"))
    assert "Calibration samples were drawn from the same split of Salesforce/wikitext" in same_split
    unseen = make_report(evaluations=(evaluation("pruned", 12.0, seen_windows=0),))
    none = "None of the 20 evaluated windows shares 32 or more tokens in a row with the calibration text."
    assert none in words(model_card(CONFIG, unseen, "x"))
    unknown = make_report(
        calibration={"data": "texts", "num_samples": 1, "seqlen": 9, "num_tokens": 9},
        evaluations=(evaluation("pruned", 12.0, data="texts"),),
    )
    assert "overlap with the calibration data was not recorded" in words(model_card(CONFIG, unknown, "x"))


def test_every_layer_has_its_line_and_many_are_folded():
    few = model_card(CONFIG, make_report(), "x")
    assert "| 1 | 8 → 4 | 50.0 % | 0.250 | 0.100 | 0.300 |" in few
    many = model_card(CONFIG, make_report(layers=tuple(layer_report(index) for index in range(40))), "x")
    assert "<summary>All 40 layers</summary>" in many
    assert Page(many).elements.count("tr") == Page(few).elements.count("tr") + 38
    wide = model_card(CONFIG, make_report(layers=(layer_report(0, after=4), layer_report(1, after=6))), "x")
    assert "| FFN channels per layer | 8 | 4 to 6 |" in wide


def test_the_plot_is_shown_only_where_it_is():
    assert "rescue.png" not in model_card(CONFIG, make_report(), "x")
    assert ("img", "src", "rescue.png") in Page(model_card(CONFIG, make_report(), "x", has_plot=True)).attributes


def test_the_configuration_is_embedded_whole():
    block = re.search(r"```json\n(.*?)```", model_card(CONFIG, make_report(), "x"), re.DOTALL)
    assert OTPruningConfig.from_dict(json.loads(block[1])) == CONFIG


def test_data_and_models_without_a_name_have_placeholders_that_are_explained():
    calibration = {"data": "local file", "num_samples": 4, "seqlen": 9, "num_tokens": 36}
    text = words(model_card(CONFIG, make_report(base_model=None, calibration=calibration), "x"))
    assert text.count("A local model of type llama with") == 1
    assert "otprune prune BASE_MODEL -o x" in text
    assert "BASE_MODEL stands for the folder of the dense model" in text
    assert "CALIBRATION_DATA stands for the calibration data (a local file)" in text
    assert "EVALUATION_DATA" not in text


def test_functions_of_the_users_own_are_named_as_a_reason_why_it_cannot_be_remade():
    text = words(model_card(CONFIG, make_report(custom_functions={"cost": "my_cost"}), "x"))
    assert (
        "The configuration alone does not remake it: functions from outside the package were used for cost (my_cost)"
        in text
    )


def test_the_license_is_that_of_the_base_model_or_said_to_be_unknown():
    assert "That of the base model, as its card states it: llama3.2." in words(model_card(CONFIG, make_report(), "x"))
    assert "The license of the base model is not known here" in words(
        model_card(CONFIG, make_report(base_card={}), "x")
    )


def test_the_text_of_a_license_is_a_link():
    base_card = {"license": "other", "license_name": "house", "license_link": "LICENSE.txt"}
    card = model_card(CONFIG, make_report(base_card=base_card), "x")
    address = "https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/LICENSE.txt"
    assert ("a", "href", address) in Page(card).attributes
    assert f"as its card states it: other, house ({address})." in words(card)


def test_a_model_that_was_not_pruned_says_so():
    card = model_card(CONFIG, None, "x")
    assert "has not been pruned yet" in card
    assert_harmless(card)
    assert front_matter(card)["otprune"] == {"method": "otprune", "pruning_ratio": 0.5}


def test_a_report_without_layers_or_numbers_is_rendered():
    assert_harmless(model_card(CONFIG, make_report(layers=(), parameters_before=0, size_before=None), "x"))
    odd = make_report(layers=(layer_report(0, float("nan"), before=0, after=0),), size_before=0)
    assert "not finite" in assert_harmless(model_card(CONFIG, odd, "x")).text


def hostile_card(text: str) -> tuple[OTPruningConfig, PruningReport, str]:
    """A configuration and report with a string wherever one may come from outside."""
    config = OTPruningConfig(
        dataset=text, dataset_config=text, calibration_split=text, evaluation_split=text, text_column=text
    )
    evaluations = tuple(
        evaluation(stage, 10.0, data=data, dtype=text, protocol=text)
        for stage in ("dense", "pruned")
        for data in (text, "texts")
    )
    report = make_report(
        config,
        base_model=text,
        model_type=text,
        calibration={"data": text, "num_samples": 1, "seqlen": 2, "num_tokens": 2},
        evaluations=evaluations,
        custom_functions={text: text, "cost": text},
        versions={text: text},
        base_card={"license": text, "license_name": text, "license_link": text, "language": [text, text]},
    )
    return config, report, model_card(config, report, text, has_plot=True)


def test_r11_no_hostile_string_becomes_yaml_html_or_structure(record_figure):
    benign = {text: assert_harmless(hostile_card(text)[2], has_plot=True).elements for text in ("no name", "a-name")}
    ok = 0
    for text in HOSTILE:
        config, report, card = hostile_card(text)
        metadata = front_matter(card)
        assert metadata == card_metadata(config, report, text).to_dict()
        assert set(metadata) <= KEYS
        assert metadata.get("license", "mit") in LICENSES
        page = assert_harmless(card, has_plot=True)
        expected = benign["no name" if hub_name(text) is None else "a-name"]
        assert all(page.elements.count(element) == expected.count(element) for element in STRUCTURE)
        assert page.title == (plain_text(text.rsplit("/", 1)[-1], max_length=96) or "Pruned model")
        assert len(card) < 120_000
        ok += 1
    record_figure("R11", tried=len(HOSTILE), ok=ok)
    assert ok == len(HOSTILE) >= 100


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60) | st.text("`*_<>&[]()!|#~-'\"\n\\{%}: /@", max_size=40))
def test_any_string_is_harmless(text):
    _, _, card = hostile_card(text)
    assert_harmless(card, has_plot=True)
    assert set(front_matter(card)) <= KEYS


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.none(), max_size=2)
)
FIELDS = sorted(make_report().to_dict())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), VALUES, st.sampled_from(["itself", "first", "entry"]))
def test_a_report_file_with_anything_in_it_gives_a_card_or_an_error_of_ours(field, value, where):
    values = make_report().to_dict()
    if where == "itself" or not values[field] or isinstance(values[field], (str, float, int)):
        values[field] = value
    elif isinstance(values[field], dict):
        values[field] = {**values[field], next(iter(values[field])): value}
    elif where == "first" or not isinstance(values[field][0], dict):
        values[field] = [value, *values[field][1:]]
    else:
        entry = values[field][0]
        values[field] = [{**entry, sorted(entry)[len(entry) // 2]: value}, *values[field][1:]]
    try:
        model_card(CONFIG, PruningReport.from_dict(values), "x")
    except OTPruneError:
        return


EXAMPLES = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


def test_there_is_an_example_of_each_kind():
    rescued = [
        front_matter((path / "README.md").read_text(encoding="utf-8"))["otprune"]["rescue_ratio"] for path in EXAMPLES
    ]
    assert max(rescued) > 0.5
    assert min(rescued) < 0


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_an_example_card_is_what_its_configuration_and_report_give(folder):
    config = OTPruningConfig.from_pretrained(folder)
    report = PruningReport.load(folder / "otprune_report.json")
    card = model_card(config, report, folder.name, has_plot=True)
    assert card.encode() == (folder / "README.md").read_bytes()
    assert (folder / "rescue.png").is_file()
    assert_harmless(card, has_plot=True)


def test_the_script_that_renders_the_examples_changes_no_card(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "model_cards")
    render = importlib.import_module("render")
    for folder in EXAMPLES:
        (tmp_path / folder.name).mkdir()
        for file in ("otprune_config.json", "otprune_report.json"):
            (tmp_path / folder.name / file).write_bytes((folder / file).read_bytes())
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["render.py"])
    render.main()
    for folder in EXAMPLES:
        assert (tmp_path / folder.name / "README.md").read_bytes() == (folder / "README.md").read_bytes()
