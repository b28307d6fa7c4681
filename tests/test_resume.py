"""Runs that are killed, or fail, at any step of writing go on to the same bits."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest
from safetensors.torch import save_file

from optimum_otprune import OTPruner, OTPruningConfig, checkpoint
from optimum_otprune.state import default_state_folder, has_state
from tests.conftest import make_llama
from tests.crashes import DIED, at_each_step, command, die_at, exit_code, forked, full_disk_at, hashes

FAST = ("--pruning-ratio", "0.5", "--multiple-of", "1", "--quality", "fast", "--reconstruction-steps", "0", "--quiet")


class Runs:
    """One command line, its result without an interruption, and a place to interrupt it in.

    Every run writes into a folder of the same name, which the card repeats.
    """

    def __init__(self, root, patch):
        patch.setattr(checkpoint, "can_plot", lambda: False)  # drawing takes longer than everything else together
        self.root, self.place = root, root / "place"
        make_llama().save_pretrained(root / "dense")
        self.output = self.place / "out"
        self.state = default_state_folder(self.output)
        (root / "straight").mkdir()
        assert self.run(output=root / "straight" / "out", resume=()) == 0
        self.expected = hashes(root / "straight" / "out")
        self.clear()

    def clear(self):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def run(self, output=None, resume=("--resume",)):
        arguments = ("--calibration-data", self.root / "ids.safetensors", *FAST)
        return command("prune", self.root / "dense", "-o", output or self.output, *arguments, *resume)

    def count_steps(self, removals=True):
        """Of a whole run."""
        taken = []
        with pytest.MonkeyPatch.context() as patch:
            at_each_step(taken.append, patch, removals)
            assert self.run() == 0
        self.clear()
        return len(taken)

    def check_output_absent_or_complete(self):
        assert not self.output.exists() or hashes(self.output) == self.expected

    def go_on(self):
        """The same command again, without a fault; afterwards there is nothing but the expected folder."""
        assert self.run() == 0
        assert hashes(self.output) == self.expected
        assert [path.name for path in self.place.iterdir()] == ["out"]


@pytest.fixture
def runs(tokens, tmp_path, monkeypatch):
    save_file({"input_ids": tokens}, tmp_path / "ids.safetensors")
    return Runs(tmp_path, monkeypatch)


def tree(folder):
    """What is there, whatever random names it has."""
    return tuple((re.sub(r"partial-\w+", "partial", name), digest) for name, digest in hashes(folder).items())


@pytest.mark.parametrize("part", range(2))
def test_from_what_is_on_the_disk_before_any_step_of_writing_the_run_goes_on_to_the_same_bits(
    runs, part, record_figure
):
    seen, snapshots = set(), []

    def snapshot(number):
        runs.check_output_absent_or_complete()
        content = tree(runs.place)
        if content not in seen:
            seen.add(content)
            snapshots.append(runs.root / f"snapshot-{number}")
            shutil.copytree(runs.place, snapshots[-1])

    with pytest.MonkeyPatch.context() as patch:
        at_each_step(snapshot, patch)
        assert runs.run() == 0
    assert len(snapshots) > 30
    mine = snapshots[part::2]
    for place in mine:
        runs.clear()
        shutil.copytree(place, runs.place, dirs_exist_ok=True)
        runs.go_on()
    record_figure("R4, states on the disk", len(mine), len(mine))
