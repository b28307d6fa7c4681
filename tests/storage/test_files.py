"""Folders are exchanged in one step, by one process, and nothing but what is ours is ever removed."""

import errno
import os
import re
import signal
import threading

import pytest

from optimum_otprune.errors import OutputError
from optimum_otprune.storage import files
from optimum_otprune.storage.files import recover, replace_file, save_text, writing_folder
from optimum_otprune.storage.manifest import MANIFEST_FILE, verify_folder, write_manifest
from optimum_otprune.storage.outputs import UNFINISHED_MODE
from tests.crashes import DIED, at_each_step, die_at, exit_code, forked, full_disk_at, hashes

MODEL = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}


def fill(folder, **files_):
    for name, text in {**MODEL, **files_}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save(target, text="weights", overwrite=True, before_the_end=lambda: None):
    """A folder as `save_checkpoint` makes it."""
    with writing_folder(target, overwrite, 0) as partial:
        fill(partial, **{"model.safetensors": text, "README.md": "card"})
        write_manifest(partial)
        before_the_end()


def weights(folder):
    return (folder / "model.safetensors").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def target(request, tmp_path, monkeypatch):
    """A saved folder, on a system that can exchange folders and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    save(tmp_path / "out", "old")
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_system_of_the_tests_exchanges_folders(tmp_path):
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").is_dir()
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "a", tmp_path / "c")


def test_a_folder_is_replaced_by_another_and_nothing_stays_beside_it(target):
    save(target, "new")
    assert weights(target) == "new"
    verify_folder(target)
    assert names(target.parent) == ["out"]


FOREIGN = (
    "thesis.txt",
    ".git/HEAD",
    "notes/a.txt",
    "model.safetensors.bak",
    "optimizer.pt",
    "additional_chat_templates/thesis.txt",
    "adapter_model.safetensors",
    "empty/",
    "link",
)


@pytest.mark.parametrize("is_listed", [True, False], ids=["of ours", "of transformers"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_one_foreign_file_is_not_replaced_and_the_file_is_named(
    tmp_path, name, is_listed, record_figure
):
    folder = tmp_path / "out"
    fill(folder)
    if is_listed:
        write_manifest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        (folder / name).mkdir()
    elif name == "link":
        (folder / name).symlink_to(tmp_path)
    else:
        (folder / name).write_text("dear")
    before = hashes(tmp_path)
    with pytest.raises(OutputError, match=rf"'out' holds '{re.escape(name.split('/')[0])}.*is no file of a saved"):
        save(folder, "new")
    assert hashes(tmp_path) == before
    assert names(tmp_path) == ["out"]
    record_figure("R13", tried=1, ok=1)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_not_replaced_whatever_its_names(tmp_path, missing, record_figure):
    fill(tmp_path / "out")
    (tmp_path / "out" / missing).unlink()
    with pytest.raises(OutputError, match="is no file of a saved model"):
        save(tmp_path / "out")
    assert names(tmp_path / "out") == sorted(set(MODEL) - {missing})
    record_figure("R13", tried=1, ok=1)


def test_a_folder_of_a_model_and_nothing_else_is_replaced(tmp_path):
    fill(tmp_path / "out", **{"additional_chat_templates/tool.jinja": "x"})
    save(tmp_path / "out", "new")
    assert weights(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


def test_a_link_of_a_listed_name_is_foreign(target, tmp_path):
    (target / "model.safetensors").rename(tmp_path / "elsewhere")
    (target / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"holds 'model.safetensors'"):
        save(target)
    assert (tmp_path / "elsewhere").read_text() == "old"


def test_a_card_edited_by_hand_is_ours_and_so_is_what_a_killed_writing_of_it_left(target):
    (target / "README.md").write_text("mine")
    (target / ".README.md.partial-123").write_text("half")
    save(target, "new")
    assert names(target.parent) == ["out"]


def test_a_foreign_file_that_comes_while_the_folder_is_written_stops_it(target, record_figure):
    with pytest.raises(OutputError, match=r"got 'thesis.txt' meanwhile, which is not ours"):
        save(target, "new", before_the_end=lambda: (target / "thesis.txt").write_text("dear"))
    assert weights(target) == "old"
    assert names(target.parent) == ["out"]
    record_figure("R13", tried=1, ok=1)


def test_a_foreign_file_that_comes_at_the_last_moment_stays_and_is_told(target, monkeypatch, record_figure):
    original = files._remove

    def late(folder, names):
        if weights(target) == "new" and weights(folder) == "old":
            (folder / "thesis.txt").write_text("dear")
        original(folder, names)

    monkeypatch.setattr(files, "_remove", late)
    with pytest.warns(UserWarning, match=r"was not removed, since 'thesis.txt' in it is not ours"):
        save(target, "new")
    assert weights(target) == "new"
    (left,) = (path for path in target.parent.iterdir() if path != target)
    assert names(left) == ["thesis.txt"]
    record_figure("R13", tried=1, ok=1)


@pytest.mark.parametrize("is_there", [False, True])
def test_of_two_saves_into_one_new_folder_the_second_is_refused(tmp_path, is_there):
    target = tmp_path / "out"
    if is_there:
        target.mkdir()
    with pytest.raises(OutputError, match="was written by somebody else meanwhile, and stays as it is"):
        save(target, "second", False, before_the_end=lambda: save(target, "first", False))
    assert weights(target) == "first"
    assert names(tmp_path) == ["out"]


def test_two_threads_that_save_into_one_new_folder_leave_one_complete(tmp_path):
    barrier, failures = threading.Barrier(2), []

    def run(text):
        try:
            save(tmp_path / "out", text, False, before_the_end=barrier.wait)
        except OutputError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 1
    verify_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_the_folder_of_a_live_process_is_left_alone_and_that_of_a_dead_one_is_removed(target):
    def dies():
        save(target, "dead", before_the_end=lambda: os._exit(DIED))
        return 0

    assert exit_code(forked(dies)) == DIED
    assert len(names(target.parent)) == 2

    def while_it_lives():
        (live,) = (path for path in target.parent.iterdir() if path != target)  # that of the dead one is gone
        recover(target)
        save(target, "other")
        assert live.is_dir()

    save(target, "new", before_the_end=while_it_lives)
    assert weights(target) == "new"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("is_complete", [True, False])
def test_after_a_death_between_two_renames_the_next_start_puts_a_whole_folder_in_place(
    target, is_complete, monkeypatch
):
    """The new one if it is complete, else the old one."""
    rename = os.rename

    def dies_after_the_first(source, destination):
        rename(source, destination)
        if ".old-" in str(destination):
            os._exit(DIED)

    def dies():
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", dies_after_the_first)
        save(target, "new")
        return 0

    assert exit_code(forked(dies)) == DIED
    assert not target.exists()
    if not is_complete:
        (partial,) = target.parent.glob(".out.partial-*")
        (partial / "model.safetensors").write_text("ne")
    recover(target)
    assert weights(target) == ("new" if is_complete else "old")
    verify_folder(target)
    assert names(target.parent) == ["out"]


def test_a_new_folder_that_cannot_take_its_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    save(tmp_path / "out", "old")
    rename = os.rename

    def fail(source, destination):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error", str(tmp_path))
        rename(source, destination)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match=r"could not be written: Input/output error\.") as caught:
        save(tmp_path / "out", "new")
    assert str(tmp_path) not in str(caught.value)
    assert weights(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_an_interruption_just_after_the_exchange_removes_nothing_of_the_old_folder_by_mistake(target, monkeypatch):
    def interrupt(*arguments):
        (target.parent / old[0] / "thesis.txt").write_text("dear")
        raise KeyboardInterrupt

    old = []
    original = files._put_in_place

    def placed(partial, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(files, "_remove", lambda folder, names: old.append(folder) or interrupt())
            original(partial, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_put_in_place", placed)
        with pytest.raises(KeyboardInterrupt):
            save(target, "new")
    assert weights(target) == "new"
    with pytest.warns(UserWarning, match="'thesis.txt' in it is not ours"):
        recover(target)
    assert (old[0] / "thesis.txt").read_text() == "dear"
    (old[0] / "thesis.txt").unlink()
    recover(target)
    assert names(target.parent) == ["out"]


def steps(target, removals=True):
    """How many steps of writing replacing a folder takes."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        at_each_step(taken.append, patch, removals)
        save(target, "old")
    return len(taken)


def test_killed_at_any_step_of_replacing_the_old_or_the_new_folder_is_there_whole(target, request, record_figure):
    can_exchange = "two renames" not in request.node.name
    count = steps(target)
    assert count > 15
    for number in range(1, count + 1):

        def dies(number=number):
            die_at(number, pytest.MonkeyPatch())
            save(target, "new")
            return 0

        assert exit_code(forked(dies)) == DIED
        assert target.is_dir() or not can_exchange
        recover(target)
        verify_folder(target)
        assert weights(target) in ("old", "new")
        assert names(target.parent) == ["out"]
        save(target, "old")
    record_figure("R4, processes that died at a step", count, count)


def test_a_disk_that_is_full_at_any_step_of_replacing_leaves_the_old_folder(target, record_figure):
    count = steps(target, removals=False)
    for number in range(1, count + 1):
        with pytest.MonkeyPatch.context() as patch:
            full_disk_at(number, patch)
            with pytest.raises(OutputError, match="the disk is full"):
                save(target, "new")
        assert weights(target) == "old"
        verify_folder(target)
        assert names(target.parent) == ["out"]
    record_figure("R5", count, count)


FOLDERS_OF_OTHERS = (".out.partial-backup", ".out.old-version", ".out.partial-0123456789ABCDEF", ".output.partial-x")


def test_hidden_folders_of_others_stay(target, record_figure):
    for name in FOLDERS_OF_OTHERS:
        fill(target.with_name(name))
    recover(target)
    assert names(target.parent) == sorted(["out", *FOLDERS_OF_OTHERS])
    record_figure("R13", tried=len(FOLDERS_OF_OTHERS), ok=len(FOLDERS_OF_OTHERS))


def test_an_abandoned_folder_goes_with_every_file_that_a_save_writes(target):
    left = target.with_name(f".out.partial-{'0' * 16}")
    ours = ("README.md", "otprune_report.json", ".otprune_report.json.partial-12", "rescue.png", "modeling_otprune.py")
    fill(left, **dict.fromkeys((*ours, "otprune_config.json", "otprune_manifest.json", "chat_template.jinja"), "half"))
    recover(target)
    assert names(target.parent) == ["out"]


FILES_OF_LIBRARIES = (
    ".tmpAbC123",
    "modeling_foo.py",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "additional_chat_templates/a",
)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_folder_that_a_killed_process_was_writing_goes_with_whatever_libraries_wrote_there(
    target, mask, record_figure
):
    def dies():
        os.umask(mask)
        with writing_folder(target, True, 0) as partial:
            fill(partial, **dict.fromkeys(FILES_OF_LIBRARIES, "half"))
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert exit_code(forked(dies)) == -signal.SIGKILL
    (left,) = target.parent.glob(".out.partial-*")
    assert names(left)[0] == ".tmpAbC123"
    recover(target)
    assert names(target.parent) == ["out"]
    assert weights(target) == "old"
    record_figure("R4, processes that died at a step", 1, 1)


def test_a_link_in_a_folder_that_a_killed_process_was_writing_is_not_ours(target, tmp_path):
    left = target.with_name(f".out.partial-{'0' * 16}")
    left.mkdir(mode=UNFINISHED_MODE)
    (left / "link").symlink_to(target)
    (left / "notes").mkdir()
    (left / "notes" / "thesis.txt").write_text("dear")
    with pytest.warns(UserWarning, match=r"was not removed, since 'link' in it is not ours"):
        recover(target)
    assert (left / "notes" / "thesis.txt").read_text() == "dear"
    verify_folder(target)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_an_earlier_output_under_a_hidden_name_keeps_what_is_not_ours(target, mask):
    """Its own mode, not its name, tells it from a folder that was being written, however narrow the umask is."""
    before = os.umask(mask)
    try:
        save(target, "earlier")
    finally:
        os.umask(before)
    hidden = target.rename(target.with_name(f".out.partial-{'0' * 16}"))
    (hidden / "thesis.txt").write_text("dear")
    with pytest.warns(UserWarning, match=r"was not removed, since 'thesis.txt' in it is not ours"):
        recover(target)
    assert names(hidden) == ["thesis.txt"]


def test_an_abandoned_folder_keeps_what_is_not_ours_and_says_so(target, record_figure):
    left = target.with_name(f".out.partial-{'0' * 16}")
    fill(left, **{"thesis.txt": "dear"})
    link = target.with_name(f".out.partial-{'1' * 16}")
    link.symlink_to(target)
    with pytest.warns(UserWarning, match=r"was not removed, since 'thesis.txt' in it is not ours"):
        recover(target)
    assert names(left) == ["thesis.txt"]
    assert link.is_symlink()
    verify_folder(target)
    record_figure("R13", tried=2, ok=2)


def test_where_the_file_system_knows_no_locks_a_save_works_and_nothing_is_taken_for_abandoned(target, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    left = target.with_name(f".out.partial-{'0' * 16}")
    fill(left)
    save(target, "new")
    assert weights(target) == "new"
    assert names(left) == sorted(MODEL)


def test_a_temporary_that_somebody_planted_as_a_link_is_never_written_through(tmp_path, record_figure):
    (tmp_path / "thesis.txt").write_text("dear")
    temporary = tmp_path / f".best.json.partial-{os.getpid()}"
    temporary.symlink_to(tmp_path / "thesis.txt")
    save_text(tmp_path / "best.json", "{}", overwrite=False)
    assert (tmp_path / "best.json").read_text() == "{}"
    assert not (tmp_path / "best.json").is_symlink()
    temporary.symlink_to(tmp_path / "thesis.txt")
    replace_file(tmp_path / "other", b"x", temporary)
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    assert names(tmp_path) == ["best.json", "other", "thesis.txt"]
    record_figure("R13", tried=2, ok=2)


@pytest.mark.parametrize(
    ("content", "is_replaced"),
    [("", True), ('{"a": 1, "b": 2}', True), ('{"a": 1}', False), ("dear", False), ("[1]", False), ("\xff", False)],
)
def test_a_file_is_replaced_only_if_it_holds_what_the_command_writes(tmp_path, content, is_replaced, record_figure):
    file = tmp_path / "thesis.json"
    file.write_text(content, encoding="latin-1")
    if is_replaced:
        save_text(file, "new", True, ("a", "b"))
        assert file.read_text() == "new"
        return
    with pytest.raises(OutputError, match="holds something else than this command writes, so it is not replaced"):
        save_text(file, "new", True, ("a", "b"))
    assert file.read_text(encoding="latin-1") == content
    record_figure("R13", tried=1, ok=1)


def test_a_file_that_is_a_link_or_a_device_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OutputError, match=f"The output '{name}' is a link or a device"):
            save_text(tmp_path / name, "new", True)


def test_a_folder_that_cannot_be_read_is_one_clear_error(target, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OutputError, match=r"'out' cannot be read \(Permission denied\)"):
        save(target)


def test_the_manifest_is_removed_last_so_that_a_killed_removal_is_gone_on_with(target, monkeypatch):
    removed = []
    original = os.unlink

    def noted(path, **options):
        removed.append(os.path.basename(path))
        original(path, **options)

    monkeypatch.setattr(os, "unlink", noted)
    save(target, "new")
    assert removed[-1] == MANIFEST_FILE
