"""The card of a saved folder, rendered from the configuration and report in it."""

import os
from pathlib import Path

from optimum_otprune.checkpoints.card.plots import PLOT_FILE
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.config.options_file import CONFIG_FILE, read_options
from optimum_otprune.errors import ReportError
from optimum_otprune.models.compatibility import reads_in_older_versions
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.files import save_text
from optimum_otprune.storage.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    digest,
    manifest_text,
    read_manifest,
)


def folder_card(folder: Path, name: str | None = None, has_tokenizer: bool | None = None) -> str:
    """Render the card of a folder that `OTPruner.save_pretrained` wrote.

    Args:
        folder: A folder with `otprune_config.json`; if it has no report, the model was not pruned yet.
        name: What the card calls the model; default: the folder's name.
        has_tokenizer: Whether a tokenizer belongs to the model; default: whether its files are in the folder.

    Raises:
        ReportError: If there is no configuration, or the report is damaged.
        ConfigurationError: If the configuration is damaged.
    """
    if not os.path.isfile(folder / CONFIG_FILE):
        raise ReportError(f"{folder.name!r} has no {CONFIG_FILE}: it is no folder that `otprune prune` wrote.")
    report_file = folder / REPORT_FILE
    if has_tokenizer is None:
        has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return model_card(
        read_options(folder / CONFIG_FILE),
        PruningReport.load(report_file) if report_file.is_file() else None,
        folder.resolve().name if name is None else name,
        has_tokenizer=has_tokenizer,
        has_plot=(folder / PLOT_FILE).is_file(),
        older_names=reads_in_older_versions(folder),
    )


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
    file, manifest = folder / CARD_FILE, folder / MANIFEST_FILE
    listed = read_manifest(folder) if manifest.is_file() else None
    differs = file.is_file() and file.read_bytes() != text.encode()
    if differs and listed is not None:
        differs = digest(file) != listed.get(CARD_FILE)
    save_text(file, text, overwrite=True)
    if listed is not None:
        save_text(manifest, manifest_text({**listed, CARD_FILE: digest(file)}), overwrite=True)
    return differs
