"""The notebook of a repository: made from the report, plain Python, strings of strangers as strings."""

import ast
import dataclasses
import json

import pytest

from optimum_otprune.checkpoints.card.notebook import folder_notebook, notebook
from optimum_otprune.config.configuration import OTPruningConfig
from tests.pruning.test_quantization_report import QUANTIZED
from tests.reports import evaluation, layer_report, make_report


def cells(config=None, name="me/x", **changes) -> list[tuple[str, str]]:
    """Kind and text of every cell."""
    content = json.loads(notebook(config or OTPruningConfig(pruning_ratio=0.5), make_report(**changes), name))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    return [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]


def code(found: list[tuple[str, str]]) -> str:
    return "\n".join(text for kind, text in found if kind == "code" and not text.startswith("%pip "))


def names(source: str) -> dict[str, str]:
    """Strings that names in capitals stand for."""
    return {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


def test_it_loads_the_repository_and_its_base_and_shows_what_was_measured():
    found = cells(evaluations=(evaluation("dense", 10.0), evaluation("pruned", 12.0)))
    assert found[1] == ("code", '%pip install --quiet accelerate "transformers>=4.57"')
    assert {"MODEL": "me/x", "BASE": "meta-llama/Llama-3.2-1B"}.items() <= names(code(found)).items()
    assert "**10.00** of the base model, **12.00** of this one" in " ".join(text for _, text in found)
    assert "trust_remote_code" not in code(found)


def test_without_a_base_on_the_hub_or_a_measurement_nothing_is_claimed_of_them():
    found = cells(base_model="/home/me/dense", evaluations=())
    assert set(names(code(found))) == {"MODEL", "PROMPT", "TEXT"}
    text = " ".join(text for _, text in found)
    assert "was not measured" in text
    assert "not known by a name of the Hub" in text
    assert "/home" not in text


def test_code_of_the_repository_is_run_only_where_the_model_needs_it_and_never_for_the_base():
    config = OTPruningConfig(pruning_ratio=0.5, non_uniform_format="per_layer_config")
    found = cells(config, layers=(layer_report(0, after=4), layer_report(1, after=6)))
    assert "load(MODEL, trust_remote_code=True)" in code(found)
    assert "load(BASE)" in code(found)
    assert found[1][1].endswith('"transformers>=5.15"')


@pytest.mark.parametrize(("library", "installed"), [("torchao 0.15", "torchao "), ("--index-url=https://x 1", "")])
def test_a_quantized_model_brings_what_reads_it_and_nothing_of_a_strangers(library, installed):
    found = cells(quantization=dataclasses.replace(QUANTIZED, library=library))
    assert found[1][1] == f'%pip install --quiet accelerate {installed}"transformers>=4.57"'


@pytest.mark.parametrize("name", ['a"b', "a\n```python\nimport os\n```\n", "<img src=x>"])
def test_strings_of_strangers_become_neither_code_nor_markdown(name):
    evaluations = (evaluation("dense", 10.0, data=name), evaluation("pruned", 12.0, data=name))
    found, plain = cells(base_model=name, evaluations=evaluations), cells(base_model=None)
    assert code(found) == code(plain)
    assert [kind for kind, _ in found] == [kind for kind, _ in plain]
    assert "<img" not in " ".join(text for _, text in found)


def test_a_model_without_a_tokenizer_or_of_another_task_gets_none(tmp_path):
    OTPruningConfig(pruning_ratio=0.5).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert folder_notebook(tmp_path, "me/x") is None  # not pruned yet
    make_report().save(tmp_path / "otprune_report.json")
    assert folder_notebook(tmp_path, "me/x") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert folder_notebook(tmp_path, "me/x") == notebook(OTPruningConfig(pruning_ratio=0.5), make_report(), "me/x")
    make_report(auto_class="AutoModelForMaskedLM").save(tmp_path / "otprune_report.json")
    assert folder_notebook(tmp_path, "me/x") is None
