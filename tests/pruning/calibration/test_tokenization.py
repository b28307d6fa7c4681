"""A text that is tokenized piece by piece has the tokens of one call for all of it."""

import random

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.pruning.calibration import documents, tokenization
from optimum_otprune.pruning.calibration.data import ModelLimits, calibration_tokens, evaluation_tokens
from optimum_otprune.pruning.calibration.tokenization import first_tokens

LIMITS = ModelLimits(vocab_size=1000, max_positions=None)
CONFIG = OTPruningConfig(seqlen=10, num_samples=5)
WORDS = [
    "transport",
    "plans",
    "move",
    "mass",
    "Maße",
    "cafe\u0301",
    "東京の",
    "a",
    "at",
    "cost",
    "12,345",
    "don't",
    "…",
]
MARKS = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", ". ", " = ", "\r\n", " " * 30]


@pytest.fixture(scope="module")
def long_text() -> str:
    """600,000 characters of words, some of several bytes or code points, with marks and spaces of all kinds."""
    generator = random.Random(0)
    return "".join(generator.choice(WORDS) + generator.choice(MARKS) for _ in range(120_000))[:600_000]


def made(kind: str, text: str) -> PreTrainedTokenizerFast:
    """A small trained tokenizer that puts a token at the beginning and one at the end of what it is given."""
    special = ["<s>", "</s>", "<unk>"]
    if kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "BPE over words":  # as SentencePiece does: a space is a letter of the word after it
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, max_token_length=9)
        text = "\n".join(text[start : start + 200] for start in range(0, 20_000, 200))
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator([text[:50_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Measuring:
    """A tokenizer that notes how many characters it was given at once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.lengths = []

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE over words", "Unigram"])
def test_a_long_text_has_the_tokens_of_one_call_though_it_is_tokenized_in_pieces(long_text, kind, monkeypatch):
    tokenizer = made(kind, long_text)
    expected = tokenizer(long_text)["input_ids"]
    measuring = Measuring(tokenizer)
    for parts in ([long_text], long_text.splitlines(keepends=True)):
        assert first_tokens(parts, measuring).tolist() == expected
    assert max(measuring.lengths) < len(long_text) / 2
    assert sum(measuring.lengths) < 2 * 1.1 * len(long_text)
    for number in (1, 5000, len(expected) - 9):
        found = first_tokens([long_text], tokenizer, number).tolist()
        assert len(found) >= number
        assert found == expected[: len(found)]
    monkeypatch.setattr(tokenization, "_CHUNK", 1 << 13)
    monkeypatch.setattr(tokenization, "_MARGIN", 20)
    assert first_tokens([long_text], tokenizer).tolist() == expected  # of some hundred pieces


def test_evaluation_without_a_limit_tokenizes_in_pieces_and_has_the_same_first_windows(long_text):
    measuring = Measuring(made("byte-level BPE", long_text))
    texts = long_text.split("\n\n")
    found = evaluation_tokens(texts, CONFIG, measuring, LIMITS).tokens
    assert max(measuring.lengths) < len(long_text) / 2
    assert (evaluation_tokens(texts, CONFIG, measuring, LIMITS, 4000).tokens == found[:4000]).all()


def test_a_text_that_cannot_be_joined_is_tokenized_as_a_whole(long_text, monkeypatch):
    def contextual(text, **options):
        """Every token depends on how long the text is."""
        return {"input_ids": [len(text) % 997] * (len(text) // 4)}

    monkeypatch.setattr(tokenization, "_CHUNK", 1 << 14)
    assert first_tokens([long_text], contextual).tolist() == contextual(long_text)["input_ids"]


def endless(first, rest):
    """A stream of rows that never ends."""

    def rows():
        yield {"text": first}
        while True:
            yield {"text": rest}

    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(rows, features=features)


@pytest.mark.figure("R6")
@pytest.mark.parametrize(("first", "rest"), [(None, None), ("", ""), ("w1", " \n"), ("w1 w2", None), (None, "")])
def test_a_stream_without_an_end_and_without_text_is_given_up(tokenizer, first, rest, monkeypatch):
    monkeypatch.setattr(documents, "_EMPTY_ROWS", 3000)
    stream = endless(first, rest)
    with pytest.raises(CalibrationDataError, match="is null or empty, as are the 2,999 before it|hold no text"):
        calibration_tokens(stream, CONFIG, tokenizer, LIMITS)
    for max_windows in (3, None):
        with pytest.raises(CalibrationDataError, match="Row 300[01] of the dataset is null or empty|hold no text"):
            evaluation_tokens(stream, CONFIG, tokenizer, LIMITS, max_windows)


def test_the_blank_lines_between_documents_without_text_are_no_windows(long_text):
    with pytest.raises(CalibrationDataError, match="hold no text"):
        evaluation_tokens(endless("", ""), CONFIG, made("byte-level BPE", long_text), LIMITS, 3)


@pytest.mark.figure("R6")
def test_a_stream_without_an_end_that_never_fills_a_window_is_given_up(tokenizer, monkeypatch):
    def deaf(texts, **options):
        """A tokenizer that knows but the first words."""
        return {"input_ids": [1, 2] if isinstance(texts, str) else [[1, 2]] + [[]] * (len(texts) - 1)}

    monkeypatch.setattr(tokenization, "_GIVEN_UP", 1 << 18)
    stream = endless("w1 w2", "\u200b" * 500)
    with pytest.raises(CalibrationDataError, match="characters of the stream hold too few tokens for 5 windows of 10"):
        calibration_tokens(stream, CONFIG, deaf, LIMITS)
    with pytest.raises(CalibrationDataError, match="characters of the stream hold only 2 tokens"):
        evaluation_tokens(stream, CONFIG, deaf, LIMITS, 3)


def test_a_gap_without_text_in_data_that_end_is_no_error(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_EMPTY_ROWS", 100)
    rows = ["w1 w2 " * 9, *[""] * 300, *[None] * 300, "w3 w4 " * 9]
    assert len(evaluation_tokens(rows, CONFIG, tokenizer, LIMITS).tokens) == 3
