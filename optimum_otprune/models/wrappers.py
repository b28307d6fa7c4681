"""Wrappers around a model and adapters in it: they are removed where nothing is lost, and refused otherwise."""

import os

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.errors import ConfigurationError, UnsupportedModelError

_DYNAMIC = "transformers_modules."  # where transformers puts the code of repositories
_MERGE = "Merge the adapter first (`model = model.merge_and_unload()` of peft), and give the merged model."


def unwrapped(model: object) -> PreTrainedModel:
    """Return the model that a compiled or data-parallel one is made of, or the model itself.

    Args:
        model: A model in memory; its wrapper still works around the same model afterwards.

    Raises:
        UnsupportedModelError: If the object is a model of peft, or a module that is no model of transformers.
        ConfigurationError: If the object is no module at all.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "peft_config") and not hasattr(inner, "_orig_mod"):
            raise UnsupportedModelError(
                f"The model is of type {type(inner).__name__}, an adapter around a model, whose weights are not in "
                f"the layers that would be pruned. {_MERGE}"
            )
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)  # torch.compile; parallel ones
        if not isinstance(wrapped, nn.Module):
            break
        inner = wrapped
    if isinstance(inner, PreTrainedModel):
        return inner
    if isinstance(inner, nn.Module):
        raise UnsupportedModelError(
            f"The model is of type {type(inner).__name__}; want a `PreTrainedModel` of transformers. Load it by "
            "`AutoModelForCausalLM.from_pretrained`, or give its name or folder."
        )
    raise ConfigurationError(
        f"The model is of type {type(model).__name__}; want a `PreTrainedModel`, or, for `OTPruner.from_pretrained`, "
        "the name or folder of one."
    )


def checked_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer, or None if there is none.

    Raises:
        ConfigurationError: If the object is no tokenizer of transformers, such as the name of one.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    raise ConfigurationError(
        f"`tokenizer` is of type {type(tokenizer).__name__}; want a tokenizer of transformers. Load it by "
        "`AutoTokenizer.from_pretrained`, or leave it out for the model's own."
    )


def model_in_memory(model: object) -> PreTrainedModel | None:
    """Return the model, unwrapped, or None for a name or path of one.

    Raises:
        UnsupportedModelError: If `unwrapped` raises it.
        ConfigurationError: If `unwrapped` raises it.
    """
    return None if isinstance(model, (str, os.PathLike)) else unwrapped(model)


def check_plain(model: PreTrainedModel) -> None:
    """Raise if a model is compiled, or has adapters or code that would not be saved with it.

    Raises:
        UnsupportedModelError: If it is such a model; the message names the first adapted or compiled module, or the
            class whose code would not be saved.
    """
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
            raise UnsupportedModelError(
                f"The model has an adapter in it, first in {name!r}; saved, it would lack weights. Merge it first: "
                "load the model without the adapter, `PeftModel.from_pretrained(model, adapter).merge_and_unload()` "
                "of peft, and give the result."
            )
        is_compiled = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # the function alone
        if is_compiled or "_orig_mod" in parts or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"The module {name!r}" if name else "The model"
            raise UnsupportedModelError(
                f"{where} is compiled, so that nobody can look into it while it runs. Load the model without "
                "compiling it, and compile the pruned one."
            )
    for made in (model, model.config):
        if type(made).__module__.startswith(_DYNAMIC) and not has_own_code(made):
            raise UnsupportedModelError(
                f"{type(made).__name__} is code of a repository that would not be saved with the model. Load it by "
                "an auto class, such as `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`."
            )


def has_own_code(made: object) -> bool:
    """Return whether transformers saves the code of an object's class beside it, as it does for auto classes."""
    return getattr(type(made), "_auto_class", None) is not None
