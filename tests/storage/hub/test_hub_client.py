"""What the client writes into logs."""

import logging
from fractions import Fraction

import pytest

from optimum_otprune.checkpoints.push import check_push
from optimum_otprune.config.configuration import OTPruningConfig
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


@pytest.mark.parametrize("repo_id", [None, 5])
def test_a_repository_is_named_by_a_string(repo_id):
    with pytest.raises(ConfigurationError, match=f"`repo_id` is {repo_id}; want a string such as 'user/name'"):
        OTPruningConfig().push_to_hub(repo_id)
    with pytest.raises(ConfigurationError, match=f"`repo_id` is {repo_id}; want a string such as 'user/name'"):
        check_push(repo_id, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"private": "yes"}, "`private` is 'yes'; want True or False or None"),
        ({"create_pr": 1}, "`create_pr` is 1; want True or False"),
        ({"token": 5}, "`token` is of type int; want a string"),
        ({"revision": 5}, "`revision` is 5; want a string or None"),
        ({"commit_message": b"x"}, "`commit_message` is b'x'; want a string or None"),
        ({"deadline": True}, "`deadline` is True; want a number or None"),
    ],
    ids=repr,
)
def test_an_option_of_pushing_has_the_type_that_is_written(options, words):
    with pytest.raises(ConfigurationError, match=words):
        check_push("me/x", options)


def test_an_option_of_reading_a_configuration_has_the_type_that_is_written(tmp_path):
    with pytest.raises(ConfigurationError, match="`cache_dir` is 5; want a string or a path or None"):
        OTPruningConfig.from_pretrained(tmp_path, cache_dir=5)


@pytest.mark.parametrize("seconds", [float("inf"), 10**400, Fraction(10**400)], ids=["inf", "int", "fraction"])
def test_an_endless_deadline_waits_for_the_work(seconds):
    assert Deadline(seconds).run(lambda: 3) == 3
