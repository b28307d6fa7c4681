"""Two models side by side: what is measured, and what is refused before any pass."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import optimum_otprune
from optimum_otprune import ModelComparison, OTPruner, OTPruningConfig, compare_models
from optimum_otprune.checkpoints.dense import dense_reference, loading_of_dense
from optimum_otprune.errors import CalibrationDataError, ConfigurationError, ModelLoadError, UnsupportedModelError
from optimum_otprune.models import agreement
from optimum_otprune.models.agreement import evaluate_model
from optimum_otprune.models.continuations import greedy_continuation
from optimum_otprune.pruning import side_by_side
from tests.conftest import WORDS, make_llama

QUIET = {"progress": False, "new_tokens": 5}


@pytest.fixture
def pruned_folder(llama_folder, tokens, tmp_path):
    """Half of the dense folder's channels."""
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", seqlen=20)
    pruner = OTPruner.from_pretrained(llama_folder, config)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "half")


@pytest.fixture
def no_pass(monkeypatch):
    """Running a model would fail."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was run")

    monkeypatch.setattr(side_by_side, "evaluate_model", fail)
    monkeypatch.setattr(side_by_side, "greedy_continuation", fail)
    monkeypatch.setattr(agreement, "evaluate_perplexity", fail)


def text(start: int, words: int = 100) -> str:
    return " ".join(f"w{(start + 7 * index) % 60}" for index in range(words))


def test_folders_are_compared_on_several_data_sets_and_prompts(llama_folder, pruned_folder, tmp_path):
    (tmp_path / "notes.txt").write_text(text(0))
    data = {"notes": tmp_path / "notes.txt", "ids": torch.arange(60).reshape(3, 20)}
    found = compare_models(llama_folder, pruned_folder, data, ["w1 w2", "w3"], **QUIET)
    assert isinstance(found, ModelComparison)
    assert (found.dense.name, found.pruned.name) == ("dense", "half")
    assert (found.dense.ffn_widths, found.pruned.ffn_widths) == ((48,) * 3, (24,) * 3)
    assert [(row.name, row.num_tokens, row.seqlen) for row in found.data] == [("notes", 95, 20), ("ids", 57, 20)]
    dense, pruned = (OTPruner.from_pretrained(folder) for folder in (llama_folder, pruned_folder))
    expected = evaluate_model(pruned.model, dense.model, data["ids"], 8, progress=False)
    row = found.data[1]
    assert (row.perplexity, row.dense_perplexity) == (expected["perplexity"], expected["dense_perplexity"])
    assert (row.kl, row.agreement) == (expected["kl"], expected["agreement"])
    assert row.ratio == row.perplexity / row.dense_perplexity
    for entry, ids in zip(found.prompts, ([2, 3], [4])):  # word 0 is unknown
        written = [greedy_continuation(one.model, torch.tensor(ids), 5) for one in (dense, pruned)]
        assert [entry.dense, entry.pruned] == [
            dense.tokenizer.decode(one, skip_special_tokens=True) for one in written
        ]
        same = (written[0] == written[1]).long().cumprod(0).sum()
        assert entry.same_tokens == same
    assert str(tmp_path) not in json.dumps(found.to_dict())


def test_the_dense_model_beside_itself_is_no_different(llama, tokenizer):
    found = compare_models(llama, make_llama(), [text(0)], ["w5"], tokenizer=tokenizer, seqlen=10, **QUIET)
    assert [(row.name, row.kl, row.agreement, row.ratio) for row in found.data] == [("data", 0.0, 1.0, 1.0)]
    assert found.prompts[0].dense == found.prompts[0].pruned == found.prompts[0].same_text
    assert found.size_ratio == 1


def test_a_data_set_with_splits_is_one_data_set(llama, tokenizer):
    splits = DatasetDict({"test": Dataset.from_dict({"text": [text(0)]})})
    found = compare_models(llama, llama, splits, [], tokenizer=tokenizer, seqlen=10, **QUIET)
    assert [row.num_windows for row in found.data] == [10]


def test_text_that_was_calibrated_on_is_counted(llama_folder, tmp_path):
    seen = torch.randint(60, (6, 40), generator=torch.Generator().manual_seed(5))
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast")
    pruner = OTPruner.from_pretrained(llama_folder, config)
    pruner.prune(seen, progress=False)
    folder = pruner.save_pretrained(tmp_path / "half")
    found = compare_models(llama_folder, folder, {"seen": seen, "new": (seen + 1).flip(1)}, [], **QUIET)
    assert [row.seen_windows for row in found.data] == [6, 0]


def test_a_continuation_is_greedy_whatever_the_models_own_settings_are(llama):
    prompt = torch.tensor([5, 9, 3])
    expected = prompt.tolist()
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(llama(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    llama.generation_config.do_sample, llama.generation_config.temperature = True, 2.0
    llama.generation_config.repetition_penalty = 5.0
    llama.generation_config.eos_token_id = None
    assert greedy_continuation(llama, prompt, 6).tolist() == expected[3:]
    assert llama.generation_config.repetition_penalty == 5.0
    llama.generation_config.eos_token_id = expected[4]
    ended = greedy_continuation(llama, prompt, 6).tolist()
    assert ended == expected[3 : 3 + expected[3:].index(expected[4]) + 1]


def test_a_chat_prompt_is_a_users_turn(llama, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}w9 {{ m.content }} w8{% endfor %}{{ ' w7' * add_generation_prompt }}"
    )
    in_chat = compare_models(llama, llama, {}, ["w5"], tokenizer=tokenizer, chat=True, **QUIET)
    as_text = compare_models(llama, llama, {}, ["w9 w5 w8 w7"], tokenizer=tokenizer, **QUIET)
    assert in_chat.prompts[0].dense == as_text.prompts[0].dense
    assert in_chat.prompts[0].prompt == "w5"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same words with other ids."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, "[UNK]"])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_models_that_do_not_read_the_same_tokens_are_refused_before_any_pass(
    llama_folder, pruned_folder, llama, tokens, tmp_path, no_pass
):
    larger = make_llama(vocab_size=65)
    for compared in (
        lambda: compare_models(larger, pruned_folder, tokens, []),
        lambda: OTPruner.from_pretrained(llama).evaluate(tokens, dense=larger),
    ):
        with pytest.raises(UnsupportedModelError, match="vocabulary has 65 tokens, that of the other 64"):
            compared()
    other = tmp_path / "other"
    llama.save_pretrained(other)
    other_tokenizer().save_pretrained(other)
    for compared in (
        lambda: compare_models(other, pruned_folder, tokens, []),
        lambda: OTPruner.from_pretrained(pruned_folder).evaluate(tokens, dense=other),
    ):
        with pytest.raises(UnsupportedModelError, match="different tokenizers: the same text has other token ids"):
            compared()


def test_a_dense_model_that_is_pruned_is_refused_before_any_pass(pruned_folder, llama, tokens, no_pass):
    for compared in (
        lambda: compare_models(pruned_folder, llama, tokens, []),
        lambda: OTPruner.from_pretrained(llama).evaluate(tokens, dense=pruned_folder),
        lambda: OTPruner.from_pretrained(llama).evaluate(tokens, dense=OTPruner.from_pretrained(pruned_folder).model),
    ):
        with pytest.raises(UnsupportedModelError, match="is pruned itself"):
            compared()


@pytest.mark.parametrize(
    ("data", "prompts", "options", "error", "message"),
    [
        ({"a": [text(0)], "b": ["w1"]}, [], {}, CalibrationDataError, "hold 1 tokens, fewer than one window"),
        ({}, "w1", {}, ConfigurationError, "`prompts` is 'w1'; want a list of strings"),
        ({}, ["w1", 2], {}, ConfigurationError, "want a list of strings"),
        ({}, ["w1", ""], {}, ConfigurationError, "The prompt '' has no tokens"),
        ({}, ["w1", "\ud800"], {}, ConfigurationError, "Prompt 2 holds half a character"),
        (
            {},
            [text(0, 36)],
            {},
            ConfigurationError,
            "A prompt of 36 tokens and 5 new ones do not fit",
        ),
        ({}, ["w1"], {"chat": True}, CalibrationDataError, "no chat template"),
        ({}, ["w1"], {"new_tokens": 0}, ConfigurationError, "`new_tokens` is 0"),
        ({}, [], {"seqlen": "long"}, ConfigurationError, "`seqlen` is 'long'; want an integer or None"),
        ({}, [], {"max_windows": 0}, ConfigurationError, "`max_windows` is 0"),
        ({}, [], {"max_window": 1}, ConfigurationError, "Did you mean .max_windows"),
        ({}, [], {"dtype": "float16"}, ConfigurationError, "nothing to load with `dtype`"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_pass(
    llama, tokenizer, no_pass, data, prompts, options, error, message
):
    with pytest.raises(error, match=message):
        compare_models(llama, llama, data, prompts, **{"tokenizer": tokenizer, "seqlen": 10, **QUIET, **options})


def test_prompts_need_a_tokenizer_and_are_left_out_without_one(llama, tokens):
    assert compare_models(llama, llama, tokens, **QUIET).prompts == ()
    with pytest.raises(ConfigurationError, match="no tokenizer, so prompts cannot be used"):
        compare_models(llama, llama, tokens, ["w1"], **QUIET)


def test_a_model_that_is_not_there_is_an_error(llama, tokens):
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        compare_models("nobody/no-such-model", llama, tokens)


def test_the_dense_model_is_loaded_like_the_other_but_for_what_is_its_own(llama_folder, llama):
    options = {"revision": "v2", "verify": True, "offload_folder": "there", "token": "t"}
    found = loading_of_dense(options)
    assert (found["revision"], found["verify"], found["token"]) == (None, False, "t")
    assert found["offload_folder"] != "there"
    assert options["offload_folder"] == "there"
    loaded = dense_reference(llama_folder, llama.to(torch.bfloat16), None)
    assert loaded.dtype == torch.bfloat16


def test_what_is_public_is_listed():
    assert {"compare_models", "ModelComparison"} <= set(optimum_otprune.__all__)
