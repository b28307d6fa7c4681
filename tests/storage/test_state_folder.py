"""The state folder: files are whole or not there, one process has it, and what is in it is not trusted."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from optimum_otprune.errors import OutputError, StateError
from optimum_otprune.storage.state_folder import LOCK_FILE, STATE_FILE, StateFolder, default_state_folder, has_state


@pytest.fixture
def folder(tmp_path):
    """The state of a run with one file."""
    folder = tmp_path / "state"
    with StateFolder.opened(folder) as state:
        state.begin({"model": "a"})
        state.write({"layer-00000.json": b"{}"})
    return folder


def test_what_is_written_is_there_when_opened_again(folder):
    with StateFolder.opened(folder) as state:
        assert state.fingerprint == {"model": "a"}
        assert state.names == {"layer-00000.json"}
        assert state.read("layer-00000.json") == b"{}"
        state.discard()
    assert not folder.exists()


def test_a_folder_in_which_no_run_began_is_gone_afterwards(tmp_path):
    with StateFolder.opened(tmp_path / "state"):
        assert (tmp_path / "state").is_dir()
    assert not any(tmp_path.iterdir())


def test_a_run_whose_result_was_saved_counts_no_more(folder, monkeypatch):
    with monkeypatch.context() as patch, StateFolder.opened(folder) as state:
        patch.setattr(StateFolder, "_remove_files", lambda self: None)  # as if the process had been killed here
        state.discard()
    with StateFolder.opened(folder) as state:
        assert state.is_saved
        state.begin({"model": "b"})
        assert not state.is_saved
        assert not state.names
    assert sorted(path.name for path in folder.iterdir()) == [STATE_FILE, LOCK_FILE]


def test_one_process_at_a_time_has_it_and_the_lock_of_a_dead_one_is_no_obstacle(folder):
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StateError, match="'state' is in use by another process. Wait"), StateFolder.opened(folder):
        pass
    os.close(descriptor)  # as the kernel does when a process ends; the file stays
    with StateFolder.opened(folder) as state:
        assert state.names


def test_temporaries_of_a_killed_process_are_removed(folder):
    (folder / ".layer-00001.safetensors.tmp").write_bytes(b"half")
    with StateFolder.opened(folder):
        assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("name", [".state.json.tmp", "state.json", ".layer-00001.json.tmp", "layer-00001.json"])
def test_nothing_is_written_through_a_link_that_somebody_planted(folder, name, tmp_path, record_figure):
    (tmp_path / "thesis.txt").write_text("dear")
    with StateFolder.opened(folder) as state:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "thesis.txt")
        state.write({"layer-00001.json": b"[]"})
        assert state.read("layer-00001.json") == b"[]"
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    assert not any(path.is_symlink() for path in folder.iterdir())
    record_figure("R13", tried=1, ok=1)


def test_a_folder_that_is_a_link_is_refused(folder):
    (folder.parent / "link").symlink_to(folder)
    with pytest.raises(StateError, match="The state 'link' is a link"), StateFolder.opened(folder.parent / "link"):
        pass


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(StateError, match="holds 'thesis.txt' but no state.json"), StateFolder.opened(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(StateError, match=r"'thesis.txt' is a file"), StateFolder.opened(tmp_path / "thesis.txt"):
        pass


def test_files_of_others_outlive_the_state(folder):
    (folder / "notes.txt").write_text("mine")
    with StateFolder.opened(folder) as state:
        state.discard()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "remove", "pipe", "link"])
def test_a_file_that_is_not_what_was_written_is_told(folder, damage, tmp_path):
    file = folder / "layer-00000.json"
    if damage in ("remove", "pipe", "link"):
        file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(b"{}")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage != "remove":
        file.write_bytes({"flip": b"{|", "truncate": b"{", "append": b"{}{"}[damage])
    with StateFolder.opened(folder) as state, pytest.raises(StateError, match="is missing|has other bytes"):
        state.read("layer-00000.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [], "of another format than 1. Remove the folder to begin anew"),
        (lambda state: {**state, "format": 2}, "of another format than 1"),
        (lambda state: {**state, "fingerprint": None}, "fingerprint, files or saved is of another kind"),
        (lambda state: {**state, "saved": 1}, "fingerprint, files or saved is of another kind"),
        (lambda state: {**state, "files": {"../../x": {}}}, r"lists '../../x', which no run writes"),
        (lambda state: {**state, "files": {"layer-00000.json\n": {}}}, "which no run writes"),
        (lambda state: {**state, "files": {"layer-00000.json": {"size": True}}}, "damaged at 'layer-00000.json'"),
        (lambda state: {**state, "files": {"layer-00000.json": 3}}, "want a size in bytes and a SHA-256"),
    ],
)
def test_a_damaged_index_is_one_clear_error(folder, change, message):
    index = folder / STATE_FILE
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(StateError, match=message), StateFolder.opened(folder):
        pass
    assert index.is_file()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format": NaN}', b"1" * 5000])
def test_an_index_that_is_no_json_is_one_clear_error(folder, content):
    (folder / STATE_FILE).write_bytes(content)
    with (
        pytest.raises(StateError, match="'state' cannot be used: 'state.json' is damaged"),
        StateFolder.opened(folder),
    ):
        pass


def test_an_index_that_is_a_pipe_or_a_folder_does_not_hang(folder):
    (folder / STATE_FILE).unlink()
    os.mkfifo(folder / STATE_FILE)
    with pytest.raises(StateError, match="no plain file"), StateFolder.opened(folder):
        pass


def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with StateFolder.opened(folder) as state:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="'state' could not be written: the disk is full. Finished layers are"):
            state.write({"layer-00001.json": b"{}"})
        monkeypatch.undo()
    assert not list(folder.glob(".*.tmp"))
    with StateFolder.opened(folder) as state:
        assert state.names == {"layer-00000.json"}


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    message = "'state' could not be written: Permission denied"
    with pytest.raises(OutputError, match=message), StateFolder.opened(tmp_path / "state"):
        pass


def test_the_default_is_a_hidden_folder_beside_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_state_folder(tmp_path / "out") == tmp_path / ".out.otprune-state"
    assert default_state_folder(Path(".")) == tmp_path.with_name(f".{tmp_path.name}.otprune-state")
    assert default_state_folder(Path("x/..")) == default_state_folder(Path("."))
    assert not has_state(tmp_path)
