"""Recovery, end to end: what it gives, what it keeps, and what it refuses."""

import json
import re
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import (
    CalibrationDataError,
    ConfigurationError,
    MissingExtraError,
    NumericalError,
    UnsupportedModelError,
)
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models import training
from optimum_otprune.pruning.recovery import recover as module
from optimum_otprune.pruning.recovery.heldout import Measured
from optimum_otprune.pruning.recovery.samples import Plan, RecoverySamples, plan_samples
from optimum_otprune.pruning.recovery.teacher import DenseTeacher
from optimum_otprune.pruning.report import PruningReport
from tests.conftest import VOCAB_SIZE, make_llama, run_command
from tests.models.test_contract import build

CONFIG = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", intercept="never", self_calibration=0)
FAST = {"num_tokens": 2000, "batch_tokens": 80, "learning_rate": 1e-3, "progress": False}


def save_pair(tokens, folder):
    """Save a dense model, the same model pruned, and what it was pruned on."""
    make_llama().save_pretrained(folder / "base")
    pruner = OTPruner.from_pretrained(make_llama(), CONFIG)
    pruner.prune(tokens, progress=False)
    pruner.save_pretrained(folder / "pruned")
    torch.save(tokens, folder / "tokens.pt")


@pytest.fixture
def pruned(llama, tokens) -> OTPruner:
    pruner = OTPruner.from_pretrained(llama, CONFIG)
    pruner.prune(tokens, progress=False)
    return pruner


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("trained", ["ffn", "all", "lora"])
def test_recovery_brings_the_model_nearer_to_the_dense_one_on_held_out_text(pruned, trained):
    before = weights(pruned.model)
    report = pruned.recover(
        base_model=make_llama(), trained=trained, heldout_data=torch.arange(40).view(2, 20), **FAST
    )
    parts = [(part.part, part.data) for part in report.heldout]
    assert parts == [("given", "token ids"), ("written", ""), ("other", "token ids")]
    assert sum(part.kl_after for part in report.heldout) < sum(part.kl_before for part in report.heldout)
    touched = changed(before, weights(pruned.model))
    assert all("mlp" in name for name in touched) == (trained != "all")
    assert len(touched) == (len(before) if trained == "all" else 9)
    size = sum(before[name].numel() for name in touched)
    updates = sum(16 * sum(before[name].shape) for name in touched if "mlp" in name)
    assert report.trained_parameters == (updates if trained == "lora" else size)
    assert report.num_tokens == 2000
    assert report.steps == 25


@pytest.mark.parametrize("trained", ["ffn", "lora"])
def test_the_model_is_as_before_but_for_its_weights_and_can_be_saved_and_loaded(pruned, tmp_path, trained):
    needs = [part.requires_grad for part in pruned.model.parameters()]
    attributes = {name: set(vars(module)) for name, module in pruned.model.named_modules()}
    recovery = pruned.recover(base_model=make_llama(), trained=trained, gradient_checkpointing=True, **FAST)
    assert {name: set(vars(module)) for name, module in pruned.model.named_modules()} == attributes
    assert [part.requires_grad for part in pruned.model.parameters()] == needs
    assert not pruned.model.training
    pruned.save_pretrained(tmp_path / "out")
    loaded = OTPruner.from_pretrained(tmp_path / "out")
    assert not changed(weights(pruned.model), weights(loaded.model))
    assert loaded.report.recoveries == (recovery,)


def test_weights_that_are_worse_on_held_out_tokens_are_not_kept(pruned):
    before = weights(pruned.model)
    report = pruned.recover(base_model=make_llama(), **{**FAST, "learning_rate": 0.9})
    assert report.kept_step == 0
    assert report.steps == 25  # the rate falls at the end, so that nothing ends the training before
    assert not changed(before, weights(pruned.model))
    assert all(part.kl_after == part.kl_before for part in report.heldout)


def test_one_part_that_gets_worse_beyond_noise_is_enough_to_refuse_weights():
    def measured(*kl):
        return Measured(torch.tensor([[value, 0.0, 0.0, 0.0] for value in kl], dtype=torch.float64), 2)

    start = measured(1.0, 1.1, 0.9)
    assert measured(1.2, 1.3, 1.2).is_worse_than(start)
    assert not measured(1.5, 0.6, 1.0).is_worse_than(start)  # within noise
    assert not start.is_worse_than(start)
    best = module.BestWeights({}, {}, {"one": start, "two": start})
    best.look(1, {"one": measured(0.1, 0.1, 0.1), "two": measured(1.2, 1.3, 1.2)})
    assert best.step == 0
    best.look(2, {"one": measured(0.9, 1.0, 0.8), "two": start})
    assert best.step == 2


@pytest.mark.parametrize(
    ("error", "trained"), [(KeyboardInterrupt, "ffn"), (NumericalError, "all"), (OSError, "lora")]
)
def test_whatever_ends_recovery_early_leaves_the_model_bit_for_bit_as_it_was(pruned, monkeypatch, error, trained):
    before, objects = weights(pruned.model), [id(part) for part in pruned.model.parameters()]
    add, calls = training.Stepper.add, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 10:
            raise error("stop")
        add(*args)

    monkeypatch.setattr(training.Stepper, "add", failing)
    with pytest.raises(error, match="stop"):
        pruned.recover(base_model=make_llama(), trained=trained, **FAST)
    assert len(calls) == 10
    assert not changed(before, weights(pruned.model))
    assert [id(part) for part in pruned.model.parameters()] == objects
    assert all(part.requires_grad for part in pruned.model.parameters())
    assert pruned.report.recoveries == ()


def test_batches_in_parts_give_the_same_weights_as_whole_ones(llama, tokens, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # bfloat16 rounds each part for itself
    found = []
    for batch_size in (4, 1):
        pruner = OTPruner.from_pretrained(make_llama(), CONFIG)
        pruner.prune(tokens, progress=False)
        pruner.recover(base_model=llama, **{**FAST, "num_tokens": 400, "written_per_sample": 0}, batch_size=batch_size)
        found.append(weights(pruner.model))
    assert changed(found[0], weights(llama))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


def test_a_model_of_16_bits_keeps_its_dtype_and_gets_better(tokens):
    pruner = OTPruner.from_pretrained(make_llama().bfloat16(), CONFIG)
    pruner.prune(tokens, progress=False)
    report = pruner.recover(base_model=make_llama().bfloat16(), **FAST)
    assert {part.dtype for part in pruner.model.parameters()} == {torch.bfloat16}
    assert report.kept_step > 0


def test_weights_that_rounding_to_16_bits_makes_worse_are_not_kept(tokens):
    pruner = OTPruner.from_pretrained(make_llama().bfloat16(), CONFIG)
    pruner.prune(tokens, progress=False)
    before = weights(pruner.model)
    report = pruner.recover(base_model=make_llama().bfloat16(), **{**FAST, "learning_rate": 1e-9})
    assert report.kept_step == 0  # what was trained is lost in rounding
    assert not changed(before, weights(pruner.model))
    assert all(part.kl_after == part.kl_before for part in report.heldout)


@pytest.mark.parametrize("trained", ["ffn", "lora"])
def test_what_is_told_was_measured_on_the_weights_that_are_kept(tokens, trained):
    pruner = OTPruner.from_pretrained(make_llama().bfloat16(), CONFIG)
    pruner.prune(tokens, progress=False)
    dense = make_llama().bfloat16()
    report = pruner.recover(base_model=dense, trained=trained, **{**FAST, "learning_rate": 3e-3})
    assert report.kept_step > 0
    (given,) = [part for part in report.heldout if part.part == "given"]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed_of(0, 0)))
    samples = RecoverySamples(tokens, {}, {"given": tokens[order[: given.num_windows].sort().values]})
    measured = module.Heldout(pruner.model, DenseTeacher(dense, samples), 8).measure()
    assert measured["given"].kl == given.kl_after


def test_weights_that_no_prediction_depends_on_are_left_alone(pruned, tmp_path):
    pruned.model.unused = torch.nn.Parameter(torch.ones(3))
    report = pruned.recover(base_model=make_llama(), trained="all", resume_from=tmp_path / "state", **FAST)
    assert report.kept_step > 0
    assert torch.equal(pruned.model.unused, torch.ones(3))


def test_a_process_that_chose_mixed_precision_before_can_recover(pruned):
    Accelerator(mixed_precision="bf16", cpu=True)
    try:
        assert pruned.recover(base_model=make_llama(), **FAST).kept_step > 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_cannot_be_trained_is_refused_before_the_dense_model_is_loaded_or_asked(pruned, monkeypatch):
    monkeypatch.setattr(training, "is_offloaded", lambda model: True)
    with pytest.raises(UnsupportedModelError, match="offloaded, so that they cannot be trained"):
        pruned.recover(base_model="no/such-model", **FAST)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"needs peft. Install it: pip install 'optimum_otprune\[recover\]'"):
        pruned.recover(base_model="no/such-model", trained="lora", **FAST)


def test_a_model_that_does_not_go_on_with_a_text_is_refused():
    with pytest.raises(UnsupportedModelError, match="does not go on with a text token by token"):
        training.check_trainable(build("t5"), "all")


def test_blocks_that_are_computed_twice_give_the_same_weights(llama, tokens):
    found = []
    for twice in (False, True):
        pruner = OTPruner.from_pretrained(make_llama(), CONFIG)
        pruner.prune(tokens, progress=False)
        pruner.recover(base_model=llama, gradient_checkpointing=twice, **FAST)
        found.append(weights(pruner.model))
    assert not changed(*found)
    assert changed(found[0], weights(llama))


def test_no_sample_comes_again_before_all_others():
    samples = RecoverySamples(torch.arange(10).view(10, 1), {}, {})
    batches = samples.batches(4, seed=0)
    seen = torch.cat([next(batches) for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_samples_are_planned_by_the_budget():
    assert plan_samples(128, 256, 10**9, 4.0) == Plan(given=112, written=448, heldout=16)
    assert plan_samples(128, 256, 300 * 256, 4.0) == Plan(given=124, written=176, heldout=4)
    assert plan_samples(128, 256, 100 * 256, 4.0) == Plan(given=50, written=50, heldout=4)
    assert plan_samples(128, 256, 100 * 256, 0.0) == Plan(given=100, written=0, heldout=4)
    assert plan_samples(4, 2048, 10**9, 4.0) == Plan(given=3, written=12, heldout=1)
    assert plan_samples(0, 256, 100 * 256, 4.0) == Plan(given=0, written=100, heldout=4)
    assert plan_samples(0, 256, 10**12, 4.0) == Plan(given=0, written=2**14, heldout=32)
    with pytest.raises(CalibrationDataError, match="has 1 sample, and holds some out"):
        plan_samples(1, 2048, 10**9, 4.0)


def test_a_model_that_was_pruned_without_data_is_recovered_without(llama):
    pruner = OTPruner.from_pretrained(llama, CONFIG.replace(num_samples=12, seqlen=20))
    pruner.prune("self", progress=False)
    report = pruner.recover(base_model=make_llama(), **FAST)
    assert [part.part for part in report.heldout] == ["written"]
    assert report.samples == {"given": 0, "written": 100}
    assert report.data == "self"


def test_a_dense_model_that_cannot_write_is_refused(pruned, monkeypatch):
    dense = make_llama()
    monkeypatch.setattr(type(dense), "can_generate", lambda self: False)
    with pytest.raises(ConfigurationError, match="cannot write text. Set `written_per_sample=0`"):
        pruned.recover(base_model=dense, **FAST)
    assert pruned.recover(base_model=dense, written_per_sample=0, **FAST).samples["given"] > 0


def test_wrong_options_and_models_are_refused(pruned, llama):
    dense = make_llama()
    with pytest.raises(ConfigurationError, match="`num_tokens` 'many' is no number"):
        pruned.recover(base_model=dense, num_tokens="many")
    with pytest.raises(ConfigurationError, match="Did you mean 'ffn'"):
        pruned.recover(base_model=dense, trained="ff")
    with pytest.raises(ConfigurationError, match="`learning_rate` is 3; want a number > 0 and < 1"):
        pruned.recover(base_model=dense, learning_rate=3)
    with pytest.raises(ConfigurationError, match="Unknown option of recovery 'tokens'"):
        pruned.recover(base_model=dense, tokens=3)
    with pytest.raises(UnsupportedModelError, match="is pruned itself"):
        pruned.recover(base_model=llama)
    with pytest.raises(ConfigurationError, match="not known from which dense model"):
        pruned.recover()
    with pytest.raises(UnsupportedModelError, match="vocabulary has 65 tokens, that of the other 64"):
        pruned.recover(base_model=make_llama(vocab_size=VOCAB_SIZE + 1))
    with pytest.raises(UnsupportedModelError, match="was not pruned"):
        OTPruner.from_pretrained(dense).recover(base_model=dense)


def test_the_commands_recover_a_folder_and_a_model_that_was_just_pruned(llama_folder, tokens, tmp_path, capsys):
    torch.save(tokens, tmp_path / "tokens.pt")
    data = ["--quiet", "--batch-size", "4"]
    pruning = ["--pruning-ratio", "0.5", "--multiple-of", "1", "--quality", "fast"]
    given = ["--calibration-data", tmp_path / "tokens.pt"]
    assert run_command("prune", llama_folder, "-o", tmp_path / "half", *pruning, *given, *data) == 0
    command = ["recover", tmp_path / "half", "--data", tmp_path / "tokens.pt", "--num-tokens", "1k", *data]
    assert run_command(*command, "-o", tmp_path / "out") == 1
    assert "pruned itself. Give the one that was pruned" in capsys.readouterr().err
    assert run_command(*command, "--base", llama_folder, "-o", tmp_path / "out", "--trained", "al") == 2
    assert run_command(*command, "--base", llama_folder, "-o", tmp_path / "out") == 0
    assert "distillation" in capsys.readouterr().out
    saved = PruningReport.load(tmp_path / "out" / "otprune_report.json")
    assert saved.recoveries[0].num_tokens == 1040  # two steps of 13 samples of 40 tokens
    both = ["prune", llama_folder, "-o", tmp_path / "both", *pruning, *given, *data]
    assert run_command(*both, "--recover", "1k") == 0
    assert len(json.loads((tmp_path / "both" / "otprune_report.json").read_text())["recoveries"]) == 1


def test_a_dry_run_includes_recovery(llama_folder, tokens, tmp_path, capsys):
    torch.save(tokens, tmp_path / "tokens.pt")
    data = ["--calibration-data", tmp_path / "tokens.pt"]
    command = ["prune", llama_folder, "-o", tmp_path / "out", *data, "--multiple-of", "1", "--dry-run"]
    assert run_command(*command) == 0
    assert "recovery" not in capsys.readouterr().out
    assert run_command(*command, "--recover", "1M") == 0
    printed = capsys.readouterr().out
    assert "recovery: weights, gradients and moments" in printed
    assert re.search(r"Time +about .*\(.*, recovery [0-9u]", printed)
    assert run_command(*command, "--recover", "much") == 2
    plan = OTPruner.plan(llama_folder, CONFIG, tokens, recover=10**6)
    longer = OTPruner.plan(llama_folder, CONFIG, tokens, recover="100M")
    assert longer.seconds["recovery"] > 10 * plan.seconds["recovery"]
    trained = [use.bytes for use in plan.memory if use.purpose.startswith("recovery: weights")]
    assert trained == [16 * 20_448]  # all weights, of which 6,912 are the FFNs'
