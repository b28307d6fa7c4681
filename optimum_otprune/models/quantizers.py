"""How a model is quantized as transformers loads it, and whether its widths fit. The only door to torchao.

The widths that fit were read from torchao 0.18 (`quantize_affine`, which wants whole groups) and bitsandbytes 0.50
(`_convert_weight_packed_for_cpu`, which wants whole blocks in a row and 32 rows at a time).
"""

import math
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_otprune.errors import ConfigurationError, MissingExtraError, UnsupportedModelError, unknown_name
from optimum_otprune.models.architectures import find_spec
from optimum_otprune.models.defaults import SCHEMES
from optimum_otprune.models.find_ffns import known_blocks

_GROUP = 32  # weights of torchao's int4 that share a scale: the smallest group that its kernels know


class Scheme(NamedTuple):
    """One way to quantize the weights of linear layers.

    Attributes:
        name: Its name, one of `SCHEMES`.
        library: The library that does it, and that the result needs to be loaded.
        words: What it does to a weight.
        columns: The number that the inputs of a layer are a multiple of.
        rows: The number that its outputs are a multiple of.
        kinds: The classes of layers that it knows.
    """

    name: str
    library: str
    words: str
    columns: int
    rows: int
    kinds: tuple[type[nn.Module], ...]


_LINEAR = (nn.Linear,)
_SCHEMES = {
    "int8": Scheme("int8", "torchao", "8 bits, one scale for each output", 1, 1, _LINEAR),
    "int4": Scheme("int4", "torchao", f"4 bits, one scale for {_GROUP} weights", _GROUP, 1, _LINEAR),
    "nf4": Scheme("nf4", "bitsandbytes", "4 bits (NF4), one scale for 64 weights", 64, 32, (nn.Linear, Conv1D)),
}
assert tuple(_SCHEMES) == SCHEMES


class QuantizedLayer(NamedTuple):
    """A layer whose weight is to be quantized.

    Attributes:
        name: Its name in the model.
        inputs: Number of its inputs.
        outputs: Number of its outputs.
    """

    name: str
    inputs: int
    outputs: int


def scheme_named(name: object) -> Scheme:
    """Return a scheme by its name.

    Raises:
        ConfigurationError: If there is none.
    """
    if not isinstance(name, str) or name not in _SCHEMES:
        raise ConfigurationError(unknown_name("`scheme`", name, SCHEMES))
    return _SCHEMES[name]


def library_version(scheme: Scheme) -> str:
    """Return the version of the library that a scheme needs.

    Raises:
        MissingExtraError: If it is not installed; the message names the extra.
    """
    try:
        import_module(scheme.library)
        return version(scheme.library)
    except (ImportError, PackageNotFoundError) as error:
        raise MissingExtraError(
            f"`{scheme.name}` needs {scheme.library}, which is not installed. Install it by "
            "`pip install 'optimum_otprune[quantize]'`."
        ) from error


def quantization_config(scheme: Scheme, dtype: torch.dtype) -> QuantizationConfigMixin:
    """Return the configuration by which transformers quantizes a model while it loads it.

    Args:
        scheme: The scheme, whose library is installed.
        dtype: Data type of the weights that stay as they are, and of computing with the others.
    """
    if scheme.library == "bitsandbytes":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao import quantization as ao

    if scheme.name == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    four_bits = ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=ao.PerGroup(_GROUP),
        mapping_type=ao.MappingType.ASYMMETRIC,
    )
    return TorchAoConfig(four_bits)


def quantized_layers(model: PreTrainedModel, scheme: Scheme) -> list[QuantizedLayer]:
    """Return the layers whose weights a scheme quantizes: those that transformers does not keep as they are.

    Args:
        model: The model; its weights are not read.
        scheme: The scheme.
    """
    kept = tuple(get_keys_to_not_convert(model))
    found = []
    for name, module in model.named_modules():
        if isinstance(module, scheme.kinds) and not any(name == key or name.startswith(f"{key}.") for key in kept):
            outputs, inputs = module.get_parameter("weight").shape[:: -1 if isinstance(module, Conv1D) else 1]
            found.append(QuantizedLayer(name, inputs, outputs))
    return found


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether a model has quantized weights, by whichever library."""
    return getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None


def quantized_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many parameters a quantized model has, and their bytes in memory; shared ones count once."""
    size = 0
    for parameter in model.parameters():
        inner = [getattr(parameter, name) for name in getattr(parameter, "tensor_data_names", ())]  # of torchao
        scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)  # of bitsandbytes
        parts = [*(inner or [parameter.data]), *([] if scales is None else [scales])]
        size += sum(part.numel() * part.element_size() for part in parts)
    return model.num_parameters(), size


def quantized_widths(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the channels of each FFN of a quantized model, as its linear layers note them."""
    widths = []
    for block in known_blocks(model, find_spec(model)[1]):
        up = block.projection("up")
        width = getattr(up, "out_features", None) or getattr(up, "nf", None) or 0
        widths.append(width // block.spec.slots["up"].parts)
    return tuple(widths)


def check_fits(model: PreTrainedModel, scheme: Scheme, ffn_widths: Collection[int]) -> list[QuantizedLayer]:
    """Return the layers that a scheme quantizes, or raise an error if one has a width that does not fit.

    Args:
        model: The model; its weights are not read.
        scheme: The scheme.
        ffn_widths: The widths that pruning left the FFNs, which pruning again can change.

    Raises:
        UnsupportedModelError: If a width does not fit, or there is no layer to quantize; the message says what to do.
    """
    layers = quantized_layers(model, scheme)
    if not layers:
        raise UnsupportedModelError(
            f"{scheme.library} finds nothing to quantize in this {type(model).__name__}: it knows layers of the kind "
            f"{' and '.join(kind.__name__ for kind in scheme.kinds)} alone. Take another scheme, or another format."
        )
    for layer in layers:
        sides = ((layer.inputs, scheme.columns, "inputs"), (layer.outputs, scheme.rows, "outputs"))
        for count, multiple, what in sides:
            if count % multiple == 0:
                continue
            least = math.lcm(scheme.columns, scheme.rows)
            again = f"Prune again with `--multiple-of {least}` (`multiple_of={least}`), or take `int8`"
            raise UnsupportedModelError(
                f"`{scheme.name}` does not fit this model: {layer.name} has {count:,} {what}, and {scheme.library} "
                f"takes multiples of {multiple}. {again if count in ffn_widths else 'Take `int8`'}, which fits all "
                "widths."
            )
    return layers
