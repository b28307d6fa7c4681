"""Data are read by what they hold, whatever they are called; what is no text, conversation or id is refused by row."""

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.pruning.calibration.data import (
    ModelLimits,
    calibration_tokens,
    evaluation_tokens,
    expected_samples,
)
from optimum_otprune.pruning.calibration.text_files import file_rows

LIMITS = ModelLimits(vocab_size=64, max_positions=40)
CONFIG = OTPruningConfig(seqlen=10, num_samples=5)
TEXTS = [" ".join(f"w{(start + step) % 60}" for step in range(50)) for start in range(4)]
TABLE = pd.DataFrame({"id": range(4), "text": TEXTS})
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS)
PLAIN = "\n\n".join(TEXTS)
IDS = [list(range(10)), list(range(20, 30))]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def zst(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


def parquet(table) -> bytes:
    sink = io.BytesIO()
    table.to_parquet(sink)
    return sink.getvalue()


def feather() -> bytes:
    sink = io.BytesIO()
    TABLE.to_feather(sink)
    return sink.getvalue()


def docx() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("word/document.xml", "text" * 50)
    return sink.getvalue()


def calibrate(data, tokenizer=None, **changes):
    return calibration_tokens(data, CONFIG.replace(**changes), tokenizer, LIMITS)


def whole(data, tokenizer=None, **changes) -> torch.Tensor:
    """Every window, in order."""
    return evaluation_tokens(data, CONFIG.replace(**changes), tokenizer, LIMITS).tokens


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("lines.txt", LINES),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode() + b"\r\n"),
        ("separators.jsonl", LINES.replace("w0 ", "w0\u2028", 1)),  # a line ends at \n only
        ("returns.jsonl", LINES.replace(": ", ":\r")),  # which JSON allows between tokens
        ("escapes.jsonl", LINES.replace("w1", r"\u00771")),
        ("strings.jsonl", "\n".join(json.dumps(text) for text in TEXTS)),
        ("array.json", json.dumps([{"text": text} for text in TEXTS])),
        ("indented.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("indented.txt", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("strings.json", json.dumps(TEXTS, indent=1)),
        ("data.json", json.dumps({"data": [{"text": text} for text in TEXTS]})),
        ("squad.json", json.dumps({"version": 2, "data": [{"text": text} for text in TEXTS]}, indent=4)),
        ("a.csv", TABLE.to_csv(index=False)),
        ("a.tsv", TABLE.to_csv(index=False, sep="\t")),
        ("semicolons.CSV", TABLE.to_csv(index=False, sep=";")),
        ("csv.txt", TABLE.to_csv(index=False)),
        ("utf-16.csv", TABLE.to_csv(index=False).encode("utf-16")),
        ("a.parquet", parquet(TABLE)),
        ("parquet.txt", parquet(TABLE)),
        ("a.feather", feather()),
        ("no suffix", PLAIN),
        ("utf-8.txt", PLAIN.encode("utf-8-sig")),
        ("utf-16.txt", PLAIN.encode("utf-16")),
        ("utf-32.txt", PLAIN.encode("utf-32")),
        ("utf-16.jsonl", LINES.encode("utf-16")),
        ("a.txt.gz", gzip.compress(PLAIN.encode())),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("gz.txt", gzip.compress(PLAIN.encode())),
        ("a.CSV.bz2", bz2.compress(TABLE.to_csv(index=False).encode())),
        ("a.json.xz", lzma.compress(json.dumps(TEXTS).encode())),
        ("a.jsonl.zst", zst(LINES)),
    ],
)
def test_a_file_is_read_by_what_it_holds(tmp_path, tokenizer, name, content):
    path = written(tmp_path, name, content)
    assert torch.equal(whole(path, tokenizer), whole(TEXTS, tokenizer))
    assert calibrate(path, tokenizer).source == "local file"
    assert [file.name for file in tmp_path.iterdir()] == [name]  # nothing is written beside it


ARRAY = "[" + ",\n ".join(json.dumps({"text": text}) for text in TEXTS) + "]"
JSON_TEXTS = {
    "array": ARRAY,
    "object": '{"data": [\n' + ARRAY[1:] + "}",
    "strings": json.dumps(TEXTS),
    "nulls": json.dumps([None, *TEXTS]),
    "indented strings": json.dumps(TEXTS, indent=1),
    "lines of strings": "\n".join(json.dumps(text) for text in TEXTS),
    "lines of ids": "\n".join(map(json.dumps, IDS)),
    "long array": json.dumps([{"text": text} for text in TEXTS * 300], indent=1),
    "long strings": json.dumps(TEXTS * 300, indent=1),
    "long lines": json.dumps({"text": " ".join(TEXTS * 300)}) + "\n" + LINES,
    "long line of escapes": json.dumps({"text": "\u4e00" * 20_000 + " ".join(TEXTS)}),
}


@pytest.mark.parametrize("kind", JSON_TEXTS)
def test_json_is_json_whatever_its_name(tmp_path, tokenizer, kind):
    expected = whole(written(tmp_path, "a.json", JSON_TEXTS[kind]), tokenizer)
    for name in ("a.txt", "a", "a.md"):
        assert torch.equal(whole(written(tmp_path, name, JSON_TEXTS[kind]), tokenizer), expected), name
    for name in ("b.gz", "b"):
        path = written(tmp_path, name, gzip.compress(JSON_TEXTS[kind].encode()))
        assert torch.equal(whole(path, tokenizer), expected), name


def test_long_text_that_begins_like_json_is_text(tmp_path, tokenizer):
    for text in ('"w1"\nw2 "w3"\n', "[1, 2]\nw1\n", "[\nw1\n", '{"w1"}\n', '["w1",\nw2\n'):
        path = written(tmp_path, "text.txt", text + PLAIN * 200)
        assert torch.equal(whole(path, tokenizer), whole([text + PLAIN * 200], tokenizer)), text
    path = written(tmp_path, "quoted.csv", '"text"\n' + "\n".join(json.dumps(text) for text in TEXTS))
    assert torch.equal(whole(path, tokenizer), whole(TEXTS, tokenizer))


@pytest.mark.parametrize("text", ["{\nw1 w2\n", "[1] w1\n", '"w1", w2\n', "BZh w1\n", "{w1}\n", "w1,w2\n", "w1\rw2"])
def test_text_that_begins_like_something_else_is_text(tmp_path, tokenizer, text):
    path = written(tmp_path, "text.txt", text + PLAIN)
    assert torch.equal(whole(path, tokenizer), whole([text + PLAIN], tokenizer))


def test_numbers_dates_and_words_for_nothing_are_text_in_a_table(tmp_path):
    path = written(tmp_path, "a.csv", 'id,text\n1,NA\n2,12\n3,2020-01-01\n4,"two\nlines, ""quoted"""\n5,None\n')
    assert [row.value for row in file_rows(path, "text")] == ["NA", "12", "2020-01-01", 'two\nlines, "quoted"', "None"]
    path = written(tmp_path, "b.csv", "id,text\n1,007\n2,1.50\n")
    assert [row.value for row in file_rows(path, "text")] == ["007", "1.50"]


NO_TEXT = [
    ("png.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "png.txt is no text: it is not UTF-8"),
    ("a.pdf", b"%PDF-1.4\n" + b"text\n" * 9, "a.pdf is no text: it holds binary data"),
    ("a.docx", docx(), "a.docx is no text"),
    ("weights.txt", save({"a": torch.zeros(3)}), "weights.txt is no text: it holds binary data"),
    ("train.bin", np.arange(60, dtype=np.uint16).tobytes(), "train.bin is no text: .* as `np.save` writes them"),
    ("late.txt", PLAIN.encode() * 400 + b"\x00", "late.txt is no text: it holds binary data"),
    ("latin.txt", "naïve".encode("latin-1"), "latin.txt is no text: it is not UTF-8"),
    ("latin late.txt", PLAIN.encode() * 2000 + "é".encode("latin-1"), "latin late.txt is no text: it is not UTF-8"),
    ("cut late.txt.gz", gzip.compress(os.urandom(80_000).hex().encode())[:-9], "cut late.txt.gz cannot be read"),
    ("cut.jsonl.gz", gzip.compress(LINES.encode())[:50], "cut.jsonl.gz cannot be read .* Check that the file is"),
    ("cut.zst", zst(LINES * 9)[:60], "cut.zst cannot be read"),
    ("bad.xz", b"\xfd7zXZ\x00" + b"z" * 50, "bad.xz cannot be read"),
    ("bad.parquet", b"PAR1" + b"z" * 50, "bad.parquet cannot be read"),
    ("bad.arrow", b"\xff\xff\xff\xff" + b"z" * 50, "bad.arrow cannot be read"),
    ("ragged.csv", "id,text\n1,w1\n2,w2,w3\n", "ragged.csv cannot be read .*Expected 2 fields in line 3, saw 3"),
    ("long.csv", "id,text\n1,w1 w2, w3 w4\n2,w5\n", "long.csv has, among its rows 1 to 256, one of more fields"),
    ("late.csv", "id,text\n1,w1,\n" + "2,w5\n" * 600 + "3,w1, w2\n", "late.csv has, among its rows 513 to 768, one"),
    ("p.parquet.gz", gzip.compress(parquet(TABLE)), "p.parquet.gz is a compressed Parquet file.*Decompress it"),
    ("f.arrow.xz", lzma.compress(feather()), "f.arrow.xz is a compressed Arrow file.*Decompress it"),
    ("body.csv", "body\nw1\n", "body.csv has no column 'text'; it has body. Set `text_column`"),
    ("body.parquet", parquet(pd.DataFrame({"body": ["w1"]})), "no column 'text'; it has body"),
    ("deep.json", "[" * 100_000, "Line 1 of deep.json is not JSON .nested too deeply."),
    ("deep.jsonl", '"w1"\n' + "[" * 100_000, "Line 2 of deep.jsonl is not JSON .nested too deeply."),
    ("long.json", "1" * 5000, "Line 1 of long.json is not JSON"),
    ("bad.json", '[\n{"text": "w1"},\n{"text"}\n]', "Line 3 of bad.json is not JSON"),
    ("half.jsonl", '{"text": "\\ud800"}\n', r"Line 1 of half.jsonl holds half a character .*U\+D800"),
    ("number.jsonl", '"w1"\n12\n', "Line 2 of number.jsonl holds a int; want text"),
    ("list.jsonl", '{"text": ["w1"]}\n', "Line 1 of list.jsonl holds a list of str; want text"),
    ("row.jsonl", '{"text": {"a": 1}}\n', "Line 1 of row.jsonl holds a dict"),
    ("empty.json", "", "hold no text"),
]


@pytest.mark.figure("R6")
@pytest.mark.parametrize(("name", "content", "message"), NO_TEXT, ids=[name for name, *_ in NO_TEXT])
def test_files_that_hold_no_text_are_refused_with_the_reason(tmp_path, tokenizer, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(CalibrationDataError, match=message) as caught:
        calibrate(path, tokenizer)
    assert str(tmp_path) not in str(caught.value)


def doors(rows, tmp_path):
    """The same rows through every door that can hold them."""
    dataset = datasets.Dataset.from_dict({"text": rows})
    dataset.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    dataset.save_to_disk(tmp_path / "saved")
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": row} for row in rows))
    return {
        "list": rows,
        "objects": [{"text": row} for row in rows],
        "dataset": dataset,
        "formatted": dataset.with_format("numpy"),
        "column": dataset["text"],
        "splits": datasets.DatasetDict({"train": dataset, "test": dataset}),
        "stream": stream,
        "streams": datasets.IterableDatasetDict({"train": stream, "test": stream}),
        "parquet": tmp_path / "rows.parquet",
        "lines": tmp_path / "rows.jsonl",
        "saved": tmp_path / "saved",
    }


def test_nulls_are_left_out_and_counted_in_every_door(tmp_path, tokenizer, caplog):
    for name, data in doors([None, *TEXTS, None], tmp_path).items():
        caplog.clear()
        assert torch.equal(whole(data, tokenizer), whole(TEXTS, tokenizer)), name
        assert caplog.messages == ["2 of 6 rows are null and were left out."], name
    empty = ["w1", ()] * 10
    caplog.clear()
    assert torch.equal(whole(empty, tokenizer), whole(["w1"] * 10, tokenizer))
    assert caplog.messages == ["10 of 20 rows are null and were left out."]
    nulls = (pd.NA, pd.NaT, float("nan"), np.float32("nan"))
    for data in (pd.Series([*TEXTS, None]), pd.Series([*TEXTS, None], dtype="string"), *([*TEXTS, x] for x in nulls)):
        caplog.clear()
        assert torch.equal(whole(data, tokenizer), whole(TEXTS, tokenizer))
        assert caplog.messages == ["1 of 5 rows are null and were left out."]
    path = written(tmp_path, "data.json", json.dumps({"data": [None, *({"text": text} for text in TEXTS)]}))
    assert torch.equal(whole(path, tokenizer), whole(TEXTS, tokenizer))
    caplog.clear()
    table = written(tmp_path, "a.csv", "id,text\n" + "\n".join(f"1,{text}" for text in ["", *TEXTS]))
    assert torch.equal(whole(table, tokenizer), whole(TEXTS, tokenizer))
    assert caplog.messages == ["1 of 5 rows are null and were left out."]


def test_conversations_are_rendered_by_the_chat_template_in_every_door(tmp_path, tokenizer):
    found = doors(CHATS, tmp_path)
    for data in found.values():
        with pytest.raises(CalibrationDataError, match=r"column 'text'\) holds a conversation, but the tokenizer"):
            whole(data, tokenizer)
    tokenizer.chat_template = TEMPLATE
    for name, data in found.items():
        assert torch.equal(whole(data, tokenizer), whole(TEXTS, tokenizer)), name
    messages = datasets.Dataset.from_dict({"messages": CHATS})
    assert torch.equal(whole(messages, tokenizer, text_column="messages"), whole(TEXTS, tokenizer))


def test_token_ids_in_rows_are_token_ids_in_every_door(tmp_path):
    for name, data in doors(IDS, tmp_path).items():
        found = calibrate(data)
        assert torch.equal(found.tokens, torch.tensor(IDS)), name
        assert found.source == "token ids"
        assert torch.equal(whole(data), torch.tensor(IDS)), name
    path = written(tmp_path, "data.json", json.dumps({"data": [None, *IDS]}))
    assert torch.equal(whole(path), torch.tensor(IDS))


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3.5, 4.5], "1 of .* holds a float; want text"),
        ([{"a": 1}], "1 of .*(holds a dict; want text|has no text under 'text'; it has a)"),
        ([["w1", "w2"]], "1 of .* holds a list of str; want text"),
        ([[[1, 2], [3, 4]]], "1 of .* holds a list of list"),
        ([True, False], "1 of .* holds a bool"),
    ],
)
def test_rows_of_other_kinds_are_refused_by_row_and_type_in_every_door(tmp_path, tokenizer, rows, message):
    found = doors(rows, tmp_path)
    if isinstance(rows[0], list) and isinstance(rows[0][0], list):
        del found["list"], found["column"]
    for data in found.values():
        with pytest.raises(CalibrationDataError, match=message):
            whole(data, tokenizer)


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["w1", [1, 2]], "Entry 2 of the list holds token ids, those before it text"),
        ([[1, 2], "w1"], "Entry 2 of the list holds text, those before it token ids"),
        ([b"w1"], "Entry 1 of the list holds a bytes"),
        (b"w1", "type bytes are not understood"),
        (np.array([TEXTS[0], 3], dtype=object), "Entry 2 of the list holds a int"),
        (np.array([b"w1"]), "Entry 1 of the list holds a bytes"),
        (["w1 \ud800"], "Entry 1 of the list holds half a character"),
        ([[1, 2**70]], "holds a token id beyond 64 bits"),
        (np.full((2, 5), 2**64 - 1, dtype=np.uint64), "go from 18446744073709551615 to 18446744073709551615"),
        (np.array(3), r"shape \(\); want"),
        (np.array(TEXTS[0]), "type ndarray are not understood"),
        (np.ma.masked_array(np.arange(60), mask=[True] + [False] * 59), "ids are masked"),
        (np.ma.masked_array(TEXTS, mask=[True, False, False, False]), "type MaskedArray are not understood"),
        ([np.ma.masked_array([1, 2], mask=[True, False]), *IDS], "Entry 1 of the list holds a MaskedArray"),
        (torch.zeros(2, 5, dtype=torch.long, device="meta"), "ids are on the meta device"),
        ([torch.zeros(5, dtype=torch.long, device="meta")], "Entry 1 of the list holds a Tensor"),
        (torch.eye(5, dtype=torch.long).to_sparse(), "ids are of the layout torch.sparse_coo"),
        ([iter([1, 2])], "Entry 1 of the list holds a list_iterator"),
        ([iter(TEXTS)], "Entry 1 of the list holds a list_iterator"),
        ({"train": TEXTS}, "'train' holds a list; want a datasets.Dataset"),
        (datasets.DatasetDict(), "no split 'train'; it has none"),
        ({"text": TEXTS}, "no split 'train'; it has text"),
    ],
)
def test_data_in_memory_that_cannot_be_used_are_refused(tokenizer, data, message):
    with pytest.raises(CalibrationDataError, match=message):
        calibrate(data, tokenizer)


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, r"the name of no file \(File name too long\).* a list of texts: \[text\]"),
        (PLAIN, r"or, if it is text, a list of texts: \[text\]"),
        ("The quick brown fox.", r"neither a file nor a folder, and no name of a dataset.*\[text\]"),
        ("two\nlines", r"no name of a dataset.*\[text\]"),
        ("nul\0nul", "the name of no file"),
        ("", "the name of no file .it is empty"),
        ("~nobody-of-that-name/a.txt", "the name of no file .Could not determine home directory"),
        ("~/absent.txt", "'absent.txt' is neither a file nor a folder"),
        ("~/absent.npy", "'absent.npy' does not exist"),
    ],
)
def test_names_that_name_no_data_are_refused_with_what_to_give(tokenizer, name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for ask in (lambda: calibrate(name, tokenizer), lambda: expected_samples(name, CONFIG, LIMITS, True)):
        with pytest.raises(CalibrationDataError, match=message) as caught:
            ask()
        assert str(tmp_path) not in str(caught.value)


def test_the_home_folder_is_expanded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "a.txt", PLAIN)
    np.save(tmp_path / "ids.npy", np.array(IDS))
    assert torch.equal(whole("~/a.txt", tokenizer), whole(TEXTS, tokenizer))
    assert torch.equal(whole("~/ids.npy"), torch.tensor(IDS))


def test_a_chat_template_that_refuses_is_one_clear_error(tokenizer):
    for template, reason in (
        ("{{ raise_exception('roles must alternate') }}", "roles must"),
        ("{% if %}", "Expected"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(CalibrationDataError, match=f"Entry 1 .* chat template refuses .*{reason}"):
            calibrate(CHATS, tokenizer)


def test_a_folder_is_read_file_by_file_without_hidden_ones(tmp_path, tokenizer, caplog):
    folder = tmp_path / "folder.txt"  # a folder all the same
    (folder / ".git").mkdir(parents=True)
    (folder / "more").mkdir()
    written(folder, ".git/config.txt", "secret")
    written(folder, ".hidden.txt", "secret")
    written(folder, "README.md", "about")
    written(folder, "picture.png", b"\x89PNG")
    written(folder, "a.txt", "\n\n".join(TEXTS[:2]))
    written(folder, "more/b.jsonl.gz", gzip.compress(LINES.split("\n", 2)[2].encode()))
    assert torch.equal(whole(folder, tokenizer), whole(TEXTS, tokenizer))
    assert caplog.messages == ["Left out of 'folder.txt', since their names are not those of text: picture.png."]
    assert calibrate(folder, tokenizer).source == "local folder"


def test_folders_without_text_are_refused_when_planned(tmp_path, tokenizer):
    for name in ("d.npy", "d.txt"):
        (tmp_path / name).mkdir()
        with pytest.raises(CalibrationDataError, match=f"The folder '{name}' holds no text files .*no saved dataset"):
            expected_samples(tmp_path / name, CONFIG, LIMITS, None)
    written(tmp_path, "d.txt/dataset_info.json", "{")
    with pytest.raises(CalibrationDataError, match="dataset in the folder 'd.txt' cannot be read"):
        calibrate(tmp_path / "d.txt", tokenizer)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8, ">i4"])
def test_token_ids_of_every_integer_type_and_stride_work(tmp_path, dtype):
    ids = np.arange(60).astype(dtype)
    expected = torch.arange(60).view(6, 10)
    np.save(tmp_path / "ids.npy", ids)
    given = [ids, ids[::-1][::-1], tmp_path / "ids.npy", ids.reshape(6, 10).copy(order="F")]
    if dtype != ">i4":
        torch.save(torch.from_numpy(ids), tmp_path / "ids.PT")
        given += [torch.from_numpy(ids), tmp_path / "ids.PT"]
    for data in given:
        assert torch.equal(whole(data), expected)
    assert torch.equal(whole(ids[::-1]), torch.arange(60).flip(0).view(6, 10))


def test_lists_of_token_ids_are_a_matrix_or_a_stream():
    assert torch.equal(calibrate(IDS, num_samples=1).tokens, torch.tensor(IDS))  # all rows
    assert torch.equal(whole([[1, 2, 3], list(range(17))]), torch.tensor([[1, 2, 3, *range(17)]]).view(2, 10))
    assert torch.equal(whole(list(range(20))), torch.arange(20).view(2, 10))


def test_the_plan_knows_rows_of_token_ids(tmp_path):
    path = written(tmp_path, "ids.jsonl", "\n".join(json.dumps({"text": row}) for row in IDS))
    assert expected_samples(path, CONFIG, LIMITS, has_tokenizer=False).source == "token ids"
    with pytest.raises(CalibrationDataError, match="no tokenizer"):
        expected_samples(TEXTS, CONFIG, LIMITS, has_tokenizer=False)
    with pytest.raises(CalibrationDataError, match="holds a dict"):
        expected_samples(datasets.Dataset.from_dict({"text": [{"a": 1}]}), CONFIG, LIMITS, has_tokenizer=True)


def test_a_stream_without_an_end_is_read_in_part_and_shuffled(tokenizer):
    def endless():
        number = 0
        while True:
            yield {"text": " ".join(f"w{(number + step) % 60}" for step in range(7))}
            number += 1

    stream = datasets.IterableDataset.from_generator(endless)
    found = calibrate(stream, tokenizer)
    assert found.tokens.shape == (5, 10)
    assert torch.equal(calibrate(stream, tokenizer).tokens, found.tokens)
    assert not torch.equal(calibrate(stream, tokenizer, seed=1).tokens, found.tokens)
    assert (
        len(evaluation_tokens(datasets.IterableDatasetDict({"test": stream}), CONFIG, tokenizer, LIMITS, 3).tokens)
        == 3
    )


def test_a_stream_of_empty_rows_without_an_end_holds_no_text(tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": ""} for _ in iter(int, 1)))
    with pytest.raises(CalibrationDataError, match="hold no text"):
        calibrate(stream, tokenizer)


def test_an_iterable_without_the_column_is_refused(tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: ({"body": text} for text in TEXTS))
    with pytest.raises(CalibrationDataError, match="no column 'text'; it has body"):
        calibrate(stream, tokenizer)
