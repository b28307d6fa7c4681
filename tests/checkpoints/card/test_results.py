"""What a report means is said in words that follow from its numbers."""

import dataclasses
import re

import pytest
import torch
from datasets import Dataset

from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.checkpoints.card.results import (
    UNNAMED_DATA,
    evaluated_on_calibration_data,
    hub_name,
    limitations,
    seen_before,
)
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ReportError
from optimum_otprune.functional.ratios import RescueEnergies
from optimum_otprune.pruning.calibration.data import ModelLimits, calibration_tokens
from tests.hostile import HOSTILE
from tests.reports import evaluation, layer_report, make_report

CONFIG = OTPruningConfig()


def said(report) -> str:
    return " ".join(limitations(report))


def test_evaluations_are_paired_by_data_and_protocol_and_the_latest_counts():
    report = make_report(
        evaluations=(
            evaluation("pruned", 30.0, seqlen=64),
            evaluation("dense", 10.0),
            evaluation("pruned", 13.0),
            evaluation("pruned", 12.0),
        )
    )
    first, second = report.comparisons
    assert (first.dense["perplexity"], first.pruned["perplexity"], first.factor) == (10.0, 12.0, 1.2)
    assert (second.dense, second.factor, second.one["seqlen"]) == (None, None, 64)


@pytest.mark.parametrize("dense", [0.0, float("inf"), float("nan")])
def test_a_factor_that_is_not_finite_is_none(dense):
    report = make_report(evaluations=(evaluation("dense", dense), evaluation("pruned", float("inf"))))
    assert report.comparisons[0].factor is None


def test_added_biases_that_some_programs_drop_are_told():
    assert "SGLang and TGI drop them without a word" in said(make_report(added_biases=True))
    assert "SGLang" not in said(make_report())
    with pytest.raises(ReportError, match="`added_biases` of the report is 'yes'; want bool"):
        make_report(added_biases="yes").check()


@pytest.mark.parametrize("name", ["user/name", "gpt2", "meta-llama/Llama-3.2-1B"])
def test_names_of_the_hub_are_known(name):
    assert hub_name(name) == name


@pytest.mark.parametrize("name", [None, 3, "", "a/b/c", "/abs/path", "./rel", "../x", "token ids", "texts"])
def test_what_cannot_be_a_name_of_the_hub_is_none(name):
    assert hub_name(name) is None


def test_of_hostile_strings_only_words_pass_as_names():
    passed = {name for name in HOSTILE if hub_name(name) is not None}
    assert passed == {"null", "yes", "0x10", "1e3", "2020-01-01", "www.evil.example"}


def test_data_without_a_name_are_called_as_calibration_calls_them(tmp_path, tokenizer):
    text = " ".join(f"w{index % 60}" for index in range(400))
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "file.txt", tmp_path / "folder" / "file.txt"):
        file.write_text(text)
    config = OTPruningConfig(seqlen=20)
    kinds = [
        "self",
        [text],
        tmp_path / "file.txt",
        tmp_path / "folder",
        Dataset.from_dict({"text": [text]}),
        torch.arange(40),
    ]
    sources = {calibration_tokens(data, config, tokenizer, ModelLimits(64, 40)).source for data in kinds}
    assert sources == set(UNNAMED_DATA)


@pytest.mark.parametrize(
    ("changes", "seen", "config", "answer"),
    [
        ({}, None, {}, False),
        ({}, None, {"evaluation_split": "train"}, True),
        ({"data": "user/other"}, None, {"evaluation_split": "train"}, False),
        ({"data": "texts"}, None, {}, False),
        ({"data": "texts"}, 3, {}, False),
        ({"data": "texts"}, 11, {}, True),
        ({}, 10, {}, False),
        ({}, 11, {}, True),
        ({}, 1, {"evaluation_split": "train"}, True),
    ],
)
def test_evaluation_on_calibration_data_is_recognized(changes, seen, config, answer):
    extra = {} if seen is None else {"seen_windows": seen}
    report = make_report(OTPruningConfig(**config), evaluations=(evaluation("pruned", 12.0, **changes, **extra),))
    assert evaluated_on_calibration_data(report, report.comparisons[0]) is answer


@pytest.mark.parametrize(("seen", "answer"), [({}, None), ({"seen_windows": 0}, False)])
def test_for_unnamed_data_only_the_recorded_windows_tell(seen, answer):
    report = make_report(
        calibration={"data": "texts", "num_samples": 4, "seqlen": 100, "num_tokens": 400},
        evaluations=(evaluation("pruned", 12.0, data="texts", **seen),),
    )
    assert evaluated_on_calibration_data(report, report.comparisons[0]) is answer


@pytest.mark.parametrize(
    ("seen", "config", "sentence"),
    [
        ({"seen_windows": 3}, {}, "3 of the "),
        (
            {},
            {"evaluation_split": "train"},
            "The windows are of text that the model was calibrated on; expect a higher",
        ),
        ({}, {}, None),
        ({"seen_windows": 0}, {}, None),
    ],
)
def test_an_evaluation_on_calibration_text_is_a_sentence(seen, config, sentence):
    found = seen_before(make_report(OTPruningConfig(**config), evaluations=()), evaluation("pruned", 12.0, **seen))
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_good_report_has_only_the_limitations_of_all():
    layers = (layer_report(after=6),)
    assert len(limitations(make_report(layers=layers))) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": (layer_report(rescue=-3.0), layer_report(1))}, "The rescue ratio is negative"),
        ({"layers": (layer_report(rescue=-0.1), layer_report(1, 0.9))}, "The rescue ratio of layer 0 is negative"),
        (
            {"layers": (layer_report(0, -0.1), layer_report(1, 0.9), layer_report(2, 0.9), layer_report(3, -0.2))},
            "The rescue ratio of layers 0 and 3 is negative",
        ),
        ({}, "50% of the FFN channels are gone"),
        ({"evaluations": ()}, "The pruned model was not evaluated"),
        ({"evaluations": (evaluation("dense", 10.0),)}, "The pruned model was not evaluated"),
        ({"evaluations": (evaluation("pruned", 10.0),)}, "The dense model was not evaluated"),
        ({"evaluations": (evaluation("pruned", 10.0, num_tokens=50),)}, "on only 50 tokens"),
        ({"evaluations": (evaluation("pruned", 10.0, seen_windows=11),)}, "on data that it was calibrated on"),
        (
            {"evaluations": (evaluation("pruned", 10.0, seen_windows=2),)},
            "Part of the evaluation text (2 of 20 windows) was calibrated on; expect a higher",
        ),
        (
            {"calibration": {"data": "texts", "num_samples": 1, "seqlen": 15, "num_tokens": 15}},
            "calibrated on 15 tokens, fewer than twice the FFN width of 8",
        ),
        ({}, "not fine-tuned"),
        ({}, "Perplexity is not everything"),
    ],
)
def test_each_limitation_is_said_where_it_holds(changes, sentence):
    assert sentence in said(make_report(**changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"calibration": {}}, "calibration.data"),
        ({"calibration": {"data": "x", "num_samples": "4", "seqlen": 1, "num_tokens": 1}}, "calibration.num_samples"),
        ({"evaluations": (3,)}, r"evaluations\[0\]"),
        ({"evaluations": (evaluation("pruned", "low"),)}, r"evaluations\[0\].perplexity"),
        ({"evaluations": (evaluation("pruned", 1.0, seen_windows=None),)}, r"evaluations\[0\].seen_windows"),
        ({"parameters_after": None}, "parameters_after"),
        ({"parameters_after": True}, "parameters_after"),
        ({"size_before": "big"}, "size_before"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"custom_functions": []}, "custom_functions"),
        ({"layers": (dataclasses.replace(layer_report(), rescue_ratio="x"),)}, r"layers\[0\].rescue_ratio"),
        (
            {"layers": (dataclasses.replace(layer_report(), energies=RescueEnergies(1, 1, None, 1, 1)),)},
            r"layers\[0\].energies.error",
        ),
    ],
)
def test_a_report_that_lacks_what_a_card_says_is_refused_by_name(changes, name):
    with pytest.raises(ReportError, match=f"`{name}` of the report is .*; want .* Restore `otprune_report.json`"):
        make_report(**changes).check(is_finite=False)


def layers(*ratios: float) -> tuple:
    return tuple(layer_report(index, ratio) for index, ratio in enumerate(ratios))


def raised(factor: float) -> tuple:
    return (evaluation("dense", 10.0), evaluation("pruned", 10.0 * factor))


@pytest.mark.parametrize(
    ("ratios", "factor", "why"),
    [
        (
            (0.6, -80.0, 0.7, 0.65),
            1.3,
            r"few layers decide the pooled ratio \(layer 1 \(-80\)\)",
        ),
        (
            (-0.1, -0.2, 0.0),
            1.2,
            "×1.20 all the same: the ratio looks at the output of each layer alone, and later",
        ),
        ((0.9, 0.8, 0.85), 3.0, "×3.00 all the same: the ratio looks at the output of each layer alone, and errors"),
        ((-0.1, -0.2, 0.0), 1.6, None),
        ((0.9, 0.8, 0.85), 1.2, None),
        ((0.3, 0.4, 0.35), 1.2, None),
    ],
)
def test_a_verdict_that_the_perplexity_contradicts_says_why(ratios, factor, why):
    report = make_report(layers=layers(*ratios), evaluations=raised(factor))
    for text in (str(report), said(report), model_card(CONFIG, report, "x")):
        assert ("all the same" in text) == (why is not None)
        assert why is None or re.search(why, text)


def test_layers_that_were_hardly_heard_had_little_to_lose():
    energies = RescueEnergies(output=100.0, pruned=4.0, error=5.0, kept=96.0, shift=0.0)
    quiet = dataclasses.replace(layer_report(0, -0.25), energies=energies)
    assert "made up only 4.0% of the layers' output" in said(make_report(layers=(quiet,), evaluations=raised(1.1)))


def test_where_no_layer_is_far_from_the_others_the_heaviest_one_is_named():
    energies = RescueEnergies(output=1000.0, pruned=400.0, error=360.0, kept=600.0, shift=0.0)
    heavy = dataclasses.replace(layer_report(0, 0.1), energies=energies)
    report = make_report(layers=(heavy, layer_report(1, 0.3), layer_report(2, 0.25)), evaluations=raised(1.1))
    assert report.outliers == ()
    assert "few layers decide the pooled ratio (layer 0 (0.1)), while half of the layers reach 0.250" in str(report)


def test_without_both_perplexities_nothing_is_contradicted():
    assert make_report(layers=layers(-5.0), evaluations=()).contradiction is None
    assert make_report(layers=layers(-5.0), evaluations=(evaluation("pruned", 12.0),)).contradiction is None


def test_the_median_and_layers_far_from_the_others_stand_beside_the_pooled_ratio():
    report = make_report(layers=layers(0.6, -80.0, 0.7, 0.65))
    text = str(report)
    assert report.rescue_ratio < -19
    assert report.median_rescue_ratio == pytest.approx(0.625)
    assert "  Rescued -19.512 (harmful, below -100%) of the pruned" in text
    assert "  Median over layers 0.625 (62.5%)" in text
    assert "  Far from the others: layer 1 (-80)" in text
    assert "-8000" not in f"{text} {report.layers[1]}"
    assert "Far from" not in str(make_report())
    card = model_card(CONFIG, report, "x")
    assert "| Rescue ratio, median over layers | | 0.625 | |" in card
    assert "−80.000 (harmful)" in card
    assert "layer 4 (0.99) is far from that of the other layers" in said(make_report(layers=layers(*[0.3] * 4, 0.99)))


def test_the_medians_are_of_layers_that_lost_channels():
    whole = dataclasses.replace(layer_report(0, 1.0, after=8), energies=RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0))
    report = make_report(layers=(whole, layer_report(1, 0.2), layer_report(2, 0.4)))
    assert report.median_rescue_ratio == pytest.approx(0.3)
    assert make_report(layers=()).median_rescue_ratio == 1.0


@pytest.mark.parametrize(("weighting", "words"), [("residual", True), ("uniform", False)])
def test_the_card_says_how_tokens_were_weighed(weighting, words):
    card = model_card(CONFIG, make_report(token_weighting=weighting), "x")
    assert ("each weighed by 1 / the squared norm of the hidden state" in card) == words
