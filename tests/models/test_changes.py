"""A model is pruned or it is what it was: whatever ends `prune`, and whatever functions of others do."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import CustomFunctionError, HalfPrunedError, OTPruneError, UnsupportedModelError
from optimum_otprune.functional.costs import activation_cost
from optimum_otprune.functional.importance import ChannelStatistics, importances, wanda
from optimum_otprune.functional.marginals import importance, mixtures, uniform
from optimum_otprune.functional.solvers import emd
from optimum_otprune.models import changes
from optimum_otprune.models import ffn_block as block
from optimum_otprune.models.devices import is_offloaded
from optimum_otprune.pruning import outcome, pipeline, preparation, prune_layer
from tests.conftest import make_llama, run_command
from tests.models.test_contract import build
from tests.models.test_passes import DISK

OPTIONS = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast", "solver": "emd", "statistics": "balanced"}
LAYERS = 3
# Functions of this package by field, called by one that is not of it.
FUNCTIONS = {
    "importance": wanda,
    "cost": activation_cost,
    "source_distribution": importance,
    "target_distribution": uniform,
    "statistics": mixtures["balanced"],
    "solver": emd,
}
ENDS = (ValueError("no"), KeyboardInterrupt(), MemoryError(), SystemExit(3), torch.OutOfMemoryError("no"))


def make_pruner(model=None, **options) -> OTPruner:
    model = make_llama(intermediate_size=24) if model is None else model
    return OTPruner.from_pretrained(model, OTPruningConfig(**{**OPTIONS, **options}))


@pytest.fixture(scope="module")
def samples():
    return torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(2))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(samples):
    """What a run leaves that nothing ends."""
    subject = make_pruner()
    subject.prune(samples, progress=False)
    return state_of(subject.model)


def everything(subject: OTPruner, samples) -> tuple[dict, dict]:
    """Tensors and other values of all that there is to a model and its pruner."""
    model = subject.model
    with torch.no_grad():
        tensors = {**state_of(model), "logits": model(input_ids=samples).logits}
    dictionaries = [
        {name: list(part) if isinstance(part, dict) else id(part) for name, part in vars(module).items()}
        for module in model.modules()
    ]
    return tensors, {
        "parameters": {name: id(part) for name, part in model.named_parameters()},
        "config": copy.deepcopy(vars(model.config)),
        "generation": copy.deepcopy(vars(model.generation_config)),
        "modules": dictionaries,
        "sizes": [(repr(module), module.training) for module in model.modules()],
        "pruner": {name: id(part) for name, part in vars(subject).items()},
    }


def is_as_it_was(before, now) -> bool:
    return same(before[0], now[0]) and before[1] == now[1]


def ends_at(function, layer: int, end: BaseException):
    """The function, which is called once a layer, but for the layer at which it raises."""
    calls = []

    def own(*inputs):
        calls.append(1)
        if len(calls) == layer + 1:
            raise end
        return function(*inputs)

    return own


@pytest.mark.parametrize("field", FUNCTIONS)
def test_a_function_that_ends_prune_at_any_layer_leaves_the_model_as_it_was(
    field, samples, undisturbed, record_figure
):
    subject = make_pruner(make_llama(intermediate_size=24).train())
    subject.model.model.embed_tokens.eval()  # modes of single modules too
    before, held = everything(subject, samples), 0
    ends = ENDS if field == "cost" else ENDS[:3]
    for layer in range(LAYERS):
        for end in ends:
            with pytest.raises(CustomFunctionError if isinstance(end, ValueError) else type(end)) as caught:
                subject.prune(samples, progress=False, **{field: ends_at(FUNCTIONS[field], layer, end)})
            if isinstance(end, ValueError):
                assert str(caught.value).startswith(
                    f"Layer {layer}: The function 'own' for `{field}` raised ValueError: no."
                )
                assert caught.value.__cause__ is end
            held += is_as_it_was(before, everything(subject, samples))
    record_figure("R14", tried=LAYERS * len(ends), ok=held)
    assert held == LAYERS * len(ends)
    subject.prune(samples, progress=False)
    assert same(state_of(subject.model), undisturbed)
    assert subject.model.training is False


PLACES = {
    "check_feasible": pipeline,
    "plan_widths": pipeline,
    "layer_gradients": preparation,
    "measure_rescue": prune_layer,
    "mark_half_pruned": pipeline,
    "finish_resize": pipeline,
    "versions": outcome,
    "model_sizes": outcome,
    "replace_parameter": block,
    "set_features": block,
    "mark_pruned": changes,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interruption_anywhere_leaves_the_model_as_it_was(place, samples, undisturbed, record_figure, monkeypatch):
    """After the first, second, … call of what is patched, until there is none so late."""
    subject = make_pruner()
    before, function = everything(subject, samples), getattr(PLACES[place], place)
    tried = held = 0
    is_over = False
    while not is_over:
        left = [tried]

        def ended(*inputs, left=left, **options):
            found = function(*inputs, **options)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(PLACES[place], place, ended)
        try:
            subject.prune(samples, progress=False)
            is_over = True
        except KeyboardInterrupt:
            monkeypatch.setattr(PLACES[place], place, function)
            tried, held = tried + 1, held + is_as_it_was(before, everything(subject, samples))
    record_figure("R14", tried=tried, ok=held)
    assert held == tried > 0
    assert same(state_of(subject.model), undisturbed)


@pytest.mark.parametrize("at", [1, 20, 40])
def test_an_interruption_of_the_undoing_waits_until_it_is_done(at, samples, record_figure, monkeypatch):
    subject = make_pruner()
    before, keep, calls = everything(subject, samples), changes._kept_attributes, []

    def interrupted(owner):
        step = keep(owner)

        def put_back():
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            step()

        return put_back

    monkeypatch.setattr(changes, "_kept_attributes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        subject.prune(samples, progress=False, solver=ends_at(emd, 1, MemoryError()))
    assert len(calls) > at
    monkeypatch.setattr(changes, "_kept_attributes", keep)
    held = is_as_it_was(before, everything(subject, samples))
    record_figure("R14", tried=1, ok=int(held))
    assert held


@pytest.mark.parametrize(("name", "options"), [("gpt2", {}), ("gemma2", {}), ("llama", {"intercept": "always"})])
def test_other_architectures_and_added_biases_are_put_back_too(name, options, samples, record_figure, monkeypatch):
    subject = make_pruner(build(name), statistics="balanced", **options)
    before, finish = everything(subject, samples), pipeline.finish_resize

    def ended(*inputs):
        finish(*inputs)
        raise MemoryError

    monkeypatch.setattr(pipeline, "finish_resize", ended)
    with pytest.raises(MemoryError):
        subject.prune(samples, progress=False)
    held = is_as_it_was(before, everything(subject, samples))
    record_figure("R14", tried=1, ok=int(held))
    assert held


def test_a_run_that_was_interrupted_goes_on_with_the_same_object(samples, undisturbed, tmp_path):
    subject = make_pruner()
    calls = []

    def counted(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return emd(*inputs)

    with pytest.raises(KeyboardInterrupt):
        subject.prune(samples, progress=False, resume_from=tmp_path / "state", solver=counted)
    subject.prune(samples, progress=False, resume_from=tmp_path / "state", solver=counted)
    assert len(calls) == 4  # the first two layers were not done again
    assert same(state_of(subject.model), undisturbed)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_offloaded_model_is_as_it_was_or_says_that_it_is_half_pruned(layer, llama_folder, samples, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, device_map=DISK, offload_folder=tmp_path / "offload")
    assert is_offloaded(model)
    subject = make_pruner(model)
    with pytest.raises(CustomFunctionError, match=f"^Layer {layer}"):
        subject.prune(samples, progress=False, solver=ends_at(emd, layer, ValueError("no")))
    if layer == 0:  # nothing was changed yet
        assert subject.prune(samples, progress=False).pruning_ratio == 0.5
        return
    for refused in (
        lambda: subject.prune(samples, progress=False),
        lambda: subject.evaluate(samples, progress=False),
        lambda: subject.tune(samples, num_trials=1, progress=False),
        lambda: subject.save_pretrained(tmp_path / "out"),
        lambda: subject.push_to_hub("me/model"),
        lambda: make_pruner(model).prune(samples, progress=False),
        lambda: OTPruner.plan(model, subject.config, samples),
    ):
        with pytest.raises(HalfPrunedError, match=r"This model is half-pruned: .*Load the dense model again"):
            refused()
    assert not (tmp_path / "out").exists()


PRUNED_ALREADY = r"This model was pruned already: .*Load the dense model and give the whole ratio"


@pytest.mark.parametrize("options", [{}, {"layer_ratios": {0: 0.25}}])
def test_a_pruned_model_is_not_pruned_again_by_whatever_way_it_comes(options, samples, tmp_path):
    """Padded ones too, whose zeros would count as channels."""
    subject = make_pruner(**options)
    subject.prune(samples, progress=False)
    folder = subject.save_pretrained(tmp_path / "out")
    loaded, copied = OTPruner.from_pretrained(folder), tmp_path / "copied"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copied)
    ways = {
        "the same object": subject,
        "a pruner of its own": make_pruner(subject.model),
        "a copy": make_pruner(copy.deepcopy(subject.model)),
        "its folder": loaded,
        "its folder with another configuration": OTPruner.from_pretrained(folder, {"pruning_ratio": 0.25}),
        "its folder as transformers loads it": make_pruner(AutoModelForCausalLM.from_pretrained(folder)),
        "a copy that transformers saved": OTPruner(AutoModelForCausalLM.from_pretrained(copied), subject.config),
    }
    for way, again in ways.items():
        widths = [layer.mlp.up_proj.out_features for layer in again.model.model.layers]
        for refused in (
            lambda again=again: again.prune(samples, progress=False),
            lambda again=again: again.tune(samples, num_trials=1, progress=False),
            lambda again=again: OTPruner.plan(again.model, again.config, samples),
        ):
            with pytest.raises(UnsupportedModelError, match=PRUNED_ALREADY):
                refused()
        assert widths == [layer.mlp.up_proj.out_features for layer in again.model.model.layers], way
        assert again.evaluate(samples, progress=False)["stage"] == "pruned", way
    with pytest.raises(UnsupportedModelError, match=PRUNED_ALREADY):
        OTPruner.plan(folder, {"pruning_ratio": 0.25}, samples)
    again = OTPruner.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert again.report.layers == subject.report.layers


def test_a_function_that_wraps_one_of_this_package_is_not_of_it(samples):
    @functools.wraps(wanda)
    def mine(statistics):
        found = wanda(statistics)
        statistics.weights.down.zero_()
        return found

    config = OTPruningConfig(method="wanda_sp", pruning_ratio=0.5, multiple_of=1)
    subject, plain = (OTPruner.from_pretrained(make_llama(intermediate_size=24), config) for _ in range(2))
    subject.prune(samples, progress=False, importance=mine)
    plain.prune(samples, progress=False)
    assert same(state_of(subject.model), state_of(plain.model))


def test_the_command_refuses_a_pruned_folder_before_it_evaluates_it(samples, tmp_path, capsys):
    subject = make_pruner()
    subject.prune(samples, progress=False)
    folder, ids = subject.save_pretrained(tmp_path / "out"), tmp_path / "ids.pt"
    torch.save(samples, ids)
    code = run_command(
        "prune", folder, "-o", tmp_path / "again", "--eval", "--calibration-data", ids, "--eval-data", ids
    )
    assert code == 1
    assert "error: This model was pruned already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_channels_of_zeros_are_counted_where_no_report_tells_of_padding(samples):
    """A dense model may have some, so that they are no reason to refuse it."""
    subject = make_pruner()
    mlp = subject.model.model.layers[1].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight[20:], mlp.up_proj.weight[20:], mlp.down_proj.weight[:, 19:]):
            weight.zero_()
    with pytest.warns(UserWarning, match="^4 of 72 FFN channels hold nothing but zeros, yet the ratio counts them"):
        subject.prune(samples, progress=False)


def test_a_run_that_prunes_nothing_may_be_followed_by_one_that_does(samples, undisturbed):
    subject = make_pruner(pruning_ratio=0.0)
    subject.prune(samples, progress=False)
    subject.config = subject.config.replace(pruning_ratio=0.5)
    subject.prune(samples, progress=False)
    assert same(state_of(subject.model), undisturbed)


def spoil(value, how: str):
    """Overwrite every tensor that a function was handed, by one of the ways that there are."""
    if isinstance(value, torch.Tensor):
        if how == "in place":
            value.zero_()
        elif how == "data":
            value.data = value.data.fill_(7)
        else:
            value.numpy()[...] = 3
    elif isinstance(value, dict):
        for part in value.values():
            spoil(part, how)
        value.clear()
    elif isinstance(value, tuple):
        for part in value:
            spoil(part, how)


@pytest.mark.parametrize("how", ["in place", "data", "numpy"])
@pytest.mark.parametrize("field", FUNCTIONS)
def test_what_a_function_does_to_its_inputs_changes_nothing(field, how, samples):
    def plain(*inputs):
        return FUNCTIONS[field](*inputs)

    def spoiling(*inputs):
        found = copy.deepcopy(FUNCTIONS[field](*inputs))
        for value in inputs:
            spoil(value, how)
        return found

    results = []
    for function in (plain, spoiling):
        subject = make_pruner(make_llama(intermediate_size=24, num_hidden_layers=1))
        report = subject.prune(samples, progress=False, **{field: function})
        results.append((state_of(subject.model), report.layers))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_function_of_a_plugin_is_named_as_it_was_registered(samples):
    @importances.register("of_a_plugin")
    def something(statistics: ChannelStatistics):
        raise KeyError("missing")

    try:
        subject = make_pruner(importance="of_a_plugin", selection="top")
        with pytest.raises(
            CustomFunctionError, match=r"^Layer 0: The function 'of_a_plugin' for `importance` raised Key"
        ):
            subject.prune(samples, progress=False)
        with pytest.raises(OTPruneError, match="raised KeyError"):
            subject.tune(samples, num_trials=1, search_space={"target_correction": (0.0, 1.0)}, progress=False)
    finally:
        importances.unregister("of_a_plugin")
