"""Warnings point to the user's own line, however deep in the package they come from."""

import warnings
from contextlib import contextmanager

import pytest

from optimum_otprune import OTPruningConfig
from optimum_otprune.config.options import VERSION_KEY
from optimum_otprune.errors import warn_user
from optimum_otprune.pruning.layer_report import warn_of_unknown

DEPTHS = {
    "a constructor": lambda: OTPruningConfig(importance="random"),
    "a class method of a base class": lambda: OTPruningConfig.from_dict({VERSION_KEY: "99.0", "telepathy": 1}),
    "a function": lambda: warn_of_unknown(["telepathy"]),
    "no call at all": lambda: warn_user("Mind the gap."),
}


@pytest.mark.parametrize("call", DEPTHS.values(), ids=DEPTHS)
def test_a_warning_names_the_line_that_called_the_package(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert [(one.filename, one.lineno) for one in told] == [(__file__, call.__code__.co_firstlineno)]


def test_library_code_between_two_calls_of_the_package_is_not_taken_for_the_user():
    outer = {"__name__": "optimum_otprune.outer", "contextmanager": contextmanager, "warn_user": warn_user}
    code = """
@contextmanager
def written():
    yield
    warn_user("Mind the gap.")


def save():
    with written():
        pass
"""
    exec(compile(code, "outer.py", "exec"), outer)
    with pytest.warns(UserWarning, match="Mind the gap") as told:
        outer["save"]()
    assert told[0].filename == __file__
