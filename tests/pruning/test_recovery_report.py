"""Reports of recovery, read from files of strangers."""

import dataclasses
import json

import pytest

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.report import PruningReport
from tests.reports import make_recovery, make_report


def read(**changes) -> PruningReport:
    """A report that went through JSON, with entries of its recovery changed."""
    values = make_report(recoveries=(make_recovery(),)).to_dict()
    values["recoveries"][0] |= changes
    return PruningReport.from_dict(json.loads(json.dumps(values)))


def test_a_report_with_a_recovery_is_read_as_it_was_written():
    assert read() == make_report(recoveries=(make_recovery(),))
    assert make_report().to_dict()["recoveries"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": 3}, r"`recoveries\[0\].trained` of the report is 3; want str"),
        ({"steps": -1}, r"`recoveries\[0\].steps` of the report is -1; want int >= 0"),
        ({"kept_step": 11}, "`recoveries.0..kept_step` of the report is 11, which is not among its 10 steps"),
        ({"learning_rate": 1e300}, "learning_rate"),
        ({"samples": {"given": "many"}}, "samples.given"),
        ({"heldout": [{}]}, r"`recoveries\[0\].heldout\[0\]` of the report has no entry `part`"),
        ({"heldout": [None] * 1001}, "has 1,001 entries; want at most 1,000"),
        ({"base_model": 1}, "base_model"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes, message):
    with pytest.raises(ReportError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kl_after", -0.5), ("agreement_after", 1.5), ("perplexity_after", 0.5), ("num_windows", 0), ("data", None)],
)
def test_impossible_numbers_of_held_out_text_are_refused(field, value):
    part = {**dataclasses.asdict(make_recovery().heldout[0]), field: value}
    with pytest.raises(ReportError, match=field):
        read(heldout=[part])


def test_entries_of_a_later_version_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="recoveries.0..news"):
        assert read(news=1).recoveries == (make_recovery(),)


def test_a_report_tells_what_was_spent_and_gained():
    text = str(make_recovery())
    assert "distillation" in text
    assert "given (user/text): KL 0.2000 -> 0.1000, agreement 60.0% -> 70.0%, perplexity 20.00 -> 15.00" in text
    assert "the weights before it were kept" in str(dataclasses.replace(make_recovery(), kept_step=0))
