"""Speed of a dense and a pruned model: what is counted by hand, what is shared, what is refused, what is written."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.speed import (
    BenchmarkSettings,
    Speed,
    SpeedComparison,
    _cache_argument,
    check_comparable,
    compare,
    cut_copy,
    widths_by_multiple,
)
from optimum_otprune.errors import UsageError
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.flops import forward_flops
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import matmul_rate
from tests.conftest import make_llama
from tests.conftest import run_command as run

QUICK = BenchmarkSettings(batch_sizes=(1, 2), seqlens=(6, 10), new_tokens=4, warm_up=0, repeats=1)


@pytest.fixture
def pruned_folder(llama, tokens, tmp_path):
    """Layers of 24, 24 and 36 channels, saved as they are."""
    config = OTPruningConfig(
        pruning_ratio=0.5,
        multiple_of=1,
        method="magnitude",
        layer_ratios={2: 0.25},
        non_uniform_format="per_layer_config",
    )
    pruner = OTPruner.from_pretrained(make_llama(), config)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "pruned")


def test_the_operations_of_a_llama_by_hand(llama):
    found = forward_flops(PrunableModel.of(llama), batch_size=2, seqlen=5)
    assert found.ffn == 2 * 10 * 3 * (3 * 32 * 48)
    assert found.projections == 2 * 10 * 3 * (2 * 32 * 32 + 2 * 32 * 16)
    assert found.scores == 4 * 2 * 15 * 32 * 3  # 1 + 2 + … + 5 pairs a sequence
    assert found.head == 2 * 2 * 32 * 64
    assert found.total == found.ffn + found.projections + found.scores + found.head


def test_the_operations_are_those_that_torch_counts_but_for_pairs_that_causal_attention_leaves_out():
    sizes = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 64,
        "n_positions": 40,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for model in (make_llama(), GPT2LMHeadModel(GPT2Config(**sizes)).eval()):
        model.set_attn_implementation("eager")
        found = forward_flops(PrunableModel.of(model), 2, 6, num_logits=6)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(2, 6, dtype=torch.long))
        left_out = found.scores * (36 - 21) // 21  # pairs of a token with a later one
        assert counter.get_total_flops() == found.total + left_out


def test_every_shape_is_measured_and_compared(llama):
    found = compare(llama, cut_copy(llama, 24), QUICK)
    assert [(entry.batch_size, entry.seqlen) for entry in found] == [(1, 6), (1, 10), (2, 6), (2, 10)]
    last = found[-1]
    assert last.dense.first_token_seconds > 0
    assert last.dense.prefill_tokens_per_second == pytest.approx(20 / last.dense.first_token_seconds)
    assert last.dense.cache_bytes == 3 * 2 * 2 * 16 * (10 + 3) * 4  # the last token is not fed back
    assert last.dense.flops == forward_flops(PrunableModel.of(llama), 2, 10).total > last.pruned.flops
    assert last.dense.decode_tokens_per_second > 0
    assert (last.dense.peak_bytes is None) == (not torch.cuda.is_available())


def test_generation_is_that_of_transformers(llama, monkeypatch):
    fed = []
    forward = llama.forward

    def note(*args, **kwargs):
        fed.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", note)
    compare(llama, llama, QUICK._replace(batch_sizes=(2,), seqlens=(6,)))
    monkeypatch.undo()
    llama.generation_config.eos_token_id = None
    everything = torch.ones_like(fed[0])
    written = llama.generate(fed[0], attention_mask=everything, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(fed[1:4], dim=1), written[:, 6:9])


def speed(seconds, flops, decode=None):
    return Speed(seconds, 1 / seconds, decode, None, 0, flops)


def test_ratios_by_hand():
    comparison = SpeedComparison(1, 8, speed(1.0, 200, 10.0), speed(0.8, 100, 15.0))
    assert comparison.prefill_speedup == pytest.approx(1.25)
    assert comparison.promised_speedup == 2
    assert comparison.share_reached == pytest.approx(0.625)
    assert comparison.share_of_time_saved == pytest.approx(0.4)  # 0.2 of the 0.5 s that are promised
    assert comparison.decode_speedup == 1.5
    assert SpeedComparison(1, 8, speed(1.0, 9), speed(1.0, 9)).share_of_time_saved is None
    assert SpeedComparison(1, 8, speed(1.0, 9), speed(1.0, 9)).decode_speedup is None
    assert SpeedComparison(1, 8, speed(1.0, 9), speed(1.0, 3)).share_of_time_saved == 0


def test_a_cut_copy_shares_everything_but_the_ffns(llama):
    before = llama(torch.arange(5)[None]).logits
    copied = cut_copy(llama, 20)
    assert [block.intermediate_size for block in ffn_blocks(copied)] == [20] * 3
    assert torch.equal(ffn_blocks(copied)[1].read().down, ffn_blocks(llama)[1].read().down[:, :20])
    assert copied.lm_head.weight is llama.lm_head.weight
    assert copied(torch.arange(5)[None]).logits.shape == before.shape
    assert torch.equal(llama(torch.arange(5)[None]).logits, before)


def test_widths_follow_the_share_that_was_kept(llama):
    pruned = cut_copy(llama, 30)
    found = widths_by_multiple(ffn_blocks(llama), ffn_blocks(pruned), [1, 4, 16])
    assert found == {1: 30, 4: 32, 16: 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlens": (38,)}, "Prompts of 38 tokens and 4 new ones do not fit into the 40 positions of the dense"),
        ({"repeats": 0}, "`repeats` is 0; want integers of at least 1"),
        ({"batch_sizes": (0,)}, "`batch_sizes` is .0,.; want"),
        ({"new_tokens": -1}, "`new_tokens` is -1"),
        ({"seqlens": (8.5,)}, "`seqlens` is .8.5,.; want integers"),
        ({"repeats": 2**31}, "`repeats` is 2147483648; want integers of at least 1 and at most 2147483647"),
    ],
)
def test_shapes_that_cannot_be_run_are_refused(llama, changes, message):
    with pytest.raises(UsageError, match=message):
        compare(llama, llama, QUICK._replace(**changes))


def test_models_that_do_not_belong_together_are_refused(llama):
    with pytest.raises(UsageError, match="3 and 2 layers"):
        check_comparable(ffn_blocks(llama), ffn_blocks(make_llama(num_hidden_layers=2)))
    with pytest.raises(UsageError, match="Layer 0 has 48 channels in the first model and 50 in the second"):
        check_comparable(ffn_blocks(llama), ffn_blocks(make_llama(intermediate_size=50)))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_gives_it(llama, monkeypatch, name):
    forward = type(llama).forward
    known = _cache_argument(llama)
    given = []

    def old(self, input_ids, past_key_values=None, **others):
        given.append("past_key_values")
        return forward(self, input_ids, **{known: past_key_values}, **others)

    def new(self, input_ids, cache=None, **others):
        given.append("cache")
        return forward(self, input_ids, **{known: cache}, **others)

    monkeypatch.setattr(type(llama), "forward", {"cache": new, "past_key_values": old}[name])
    found = compare(llama, llama, QUICK)
    assert set(given) == {name}
    assert found[0].dense.cache_bytes > 0


def test_a_model_without_a_cache_is_measured_in_prefill_only(llama, monkeypatch):
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda input_ids, **cache: forward(input_ids=input_ids, use_cache=False))
    with pytest.raises(UsageError, match="A LlamaForCausalLM keeps no KV cache"):
        compare(llama, llama, QUICK)
    found = compare(llama, llama, QUICK._replace(new_tokens=0))
    assert found[0].decode_speedup is None
    assert found[0].dense.flops == forward_flops(PrunableModel.of(llama), 1, 6, num_logits=6).total  # all its logits


def test_the_rate_of_a_matrix_product_is_positive():
    assert matmul_rate(torch.device("cpu"), torch.float32, (8, 8, 8), 0.0) > 0


def test_the_command_prints_and_writes_what_it_measured(llama_folder, pruned_folder, tmp_path, capsys):
    measured = ["--batch-sizes", 1, 2, "--seqlens", 6, "--new-tokens", 3, "--warm-up", 0, "--repeats", 1]
    arguments = ["benchmark", llama_folder, pruned_folder, *measured, "--multiple-of", 1, 2, 8, "--trust-remote-code"]
    assert run(*arguments, "--quiet", "--json", tmp_path / "speed.json") == 0
    printed = capsys.readouterr().out
    assert "FFN width 24 to 36" in printed
    assert "Peak memory is not measured on this device" in printed
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [entry["batch_size"] for entry in content["comparisons"]] == [1, 2]
    assert content["models"]["pruned"]["ffn_widths"] == [24, 24, 36]
    assert [(entry["multiples"], entry["width"]) for entry in content["multiples"]] == [([1, 2], 28), ([8], 32)]
    assert content["settings"]["new_tokens"] == 3
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "gpu"], 2, "The device 'gpu' cannot be used here"),
        (["--multiple-of", "50"], 1, "the layer has only 48 channels"),
        (["--seqlens", "64"], 2, "do not fit into the 40 positions"),
        (["--json", "."], 1, "is a folder. Give the name of a file"),
    ],
)
def test_wrong_usage_is_told(llama_folder, llama, arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--seqlens", "6", "--new-tokens", "2"]
    cut_copy(llama, 24).save_pretrained("half")
    config = json.loads(Path("half/config.json").read_text())
    Path("half/config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    assert run("benchmark", llama_folder, "half", "--quiet", *quick, *arguments) == code
    assert message in capsys.readouterr().err


def test_a_model_of_layers_that_differ_needs_the_trust_that_it_needs_everywhere(llama_folder, pruned_folder, capsys):
    assert run("benchmark", llama_folder, pruned_folder, "--quiet") == 1
    assert "trust_remote_code" in capsys.readouterr().err
