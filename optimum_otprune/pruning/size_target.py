"""From a target, in parameters or bytes, to the widest FFNs that meet it."""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.quantities import COUNT_UNITS, SIZE_UNITS, parse_quantity, parse_share
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.find_ffns import dense_width
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.save_formats import save_format
from optimum_otprune.pruning.prune_heads import cost_of_heads, planned_heads
from optimum_otprune.pruning.widths import given_widths, plan_widths, width_multiple

_LARGE_OFFSET = 10**15  # larger than any weights file
_LARGEST_RATIO = 999  # thousandths
_FILE_BYTES = 256  # bytes of the length field, format note and padding of a weights file


class Footprint(NamedTuple):
    """Parameters, or bytes, of a model as a function of the width that all its FFNs have.

    Attributes:
        fixed: Parameters, or bytes, of everything but the channels.
        per_channel: Parameters, or bytes, of one channel in every layer.
    """

    fixed: int
    per_channel: int

    def at(self, width: int) -> int:
        """Return the parameters, or bytes, of the model with FFNs of this width."""
        return self.fixed + self.per_channel * width

    def widest(self, target: int, multiple_of: int) -> int:
        """Return the largest multiple whose footprint is at most the target; 0 or less if there is none.

        Example:
            >>> Footprint(fixed=1000, per_channel=30).widest(2500, 16)
            48
        """
        return (target - self.fixed) // self.per_channel // multiple_of * multiple_of


def with_pruning_ratio(config: OTPruningConfig, prunable: PrunableModel) -> OTPruningConfig:
    """Return the configuration with a ratio in place of its target; one without a target is returned as it is.

    The ratio is the smallest for which the pruned model does not exceed the target: the kept width is rounded down to
    `multiple_of`, and where the configuration may add biases to the FFNs (`intercept`), they are counted.

    Args:
        config: A configuration with `pruning_ratio`, `target_parameters` or `target_size`.
        prunable: The dense model.

    Raises:
        ConfigurationError: If the model meets the target already, or could not meet it with one multiple of channels.
        UnsupportedModelError: If the layers differ in width.
    """
    if config.pruning_ratio is not None:
        return config
    model, blocks = prunable.model, prunable.blocks
    name = "target_parameters" if config.target_parameters is not None else "target_size"
    given = getattr(config, name)
    unit = "parameters" if name == "target_parameters" else "bytes"
    target = target_count(config, model)
    decided = given_widths(blocks, config)
    if len(decided) == len(blocks):
        raise ConfigurationError(
            f"`{name}={given!r}` would be ignored: options for single layers or kinds decide the width of every "
            "layer. Leave one of them out."
        )
    if len(set(prunable.widths)) > 1:
        return config.replace(pruning_ratio=_searched_ratio(prunable, config, unit, target))
    width = dense_width(blocks)
    _check_format(config, name, decided)
    dense = _footprint(prunable, unit, with_biases=False).at(width)
    if target >= dense:
        raise ConfigurationError(
            f"`{name}={given!r}` asks for no pruning: the model has {dense:,} {unit} now. Give a smaller target."
        )
    multiple = width_multiple(width, config)
    may_add_biases = config.intercept in ("auto", "always") and prunable.can_hold_intercept
    footprint = _footprint(prunable, unit, may_add_biases, decided)
    footprint = footprint._replace(
        fixed=footprint.fixed - cost_of_heads(planned_heads(prunable, config), config, unit)
    )
    kept = footprint.widest(target, multiple)
    if kept < multiple:
        smallest, whole = footprint.at(multiple), _tensor_total(model, unit)
        held = sum(channel_cost(block, unit) for block in blocks) * width / whole
        share = math.ceil(1000 * smallest / whole) / 10  # rounded up, so that it is enough
        raise ConfigurationError(
            f"`{name}={given!r}` cannot be met: only FFNs are pruned, which hold {held:.0%} of the model's {whole:,} "
            f"{unit}. The smallest that can be had is {smallest:,} ({share}%), with {multiple} of {width} channels "
            "left in every FFN that may be pruned; give that or more."
        )
    return config.replace(pruning_ratio=max(0.0, 1 - kept / width))


def _searched_ratio(prunable: PrunableModel, config: OTPruningConfig, unit: str, target: int) -> float:
    """Return the smallest ratio, in thousandths, with which a model whose FFNs differ in width meets a target.

    Raises:
        ConfigurationError: If the model meets it already, or no ratio does.
    """
    blocks, costs = prunable.blocks, [channel_cost(block, unit) for block in prunable.blocks]
    header = _header_bytes(_saved_tensors(prunable.model), added=0) if unit == "bytes" else 0
    whole = _tensor_total(prunable.model, unit) + header
    with_fewer_heads = whole - cost_of_heads(planned_heads(prunable, config), config, unit)

    def size(thousandths: int) -> int:
        widths = plan_widths(blocks, config.replace(pruning_ratio=thousandths / 1000))
        removed = sum((before - width) * cost for before, width, cost in zip(prunable.widths, widths, costs))
        return with_fewer_heads - removed

    if whole <= target or size(_LARGEST_RATIO) > target:
        raise ConfigurationError(
            f"A target of {target:,} {unit} cannot be met: the model has {whole:,} now, and {size(_LARGEST_RATIO):,} "
            "is the smallest that pruning leaves of it. Give one between."
        )
    return bisect_left(range(_LARGEST_RATIO), True, key=lambda ratio: size(ratio) <= target) / 1000


def target_count(config: OTPruningConfig, model: PreTrainedModel) -> int:
    """Return the parameters, or bytes, that a configuration's target allows the pruned model.

    A share refers to the dense model's parameters, or to the bytes of its weights, tied ones once; fractions are cut
    off.

    Args:
        config: A configuration with `target_parameters` or `target_size`.
        model: The dense model.
    """
    given, unit, units = config.target_size, "bytes", SIZE_UNITS
    if config.target_parameters is not None:
        given, unit, units = config.target_parameters, "parameters", COUNT_UNITS
    assert given is not None
    share = parse_share(given)
    return parse_quantity(given, units) if share is None else math.floor(share * _tensor_total(model, unit))


def _check_format(config: OTPruningConfig, name: str, decided: Mapping[int, int]) -> None:
    """Raise an error if layers are filled up with zeros to a width that is unknown before the end."""
    if (config.allocation == "adaptive" or decided) and save_format(config.non_uniform_format).fills_up:
        raise ConfigurationError(
            f"`{name}` cannot be met by layers of different widths that are filled up to the widest. Use "
            "non_uniform_format='per_layer_config', allocation='uniform' without `skip_layers` and `layer_ratios`, or "
            "`pruning_ratio`."
        )


def _footprint(
    prunable: PrunableModel, unit: str, with_biases: bool, decided: Mapping[int, int] = MappingProxyType({})
) -> Footprint:
    """Return the footprint of the model as it is, or with the biases that its FFNs may gain.

    Layers whose width is decided already count as fixed.
    """
    blocks, tensors = prunable.blocks, _saved_tensors(prunable.model)
    fixed = _tensor_total(prunable.model, unit)
    if unit == "bytes":
        fixed += _header_bytes(tensors, added=3 * len(blocks) if with_biases else 0)
    per_channel = 0
    for block in blocks:
        now = channel_cost(block, unit)
        added_once, added_each = added_biases(block, unit) if with_biases else (0, 0)
        # Subtract the present channels, and add biases that pruning may add.
        fixed += added_once - now * block.intermediate_size
        if block.layer in decided:
            fixed += (now + added_each) * decided[block.layer]
        else:
            per_channel += now + added_each
    return Footprint(fixed, per_channel)


def _tensor_total(model: PreTrainedModel, unit: str) -> int:
    return sum(tensor.numel() * _cost(tensor, unit) for tensor in _saved_tensors(model).values())


def channel_cost(block: FFNBlock, unit: str) -> int:
    """Return the parameters, or bytes, of one channel of one layer.

    Args:
        block: The block of the layer.
        unit: Either `"parameters"` or `"bytes"`.
    """
    cost = 0
    for weight, names in block.stored:
        cost += len(names) * block.hidden_size * _cost(weight, unit)
    for module, names in block.modules.items():
        for name in names:
            bias = module._parameters.get(block.spec.slots[name].bias)
            if bias is not None and name != "down":
                cost += _cost(bias, unit)
    return cost


def _cost(tensor: Tensor, unit: str) -> int:
    return tensor.element_size() if unit == "bytes" else 1


def added_biases(block: FFNBlock, unit: str) -> tuple[int, int]:
    """Return the cost of the zero biases that an FFN may gain: once, and for each channel.

    Args:
        block: The block of the layer.
        unit: Either `"parameters"` or `"bytes"`.
    """
    once = each = 0
    for module, names in block.modules.items():
        if getattr(module, "bias", None) is not None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if module is block.down:
            once += block.hidden_size * _cost(weight, unit)
        else:
            each += len(names) * _cost(weight, unit)
    return once, each


def _saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters by name, tied ones once, also those that offloading has separated."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {id(tensor): name for name, tensor in parameters.items() if tied.get(name) not in parameters}
    return {name: parameters[name] for name in own.values()}


def _header_bytes(tensors: dict[str, Tensor], added: int) -> int:
    """Return an upper bound of a weights file's header: names, types, shapes and places of tensors."""
    longest = max(tensors, key=len)
    entries = [_header_entry(name, tensor) for name, tensor in tensors.items()]
    return _FILE_BYTES + sum(map(len, entries)) + added * len(_header_entry(longest, tensors[longest]))


def _header_entry(name: str, tensor: Tensor) -> str:
    return json.dumps({name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [_LARGE_OFFSET] * 2}})
