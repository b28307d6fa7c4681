"""The card of a saved folder, rendered from the configuration and report in it."""

import os
from collections.abc import Mapping
from pathlib import Path

from optimum_otprune.checkpoints.card.plots import PLOT_FILE
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.config.options_file import CONFIG_FILE, read_options
from optimum_otprune.errors import OutputError, ReportError
from optimum_otprune.models.compatibility import reads_in_older_versions
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.files import save_text, why_not_written
from optimum_otprune.storage.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    FileEntry,
    digest,
    manifest_text,
    read_manifest,
)


def folder_card(
    folder: Path,
    name: str | None = None,
    has_tokenizer: bool | None = None,
    report: PruningReport | None = None,
) -> str:
    """Render the card of a folder that `OTPruner.save_pretrained` wrote.

    Args:
        folder: A folder with `otprune_config.json`; if it has no report, the model was not pruned yet.
        name: What the card calls the model; default: the folder's name.
        has_tokenizer: Whether a tokenizer belongs to the model; default: whether its files are in the folder.
        report: The report of the model; default: the folder's.

    Raises:
        ReportError: If there is no configuration, or the report is damaged.
        ConfigurationError: If the configuration is damaged.
    """
    if not os.path.isfile(folder / CONFIG_FILE):
        raise ReportError(f"{folder.name!r} has no {CONFIG_FILE}: it is no folder that `otprune prune` wrote.")
    options, report_file = read_options(folder / CONFIG_FILE), folder / REPORT_FILE
    if report is None and report_file.is_file():
        report = PruningReport.load(report_file)
    if has_tokenizer is None:
        has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return model_card(
        options,
        report,
        folder.resolve().name if name is None else name,
        has_tokenizer=has_tokenizer,
        has_plot=(folder / PLOT_FILE).is_file(),
        older_names=reads_in_older_versions(folder),
    )


def listed_files(folder: Path) -> dict[str, FileEntry] | None:
    """Return what the manifest of a folder lists, or None without one."""
    return read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None


def was_edited(folder: Path, text: str, listed: Mapping[str, FileEntry] | None) -> bool:
    """Return whether a folder's card is neither a given text nor what the manifest lists, such as one edited by hand.

    Args:
        folder: A saved folder.
        text: The card, as `folder_card` renders it.
        listed: What the manifest lists, or None without one.
    """
    file = folder / CARD_FILE
    if not file.is_file() or file.read_bytes() == text.encode():
        return False
    return listed is None or digest(file) != listed.get(CARD_FILE)


def replace_card(folder: Path, text: str) -> bool:
    """Write a card into a saved folder, completely or not at all.

    Args:
        folder: A saved folder.
        text: The card, as `folder_card` renders it.

    Returns:
        Whether another text was there than the folder's manifest lists, such as one edited by hand.

    Raises:
        OutputError: If the card cannot be written.
    """
    listed = listed_files(folder)
    edited = was_edited(folder, text, listed)
    replace_files(folder, {CARD_FILE: text}, listed)
    return edited


def replace_files(folder: Path, texts: Mapping[str, str | None], listed: Mapping[str, FileEntry] | None) -> None:
    """Write files into a saved folder, each completely or not at all, and then the manifest, if there is one.

    Args:
        folder: A saved folder.
        texts: The text of each file by its name; None removes it.
        listed: What the manifest lists, or None without one.

    Raises:
        OutputError: If a file cannot be written.
    """
    for name, text in texts.items():
        file = folder / name
        if text is None:
            file.unlink(missing_ok=True)
            continue
        try:
            file.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder of {name!r} could not be made: {why_not_written(error)}.") from error
        save_text(file, text, overwrite=True)
    if listed is not None:
        entries = {name: entry for name, entry in listed.items() if name not in texts}
        entries |= {name: digest(folder / name) for name, text in texts.items() if text is not None}
        save_text(folder / MANIFEST_FILE, manifest_text(entries), overwrite=True)
