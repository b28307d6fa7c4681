"""The card of a saved folder is made again from what lies in it."""

import os

import pytest

from optimum_otprune.checkpoints.card.folder import folder_card, replace_card
from optimum_otprune.commands.main import main
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError, OutputError, ReportError
from optimum_otprune.storage.manifest import MANIFEST_FILE, digest, manifest_text
from tests.reports import make_report


@pytest.fixture
def folder(tmp_path):
    """A saved folder but for the weights."""
    path = tmp_path / "llama-half"
    path.mkdir()
    OTPruningConfig(pruning_ratio=0.5).save_pretrained(path)
    make_report().save(path / "otprune_report.json")
    return path


def test_tokenizer_and_plot_are_spoken_of_where_their_files_are(folder):
    assert "AutoTokenizer" not in folder_card(folder)
    assert "rescue.png" not in folder_card(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "rescue.png").write_bytes(b"")
    assert "AutoTokenizer" in folder_card(folder)
    assert "(rescue.png)" in folder_card(folder)


def test_the_name_is_the_folders_or_the_given_one(folder, monkeypatch):
    assert "# llama-half\n" in folder_card(folder)
    assert 'from_pretrained("user/other")' in folder_card(folder, "user/other")
    monkeypatch.chdir(folder)
    assert "# llama-half\n" in folder_card(type(folder)("."))


def test_a_folder_of_a_planned_run_has_a_card_too(folder):
    (folder / "otprune_report.json").unlink()
    assert "has not been pruned yet" in folder_card(folder)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"has no otprune_config.json: it is no folder that `otprune prune` wrote"):
        folder_card(tmp_path)


def test_damaged_files_are_errors_of_ours(folder):
    (folder / "otprune_report.json").write_text("{")
    with pytest.raises(ReportError, match="not valid JSON"):
        folder_card(folder)
    (folder / "otprune_config.json").write_text("{")
    with pytest.raises(
        ConfigurationError, match="'otprune_config.json' is no pruning configuration: it is not valid JSON"
    ):
        folder_card(folder)


def test_a_card_is_replaced_whole_and_other_text_is_told(folder):
    text = folder_card(folder)
    assert replace_card(folder, text) is False
    assert replace_card(folder, text) is False
    (folder / "README.md").write_text(text + "my words")
    assert replace_card(folder, text) is True
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    assert [path.name for path in folder.glob(".README*")] == []


def test_a_card_that_is_as_the_manifest_lists_it_was_not_edited(folder):
    (folder / "README.md").write_text("as it was saved")
    (folder / MANIFEST_FILE).write_text(manifest_text({"README.md": digest(folder / "README.md")}))
    assert replace_card(folder, "with another name") is False
    assert replace_card(folder, "once more") is False
    (folder / "README.md").write_text("my words")
    assert replace_card(folder, "with another name") is True


def test_a_card_that_cannot_be_written_is_an_error_and_leaves_the_old_one(folder, monkeypatch):
    (folder / "README.md").write_text("old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="could not be written: No space left on device"):
        replace_card(folder, "new")
    assert (folder / "README.md").read_text() == "old"


def test_the_command_prints_or_writes(folder, capsys):
    main(["card", str(folder)])
    printed = capsys.readouterr().out
    assert printed == folder_card(folder)
    assert not (folder / "README.md").exists()
    main(["card", str(folder), "--write", "--name", "user/llama"])
    assert capsys.readouterr() == ("Saved the model card of llama-half.\n", "")
    assert "# llama\n" in (folder / "README.md").read_text(encoding="utf-8")
    main(["card", str(folder), "--write"])
    assert "warning: README.md had other text, perhaps edited by hand; it was replaced." in capsys.readouterr().err


def test_the_command_fails_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["card", str(tmp_path)])
    assert capsys.readouterr().err.startswith("otprune card: error: ")
