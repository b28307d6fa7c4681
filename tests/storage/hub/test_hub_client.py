"""What the client writes into logs."""

import logging
from fractions import Fraction

import pytest

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.storage.hub.client import HubClient
from optimum_otprune.storage.hub.retries import Deadline


def test_signed_addresses_do_not_reach_the_logs(caplog, monkeypatch):
    clients = [HubClient("me/x", "hf_canary", Deadline(1.0)) for _ in range(2)]
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)  # off in the client
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.warning(
        "HTTP Error %s thrown while requesting %s %s", 500, "PUT", "https://s3.example/a?X-Amz-Signature=abc&b=c"
    )
    logger.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.messages == [
        "HTTP Error 500 thrown while requesting PUT https://s3.example/a?…",
        "Retrying in 1s [Retry 1/5].",
    ]
    del clients  # as long as they are there, they see to it
    assert not logger.filters


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), "1h", None, True])
def test_a_deadline_that_is_no_time_is_refused(seconds):
    with pytest.raises(ConfigurationError, match="`deadline` is"):
        Deadline(seconds)


@pytest.mark.parametrize("seconds", [float("inf"), 10**400, Fraction(10**400)], ids=["inf", "int", "fraction"])
def test_an_endless_deadline_waits_for_the_work(seconds):
    assert Deadline(seconds).run(lambda: 3) == 3
