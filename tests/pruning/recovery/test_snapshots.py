"""A recovery that was interrupted goes on where it was, and gives the same weights."""

import shutil

import pytest
import torch

from optimum_otprune import OTPruner
from optimum_otprune.errors import StateError
from optimum_otprune.pruning.recovery import recover as recover_module
from optimum_otprune.pruning.recovery import samples as samples_module
from tests.conftest import make_llama, run_command
from tests.pruning.recovery.test_recovery import CONFIG, changed, weights

OPTIONS = {"num_tokens": 2000, "batch_tokens": 80, "trained": "ffn", "progress": False}  # 25 steps, a check every 4


@pytest.fixture
def pruned_folder(llama, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama, CONFIG)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "pruned")


def recover(folder, tokens, **options):
    pruner = OTPruner.from_pretrained(folder)
    pruner.recover(tokens, base_model=make_llama(), **{**OPTIONS, **options})
    return pruner


def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights_bit_for_bit(pruned_folder, tokens, tmp_path, steps):
    straight = recover(pruned_folder, tokens)
    state = tmp_path / "state"
    steps.update(taken=0, stop=15)
    with pytest.raises(KeyboardInterrupt):
        recover(pruned_folder, tokens, resume_from=state)
    assert len([path for path in state.iterdir() if path.name.startswith("step-0000012")]) == 10  # and none of before
    assert not [path for path in state.iterdir() if path.name.startswith("step-0000008")]
    steps.update(taken=0, stop=None)
    resumed = recover(pruned_folder, tokens, resume_from=state)
    assert steps["taken"] == 25 - 12
    assert changed(weights(OTPruner.from_pretrained(pruned_folder).model), weights(resumed.model))
    assert not changed(weights(straight.model), weights(resumed.model))
    one, other = straight.report.recoveries[0], resumed.report.recoveries[0]
    assert one.heldout == other.heldout
    assert (one.steps, one.kept_step, one.samples) == (other.steps, other.kept_step, other.samples)
    resumed.save_pretrained(tmp_path / "out")
    assert not state.exists()


def test_a_finished_run_that_was_not_saved_is_not_done_again(pruned_folder, tokens, tmp_path, steps, monkeypatch):
    state = tmp_path / "state"
    first = recover(pruned_folder, tokens, resume_from=state)
    steps["taken"] = 0
    monkeypatch.setattr(samples_module, "written_samples", None)  # nothing is written again
    second = recover(pruned_folder, tokens, resume_from=state)
    assert steps["taken"] == 0
    assert not changed(weights(first.model), weights(second.model))


@pytest.mark.parametrize("options", [{"learning_rate": 1e-3}, {"trained": "all"}, {"num_tokens": 1000}])
def test_a_state_of_other_options_is_refused(pruned_folder, tokens, tmp_path, options):
    recover(pruned_folder, tokens, resume_from=tmp_path / "state")
    with pytest.raises(StateError, match=f"begun with another `{next(iter(options))}` of recovery"):
        recover(pruned_folder, tokens, resume_from=tmp_path / "state", **options)
    with pytest.raises(StateError, match="begun with another calibration samples"):
        recover(pruned_folder, tokens + 1 - tokens.ne(0).long(), resume_from=tmp_path / "state")


def test_a_long_run_is_noted_between_checks_and_goes_on_to_the_same_bits(
    pruned_folder, tokens, tmp_path, steps, monkeypatch
):
    straight = recover(pruned_folder, tokens)
    monkeypatch.setattr(recover_module, "_SAVE_SECONDS", 0.0)
    steps.update(taken=0, stop=15)
    with pytest.raises(KeyboardInterrupt):
        recover(pruned_folder, tokens, resume_from=tmp_path / "state")
    steps.update(taken=0, stop=None)
    resumed = recover(pruned_folder, tokens, resume_from=tmp_path / "state")
    assert steps["taken"] == 25 - 14
    assert not changed(weights(straight.model), weights(resumed.model))


@pytest.mark.parametrize("kind", ["samples", "00000.safetensors", ".json"])
def test_what_is_damaged_is_done_again_with_a_warning(pruned_folder, tokens, tmp_path, kind):
    state = tmp_path / "state"
    first = recover(pruned_folder, tokens, resume_from=state)
    (file,) = [
        path for path in state.iterdir() if kind in path.name and path.name not in ("state.json", "recovered.json")
    ]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="interrupted"):
        second = recover(pruned_folder, tokens, resume_from=state)
    assert not changed(weights(first.model), weights(second.model))


def test_files_that_a_crash_left_are_removed(pruned_folder, tokens, tmp_path):
    state = tmp_path / "state"
    recover(pruned_folder, tokens, resume_from=state)
    left = state / "step-0000099-00000.safetensors"
    left.write_bytes(b"half")
    recover(pruned_folder, tokens, resume_from=state)
    assert not left.exists()


def test_the_command_goes_on_and_knows_a_result_that_was_saved(pruned_folder, tokens, tmp_path, steps, capsys):
    torch.save(tokens, tmp_path / "tokens.pt")
    make_llama().save_pretrained(tmp_path / "base")
    command = ["recover", pruned_folder, "--base", tmp_path / "base", "--data", tmp_path / "tokens.pt"]
    command += ["-o", tmp_path / "out", "--num-tokens", "2k", "--batch-tokens", "80", "--trained", "ffn"]
    command += ["--quiet", "--resume"]
    steps["stop"] = 15
    assert run_command(*command) == 130
    state = tmp_path / ".out.otprune-state"
    assert "interrupted. The weights so far are in" in capsys.readouterr().err
    shutil.copytree(state, tmp_path / "kept")
    steps.update(taken=0, stop=None)
    assert run_command(*command) == 0
    assert steps["taken"] == 25 - 12
    assert not state.exists()
    assert run_command(*command[:-1]) == 1  # the output is not empty
    assert run_command(*command) == 1  # the state is new, so that it is another run
    assert "not empty" in capsys.readouterr().err


def test_a_result_that_was_saved_is_known_though_its_state_is_still_there(pruned_folder, tokens, tmp_path, capsys):
    state = tmp_path / "state"
    pruner = recover(pruned_folder, tokens, resume_from=state)
    shutil.copytree(state, tmp_path / "kept")
    pruner.save_pretrained(tmp_path / "out")
    shutil.copytree(tmp_path / "kept", state)
    command = ["recover", pruned_folder, "-o", tmp_path / "out", "--quiet", "--resume", state]
    assert run_command(*command) == 0
    assert "is complete already" in capsys.readouterr().out
    assert not state.exists()


def test_pruning_and_recovery_go_on_together(llama_folder, tokens, tmp_path, steps):
    torch.save(tokens, tmp_path / "tokens.pt")
    command = ["prune", llama_folder, "-o", tmp_path / "out", "--pruning-ratio", "0.5", "--multiple-of", "1"]
    command += ["--quality", "fast", "--calibration-data", tmp_path / "tokens.pt", "--quiet", "--recover", "20k"]
    command += ["--resume"]
    steps["stop"] = 6
    assert run_command(*command) == 130
    assert {path.name for path in tmp_path.glob(".out*")} == {".out.otprune-state", ".out.otprune-state-recovery"}
    steps.update(taken=0, stop=None)
    assert run_command(*command) == 0
    assert not list(tmp_path.glob(".out*"))
    assert run_command("verify", tmp_path / "out") == 0
