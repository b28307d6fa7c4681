"""What belongs to the whole process is what it was: a notebook goes on after a run as it was before it."""

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import optuna  # noqa: F401 - libraries that set something up when they are imported are imported before
import ot  # noqa: F401
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands import actions  # noqa: F401
from optimum_otprune.errors import CustomFunctionError
from optimum_otprune.storage.hub.client import HubClient
from optimum_otprune.storage.hub.retries import Deadline
from tests.conftest import run_command

HALF = ("--pruning-ratio", "0.5", "--multiple-of", "1")


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def process_state() -> dict:
    loggers = {
        name: (logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled)
        for name, logger in [("", logging.getLogger()), *logging.Logger.manager.loggerDict.items()]
        if isinstance(logger, logging.Logger)
    }
    return {
        "loggers": {name: state for name, state in loggers.items() if state[:3] != (0, [], [])},
        "logging": (logging.root.manager.disable, logging.getLogRecordFactory(), logging.raiseExceptions),
        "warnings": (warnings.showwarning, warnings.formatwarning, list(warnings.filters)),
        "progress bars": (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()),
        "verbosity": (transformers_logging.get_verbosity(), optuna.logging.get_verbosity()),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "environment": dict(os.environ),
        "place": (os.getcwd(), umask(), locale.setlocale(locale.LC_ALL)),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "interpreter": (sys.excepthook, threading.excepthook, sys.getrecursionlimit(), list(sys.path), gc.isenabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "torch": (torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "random numbers": (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()),
    }


@pytest.fixture
def ids(tokens, tmp_path):
    file = tmp_path / "ids.pt"
    torch.save(tokens, file)
    return file


def prune_with_everything(folder, tokens):
    config = OTPruningConfig(
        pruning_ratio=0.5,
        multiple_of=1,
        method="structured_afr_with_intrafusion",
        compensation="ridge",
        reconstruction_steps=2,
        self_calibration=1,
        allocation="adaptive",
    )
    pruner = OTPruner.from_pretrained(folder, config)
    pruner.evaluate(tokens, progress=False)
    pruner.prune(tokens, max_hidden_memory=0)
    pruner.save_pretrained(folder.parent / "out")


def prune_in_vain(folder, tokens):
    def broken(statistics):
        raise ValueError

    pruner = OTPruner.from_pretrained(folder, {"pruning_ratio": 0.5, "multiple_of": 1})
    with pytest.raises(CustomFunctionError):
        pruner.prune(tokens, importance=broken)


def talk_to_the_hub(folder, tokens):
    HubClient("me/model", None, Deadline(1.0))


@pytest.mark.parametrize("call", [prune_with_everything, prune_in_vain, talk_to_the_hub])
def test_a_call_leaves_the_process_as_it_was(call, llama_folder, tokens):
    before = process_state()
    call(llama_folder, tokens)
    assert process_state() == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("prune", "{model}", "-o", "{out}", *HALF, "--quality", "fast", "--calibration-data", "{ids}"), 0),
        (("prune", "{model}", "-o", "{out}", *HALF, "--quiet", "--dry-run", "--calibration-data", "{ids}"), 0),
        (("prune", "{model}", "-o", "{out}", "--quiet", "--calibration-data", "missing"), 1),
        (("prune", "{model}", "-o", "{out}", "--quiet", "--eval-data", "{ids}"), 2),
        (("evaluate", "{model}", "--data", "{ids}", "--quiet"), 0),
        (
            (
                "tune",
                "{model}",
                "-o",
                "{out}",
                *HALF,
                "--quality",
                "fast",
                "--trials",
                "2",
                "--calibration-data",
                "{ids}",
            ),
            0,
        ),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_command_leaves_the_process_as_it_was(arguments, code, is_quiet, llama_folder, ids, tmp_path):
    if is_quiet:  # as somebody has it who wants no bars
        transformers_logging.disable_progress_bar()
    try:
        before = process_state()
        names = {"model": llama_folder, "out": tmp_path / "out", "ids": ids}
        assert run_command(*(argument.format(**names) for argument in arguments)) == code
        assert process_state() == before
    finally:
        transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("is_off", [False, True])
def test_bars_of_the_hubs_client_stay_as_they_were_where_those_of_transformers_are_shown(is_off, llama_folder, ids):
    transformers_logging.enable_progress_bar()
    (disable_progress_bars if is_off else enable_progress_bars)()
    try:
        assert run_command("evaluate", llama_folder, "--data", ids, "--quiet") == 0
        assert are_progress_bars_disabled() is is_off
    finally:
        enable_progress_bars()
