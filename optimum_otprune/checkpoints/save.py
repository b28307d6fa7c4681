"""Save a model with its tokenizer, configuration, report and card; a folder is complete or not there."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.card.eval_results import EVAL_RESULTS_FILE, eval_results
from optimum_otprune.checkpoints.card.plots import PLOT_FILE, can_plot, save_rescue_plot
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.checkpoints.model_files import save_model_files
from optimum_otprune.config.checks import check_size
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.compatibility import reads_in_older_versions
from optimum_otprune.models.devices import is_offloaded, restore_ties, savable_if_offloaded, weight_bytes
from optimum_otprune.models.faithfulness import check_logits, check_parameters
from optimum_otprune.models.loadable import check_loadable
from optimum_otprune.models.save_formats import save_format
from optimum_otprune.models.wrappers import check_plain
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.files import writing_folder
from optimum_otprune.storage.manifest import CARD_FILE, write_manifest
from optimum_otprune.storage.outputs import resolved_output

_SHARDS, _LEAST_SHARD = 20, 100 * 10**6  # of a model with offloaded weights


def shard_size(model: PreTrainedModel, wanted: int | str | None) -> int | str:
    """Return the default of `max_shard_size`; a shard of offloaded weights is loaded whole to be written.

    Raises:
        ConfigurationError: If what is wanted is no size.
    """
    if wanted is not None:
        return check_size("max_shard_size", wanted, least=1)
    return max(_LEAST_SHARD, weight_bytes(model) // _SHARDS) if is_offloaded(model) else "5GB"


class Contents(NamedTuple):
    """A model with all that is saved beside it.

    Attributes:
        model: The model, pruned or not.
        tokenizer: The model's tokenizer, or None.
        config: The configuration that the model was, or will be, pruned by.
        report: The report of pruning; None for a model that is not pruned yet.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: OTPruningConfig
    report: PruningReport | None


def save_checkpoint(
    folder: Path,
    contents: Contents,
    overwrite: bool,
    max_shard_size: int | str | None,
    places: Mapping[str, Path],
    name: str | None = None,
) -> Path:
    """Write everything into a hidden sibling folder, then rename it.

    Args:
        folder: The folder to write; it must not exist, or be empty, unless `overwrite`.
        contents: The model and what is saved with it.
        overwrite: Whether a folder that holds a saved model and nothing else is replaced.
        max_shard_size: The most bytes of one safetensors file; None is the default of `shard_size`.
        places: Folders and files of the user that must not be written into, by what they are.
        name: The model's name on its card; None is the folder's name.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder cannot be written, or holds what may not be replaced.
        ConfigurationError: If `overwrite` is not True or False.
        NumericalError: If a parameter is NaN or infinite, which is named, or the logits are.
        UnsupportedModelError: If modules were put into the model that could not be loaded again.
        RegistryError: If layers differ in width and the configuration's save format is not registered here.
    """
    if not isinstance(overwrite, bool):
        raise ConfigurationError(f"`overwrite` is {overwrite!r}; want True or False.")
    model, tokenizer, config, report = contents
    if report is not None and len(set(report.widths)) > 1:
        save_format(config.non_uniform_format)
    check_plain(model)
    restore_ties(model)
    check_loadable(model)
    with writing_folder(folder, overwrite, weight_bytes(model), places) as partial, _known_failures():
        check_parameters(model)
        check_logits(model)
        restore_ties(model)  # reading offloaded weights has separated tied ones
        with savable_if_offloaded(model):
            save_model_files(partial, model, tokenizer, shard_size(model, max_shard_size))
        (partial / CONFIG_FILE).write_text(config.to_json_string(), encoding="utf-8")
        if report is not None:
            report.save(partial / REPORT_FILE)
            _save_eval_results(report, partial / EVAL_RESULTS_FILE)
        has_plot = report is not None and bool(report.layers) and can_plot()
        if report is not None and has_plot:
            save_rescue_plot(report, partial / PLOT_FILE)
        older = reads_in_older_versions(partial)
        shown = resolved_output(folder).name if name is None else name
        card = model_card(config, report, shown, tokenizer is not None, has_plot, older)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        write_manifest(partial)
    return folder


def _save_eval_results(report: PruningReport, file: Path) -> None:
    """Write what the Hub reads of results that were added to a model before it was loaded, if there are any."""
    text = eval_results(report.tasks)
    if text is not None:
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")


@contextmanager
def _known_failures() -> Iterator[None]:
    """Make a full disk an `OSError`, whichever library meets it."""
    try:
        yield
    except SafetensorError as error:
        full = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(full, os.strerror(full)) from error
