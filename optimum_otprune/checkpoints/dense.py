"""The dense model that another is measured against: loaded where it is a name, and refused where it does not fit."""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.check_loading import check_loading_options, refuse_loading_options
from optimum_otprune.checkpoints.load import load_checkpoint, load_skeleton
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError, warn_user
from optimum_otprune.models.agreement import DenseOutputs
from optimum_otprune.models.changes import check_whole, is_pruned
from optimum_otprune.models.devices import is_offloaded, is_spread, read_parameter
from optimum_otprune.models.inputs import input_device, vocabulary_size
from optimum_otprune.models.wrappers import model_in_memory, unwrapped
from optimum_otprune.pruning.dry_run.estimate import Skeleton

_ROWS = 1024  # of the embeddings that are compared
_SAME = 0.01  # relative distance of embeddings that rounding to 16 or 8 bits stays below
_PROBE = "The 12 cafés\n\tcost 3.50 €; it's 日本語, isn’t it?  def f(x): return x**2"


class Compared(NamedTuple):
    """A model that is measured against the dense one, or trained towards it.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def dense_reference(
    dense: PreTrainedModel | DenseOutputs | str | os.PathLike | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: LoadingOptions | None = None,
) -> PreTrainedModel | DenseOutputs | None:
    """Return the dense model that a model is measured against.

    Args:
        dense: A model in memory, what was kept of one, or the folder or Hub id of one, which is loaded in the data
            type of `model`.
        model: The model that is measured.
        tokenizer: The tokenizer of that model, or None.
        options: The options that `model` was loaded by; without, the dense model goes to the same device, or is
            spread as `device_map="auto"` does where `model` is spread.

    Raises:
        ModelLoadError: If the dense model cannot be loaded.
        UnsupportedModelError: If `check_same_text` refuses it.
    """
    if dense is None or isinstance(dense, DenseOutputs):
        return dense
    if not isinstance(dense, (str, os.PathLike)):
        loaded = unwrapped(dense)
        check_same_text(loaded, model)
        return loaded
    given = _beside(model) if options is None else loading_of_dense(options)
    given["dtype"] = model.dtype
    return _loaded(os.fspath(dense), given, Compared(model, tokenizer), check_same_text)


def loading_of_dense(options: LoadingOptions) -> LoadingOptions:
    """Return the options by which the dense model is loaded beside another one.

    A revision and a manifest are those of the other model, and two models would overwrite each other's offloaded
    layers in one folder.

    Args:
        options: The options of loading the other model.
    """
    found = options.copy()
    found["revision"], found["verify"] = None, False
    folder = found.get("offload_folder")
    if folder is not None:
        found["offload_folder"] = os.path.join(folder, "dense")
    return found


def load_base(
    given: str | os.PathLike | PreTrainedModel | None,
    pruned: Compared,
    known: str | None,
    options: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Return the dense model that a pruned one was made from; one that does not fit is refused.

    Args:
        given: The model, or its Hub id or folder; None for the one that is known.
        pruned: The pruned model.
        known: Where the dense model is, as far as that was noted; None if it was not.
        options: Options of loading; by default it gets the pruned model's dtype and device.

    Raises:
        ConfigurationError: If it is not known.
        UnsupportedModelError: If it is pruned itself, or of other sizes than the pruned model.
        ModelLoadError: If it cannot be found or read.
    """
    loading = _loading_of_base(pruned, options)
    model = None if given is None else model_in_memory(given)
    if model is not None:
        refuse_loading_options(check_loading_options(_given(options)))
        _check_base(model, pruned.model)
        _warn_of_other_embeddings(model, pruned.model)
        return model
    source = _source_of_base(given, pruned, known)
    dense = _loaded(source, loading, pruned, _check_base)
    _warn_of_other_embeddings(dense, pruned.model)
    return dense


def base_skeleton(
    given: str | os.PathLike | PreTrainedModel | None,
    pruned: Compared,
    known: str | None,
    options: Mapping[str, object] | None = None,
) -> Skeleton:
    """Return what `load_base` would load, without its weights.

    Args:
        given: The model, or its Hub id or folder; None for the one that is known.
        pruned: The pruned model.
        known: Where the dense model is, as far as that was noted; None if it was not.
        options: Options of loading, as in `load_base`.

    Raises:
        OTPruneError: Whatever `load_base` raises before it reads weights.
    """
    model = None if given is None else model_in_memory(given)
    if model is not None:
        _check_base(model, pruned.model)
        return Skeleton.of_loaded(model)
    skeleton = load_skeleton(_source_of_base(given, pruned, known), _loading_of_base(pruned, options))
    _check_base(skeleton.model, pruned.model)
    return skeleton


def _source_of_base(given: object, pruned: Compared, known: str | None) -> str:
    source = known or pruned.model.name_or_path if given is None else str(given)
    if not source:
        raise ConfigurationError(
            "It is not known from which dense model this one was made. Give it as `base_model` (`--base`): a Hub id, "
            "a folder or a model in memory."
        )
    return source


def _loading_of_base(pruned: Compared, options: Mapping[str, object] | None) -> LoadingOptions:
    return check_loading_options({**_beside(pruned.model), **_given(options)})


def _given(options: Mapping[str, object] | None) -> dict[str, object]:
    return {name: value for name, value in (options or {}).items() if value is not None}


def _beside(model: PreTrainedModel) -> LoadingOptions:
    """Return the options by which a model gets the dtype and the place of another one."""
    device = input_device(model)
    place = "auto" if is_spread(model) else None if device.type in ("cpu", "meta") else {"": device}
    return check_loading_options({"device_map": place, "dtype": model.dtype})


def _loaded(
    source: str,
    options: LoadingOptions,
    compared: Compared,
    check: Callable[[PreTrainedModel, PreTrainedModel], None],
) -> PreTrainedModel:
    """Load the dense model; if its configuration shows that it does not fit, its weights are not read."""
    check(load_skeleton(source, options).model, compared.model)
    found = load_checkpoint(source, options)
    check(found.model, compared.model)
    check_same_text(found.model, compared.model, found.tokenizer, compared.tokenizer)
    return found.model


def _check_base(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Raise an error if a model cannot be the one that was pruned."""
    check_same_text(dense, pruned)
    for what in ("hidden_size", "num_hidden_layers"):
        sizes = [getattr(model.config.get_text_config(), what) for model in (dense, pruned)]
        if sizes[0] != sizes[1]:
            raise UnsupportedModelError(
                f"The dense model has `{what}={sizes[0]:,}`, the pruned one {sizes[1]:,}: it was not made from it. "
                "Give the model that was pruned as `base_model` (`--base`)."
            )


def _warn_of_other_embeddings(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Warn if a model's embeddings are not those of the pruned one: pruning leaves them, though training does not."""
    one, other = (_first_embeddings(model) for model in (dense, pruned))
    if one is None or other is None:
        return
    distance = float((one - other).norm() / other.norm().clamp(min=1e-30))
    if not distance <= _SAME:
        warn_user(
            f"The embeddings of the dense model differ from those of the pruned one by {distance:.0%}: unless one of "
            "them was trained since, it is not the model that was pruned, and the pruned one is trained towards "
            "another. Give the model that was pruned as `base_model` (`--base`)."
        )


def _first_embeddings(model: PreTrainedModel) -> Tensor | None:
    """Return the embeddings of some tokens, `(tokens, hidden_size)`; None where there are no values of them."""
    owner = model.get_input_embeddings()
    weight = owner._parameters["weight"]
    if weight is None or not weight.is_floating_point() or weight.is_meta and not is_offloaded(owner):
        return None
    found = read_parameter(owner, "weight")
    return None if found is None else found[:_ROWS].float().cpu()


def check_same_text(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise an error unless two models can be asked for the same tokens, and the first one is dense.

    Args:
        dense: The dense model.
        model: The model that is measured against it.
        dense_tokenizer: The tokenizer of the dense model; None if there is none, or it is not known.
        tokenizer: The tokenizer of the other model; the same.

    Raises:
        UnsupportedModelError: If the dense model is pruned, or vocabularies or tokenizers differ.
        HalfPrunedError: If the dense model is half-pruned.
    """
    check_whole(dense)
    if is_pruned(dense):
        raise UnsupportedModelError(
            "The model that is taken for the dense one is pruned itself. Give the one that was pruned."
        )
    sizes = vocabulary_size(dense), vocabulary_size(model)
    if sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"The dense model's vocabulary has {sizes[0]:,} tokens, that of the other {sizes[1]:,}, so their "
            "predictions cannot be compared. Give the model that was pruned."
        )
    if dense_tokenizer is None or tokenizer is None:
        return
    ids = [one(_PROBE, add_special_tokens=False)["input_ids"] for one in (dense_tokenizer, tokenizer)]
    if ids[0] != ids[1] or dense_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UnsupportedModelError(
            "The two models have different tokenizers: the same text has other token ids for each. Give the dense "
            "model that was pruned, with the tokenizer that it had then."
        )
