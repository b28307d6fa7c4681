"""The dense model that another is measured against: loaded where it is a name, and refused where it does not fit."""

import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.load import load_checkpoint
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.agreement import DenseOutputs
from optimum_otprune.models.changes import check_whole, is_pruned
from optimum_otprune.models.devices import is_spread
from optimum_otprune.models.inputs import input_device, vocabulary_size
from optimum_otprune.models.wrappers import unwrapped

_PROBE = "The 12 cafés\n\tcost 3.50 €; it's 日本語, isn’t it?  def f(x): return x**2"


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
    if options is None:
        device = input_device(model)
        place = "auto" if is_spread(model) else None if device.type == "cpu" else {"": device}
        options = check_loading_options({"device_map": place})
    given = loading_of_dense(options)
    given["dtype"] = model.dtype
    found = load_checkpoint(os.fspath(dense), given)
    check_same_text(found.model, model, found.tokenizer, tokenizer)
    return found.model


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
