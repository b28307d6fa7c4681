"""Find and load the dense model that a pruned one was made from."""

import os
from collections.abc import Mapping

from transformers import PreTrainedModel

from optimum_otprune.checkpoints.check_loading import check_loading_options, refuse_loading_options
from optimum_otprune.checkpoints.dense import check_same_text
from optimum_otprune.checkpoints.load import load_checkpoint, load_skeleton
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError
from optimum_otprune.models.devices import is_spread
from optimum_otprune.models.wrappers import model_in_memory


def load_base(
    given: str | os.PathLike | PreTrainedModel | None,
    pruned: PreTrainedModel,
    known: str | None,
    options: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Return the dense model; one that does not fit is refused before its weights are read.

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
    loading = check_loading_options(options or {})
    model = None if given is None else model_in_memory(given)
    if model is not None:
        refuse_loading_options(loading)
        _check(model, pruned)
        return model
    source = known or pruned.name_or_path if given is None else str(given)
    if not source:
        raise ConfigurationError(
            "It is not known from which dense model this one was made. Give it as `base_model` (`--base`): a Hub id, "
            "a folder or a model in memory."
        )
    if not options or "dtype" not in options:
        loading["dtype"] = pruned.dtype
    if (not options or "device_map" not in options) and pruned.device.type != "cpu":
        loading["device_map"] = "auto" if is_spread(pruned) else str(pruned.device)
    _check(load_skeleton(source, loading).model, pruned)
    return load_checkpoint(source, loading).model


def _check(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    check_same_text(dense, pruned)
    for what in ("hidden_size", "num_hidden_layers"):
        sizes = [getattr(model.config.get_text_config(), what) for model in (dense, pruned)]
        if sizes[0] != sizes[1]:
            raise UnsupportedModelError(
                f"The dense model has `{what}={sizes[0]:,}`, the pruned one {sizes[1]:,}: it was not made from it. "
                "Give the model that was pruned as `base_model` (`--base`)."
            )
