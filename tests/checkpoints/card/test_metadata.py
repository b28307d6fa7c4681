"""The front matter is what the Hub accepts: plain values, names of the Hub, the base model's license."""

import pytest
import yaml

from optimum_otprune.checkpoints.card.base_card import LICENSES
from optimum_otprune.checkpoints.card.metadata import card_metadata
from optimum_otprune.checkpoints.card.results import hub_name
from optimum_otprune.config.configuration import OTPruningConfig
from tests.reports import evaluation, layer_report, make_report


def metadata(config=None, name="user/llama-half", **changes) -> dict:
    data = card_metadata(config or OTPruningConfig(pruning_ratio=0.5), make_report(config, **changes), name)
    loaded = yaml.safe_load(data.to_yaml())
    assert loaded == data.to_dict()
    return loaded


def test_a_whole_front_matter():
    assert metadata() == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "license": "llama3.2",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["Salesforce/wikitext"],
        "metrics": ["perplexity"],
        "tags": [
            "pruned",
            "optimum-otprune",
            "pruning",
            "structured-pruning",
            "optimal-transport",
            "compression",
            "llama",
        ],
        "otprune": {
            "method": "otprune",
            "pruning_ratio": 0.5,
            "intermediate_size": 4,
            "rescue_ratio": 0.375,
            "dilution_ratio": 0.1,
        },
        "model-index": [
            {
                "name": "llama-half",
                "results": [
                    {
                        "task": {"type": "text-generation", "name": "Text Generation"},
                        "dataset": {
                            "name": "Salesforce/wikitext",
                            "type": "Salesforce/wikitext",
                            "config": "wikitext-2-raw-v1",
                            "split": "test",
                        },
                        "metrics": [
                            {
                                "type": "perplexity",
                                "value": value,
                                "name": f"Perplexity ({what})",
                                "args": {"seqlen": 2001, "num_tokens": 40000},
                            }
                            for value, what in ((12.0, "pruned"), (10.0, "base model"))
                        ],
                    }
                ],
            }
        ],
    }


def test_what_the_hub_requires_of_a_model_index_is_there_for_every_kind_of_data():
    evaluations = [
        evaluation("pruned", 3.0, data=data) for data in ("texts", "user/data", "token ids", "a\nb", "/a/b")
    ]
    for result in metadata(evaluations=evaluations)["model-index"][0]["results"]:
        assert result["task"]["type"] == "text-generation"
        assert result["dataset"]["type"] == "custom" or hub_name(result["dataset"]["type"])
        assert result["dataset"]["name"]
        assert "/a/b" not in str(result)
        for metric in result["metrics"]:
            assert metric["type"] == "perplexity"
            assert isinstance(metric["value"], float)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_left_out(value):
    found = metadata(
        evaluations=(evaluation("dense", 10.0), evaluation("pruned", value)), layers=(layer_report(0, value),)
    )
    assert [metric["value"] for metric in found["model-index"][0]["results"][0]["metrics"]] == [10.0]
    assert "rescue_ratio" not in found["otprune"]
    found = metadata(evaluations=(evaluation("pruned", value),))
    assert "model-index" not in found
    assert "metrics" not in found


@pytest.mark.parametrize("name", [None, "/home/somebody/model", "./model", "a/b/c", "a\n---\nlicense: evil", "../x"])
def test_paths_and_other_text_are_no_names_of_base_model_or_data(name):
    calibration = {"data": name or "local file", "num_samples": 1, "seqlen": 2, "num_tokens": 2}
    found = metadata(base_model=name, calibration=calibration)
    assert "base_model" not in found
    assert "datasets" not in found
    assert "somebody" not in str(found)


@pytest.mark.parametrize(
    ("base_card", "base_model", "expected"),
    [
        ({}, "user/base", {}),
        ({"license": "mit"}, None, {"license": "mit"}),
        (
            {"license": "other", "license_name": "house", "license_link": "LICENSE.txt"},
            "user/base",
            {
                "license": "other",
                "license_name": "house",
                "license_link": "https://huggingface.co/user/base/blob/main/LICENSE.txt",
            },
        ),
        ({"license": "other", "license_link": "LICENSE.txt"}, None, {"license": "other"}),
        ({"license": "<b>"}, "user/base", {}),
        ({"license": ["mit", "bsd"]}, "user/base", {}),
        (
            {"license": "other", "license_link": "https://example.org/license"},
            None,
            {"license": "other", "license_link": "https://example.org/license"},
        ),
    ],
)
def test_the_license_is_copied_and_never_invented(base_card, base_model, expected):
    found = metadata(base_card=base_card, base_model=base_model)
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    assert found.get("license", "mit") in LICENSES


def test_results_on_calibration_data_are_named_so():
    for seen, said in ((11, "on calibration data"), (10, "text partly calibrated on")):
        found = metadata(evaluations=(evaluation("pruned", 12.0, seen_windows=seen),))
        metric = found["model-index"][0]["results"][0]["metrics"][0]
        assert metric["name"] == f"Perplexity (pruned, {said})"


def test_a_model_that_is_not_pruned_yet_has_no_tag_of_a_pruned_one():
    tags = card_metadata(OTPruningConfig(pruning_ratio=0.5), None, "x").to_dict()["tags"]
    assert "pruning" in tags
    assert "pruned" not in tags


def test_widths_that_differ_are_all_given():
    layers = (layer_report(0, after=4), layer_report(1, after=6))
    assert metadata(layers=layers)["otprune"]["intermediate_size"] == [4, 6]


def test_a_target_is_given_beside_the_ratio_that_met_it():
    found = metadata(OTPruningConfig(target_parameters="900M"))["otprune"]
    assert (found["target_parameters"], found["pruning_ratio"]) == ("900M", 0.5)
