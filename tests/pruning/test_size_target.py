"""Targets in parameters and bytes: the widest FFNs that meet them, and what cannot be met."""

import copy
import re

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import GPT2LMHeadModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.config.quantities import COUNT_UNITS, SIZE_UNITS, parse_quantity
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.size_target import Footprint, target_count, with_pruning_ratio
from tests.conftest import make_llama
from tests.models.test_contract import SOME, build

CHANNEL = 3 * 3 * 32  # three layers, three projections, hidden size 32


def prune(model, tokens, **options):
    pruner = OTPruner(model, OTPruningConfig(**{"multiple_of": 1, **options}))
    pruner.prune(tokens, progress=False)
    return pruner


def width_for(model, **options) -> int:
    """The width that a target leaves, without pruning."""
    prunable = PrunableModel.of(model)
    config = with_pruning_ratio(OTPruningConfig(**{"multiple_of": 1, **options}), prunable)
    return round((1 - config.pruning_ratio) * prunable.widths[0])


@pytest.mark.parametrize(
    ("text", "units", "number"),
    [
        ("1.2B", COUNT_UNITS, 1_200_000_000),
        ("900M", COUNT_UNITS, 900_000_000),
        ("350k", COUNT_UNITS, 350_000),
        ("1200", COUNT_UNITS, 1200),
        (1200, COUNT_UNITS, 1200),
        ("2GB", SIZE_UNITS, 2_000_000_000),
        ("1.5 GiB", SIZE_UNITS, 1_610_612_736),
        ("500mb", SIZE_UNITS, 500_000_000),
        ("100B", SIZE_UNITS, 100),
    ],
)
def test_a_quantity_is_read_with_its_unit(text, units, number):
    assert parse_quantity(text, units) == number


@pytest.mark.figure("R6")
@pytest.mark.parametrize("name", ["target_parameters", "target_size"])
@pytest.mark.parametrize(
    "value",
    ["", "B9", "-1", "1.2X", "1e9", "nan", "1,5GB", "0", 0, -1, 1.5, True, [1], "0%", "100%", "150%", "%", 0.0, 1.0],
)
def test_a_target_that_is_no_quantity_is_an_error_that_lists_the_units(name, value):
    with pytest.raises(
        ConfigurationError,
        match=f"`{name}` is .*; want an integer or a string with a unit .*MB?,.* >= 1, or a share .* '70%' or 0.7",
    ):
        OTPruningConfig(**{name: value})


def test_units_of_size_are_none_of_parameters():
    with pytest.raises(ConfigurationError, match="`target_parameters` is '2GB'"):
        OTPruningConfig(target_parameters="2GB")


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    "options",
    [
        {"pruning_ratio": 0.5, "target_size": "2GB"},
        {"pruning_ratio": 0.2, "target_parameters": 100},
        {"target_parameters": 100, "target_size": 100},
    ],
)
def test_two_budgets_are_an_error_that_names_both(options):
    first, second = options
    with pytest.raises(ConfigurationError, match=f"`{first}=.*` and `{second}=.*more than one way"):
        OTPruningConfig(**options)


def test_the_saved_configuration_keeps_the_target_as_it_was_given(tmp_path):
    config = OTPruningConfig(target_size="2GB")
    assert (config.pruning_ratio, config.target_parameters, config.target_size) == (None, None, "2GB")
    config.save_pretrained(tmp_path)
    assert OTPruningConfig.from_pretrained(tmp_path) == config.replace() == config


def test_a_new_budget_takes_the_place_of_the_old_one(tmp_path):
    OTPruningConfig(pruning_ratio=0.3).save_pretrained(tmp_path)
    config = OTPruningConfig.from_pretrained(tmp_path, target_parameters="1M")
    assert (config.pruning_ratio, config.target_parameters) == (None, "1M")
    assert config.replace(seed=1).target_parameters == "1M"
    assert config.replace(method="flap").target_parameters == "1M"
    config = config.replace(pruning_ratio=0.4)
    assert (config.pruning_ratio, config.target_parameters) == (0.4, None)


def test_a_configuration_without_a_target_is_returned_as_it_is(llama):
    config = OTPruningConfig(pruning_ratio=0.3)
    assert with_pruning_ratio(config, PrunableModel.of(llama)) is config


def test_a_footprint_by_hand():
    footprint = Footprint(fixed=100, per_channel=7)
    assert footprint.at(10) == 170
    assert [footprint.widest(170, multiple) for multiple in (1, 4, 16)] == [10, 8, 0]
    assert footprint.widest(50, 1) < 1


@pytest.mark.parametrize("shortage", [1, CHANNEL - 1, CHANNEL, CHANNEL + 1, 20 * CHANNEL])
def test_the_largest_model_that_has_at_most_the_parameters_is_left(llama, tokens, shortage):
    dense = llama.num_parameters()
    target = dense - shortage
    pruner = prune(llama, tokens, target_parameters=target, method="wanda_sp")
    assert pruner.report.parameters_after == pruner.model.num_parameters() <= target
    assert pruner.model.num_parameters() + CHANNEL > target
    assert pruner.report.pruning_ratio == pytest.approx(1 - pruner.model.config.intermediate_size / 48)


def test_the_width_is_rounded_down_to_a_multiple():
    model = make_llama(intermediate_size=256)
    target = model.num_parameters() - CHANNEL  # 255 channels would do
    assert width_for(model, method="wanda_sp", target_parameters=target, multiple_of=16) == 240
    exact = model.num_parameters() - 32 * CHANNEL
    assert width_for(model, method="wanda_sp", target_parameters=exact, multiple_of=16) == 224
    assert width_for(model, method="wanda_sp", target_parameters=exact - 1, multiple_of=16) == 208


def test_tied_embeddings_count_once(tokens):
    model = make_llama(tie_word_embeddings=True)
    untied = make_llama().num_parameters()
    assert untied - model.num_parameters() == 64 * 32
    target = model.num_parameters() - 10 * CHANNEL
    pruner = prune(model, tokens, target_parameters=target, method="wanda_sp")
    assert pruner.model.config.intermediate_size == 38
    assert pruner.model.num_parameters() == target


def test_an_intercept_that_may_come_is_paid_for(llama, tokens):
    target = llama.num_parameters() - 10 * CHANNEL
    pruner = prune(llama, tokens, target_parameters=target, intercept="always")
    assert pruner.model.model.layers[0].mlp.gate_proj.bias is not None
    biased = pruner.model.num_parameters()
    assert biased <= target < biased + CHANNEL + 3 * 2


@pytest.mark.parametrize("name", SOME)
def test_a_target_holds_on_every_architecture(name, tokens):
    model = build(name)
    dense = model.num_parameters()
    target = dense - 40 * 2 * 32
    pruner = prune(copy.deepcopy(model), tokens, target_parameters=target, intercept="never")
    assert dense - 45 * 2 * 32 * 2 < pruner.model.num_parameters() <= target


@pytest.mark.parametrize(("dtype", "bytes_per_number"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_weights_are_at_most_the_target_size(tokens, tmp_path, dtype, bytes_per_number, tied):
    model = make_llama(tie_word_embeddings=tied).to(dtype)
    dense = model.num_parameters() * bytes_per_number
    target = dense - 10 * CHANNEL * bytes_per_number
    pruner = prune(model, tokens, target_size=target, intercept="always")
    pruner.save_pretrained(tmp_path / "out")
    saved = (tmp_path / "out" / "model.safetensors").stat().st_size
    headers = 40 * 150
    assert target - (CHANNEL + 6) * bytes_per_number - headers < saved <= target


def test_offloaded_weights_count_as_any(tokens):
    plain, offloaded = (make_llama(tie_word_embeddings=True) for _ in range(2))
    cpu_offload(offloaded)
    for target in ({"target_parameters": 20_000}, {"target_size": "90kB"}):
        assert width_for(offloaded, **target) == width_for(plain, **target) < 48


@pytest.mark.figure("R6")
@pytest.mark.parametrize(("name", "value"), [("target_parameters", "1B"), ("target_size", "1TB")])
def test_a_target_that_the_model_meets_already_is_an_error_with_its_size(llama, tokens, name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}='{value}'` asks for no pruning: the model has [0-9,]+ "):
        prune(llama, tokens, **{name: value})
    with pytest.raises(ConfigurationError, match="asks for no pruning"):
        prune(llama, tokens, target_parameters=llama.num_parameters())


@pytest.mark.figure("R6")
@pytest.mark.parametrize(("name", "value"), [("target_parameters", 1000), ("target_size", "1kB")])
def test_a_target_that_no_width_meets_is_an_error_with_the_smallest_size(llama, tokens, name, value):
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ConfigurationError, match=f"`{name}=.*cannot be met: .*smallest .* with 1 of 48 channels"):
        prune(llama, tokens, **{name: value})
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())


def test_layers_of_different_widths_have_no_one_ratio(llama):
    block = PrunableModel.of(llama).blocks[0]
    block.install(block.read().select(torch.arange(10)))
    with pytest.raises(UnsupportedModelError, match=r"different FFN widths \(10 to 48\)"):
        with_pruning_ratio(OTPruningConfig(target_parameters=20_000), PrunableModel.of(llama))


def test_the_card_shows_the_target_and_the_ratio_that_resulted(tokens, tmp_path):
    model = build("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    pruner = prune(model, tokens, target_parameters=model.num_parameters() - 24 * 2 * 65)
    pruner.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "target_parameters: " in card
    assert "pruning_ratio: 0.5\n" in card
    assert "Pruned channels: 48 (50.0%)" in str(pruner.report)
    assert OTPruner.from_pretrained(tmp_path / "out").config == pruner.config


@pytest.mark.parametrize("share", ["70%", " 70.0 %", 0.7, "0.7", np.float64(0.7)])
def test_a_share_is_one_of_the_dense_models_parameters(share):
    model = make_llama()  # 27,360 parameters, 48 channels of 288: 70 % are 19,152, which 19 channels fit into
    dense = model.num_parameters()
    assert (dense, CHANNEL) == (27_360, 288)
    assert width_for(model, method="wanda_sp", target_parameters=share) == 19
    assert dense - (48 - 19) * CHANNEL <= 0.7 * dense < dense - (48 - 20) * CHANNEL


def test_a_share_is_counted_exactly_and_rounded_down_to_the_multiple():
    model = make_llama(intermediate_size=256)
    exact = model.num_parameters() - 64 * CHANNEL
    share = f"{100 * exact / model.num_parameters():.10f}%"
    config = OTPruningConfig(target_parameters=share)
    assert target_count(config, model) in (exact - 1, exact)
    assert width_for(model, method="wanda_sp", target_parameters="80%", multiple_of=16) == 192
    assert target_count(OTPruningConfig(target_parameters=0.1), model) == model.num_parameters() // 10
    assert target_count(OTPruningConfig(target_size="50%"), model) == 2 * model.num_parameters()


@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_weights_are_at_most_their_share(tokens, tmp_path, tied):
    model = make_llama(tie_word_embeddings=tied)
    OTPruner(model, OTPruningConfig()).save_pretrained(tmp_path / "dense")
    pruner = prune(model, tokens, target_size="80%", intercept="always", quality="fast")
    pruner.save_pretrained(tmp_path / "out")
    dense, saved = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "out"))
    assert 0.7 * dense < saved <= 0.8 * dense


def test_plan_report_and_card_say_the_share(llama, tokens, tmp_path):
    config = OTPruningConfig(method="wanda_sp", multiple_of=1, target_parameters="70%")
    assert "27,360 -> 19,008 (69.5%)" in str(OTPruner.plan(llama, config, tokens))
    pruner = OTPruner(llama, config)
    pruner.prune(tokens, progress=False)
    assert "Parameters: 27,360 -> 19,008 (69.5%)" in str(pruner.report)
    assert pruner.report.config["target_parameters"] == "70%"
    pruner.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "30.5 % of its parameters removed" in card
    assert "--target-parameters 70%" in card


@pytest.mark.figure("R6")
@pytest.mark.parametrize("name", ["target_parameters", "target_size"])
@pytest.mark.parametrize("intercept", ["never", "always"])
def test_the_smallest_share_that_is_named_can_be_had(llama, name, intercept):
    with pytest.raises(
        ConfigurationError,
        match=rf"`{name}='5%'` cannot be met: .* hold 51% of the model's [0-9,]+ \w+\. .* give that or more",
    ) as caught:
        width_for(llama, intercept=intercept, multiple_of=2, **{name: "5%"})
    count, percent = re.search(r"had is ([0-9,]+) \(([0-9.]+%)\), with 2 of 48", str(caught.value)).groups()
    assert width_for(llama, intercept=intercept, multiple_of=2, **{name: percent}) == 2
    assert width_for(llama, intercept=intercept, multiple_of=2, **{name: int(count.replace(",", ""))}) == 2
    if (name, intercept) == ("target_parameters", "never"):
        assert int(count.replace(",", "")) == 27_360 - 46 * CHANNEL


def test_the_integer_one_is_a_count(llama):
    for value in (1, "1"):
        with pytest.raises(ConfigurationError, match="cannot be met: only FFNs are pruned"):
            width_for(llama, target_parameters=value)
