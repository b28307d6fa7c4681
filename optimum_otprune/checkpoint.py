"""Save a model with its tokenizer, configuration, report and card; a folder is complete or not there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.architectures.remote_code import MODELING_FILE, modeling_code
from optimum_otprune.architectures.spec import find_spec
from optimum_otprune.card import model_card
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.devices import is_offloaded, known_as_offloaded, restore_ties
from optimum_otprune.errors import OutputError
from optimum_otprune.manifest import CARD_FILE, write_manifest
from optimum_otprune.option_checks import check_size
from optimum_otprune.plots import PLOT_FILE, can_plot, save_rescue_plot
from optimum_otprune.report import REPORT_FILE, PruningReport
from optimum_otprune.state import sync

_SPACE_MARGIN = 1.1
_SHARDS, _LEAST_SHARD = 20, 100 * 10**6  # of a model with offloaded weights


def check_output_folder(folder: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raise when `save_checkpoint` could not write there; called before hours of work, too.

    Args:
        folder: Where the result shall be.
        overwrite: Whether a folder that is not empty is replaced.
        needed_bytes: Expected size.

    Raises:
        OutputError: If the folder is a file, not empty, not writable, or on a disk without room.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output {folder.name!r} is a file. Choose the name of a folder.")
    if folder.is_symlink() or os.path.ismount(folder):
        raise OutputError(
            f"The output {folder.name!r} is a link or a mounted folder, which cannot appear complete or not at all. "
            "Give a folder inside it."
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"The output folder {folder.name!r} is not empty. Choose another, or set `overwrite` to replace it."
        )
    parent = folder.absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise OutputError(f"The folder {existing.name!r}, where {folder.name!r} shall be written, is not writable.")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * _SPACE_MARGIN:
        raise OutputError(
            f"The disk has {free / 1e9:.1f} GB free, but the result needs about {needed_bytes / 1e9:.1f} GB. Make "
            "room, or choose another output folder."
        )


def check_output_file(file: Path, overwrite: bool) -> None:
    """Raise when `save_text` could not write there.

    Args:
        file: Where the result shall be.
        overwrite: Whether a file is replaced.

    Raises:
        OutputError: If it is a folder, exists already, or its folder is missing or not writable.
    """
    if file.is_dir():
        raise OutputError(f"The output {file.name!r} is a folder. Give the name of a file.")
    if file.exists() and not overwrite:
        raise OutputError(f"The output file {file.name!r} exists. Choose another, or set `overwrite` to replace it.")
    folder = file.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder {folder.name!r}, where {file.name!r} shall be written, is missing or read-only."
        )


def save_text(file: Path, text: str, overwrite: bool) -> None:
    """Write a file that is complete or not there.

    Args:
        file: Where.
        text: What.
        overwrite: Whether a file is replaced.

    Raises:
        OutputError: See `check_output_file`; or if writing fails.
    """
    check_output_file(file, overwrite)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, file)
    except OSError as error:
        raise OutputError(f"The output file {file.name!r} could not be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the size of a model's weights, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def shard_size(model: PreTrainedModel, wanted: int | str | None) -> int | str:
    """Return what `max_shard_size` is by default: a shard of offloaded weights is loaded as a whole to be written.

    Raises:
        ConfigurationError: If what is wanted is no size.
    """
    if wanted is not None:
        return check_size("max_shard_size", wanted, least=1)
    return max(_LEAST_SHARD, weight_bytes(model) // _SHARDS) if is_offloaded(model) else "5GB"


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: OTPruningConfig,
    report: PruningReport | None,
    overwrite: bool,
    max_shard_size: int | str | None,
) -> Path:
    """Write everything into a hidden sibling folder, then rename it.

    Raises:
        OutputError: See `check_output_folder`; or if writing fails, in which case nothing of it stays.
    """
    restore_ties(model)
    check_output_folder(folder, overwrite, weight_bytes(model))
    with _writing(folder) as partial:
        _make_generation_config_valid(model)
        with known_as_offloaded(model):
            _save_model(model, partial, shard_size(model, max_shard_size))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config.save_pretrained(partial)
        if report is not None:
            report.save(partial / REPORT_FILE)
        has_plot = report is not None and bool(report.layers) and can_plot()
        if report is not None and has_plot:
            save_rescue_plot(report, partial / PLOT_FILE)
        card = model_card(config, report, folder.name, has_tokenizer=tokenizer is not None, has_plot=has_plot)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        write_manifest(partial)
        _make_durable(partial)
    return folder


def _save_model(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    """The model, with a modeling file if its layers differ in width."""
    if not getattr(model.config, "is_heterogeneous", False):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    code = modeling_code(model, find_spec(model)[1])
    model.config.auto_map = code.auto_map
    # Tensors named as the modeling file has them: transformers converts older names for its own classes only.
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    (folder / MODELING_FILE).write_text(code.text, encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one that takes its name when everything is written, and is gone otherwise."""
    target = folder.absolute()
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        yield partial
        _move_into_place(partial, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or type(error).__name__
        raise OutputError(
            f"The output folder {folder.name!r} could not be written: {reason}. Nothing was left there; the model in "
            "memory is unharmed, so save it again elsewhere."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, target: Path) -> None:
    old: Path | None = None
    try:
        if target.is_dir():
            if any(target.iterdir()):
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
                old.rmdir()
                os.rename(target, old)
            else:
                target.rmdir()
        os.rename(partial, target)
    finally:
        if old is not None and old.is_dir() and not target.exists():
            os.rename(old, target)  # the new one could not take its place
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    """Flush files to the disk, with the permissions that the umask allows (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
            sync(file)
    folder.chmod(0o777 & ~umask)
    sync(folder)


def _make_generation_config_valid(model: PreTrainedModel) -> None:
    """Sampling parameters without sampling load with a warning, but are refused when saved."""
    generation = getattr(model, "generation_config", None)
    if generation is None or generation.do_sample:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
