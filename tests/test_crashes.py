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

import pytest
from safetensors.torch import save_file

from optimum_otprune import OTPruner
from optimum_otprune.checkpoints import mixin
from optimum_otprune.checkpoints import save as checkpoint
from optimum_otprune.pruning import pipeline
from optimum_otprune.storage.manifest import verify_folder
from optimum_otprune.storage.state_folder import default_state_folder, has_state
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


def die_at_steps(runs, numbers, record_figure):
    for number in numbers:

        def dies(number=number):
            die_at(number, pytest.MonkeyPatch())
            return runs.run()

        assert exit_code(forked(dies)) == DIED
        runs.check_output_absent_or_complete()
        runs.go_on()
        runs.clear()
        record_figure("R4, processes that died at a step")


def test_a_process_that_dies_at_a_step_of_writing_is_gone_on_with(runs, record_figure):
    die_at_steps(runs, range(1, runs.count_steps() + 1, 8), record_figure)


@pytest.mark.slow
def test_a_process_that_dies_at_any_step_of_writing_is_gone_on_with(runs, record_figure):
    die_at_steps(runs, range(1, runs.count_steps() + 1), record_figure)


def kill_at_random(runs, times, seed, record_figure):
    """Kill the same run several times, whether or not it has gone on since, and then let it end."""
    draw = random.Random(seed)
    begin = time.monotonic()
    assert exit_code(forked(runs.run)) == 0
    seconds = time.monotonic() - begin
    runs.clear()
    for _ in range(times):
        pid = forked(runs.run)
        time.sleep(draw.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) in (-signal.SIGKILL, 0)
        runs.check_output_absent_or_complete()
        if runs.output.exists() and not runs.state.exists():
            runs.clear()
        record_figure("R4, random kills")
    runs.go_on()


def test_a_process_that_is_killed_at_random_moments_is_gone_on_with(runs, record_figure):
    kill_at_random(runs, 5, 0, record_figure)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_processes_that_are_killed_at_random_moments_are_gone_on_with(runs, seed, record_figure):
    kill_at_random(runs, 5, seed, record_figure)


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("kind", ["flip", "truncate", "remove"])
def test_a_damaged_layer_and_no_other_is_done_again(runs, layer, kind, monkeypatch, capsys, record_figure):
    die_before_saving(runs, monkeypatch)
    file = runs.state / f"layer-0000{layer}.{'json' if layer == 1 else 'safetensors'}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if kind != "remove":
        file.write_bytes(content if kind == "flip" else content[:-1])
    done, original = [], pipeline.prune_layer

    def noted(block, *arguments, **options):
        done.append(block.layer)
        return original(block, *arguments, **options)

    monkeypatch.setattr(pipeline, "prune_layer", noted)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        runs.go_on()
    assert done == [layer]
    why = "is missing" if kind == "remove" else "has other bytes than were written"
    expected = f"warning: Layer {layer} of the interrupted run is damaged and done again: {file.name!r} {why}.\n"
    assert capsys.readouterr().err == expected
    record_figure("R4, damaged layers")


def die_before_saving(runs, monkeypatch):
    """All layers are finished, and the process ends."""

    def save(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mixin, "save_checkpoint", save)
        assert runs.run() == 130


def fail_at_steps(runs, numbers, record_figure, capsys):
    for number in numbers:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("always")  # the state of a saved run that cannot be removed is a warning
            full_disk_at(number, patch)
            code = runs.run()
        printed = capsys.readouterr().err
        if code == 0:
            assert "The model is saved, but the state of the run was not removed" in printed
        else:
            assert (code, printed.count("\n")) == (1, 1)
            assert "the disk is full" in printed
            assert ("run the same command again to go on" in printed) == has_state(runs.state)
        assert not list(runs.place.glob(".out.partial-*"))
        assert not list(runs.state.glob(".*.tmp"))
        runs.check_output_absent_or_complete()
        runs.go_on()
        runs.clear()
        record_figure("R5")


def test_a_disk_that_is_full_at_a_step_is_one_line_and_the_run_goes_on_later(runs, record_figure, capsys):
    fail_at_steps(runs, range(1, runs.count_steps(removals=False) + 1, 6), record_figure, capsys)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_step_is_one_line_and_the_run_goes_on_later(runs, record_figure, capsys):
    fail_at_steps(runs, range(1, runs.count_steps(removals=False) + 1), record_figure, capsys)


@pytest.mark.parametrize("largest", [0, 2_000, 20_000, 50_000])
def test_a_file_that_the_system_does_not_let_grow_is_one_line_and_the_run_goes_on_later(runs, largest, record_figure):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        return runs.run()

    assert exit_code(forked(limited)) == 1
    assert not runs.output.exists()
    runs.go_on()
    record_figure("R5")


def test_a_parent_that_is_read_only_and_an_output_that_exists_are_told_before_any_work(
    runs, monkeypatch, capsys, record_figure
):
    monkeypatch.setattr(OTPruner, "from_pretrained", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert runs.run() == 1
        assert "is not writable" in capsys.readouterr().err
    runs.output.write_text("a file")
    assert runs.run() == 1
    assert "is a file" in capsys.readouterr().err
    runs.output.unlink()
    runs.output.mkdir()
    (runs.output / "thesis.txt").write_text("dear")
    assert runs.run() == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in runs.place.iterdir()] == ["out"]
    (runs.output / "thesis.txt").unlink()
    (runs.place / ".out.otprune-state").mkdir()
    (runs.place / ".out.otprune-state" / "thesis.txt").write_text("dear")
    assert runs.run() == 1
    assert "holds 'thesis.txt' but no state.json" in capsys.readouterr().err
    record_figure("R5", 4, 4)


def test_a_complete_output_of_other_options_is_not_taken_for_this_runs(runs, monkeypatch, capsys):
    die_before_saving(runs, monkeypatch)
    shutil.copytree(runs.root / "straight" / "out", runs.output)
    assert runs.run(resume=("--resume", "--pruning-ratio", "0.25")) == 1
    assert "not empty" in capsys.readouterr().err
    assert has_state(runs.state)
    (runs.output / "config.json").write_text("{}")
    assert runs.run() == 1
    assert "not empty" in capsys.readouterr().err


def interrupted_run(runs, number, **options) -> int:
    """The exit code of a run that gets a signal while its second layer is pruned."""
    original = pipeline.prune_layer

    def interrupted(block, *arguments, **others):
        if block.layer == 1:
            os.kill(os.getpid(), number)
        return original(block, *arguments, **others)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "prune_layer", interrupted)
            return runs.run(**options)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_says_in_one_line_how_to_go_on(runs, number, code, word, capsys):
    handlers = signal.getsignal(signal.SIGTERM)
    assert interrupted_run(runs, number) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"error: {word}. Finished layers are in" in printed
    assert "run the same command again to go on." in printed
    assert signal.getsignal(signal.SIGTERM) is handlers
    runs.go_on()


def test_an_interruption_without_a_state_says_what_would_have_kept_one(runs, capsys):
    assert interrupted_run(runs, signal.SIGINT, resume=()) == 130
    printed = capsys.readouterr().err
    assert "error: interrupted. No layer of it was kept; with `--resume`" in printed
    assert printed.count("\n") == 1
    assert not has_state(runs.state)


def test_a_folder_of_ones_own_for_the_state_is_used_and_removed(runs, tmp_path):
    assert runs.run(resume=(f"--resume={tmp_path / 'kept' / 'state'}",)) == 0
    assert hashes(runs.output) == runs.expected
    assert not any((tmp_path / "kept").iterdir())


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own_is_killed_and_gone_on_with(runs, record_figure):
    arguments = [str(part) for part in ("--calibration-data", runs.root / "ids.safetensors", *FAST, "--resume")]
    line = [
        sys.executable,
        "-m",
        "optimum_otprune",
        "prune",
        str(runs.root / "dense"),
        "-o",
        str(runs.output),
        *arguments,
    ]
    for layer in (0, 1):
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (runs.state / f"layer-0000{layer}.json").exists():
                time.sleep(0.001)
            process.kill()
        record_figure("R4, random kills")
    runs.check_output_absent_or_complete()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0
    written = hashes(runs.output)  # these runs draw a plot, which the card shows
    assert written["model.safetensors"] == runs.expected["model.safetensors"]
    assert written["otprune_report.json"] == runs.expected["otprune_report.json"]
    verify_folder(runs.output)
