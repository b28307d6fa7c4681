"""Reports of quantization, read from files of strangers, and what a card makes of them."""

import json

import pytest

from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.quantization_report import QuantizationReport
from optimum_otprune.pruning.report import PruningReport
from tests.reports import make_report

QUANTIZED = QuantizationReport(
    scheme="int8",
    library="torchao 0.18.0",
    words="8 bits, one scale for each output",
    quantized_parameters=500,
    dtype="float32",
    size_before=4000,
    size_after=1500,
    num_tokens=252,
    kl=0.01,
    agreement=0.9,
    perplexity_before=12.5,
    perplexity_after=13.0,
)


def read(**changes) -> PruningReport:
    """A report that went through JSON, with entries of its quantization changed."""
    values = make_report(quantization=QUANTIZED).to_dict()
    values["quantization"] |= changes
    return PruningReport.from_dict(json.loads(json.dumps(values)))


def test_a_report_with_a_quantization_is_read_as_it_was_written_and_one_without_says_nothing_of_it():
    assert read() == make_report(quantization=QUANTIZED)
    assert "quantization" not in make_report().to_dict()
    assert str(QUANTIZED).splitlines()[0] == "Quantization: int8 by torchao 0.18.0 (8 bits, one scale for each output)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": 8}, "`quantization.scheme` of the report is 8; want str"),
        ({"library": ""}, "`quantization.library` of the report is ''; want up to 100 characters"),
        ({"size_after": -1}, "`quantization.size_after` of the report is -1"),
        ({"kl": -0.1}, "`quantization.kl`"),
        ({"perplexity_after": 0.5}, "`quantization.perplexity_after`"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes, message):
    with pytest.raises(ReportError, match=message):
        read(**changes)


def test_a_card_says_what_the_numbers_are_of_and_what_loads_it_and_escapes_what_strangers_wrote():
    card = model_card(OTPruningConfig(), read(), "pruned-int8")
    assert "quantized to int8** (see [below](#quantization)); the other numbers here are those from before." in card
    assert "| Files of the weights, by quantization | 4.00 kB | 1.50 kB | −62.5 % |" in card
    assert "Plain transformers loads it where `torchao` is installed, too" in card
    assert "diverges from it by 0.0100 nats per token" in card
    unmeasured = model_card(OTPruningConfig(), read(kl=None, agreement=None), "pruned-int8")
    assert "How far that moved its outputs was not measured." in unmeasured
    hostile = model_card(OTPruningConfig(), read(library="`]( <b>", words="<script>"), "pruned-int8")
    assert "<script>" not in hostile
    assert "<b>" not in hostile
