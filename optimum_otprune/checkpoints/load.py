"""Load a model, pruned or not, with its tokenizer and the files of pruning, and name what is damaged."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_otprune.checkpoints.card.base_card import read_base_card
from optimum_otprune.checkpoints.sources import (
    ADAPTER_FILE,
    check_config,
    check_file,
    check_folder,
    explanation,
    loading_class,
)
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions, PlacementOptions
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ModelLoadError
from optimum_otprune.models.distributed import own_device
from optimum_otprune.pruning.dry_run.estimate import Skeleton
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.hub.client import is_hub_id, without_secrets_in_warnings
from optimum_otprune.storage.hub.options import HubOptions, part
from optimum_otprune.storage.hub.push import verify_saved
from optimum_otprune.storage.manifest import CARD_FILE, TOKENIZER_FILES
from optimum_otprune.storage.untrusted import visible, why_no_name

_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s'\"/]+/)+")  # of absolute paths, such as the cache's, but not of addresses
_LONGEST = 2000  # the longest quoted message in characters
# Whatever transformers, torch and the code of a model raise where its files are not what that code expects.
_FOREIGN = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    LookupError,
    TypeError,
    NameError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    StrictDataclassError,
)


class Checkpoint(NamedTuple):
    """The contents of a folder or repository.

    Attributes:
        model: The loaded model.
        tokenizer: The model's tokenizer, or None.
        config: The pruning configuration, or None if the model was not pruned by this package.
        report: The report, or None if the model was not pruned by this package.
        base_model: The Hub id of the dense model, or None if that is not known.
        base_card: License and language, from the base model's card or else from the card beside the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: OTPruningConfig | None
    report: PruningReport | None
    base_model: str | None
    base_card: Mapping[str, object]


def load_checkpoint(
    name: str,
    options: LoadingOptions,
    *,
    may_be_quantized: bool = False,
    quantization: QuantizationConfigMixin | None = None,
) -> Checkpoint:
    """Load a model with its tokenizer and the files that pruning left beside it.

    Args:
        name: Hub id or local folder.
        options: All options of loading, as `check_loading_options` returns them.
        may_be_quantized: Whether a model with quantized weights is taken, to be run only.
        quantization: How transformers quantizes the weights while it loads them; None leaves them as they are.

    Raises:
        ModelLoadError: If it cannot be found or read, or tensors are missing.
        IntegrityError: If it was to be verified and is not what was saved.
        HubError: If it was to be verified and the Hub does not answer.
    """
    name, options = _expanded(name, options)
    hub = part(HubOptions, options)
    with _loading(name):
        _check_source(name, may_be_quantized=may_be_quantized)
    if options["verify"]:
        commit = verify_saved(name, **hub)
        if commit is not None:
            hub["revision"] = commit  # load exactly the verified commit
    loader = _checked_loader(name, hub, may_be_quantized)
    remote = _remote(options)
    placement: dict[str, Any] = {**part(PlacementOptions, options)}
    device = own_device()
    if device is not None and "device_map" not in placement:
        placement["device_map"] = {"": device}  # each of several processes has the model on its own accelerator
    if options["load_in_8bit"]:
        placement["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if quantization is not None:
        placement["quantization_config"] = quantization
    with _loading(name):
        loaded: Any = loader.from_pretrained(
            name, **hub, **remote, **placement, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    _check_complete(name, info)
    return _with_files(name, model, hub, remote)


def load_without_weights(name: str, options: LoadingOptions) -> tuple[Checkpoint, Skeleton]:
    """Load all of a model but its weights: as a checkpoint whose model is on the meta device, and as a skeleton.

    Args:
        name: Hub id or local folder.
        options: All options of loading, as `check_loading_options` returns them.

    Raises:
        ModelLoadError: If a file cannot be found or read.
    """
    skeleton = load_skeleton(name, options)
    name, options = _expanded(name, options)
    return _with_files(name, skeleton.model, part(HubOptions, options), _remote(options)), skeleton


def _remote(options: LoadingOptions) -> dict[str, bool]:
    return {"trust_remote_code": bool(options["trust_remote_code"])}


def _with_files(name: str, model: PreTrainedModel, hub: HubOptions, remote: dict[str, bool]) -> Checkpoint:
    """Return a model with its tokenizer and the files that pruning left beside it."""
    config_file, report_file = (_optional_file(name, file, hub) for file in (CONFIG_FILE, REPORT_FILE))
    report = None if report_file is None else PruningReport.load(report_file)
    return Checkpoint(
        model,
        _load_tokenizer(name, hub, remote),
        None if config_file is None else OTPruningConfig.from_pretrained(config_file),
        report,
        report.base_model if report else hub_id(name),
        report.base_card if report else _base_card(name, hub),
    )


def load_skeleton(name: str, options: LoadingOptions) -> Skeleton:
    """Build a model from its configuration alone, on the meta device: it has shapes, but no weights.

    Args:
        name: Hub id or local folder.
        options: All options of loading, as `check_loading_options` returns them; `dtype="auto"` is the data type that
            the configuration names.

    Returns:
        The model, and whether a tokenizer lies beside it: not known of a Hub id, where only `config.json` is read.

    Raises:
        ModelLoadError: If the configuration cannot be found or read.
    """
    name, options = _expanded(name, options)
    hub = part(HubOptions, options)
    with _loading(name):
        _check_source(name, needs_weights=False)
    loader = _checked_loader(name, hub)
    remote = _remote(options)
    with _loading(name):
        config = AutoConfig.from_pretrained(name, **hub, **remote)
        dtype = _dtype(options["dtype"], config)
        with torch.device("meta"):
            model = loader.from_config(config, dtype=dtype, **remote)
    folder = Path(name)
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES) if folder.is_dir() else None
    return Skeleton(model, options, has_tokenizer)


def _expanded(name: str, options: LoadingOptions) -> tuple[str, LoadingOptions]:
    """Expand `~` in a name and in options that are paths, after checking the name."""
    reason = why_no_name(os.path.expanduser(name))
    if reason is not None:
        raise ModelLoadError(
            f"{visible(name, 60)!r} is the name of no model ({reason}). Give a folder, or a Hub id of the form "
            "'user/name'."
        )
    expanded = options.copy()
    if options["cache_dir"] is not None:
        expanded["cache_dir"] = os.path.expanduser(options["cache_dir"])
    if options["offload_folder"] is not None:
        expanded["offload_folder"] = os.path.expanduser(options["offload_folder"])
    return os.path.expanduser(name), expanded


def _dtype(asked: object, config: PreTrainedConfig) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    named = getattr(config, "dtype", None) if asked in (None, "auto") else asked
    return named if isinstance(named, torch.dtype) else _named_dtype(str(named or "float32"))


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no data type of torch, such as 'bfloat16'")
    return dtype


def hub_id(name: str | None) -> str | None:
    """Return the name if it is a Hub id rather than a path of this machine."""
    return name if name and not os.path.exists(name) and is_hub_id(name) else None


def _check_source(name: str, needs_weights: bool = True, may_be_quantized: bool = False) -> None:
    path = Path(name)
    if path.is_dir():
        check_folder(path, needs_weights, may_be_quantized)
    elif path.is_file():
        check_file(path)
    elif hub_id(name) is None:
        raise ModelLoadError(f"{path.name[:80]!r} is neither a folder nor a valid Hub id of the form 'user/name'.")


def _checked_loader(name: str, hub: HubOptions, may_be_quantized: bool = False) -> Any:
    """Return the auto class that loads a model; the configuration of one of the Hub is checked as that of a folder."""
    with _loading(name):
        config, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if not Path(name).is_dir():
        check_config(_shown(name), config, _optional_file(name, ADAPTER_FILE, hub) is not None, may_be_quantized)
    return getattr(transformers, loading_class(config))


@contextmanager
def _loading(name: str, is_tokenizer: bool = False) -> Iterator[None]:
    shown = _shown(name)
    within = f"{shown[0].lower()}{shown[1:]}"
    try:
        with without_secrets_in_warnings():
            yield
    except SafetensorError as error:
        raise ModelLoadError(
            f"The weights of {within} are damaged ({visible(str(error), _LONGEST)}). Download or copy them "
            "again; a file of a few hundred bytes is a git-lfs pointer."
        ) from error
    except _FOREIGN as error:
        if isinstance(error, ModelLoadError):
            raise
        why = explanation(error, Path(name).is_dir(), is_tokenizer)
        what = f"The tokenizer of {within}" if is_tokenizer else shown
        raise ModelLoadError(f"{what} could not be loaded: {why}. ({_without_path(error, name)})") from error


def _without_path(error: Exception, name: str) -> str:
    """Return the first line of an error, in which a local folder is named by its last part only."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for path in (str(Path(name).resolve()), str(Path(name).absolute()), name) if Path(name).exists() else ():
        line = line.replace(path, Path(name).resolve().name)
    return visible(_FOLDERS.sub("", line), _LONGEST)


def _shown(name: str) -> str:
    return f"The folder {Path(name).name!r}" if Path(name).is_dir() else f"The model {name!r}"


def _check_complete(name: str, info: Mapping[str, Iterable[object] | None]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(visible(str(key)) for key in info.get(kind) or ())
        if found:
            raise ModelLoadError(
                f"{_shown(name)} lacks weights that fit its configuration: {kind.replace('_', ' ')} "
                f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}. They would have been filled with random "
                "numbers. Download it again."
            )


def _load_tokenizer(name: str, hub: HubOptions, remote: dict[str, bool]) -> PreTrainedTokenizerBase | None:
    """Return None only where there is no tokenizer; one that cannot be read is an error."""
    if all(_optional_file(name, file, hub) is None for file in TOKENIZER_FILES):
        return None
    with _loading(name, is_tokenizer=True):
        return AutoTokenizer.from_pretrained(name, **hub, **remote)


def _optional_file(name: str, file: str, hub: HubOptions) -> str | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    with _loading(name):
        return cached_file(
            name,
            file,
            **hub,
            _raise_exceptions_for_gated_repo=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=True,
        )


def _base_card(name: str, hub: HubOptions) -> dict[str, object]:
    """Read license and language from the card, if there is one and it can be reached; it is not required."""
    if Path(name).is_dir():
        file = _optional_file(name, CARD_FILE, hub)
    else:
        file = cached_file(
            name,
            CARD_FILE,
            **hub,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None:
        return {}
    with _loading(name):
        return read_base_card(Path(file).read_text(encoding="utf-8", errors="replace"))
