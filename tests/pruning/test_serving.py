"""What some programs that serve models do not read is said in one way in run, summary and card."""

import logging

import pytest

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.pruning.serving import not_read_everywhere
from tests.conftest import make_llama


@pytest.mark.parametrize(
    ("added_biases", "widths", "name", "told"),
    [
        (False, [24, 24], "per_layer_config", []),
        (False, [24, 36], "pad", []),
        (False, [24, 36], "of another package", []),
        (False, [24, 36], "per_layer_config", ["saved as 'per_layer_config'"]),
        (True, [24, 36], "per_layer_config", ["gained biases", "saved as 'per_layer_config'"]),
    ],
)
def test_only_what_some_program_does_not_read_is_told(added_biases, widths, name, told):
    found = not_read_everywhere(added_biases, widths, {"non_uniform_format": name})
    assert len(found) == len(told)
    assert all(words in sentence for words, sentence in zip(told, found))


def test_run_summary_and_card_say_it(tokens, tmp_path, caplog):
    options = {"pruning_ratio": 0.5, "layer_ratios": {0: 0.25}, "quality": "fast", "multiple_of": 1}
    options |= {"intercept": "never"}
    padded = OTPruner(make_llama(), OTPruningConfig(**options))
    padded.prune(tokens, progress=False)
    words = "vLLM, SGLang, TGI, llama.cpp"
    assert words not in str(padded.report) + caplog.text
    pruner = OTPruner(make_llama(), OTPruningConfig(**options, non_uniform_format="per_layer_config"))
    with caplog.at_level(logging.WARNING):
        pruner.prune(tokens, progress=False)
    pruner.save_pretrained(tmp_path / "out")
    for text in (caplog.text, str(pruner.report), (tmp_path / "out" / "README.md").read_text(encoding="utf-8")):
        assert words in text
