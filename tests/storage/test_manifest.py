"""Flipped bits, missing files and stale files beside the weights are told; the manifest itself is not trusted."""

import json
import os
import random

import pytest

from optimum_otprune.errors import IntegrityError
from optimum_otprune.storage.manifest import (
    MANIFEST_FILE,
    digest,
    is_weights_file,
    read_manifest,
    verify_folder,
    write_manifest,
)

FILES = ("model.safetensors", "config.json", "tokenizer.json", "README.md", "otprune_report.json")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for index, name in enumerate((*FILES, "additional_chat_templates/tool.jinja")):
        (folder / name).write_bytes(random.Random(index).randbytes(100 + index))
    write_manifest(folder)
    return folder


def test_a_manifest_lists_every_file_but_itself(folder):
    entries = verify_folder(folder)
    assert set(entries) == {*FILES, "additional_chat_templates/tool.jinja"}
    (folder / "empty").write_bytes(b"")
    assert digest(folder / "empty") == (0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


def test_the_same_files_give_the_same_manifest(folder):
    before = (folder / MANIFEST_FILE).read_bytes()
    assert write_manifest(folder).read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_told(folder, name, record_figure):
    content = (folder / name).read_bytes()
    generator, found, tried = random.Random(name), 0, 100
    for _ in range(tried):
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(damaged)
        with pytest.raises(IntegrityError, match=rf"\(changed: '{name}'\)"):
            verify_folder(folder)
        found += 1
    record_figure("R3", tried, found)
    (folder / name).write_bytes(content)
    verify_folder(folder)


def test_missing_longer_and_extra_files_are_told_apart(folder):
    (folder / "config.json").unlink()
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    message = (
        r"changed: 'model.safetensors'; missing: 'config.json'; extra: 'model-00001-of-00002.safetensors'\). Remove"
    )
    with pytest.raises(IntegrityError, match=message):
        verify_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "adapter_config.json",
        "x.py",
        "chat_template.jinja",
        "vocab.txt",
        "model.gguf",
        "flax_model.msgpack",
        "tf_model.h5",
        "tf_model.H5",
        "generation_config.json",
        "original/consolidated.00.pth",
        "custom/code.py",
        "custom/native.so",
        "onnx/model.onnx",
        "model.onnx",
        "model.onnx_data",
        "model.onnx.data",
        "x.pt2",
        ".x.py",
        ".hidden/modeling.py",
        "encoder/config.json",
        "encoder/pytorch_model.bin.index.json",
        "additional_chat_templates/other.jinja",
    ],
)
def test_a_file_that_a_loader_would_read_must_be_listed(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(IntegrityError, match=f"extra: '{name}'"):
        verify_folder(folder)


def test_a_linked_folder_is_told_but_files_that_are_links_count_by_their_content(folder, tmp_path):
    """As in the Hub's cache."""
    (folder / "config.json").rename(tmp_path / "blob")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    verify_folder(folder)
    (folder / "encoder").symlink_to(tmp_path)
    with pytest.raises(IntegrityError, match="extra: 'encoder'"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "not listed: 'model.safetensors'"),
        ({"weight_map": {"a": "model-00001-of-00001.safetensors"}}, "not listed: 'model-00001-of-00001.safetensors'"),
        ({"weight_map": []}, "model.safetensors.index.json is damaged"),
        ([], "model.safetensors.index.json is damaged"),
    ],
)
def test_a_manifest_must_list_the_weights(folder, index, message):
    """Else anything could be put in their place."""
    if index is None:
        (folder / "model.safetensors").unlink()
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=message):
        verify_folder(folder)


@pytest.mark.parametrize("other", ["other.bin", "other.safetensors", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("index", [None, '{"weight_map": {}}'])
def test_other_weights_in_the_manifest_do_not_stand_in_for_those_that_are_loaded(folder, other, index):
    (folder / "model.safetensors").rename(folder / other)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=r"\(not listed: 'model.safetensors'\)"):
        verify_folder(folder)


def test_weights_in_shards_are_all_listed(folder):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").rename(folder / shards[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    write_manifest(folder)
    with pytest.raises(IntegrityError, match=rf"\(not listed: '{shards[1]}'\)"):
        verify_folder(folder)
    (folder / shards[1]).write_bytes(b"x")
    write_manifest(folder)
    verify_folder(folder)


def test_weights_that_are_there_but_not_listed_are_told(folder):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["files"]["model.safetensors"]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=r"extra: 'model.safetensors'; not listed: 'model.safetensors'"):
        verify_folder(folder)


def test_licenses_pictures_and_hidden_files_may_be_added(folder):
    (folder / ".cache").mkdir()
    (folder / "results").mkdir()
    for name in (".gitattributes", "LICENSE", "notes.txt", "plot.png", ".cache/model.safetensors", "results/a.json"):
        (folder / name).write_bytes(b"x")
    verify_folder(folder)


def test_a_folder_without_a_manifest_cannot_be_checked(tmp_path):
    with pytest.raises(IntegrityError, match=f"There is no {MANIFEST_FILE}"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "C:\\x", "a\nb", "x" * 201, "a/../b", "~", "é"],
)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"][name] = {"size": 1, "sha256": "0" * 64}
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="want the plain name of a file"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {},
        {"size": -1, "sha256": "0" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": 1, "sha256": "A" * 64},
    ],
)
def test_a_damaged_entry_is_told(folder, entry):
    (folder / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": {"config.json": entry}}))
    with pytest.raises(IntegrityError, match="is damaged at 'config.json'"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "files": {}}',
        '{"format": 2, "files": {"a": 1}}',
        "[" * 99999,
    ],
)
def test_a_damaged_manifest_is_told(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(IntegrityError, match="is damaged"):
        verify_folder(folder)


def test_a_manifest_that_is_not_text_is_damaged(folder):
    (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        verify_folder(folder)


def test_a_file_that_cannot_be_listed_is_refused_when_it_is_written(folder):
    os.makedirs(folder / "sub")
    (folder / "sub" / "file").write_bytes(b"")
    with pytest.raises(IntegrityError, match="cannot list 'sub/file'"):
        write_manifest(folder)


def test_weights_are_known_by_their_names():
    weights = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    assert all(is_weights_file(name) for name in weights)
    assert not any(is_weights_file(name) for name in ("tokenizer.json", "training_args.py", "sub/model.safetensors"))
