"""What the dry run says of widths and the programs that they suit."""

import pytest

from optimum_otprune import OTPruner
from optimum_otprune.pruning.dry_run.purposes import purpose_text
from tests.conftest import make_llama


def test_a_width_that_suits_all_needs_no_other():
    assert purpose_text([768], 10.0, 1000) == "tensor-cores yes; int4 yes; gguf yes"


def test_the_nearest_widths_are_named_with_what_they_cost():
    text = purpose_text([700, 768], 1.0, 1000)
    assert text.startswith(
        "tensor-cores no (640: -6.0%, 704: +0.4%); int4 no (640: -6.0%, 768: +6.8%); gguf no (ffn_down"
    )
    assert "ffn_down stays in 16 bits; 512: -18.8%, 768: +6.8%" in text
    assert "16 bits" not in purpose_text([96], 0.0, 1000)  # whole blocks of 32
    assert purpose_text([96], 0.0, 1000).endswith("gguf no (256)")


def test_a_plan_says_it_of_the_layers_that_lose_channels(tokens):
    model = make_llama(intermediate_size=512)
    options = {"method": "magnitude", "pruning_ratio": 0.5, "skip_layers": [0], "seqlen": 20}
    plan = OTPruner.plan(model, {**options, "multiple_of": "gguf"}, tokens)
    line = next(line for line in str(plan).splitlines() if line.startswith("Made for"))
    assert line == "Made for     tensor-cores yes; int4 yes; gguf yes"
    plan = OTPruner.plan(model, {**options, "multiple_of": 1, "pruning_ratio": 0.4}, tokens)
    more = (320 - 307) * 2 * 3 * 32 / plan.parameters_after
    assert "tensor-cores no (256: " in str(plan)
    assert f"320: {more:+.1%})" in str(plan)
    nothing = OTPruner.plan(model, {**options, "multiple_of": 1, "pruning_ratio": 0.0}, tokens)
    assert "Made for" not in str(nothing)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_widths_that_are_found_by_measuring_are_not_judged(ratio, tokens):
    options = {"method": "wanda_sp", "allocation": "adaptive", "multiple_of": 1, "pruning_ratio": ratio, "seqlen": 20}
    assert "Made for" not in str(OTPruner.plan(make_llama(), options, tokens))
