"""The dry run: what it says is what pruning then does, and what pruning would refuse it refuses."""

import json

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, Qwen2Config

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.main import main
from optimum_otprune.errors import (
    CalibrationDataError,
    ConfigurationError,
    ModelLoadError,
    OutputError,
    UnsupportedModelError,
)
from optimum_otprune.pruning.dry_run.cost_model import (
    Rates,
    Workload,
    calibration_bytes,
    expected_seconds,
    working_bytes,
)

FAST = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast", "intercept": "never"}
HALF = {**FAST, "self_calibration": 0}


@pytest.fixture
def config_only(llama, tmp_path):
    """A folder with nothing but `config.json`, as a dry run gets of a Hub id."""
    folder = tmp_path / "shapes"
    llama.config.save_pretrained(folder)
    return folder


def uses(plan, device):
    return {use.purpose: use.bytes for use in plan.memory if use.device == device}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_ratios": {1: 0.25}},
        {"skip_layers": [1], "layer_ratios": {0: 0.25}, "non_uniform_format": "per_layer_config"},
        {"pruning_ratio": None, "target_parameters": "22k", "intercept": "auto"},
        {"pruning_ratio": 0.0},
    ],
)
def test_widths_parameters_and_bytes_are_those_that_pruning_gives(config_only, llama, tokens, changes):
    config = OTPruningConfig(**{**HALF, **changes})
    plan = OTPruner.plan(config_only, config, tokens)
    report = OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
    layers = [(layer.intermediate_size_before, layer.intermediate_size_after) for layer in report.layers]
    assert list(zip(plan.widths_before, plan.widths_after)) == layers
    assert (plan.parameters_before, plan.bytes_before) == (report.parameters_before, report.size_before)
    added = report.parameters_after - plan.parameters_after
    assert 0 <= added <= plan.bias_parameters
    assert report.size_after - plan.bytes_after == 4 * added


def test_a_folder_and_the_model_itself_have_the_same_plan(config_only, llama, tokens):
    plans = [OTPruner.plan(model, OTPruningConfig(**HALF), tokens) for model in (config_only, llama)]
    assert [uses(plan, "cpu") for plan in plans][0] == uses(plans[1], "cpu")
    assert plans[0].widths_after == plans[1].widths_after
    assert all(parameter.device.type == "cpu" for parameter in llama.parameters())


def test_nothing_is_read_but_the_configuration_and_nothing_is_written(config_only, tokens, tmp_path, capsys):
    torch.save(tokens, tmp_path / "ids.pt")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["prune", str(config_only), "-o", str(tmp_path / "out"), "--resume", "--multiple-of", "1", "--dry-run"]
    main([*arguments, "--calibration-data", str(tmp_path / "ids.pt")])
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM (layout 'llama'), 3 layers, hidden size 32, float32" in printed
    assert "48 -> 38 in all 3 layers" in printed
    assert "12 samples of 20 tokens, read from token ids" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_adaptive_widths_are_told_as_a_mean_and_single_layers_as_they_are(config_only, tokens):
    config = {**HALF, "allocation": "adaptive", "skip_layers": [2]}
    plan = OTPruner.plan(config_only, config, tokens)
    assert plan.adaptive_layers == (0, 1)
    assert "48 -> about 24 on average in layers 0, 1; 48 -> 48 in layer 2" in str(plan)
    assert "more by as much as the widest layer exceeds the average" in str(plan)
    assert uses(plan, "cpu")["second moments of gradients"] == 3 * 32 * 32 * 8 * 2 // 3


def test_memory_goes_where_the_device_map_puts_it(config_only, tokens):
    config = OTPruningConfig(**HALF)
    plan = OTPruner.plan(config_only, config, tokens, device_map={"model": 0, "lm_head": "disk"}, dtype="bfloat16")
    assert uses(plan, "disk") == {"weights": 64 * 32 * 2}
    assert uses(plan, "cuda:0")["weights"] == plan.bytes_before - 64 * 32 * 2
    assert "pruned FFNs beside the dense ones" not in uses(plan, "cuda:0")  # offloaded: nothing is kept to put back
    assert uses(plan, "cuda:0")["one block"] == (4 * 32 * 32 * 3 // 4 + 3 * 32 * 48 + 64) * 2
    assert uses(plan, "cpu")["inputs of one FFN"] == 12 * 20 * 32 * 2
    assert plan.computing_device == "cuda:0"
    if not torch.cuda.is_available():
        assert "there is no cuda:0 on this machine" in str(plan)


def test_an_automatic_map_is_that_of_accelerate_for_the_memory_given(config_only, tokens):
    memory = {0: "60KB", 1: "60KB", "cpu": "1GB"}
    plan = OTPruner.plan(config_only, HALF, tokens, device_map="auto", max_memory=memory)
    weights = {use.device: use.bytes for use in plan.memory if use.purpose == "weights"}
    assert sum(weights.values()) == plan.bytes_before
    assert {"cuda:0", "cuda:1", "cpu"} == set(weights)
    assert max(weights["cuda:0"], weights["cuda:1"]) <= 60_000
    one, other = (uses(plan, device)["second moments of channels"] for device in ("cuda:0", "cuda:1"))
    assert one == other  # each computes the layers that it has


def test_hidden_states_above_the_limit_are_spilled_to_disk(config_only, tokens):
    plan = OTPruner.plan(config_only, HALF, tokens, max_hidden_memory=40_000)
    assert uses(plan, "cpu")["pruned FFNs beside the dense ones"] == 3 * 3 * 32 * 24 * 4
    all_states = 3 * 12 * 20 * 32 * 4  # the pruned model's, the dense model's, and the inputs of one FFN
    assert uses(plan, "cpu")["hidden states"] == 40_000
    assert uses(plan, "disk") == {"spilled": all_states - 40_000}
    assert plan.memory_by_device["disk"] == all_states - 40_000


def test_a_plan_that_prunes_nothing_takes_no_time(config_only, tokens):
    plan = OTPruner.plan(config_only, {"pruning_ratio": 0.0}, tokens)
    assert plan.seconds == {}
    assert uses(plan, "cpu").keys() == {"Python and its libraries", "weights"}
    assert "none: nothing is pruned" in str(plan)
    assert plan.parameters_after == plan.parameters_before


def test_evaluation_is_counted_where_it_is_asked_for(config_only, llama, tokens, tmp_path, capsys):
    windows = torch.zeros(3, 40, dtype=torch.long)
    plans = [
        OTPruner.plan(config_only, HALF, tokens, evaluate=evaluate, evaluation_data=windows)
        for evaluate in (False, True)
    ]
    assert "more for evaluation" not in uses(plans[0], "cpu")
    without = {name: size for name, size in uses(plans[1], "cpu").items() if name != "more for evaluation"}
    assert without == uses(plans[0], "cpu")
    assert uses(plans[1], "cpu")["more for evaluation"] > 2**26 - 10 * 2**20  # log-probabilities, less what is there
    for batch_size in (1, 8):
        exact = OTPruner.plan(
            config_only, {"pruning_ratio": 0.0}, tokens, batch_size=batch_size, evaluate=True, evaluation_data=windows
        )
        count = batch_size * 40
        assert uses(exact, "cpu")["more for evaluation"] == 4 * count * (2 * 64 + 4 * 48 + 8 * 32) + 6 * 2**25
    torch.save(windows, tmp_path / "ids.pt")
    arguments = ["prune", str(config_only), "-o", "out", "--dry-run", "--multiple-of", "1", "--eval", "--eval-data"]
    main([*arguments, str(tmp_path / "ids.pt"), "--calibration-data", str(tmp_path / "ids.pt")])
    assert "more for evaluation" in capsys.readouterr().out
    with pytest.raises(CalibrationDataError, match="'absent.txt' is neither a file nor a folder"):
        OTPruner.plan(config_only, HALF, tokens, evaluate=True, evaluation_data="absent.txt")
    with pytest.raises(CalibrationDataError, match="This model has no tokenizer"):
        OTPruner.plan(config_only, HALF, tokens, evaluate=True)


def test_pruned_weights_are_counted_beside_the_dense_ones_but_where_those_are_offloaded(config_only, tokens):
    plan = OTPruner.plan(config_only, HALF, tokens)
    assert uses(plan, "cpu")["pruned FFNs beside the dense ones"] == 3 * 3 * 32 * 24 * 4
    assert plan.memory_by_device["cpu"] == sum(uses(plan, "cpu").values())  # nothing is counted twice
    offloaded = OTPruner.plan(config_only, HALF, tokens, device_map={"model": 0, "lm_head": "disk"})
    assert all(use.purpose != "pruned FFNs beside the dense ones" for use in offloaded.memory)


def test_text_is_at_most_as_many_samples_as_are_asked_for(llama_folder, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2")
    plan = OTPruner.plan(llama_folder, {**FAST, "quality": "best"}, tmp_path / "text.txt")
    assert "at most 128 samples of 40 tokens, read from local file; 384 more that the model writes" in str(plan)
    assert "writing samples" in plan.seconds


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({"pruning_ratio": 1.5}, {}, ConfigurationError, "`pruning_ratio` is 1.5"),
        ({"target_parameters": 5}, {}, ConfigurationError, "cannot be met"),
        ({"skip_layers": [3]}, {}, ConfigurationError, "names layer 3, but the model has 3 layers"),
        ({"multiple_of": 50}, {}, ConfigurationError, "the layer has only 48 channels"),
        ({}, {"device_map": "gpu7"}, ConfigurationError, "`device_map='gpu7'`.*cannot be followed"),
        ({}, {"device_map": {"lm_head": "cpu"}}, ConfigurationError, "no device is given for"),
        ({}, {"dtype": "float33"}, ConfigurationError, "`dtype` is 'float33'; want 'auto'"),
        ({}, {"device": "cuda"}, ConfigurationError, "option.*'device'.*Did you mean 'device_map'"),
        ({}, {"batch_size": 0}, ConfigurationError, "`batch_size`"),
        ({"seqlen": 60}, {"calibration_data": None}, CalibrationDataError, "tokenizer"),
        ({}, {"calibration_data": "absent.txt"}, CalibrationDataError, "'absent.txt' is neither a file nor a folder"),
        ({}, {"calibration_data": 3}, CalibrationDataError, "Data of type int are not understood"),
    ],
)
def test_what_pruning_would_refuse_is_refused(config_only, tokens, config, options, error, message):
    arguments = {"calibration_data": tokens, **options}
    with pytest.raises(error, match=message):
        OTPruner.plan(config_only, {**HALF, **config} if "target_parameters" not in config else config, **arguments)


def test_texts_longer_than_the_models_positions_are_refused(llama_folder):
    with pytest.raises(CalibrationDataError, match="Sequences have 60 tokens, but the model has only 40 positions"):
        OTPruner.plan(llama_folder, {**HALF, "seqlen": 60})


def test_a_model_that_cannot_hold_an_intercept_is_refused(tmp_path, tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2Config(vocab_size=64, max_position_embeddings=40, **sizes).save_pretrained(tmp_path / "qwen")
    with pytest.raises(ConfigurationError, match="needs an output bias"):
        OTPruner.plan(tmp_path / "qwen", {"method": "flap", "multiple_of": 1}, tokens)


def test_a_folder_without_a_model_and_a_width_that_no_configuration_holds_are_refused(tmp_path, tokens):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="is empty, so it holds no model"):
        OTPruner.plan(tmp_path / "empty", HALF, tokens)
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text(json.dumps(bloom))
    with pytest.raises(UnsupportedModelError, match="follows from the hidden size in its code"):
        OTPruner.plan(tmp_path / "bloom", HALF, tokens)


def test_a_model_in_memory_takes_no_options_of_loading(llama, tokens):
    with pytest.raises(ConfigurationError, match="nothing to load with `device_map`"):
        OTPruner.plan(llama, HALF, tokens, device_map="cpu")


def test_a_model_without_gates_has_a_plan(tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, max_position_embeddings=40, **sizes))
    plan = OTPruner.plan(bert, {**HALF, "intercept": "auto"}, tokens)
    assert plan.architecture == "bert"
    assert uses(plan, "cpu")["one FFN in float32, before and after"] == 2 * 4 * 2 * 32 * 48


def test_an_output_folder_that_cannot_be_written_is_told(config_only, tmp_path, tokens, capsys):
    torch.save(tokens, tmp_path / "ids.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    arguments = ["prune", str(config_only), "-o", str(tmp_path / "out"), "--dry-run", "--debug"]
    with pytest.raises(OutputError, match="not empty"):
        main(arguments)


WORK = Workload(
    num_layers=2,
    hidden_size=10,
    intermediate_size=30,
    kept_size=20,
    num_projections=3,
    tokens=400,
    written_tokens=300,
    batch_tokens=50,
    heldout_share=0.1,
    element_size=2,
    block_bytes=7,
    eliminates=True,
    tracks_dense=True,
    needs_scores=True,
    needs_moments=False,
    steps=5,
    step_tokens=8,
    vocab_size=100,
    score_tokens=40,
    written_at_once=4,
    cache_bytes=11,
    refits=True,
    transports=True,
)


def test_the_laws_of_memory_by_hand():
    pruning = {
        "one block": 7,
        "one FFN in float32, before and after": 2 * 4 * 900,
        "second moments of channels": 900 * 2 * 4 + 15 * 4 * 400,
        "activations of one batch": 4 * 50 * (4 * 30 + 8 * 10),
    }
    training = {
        "one block": 7,
        "one FFN in float32, before and after": 2 * 4 * 900,
        "second moments of channels": 900 * 2 * 4,  # the sums alone are left of the fit
        "training of one FFN": 4 * (8 * 600 + 8 * 50 * 20),
    }
    plain = WORK._replace(needs_scores=False, written_tokens=0)
    assert working_bytes(plain) == pruning
    assert working_bytes(plain._replace(steps=0)) == pruning
    assert working_bytes(plain._replace(step_tokens=50, batch_tokens=1)) == training
    no_refit = plain._replace(refits=False)
    assert working_bytes(no_refit)["second moments of channels"] == 900 * (3 * 4 + 2 * 8)
    nothing_eliminated = no_refit._replace(eliminates=False)
    assert working_bytes(nothing_eliminated)["second moments of channels"] == 900 * 2 * 4 + 3 * 8 * 600
    assert working_bytes(nothing_eliminated._replace(transports=False))["second moments of channels"] == 900 * 2 * 4
    assert working_bytes(WORK._replace(vocab_size=10_000)) == {
        "one block": 7,
        "logits of one batch and their gradients": 3 * 4 * 40 * 10_000,
    }
    assert working_bytes(WORK._replace(cache_bytes=400_000)) == {
        "one block": 7,
        "keys and values of what the model writes": 2 * 400_000,
    }
    scores = {"scores of all FFN weights": 2 * 4 * 900 * 2}
    assert calibration_bytes(WORK) == {
        "hidden states": 2 * 400 * 10 * 2,
        "inputs of one FFN": 400 * 10 * 2,
        "corrections in float32": 4 * 400 * 10,
        "inputs and targets of one FFN in float32": 2 * 4 * 400 * 10,
        **scores,
    }
    assert calibration_bytes(plain._replace(tracks_dense=False, steps=0))["hidden states"] == 400 * 10 * 2
    assert calibration_bytes(WORK._replace(num_layers=50, needs_scores=False, needs_moments=True)) == {
        "hidden states before every layer": 51 * 400 * 10 * 2,
        "gradients by hidden states": 400 * 10 * 2,
        "second moments of gradients": 8 * 100 * 50,
    }


@pytest.mark.parametrize(
    ("changes", "channels", "states", "sums"),
    [
        # Gate, up, a copy of each, the activation and the product, two gradients and one on its way; of singular
        # values three copies and two gradients more, and one on its way; five that the batch before left.
        ({}, 9 + 6 + 5, 48, 3 * 4 * 900),
        ({"score_tokens": 400, "num_projections": 2}, 5 + 4, 48, 3 * 4 * 600),  # all at once; no gate
        ({"needs_scores": False, "needs_moments": True}, 9 + 3, 16, 3 * 8 * 100),
        ({"needs_scores": False, "needs_moments": True, "score_tokens": 400}, 9, 16, 3 * 8 * 100),
    ],
)
def test_the_memory_of_gradients_by_hand(changes, channels, states, sums):
    work = WORK._replace(steps=0, refits=False, transports=False, eliminates=False, batch_tokens=1, **changes)
    assert working_bytes(work) == {
        "one block": 7,
        "one block with its gradients": 4 * work.score_tokens * (channels * 30 + states * 10),
        "sums of gradients": sums,
    }


def test_the_laws_of_time_by_hand():
    rates = Rates(model=10.0, single=100.0, double=1000.0, generation=2.0)
    kept = 2 * 3 * 10 * 20
    assert expected_seconds(WORK, forward_flops=4000, decode_flops=600, rates=rates) == pytest.approx(
        {
            "gradients": 6 * 4000 / 10,
            "writing samples": 300,
            "closed form": 4 * 400,
            "elimination": 2 * 2 * 30**3 / 1000,
            "reconstruction": (6 * 5 * 8 * kept + 2 * 20 * 40 * kept) / 100,
        }
    )
    idle = WORK._replace(written_tokens=0, steps=0, eliminates=False, needs_scores=False)
    assert expected_seconds(idle, 4000, 0, rates).keys() == {"closed form"}
