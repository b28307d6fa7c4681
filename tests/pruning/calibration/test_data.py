"""Data of every kind become token ids; what cannot be used is refused with a reason."""

import json
import pickle
import random
from importlib.resources import as_file, files

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from optimum_otprune.commands import demo_texts as documentation
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.pruning.calibration.data import ModelLimits, calibration_tokens, evaluation_tokens

LIMITS = ModelLimits(vocab_size=64, max_positions=40)
CONFIG = OTPruningConfig(seqlen=10, num_samples=5)
TEXTS = [" ".join(f"w{(start + step) % 60}" for step in range(50)) for start in range(4)]  # 200 tokens


def calibrate(data, tokenizer=None, config=CONFIG, limits=LIMITS):
    return calibration_tokens(data, config, tokenizer, limits)


def write(tmp_path, kind: str):
    """The same texts in every form that holds text."""
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    elif kind == "folder":
        path.mkdir()
        for index, text in enumerate(TEXTS):
            (path / f"{index}.txt").write_text(text)
    elif kind == "saved":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "folder", "saved", "saved_splits", "list", "dataset", "text path"])
def test_every_kind_of_text_gives_the_same_samples(kind, tokenizer, tmp_path):
    data = {"list": TEXTS, "dataset": datasets.Dataset.from_dict({"text": TEXTS})}.get(kind)
    if kind == "text path":
        data = str(write(tmp_path, "txt"))
    found = calibrate(write(tmp_path, kind) if data is None else data, tokenizer)
    expected = calibrate(TEXTS, tokenizer)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.tokens.shape == (5, 10)
    assert str(tmp_path) not in found.source


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt", "pt dictionary", "array", "tensor"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_every_kind_of_token_file_needs_no_tokenizer(kind, dtype, tokens, tmp_path):
    ids = tokens.to(dtype)
    path = tmp_path / f"ids.{kind.split()[0]}"
    if kind == "npy":
        np.save(path, ids.numpy())
    elif kind == "safetensors":
        save_file({"ids": ids}, path)
    elif kind.startswith("pt"):
        torch.save({"input_ids": ids, "other": ids} if "dictionary" in kind else ids, path)
    data = {"array": ids.numpy(), "tensor": ids}.get(kind, path)
    found = calibrate(data)
    assert torch.equal(found.tokens, tokens)  # all rows, whatever `num_samples`
    assert found.tokens.dtype == torch.int64
    assert found.describe() == {"data": "token ids", "num_samples": 12, "seqlen": 20, "num_tokens": 240}


def test_samples_of_a_stream_are_seeded_and_drawn_without_replacement():
    stream = torch.arange(60)
    found = calibrate(stream, limits=ModelLimits(64, 40), config=OTPruningConfig(seqlen=10, num_samples=4))
    starts = found.tokens[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert all(torch.equal(row, torch.arange(row[0], row[0] + 10)) for row in found.tokens)
    again = calibrate(stream, config=OTPruningConfig(seqlen=10, num_samples=4))
    assert torch.equal(found.tokens, again.tokens)
    others = [
        calibrate(stream, config=OTPruningConfig(seqlen=10, num_samples=4, seed=seed)).tokens for seed in range(9)
    ]
    assert any(not torch.equal(found.tokens, other) for other in others)


class Counting:
    """A tokenizer that counts the characters it was given."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text, **options):
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return self.tokenizer(text, **options)


@pytest.fixture(scope="module")
def demo_tokenizer():
    """A byte-level BPE."""
    with as_file(files("optimum_otprune.commands") / "demo_model") as folder:
        return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def long_text() -> str:
    """200,000 characters of numbered sentences in paragraphs of all lengths."""
    generator = random.Random(0)
    words = ["transport", "plans", "move", "mass", "from", "one", "measure", "to", "another", "at", "a", "cost"]
    sentences = (f"{' '.join(generator.choices(words, k=9))} {number}." for number in range(4000))
    return "".join(sentence + generator.choice([" ", " ", "\n", "\n\n"]) for sentence in sentences)[:200_000]


WIDE = ModelLimits(vocab_size=100_000, max_positions=None)


def test_samples_are_drawn_all_over_a_long_text_and_only_they_are_tokenized(demo_tokenizer, long_text):
    config = OTPruningConfig(seqlen=32, num_samples=40)
    counting = Counting(demo_tokenizer)
    found = calibrate([long_text], counting, config, WIDE)
    assert found.tokens.shape == (40, 32)
    assert counting.characters < len(long_text) / 10
    places = [long_text.index(demo_tokenizer.decode(row[2:-2])) for row in found.tokens]  # in order, each once
    assert places == sorted(set(places))
    assert all(
        sum(quarter <= place * 4 / len(long_text) < quarter + 1 for place in places) > 3 for quarter in range(4)
    )
    assert len(set(places)) == 40
    assert torch.equal(calibrate([long_text], demo_tokenizer, config, WIDE).tokens, found.tokens)
    assert not torch.equal(calibrate([long_text], demo_tokenizer, config.replace(seed=1), WIDE).tokens, found.tokens)


def test_a_long_text_gives_the_same_samples_however_it_is_split(demo_tokenizer, long_text, tmp_path):
    config = OTPruningConfig(seqlen=32, num_samples=10)
    paragraphs = long_text.split("\n\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(text) for text in paragraphs))
    (tmp_path / "a.txt").write_text(long_text)
    expected = calibrate([long_text], demo_tokenizer, config, WIDE).tokens
    for data in (paragraphs, tmp_path / "a.jsonl", tmp_path / "a.txt", [long_text]):
        assert torch.equal(calibrate(data, demo_tokenizer, config, WIDE).tokens, expected)


def test_no_long_text_is_tokenized_in_one_call(demo_tokenizer, long_text):
    lengths = []

    def measuring(texts, **options):
        lengths.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return demo_tokenizer(texts, **options)

    found = calibrate([long_text], measuring, OTPruningConfig(seqlen=64, num_samples=400), WIDE)
    assert len(found.tokens) == 400
    assert max(lengths) <= 8 * 64
    places = [long_text.index(demo_tokenizer.decode(row[2:-2])) for row in found.tokens[::40] if row[0] > 2]
    assert places == sorted(places)
    with pytest.raises(CalibrationDataError, match="hold no text"):
        calibrate([" \n" * 50_000], demo_tokenizer, OTPruningConfig(seqlen=64, num_samples=400), WIDE)


@pytest.mark.parametrize(
    "text", [" ".join("x" * 50 for _ in range(3000)), "w1 " * 3000, "w1" + " " * 9000 + "w2 " * 99]
)
@pytest.mark.parametrize("num_samples", [1, 9, 290, 10_000])
def test_as_many_samples_as_the_text_has_windows_for(tokenizer, text, num_samples):
    found = calibrate([text], tokenizer, OTPruningConfig(seqlen=10, num_samples=num_samples))
    assert len(found.tokens) == min(num_samples, len(tokenizer(text)["input_ids"]) // 10)


@pytest.mark.parametrize("max_windows", [1, 7, 100, 10**6])
def test_the_first_windows_are_those_of_the_whole_text_and_little_more_is_tokenized(
    demo_tokenizer, long_text, max_windows
):
    config = OTPruningConfig(seqlen=64)
    expected = evaluation_tokens([long_text], config, demo_tokenizer, WIDE).tokens[:max_windows]
    for data in ([long_text], long_text.split("\n\n")):
        counting = Counting(demo_tokenizer)
        found = evaluation_tokens(data, config, counting, WIDE, max_windows)
        assert torch.equal(found.tokens, expected)
        assert counting.characters <= min(len(long_text), 8 * (64 * max_windows + 256) + 2**14)


def test_tokens_that_a_cut_may_have_changed_are_in_no_window(tokenizer):
    def shortsighted(text, **options):
        ids = tokenizer(text, **options)["input_ids"]
        return {"input_ids": ids[:-100] + [0] * 100}

    text = "w1      " * 3000  # as few tokens as were reckoned with
    found = evaluation_tokens([text], CONFIG, shortsighted, LIMITS, max_windows=7)
    assert torch.equal(found.tokens, torch.full((7, 10), tokenizer("w1")["input_ids"][0]))


def test_all_of_a_text_is_one_stream_with_the_special_tokens_at_its_beginning(demo_tokenizer, long_text):
    stream = torch.tensor(demo_tokenizer(long_text, verbose=False)["input_ids"])
    found = evaluation_tokens(long_text.split("\n\n"), OTPruningConfig(seqlen=64), demo_tokenizer, WIDE).tokens
    assert torch.equal(found.flatten(), stream[: found.numel()])
    assert len(stream) - found.numel() < 64


def test_evaluation_windows_are_consecutive_and_the_tail_is_dropped():
    found = evaluation_tokens(torch.arange(37), CONFIG, None, LIMITS)
    assert torch.equal(found.tokens, torch.arange(30).view(3, 10))
    assert len(evaluation_tokens(torch.arange(37), CONFIG, None, LIMITS, max_windows=2).tokens) == 2


@pytest.mark.parametrize(("max_positions", "expected"), [(40, 40), (None, 2048), (131_072, 2048)])
def test_the_window_is_2048_or_the_models_positions(max_positions, expected):
    assert ModelLimits(64, max_positions).seqlen(OTPruningConfig()) == expected


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3), "want integers"),
        (torch.ones(4, 4, dtype=torch.bool), "want integers"),
        (torch.zeros(0, 5, dtype=torch.long), "not empty"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"\(num_samples, seqlen\)"),
        (torch.zeros(9, dtype=torch.long), "9 tokens, fewer than one window of 10"),
        (torch.zeros(3, 1, dtype=torch.long), "one token predict nothing"),
        (torch.zeros(3, 41, dtype=torch.long), "41 tokens, but the model has only 40 positions"),
        (torch.full((3, 5), 64), "vocabulary has 64"),
        (torch.full((3, 5), -1), "from -1 to -1"),
        (np.zeros((2, 3)), "want integers"),
        ([], "empty list"),
        (["", "  \n"], "hold no text"),
        (["text", 3], "holds a int"),
        (3, "int are not understood"),
        (None, "does not exist, or the Hub cannot be reached"),
        ("nobody/nothing", "Offline, give a local text file or token ids"),
        ("absent.txt", "'absent.txt' is neither a file nor a folder"),
        ("./absent", "neither a file nor a folder"),
        ("/a/b/absent.pt", "'absent.pt' does not exist"),
        (["w1 w2"], "2 tokens, fewer than one window of 10"),
        (datasets.Dataset.from_dict({"body": ["w1"]}), "no column 'text'; it has body. Set `text_column`"),
    ],
)
def test_data_that_cannot_be_used_are_refused_with_the_reason(data, message, tokenizer):
    with pytest.raises(CalibrationDataError, match=message):
        calibrate(data, tokenizer)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationDataError, match="no tokenizer, so text cannot be used. Give token ids"):
        calibrate(TEXTS)


class Malicious:
    def __reduce__(self):
        return (print, ("code of a pickle was run",))


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.pt", pickle.dumps(Malicious(), protocol=2), "cannot be read as token ids"),
        ("bad.npy", b"\x93NUMPY garbage", "cannot be read as token ids"),
        ("empty.npy", b"", "cannot be read as token ids"),
        ("bad.safetensors", b"version https://git-lfs.github.com/spec/v1", "cannot be read as token ids"),
        ("bad.jsonl", b"{not json}\n", "Line 1 of bad.jsonl is not JSON"),
        ("bad.jsonl", b'\n{"body": "x"}\n', "Line 2 of bad.jsonl has no text under 'text'"),
        ("bad.txt", b"\xff\xfe\x00", "bad.txt is no text: it is not UTF-16"),
    ],
)
def test_damaged_and_malicious_files_are_refused(tmp_path, tokenizer, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationDataError, match=message) as caught:
        calibrate(tmp_path / name, tokenizer)
    assert "was run" not in capsys.readouterr().out
    assert str(tmp_path) not in str(caught.value)


def test_an_object_array_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationDataError, match="cannot be read as token ids"):
        calibrate(tmp_path / "objects.npy")


def test_an_empty_folder_and_a_missing_split_are_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationDataError, match="holds no text files"):
        calibrate(tmp_path / "empty", tokenizer)
    with pytest.raises(CalibrationDataError, match="no split 'test'; it has train"):
        evaluation_tokens(write(tmp_path, "saved_splits"), CONFIG, tokenizer, LIMITS)


def test_documentation_splits_share_no_paragraph_and_repeat():
    train, validation = (documentation.documentation_texts(split) for split in ("train", "validation"))
    assert len(train) > 5 * len(validation) > 0

    def paragraphs(texts):
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n") if len(part) >= 60}

    assert not paragraphs(train) & paragraphs(validation)
    assert documentation.documentation_texts("validation") == validation


def test_an_interpreter_without_its_documentation_is_one_clear_error(monkeypatch, tmp_path):
    with pytest.raises(CalibrationDataError, match="`split` is 'test'"):
        documentation.documentation_texts("test")
    monkeypatch.setattr(documentation.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(CalibrationDataError, match="installed without its documentation: its standard library has no"):
        documentation.documentation_texts("train")
    monkeypatch.setattr(documentation, "find_spec", lambda name: None)
    with pytest.raises(CalibrationDataError, match=r"`pydoc_data.topics` is missing"):
        documentation.documentation_texts("train")
