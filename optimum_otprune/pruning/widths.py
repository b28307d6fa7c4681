"""The number of channels that each layer keeps: equal, set for a layer, or found from the cost of removing them."""

import math
from collections.abc import Sequence

from torch import Tensor
from tqdm.auto import tqdm

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import OPTIONS_BY_NAME
from optimum_otprune.errors import ConfigurationError, warn_user
from optimum_otprune.functional.allocation import allocate_widths
from optimum_otprune.functional.error_metric import metric_root
from optimum_otprune.functional.selection import kept_width, obs_elimination, rounded_multiple, sensible_multiple
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.find_ffns import check_dense
from optimum_otprune.models.passes import Passes
from optimum_otprune.pruning.calibration.layer_statistics import LayerData


def width_multiple(width: int, config: OTPruningConfig, ratio: float | None = None) -> int:
    """Return the number that kept widths are a multiple of: that of a purpose as it is, others lowered if they must.

    Args:
        width: Channels of a layer before pruning.
        config: The configuration to prune by.
        ratio: The layer's pruning ratio, by which the default is lowered to a number that more programs like; None
            where that is not decided.
    """
    if isinstance(config.multiple_of, str):
        return config.multiple
    if ratio is None or config.multiple_of != OPTIONS_BY_NAME["multiple_of"].default:
        return sensible_multiple(width, config.multiple_of)
    return rounded_multiple(width, ratio, config.multiple_of)


def given_widths(blocks: list[FFNBlock], config: OTPruningConfig) -> dict[int, int]:
    """Return the widths that `skip_layers`, `layer_ratios` and `kind_ratios` decide, by layer.

    Raises:
        ConfigurationError: If there is no such layer, or no FFN of such a kind.
        UnsupportedModelError: If the layers differ in width now.
    """
    check_dense(blocks)
    for name in ("skip_layers", "layer_ratios"):
        missing = [layer for layer in getattr(config, name) if layer >= len(blocks)]
        if missing:
            raise ConfigurationError(
                f"`{name}` names layer {missing[0]}, but the model has {len(blocks)} layers, 0 to {len(blocks) - 1}."
            )
    kinds = {block.spec.kind for block in blocks}
    ratios = _of_ffns(config)
    for kind in ratios:
        if kind not in kinds:
            raise ConfigurationError(
                f"`kind_ratios` names {kind!r}, but the model has no such FFNs; it has {', '.join(sorted(kinds))}."
            )
    own = [block for block in blocks if block.spec.kind in ratios]
    by_kind = {block.layer: _kept(block, ratios[block.spec.kind], config) for block in own}
    skipped = {layer: blocks[layer].intermediate_size for layer in config.skip_layers}
    layers = {layer: _kept(blocks[layer], ratio, config) for layer, ratio in config.layer_ratios.items()}
    return by_kind | skipped | layers


def _of_ffns(config: OTPruningConfig) -> dict[str, float]:
    """Return the ratios of kinds of FFNs."""
    return {str(kind): ratio for kind, ratio in config.kind_ratios.items() if kind != "attention"}


def _kept(block: FFNBlock, ratio: float, config: OTPruningConfig) -> int:
    width = block.intermediate_size // block.times
    if ratio and block.least_multiple > width:
        raise ConfigurationError(
            f"Experts keep a multiple of {block.least_multiple} channels, since transformers runs them by grouped "
            f"products of matrices, but {block.name} has only {width}. Give `kind_ratios` 0 for its kind."
        )
    multiple = math.lcm(width_multiple(width, config, ratio), block.least_multiple)
    return block.times * kept_width(width, ratio, multiple)


def plan_widths(blocks: list[FFNBlock], config: OTPruningConfig) -> list[int]:
    """Return the width of each layer; with `allocation="adaptive"`, the mean of those that are shared out.

    Raises:
        UnsupportedModelError: If the layers differ in width now.
        ConfigurationError: If no width is a multiple of what was asked for, a layer does not exist, or none is left
            for the ratio.
    """
    given = given_widths(blocks, config)
    differ = config.skip_layers or config.layer_ratios or config.allocation == "adaptive"
    if differ and any(block.expert is not None for block in blocks):
        raise ConfigurationError(
            "A configuration holds one width for all experts, so `skip_layers`, `layer_ratios` and "
            "`allocation='adaptive'` cannot be had for this model. Leave them out."
        )
    if config.allocation == "adaptive" and len(blocks) - len(given) < 2:
        raise ConfigurationError(
            f"`allocation='adaptive'` has nothing to share out: options for single layers or kinds decide "
            f"{len(given)} of {len(blocks)} layers. Use allocation='uniform'."
        )
    assert config.pruning_ratio is not None
    if len(given) == len(blocks) and config.pruning_ratio not in (0, OPTIONS_BY_NAME["pruning_ratio"].default):
        raise ConfigurationError(
            f"`pruning_ratio={config.pruning_ratio!r}` would be ignored: {_deciding(config)} decide the width of "
            "every layer. Leave one of them out."
        )
    for width in sorted({block.intermediate_size // block.times for block in blocks}):
        _check_multiple(width, config)
    ratio = config.pruning_ratio
    widths = [given[block.layer] if block.layer in given else _kept(block, ratio, config) for block in blocks]
    _check_shared_fields(blocks, widths)
    if widths == [block.intermediate_size for block in blocks]:
        _warn_of_nothing(blocks[0].intermediate_size, config)
    return widths


def _deciding(config: OTPruningConfig) -> str:
    names = [name for name in ("skip_layers", "layer_ratios", "kind_ratios") if getattr(config, name)]
    return " and ".join(f"`{name}`" for name in names)


def _check_shared_fields(blocks: list[FFNBlock], widths: list[int]) -> None:
    """Raise if kinds of FFNs whose width is one field of the configuration were to have different ones."""
    found: dict[tuple[str, str | None], tuple[str, int]] = {}
    for block, width in zip(blocks, widths):
        spec = block.spec
        kind, other = found.setdefault((spec.config, spec.size_key), (spec.kind, width // block.times))
        if kind != spec.kind and other != width // block.times:
            raise ConfigurationError(
                f"One field of the configuration, `{spec.size_key}`, is the width of {kind} and {spec.kind} FFNs of "
                "this model, so they need one ratio. Give both the same in `kind_ratios`."
            )


def _check_multiple(width: int, config: OTPruningConfig) -> None:
    """Raise an error if the given multiple cannot be met, and warn where it is lowered."""
    ratios = [config.pruning_ratio, *config.layer_ratios.values(), *_of_ffns(config).values()]
    multiple = config.multiple
    if not any(ratios):
        return
    if multiple > width and multiple != OPTIONS_BY_NAME["multiple_of"].default:
        kept_width(width, 0.5, multiple)  # called for its error
    sensible = width_multiple(width, config)
    if sensible != multiple:
        warn_user(
            f"`multiple_of` is lowered from {multiple} to {sensible}: the layers have only {width} channels, and "
            "rounding to more would miss the pruning ratio by far."
        )


def _warn_of_nothing(width: int, config: OTPruningConfig) -> None:
    if any((config.pruning_ratio, *config.layer_ratios.values(), *_of_ffns(config).values())):
        warn_user(
            f"Nothing is pruned: {config.pruning_ratio} of {width} channels is less than half of `multiple_of` = "
            f"{width_multiple(width, config)}."
        )


def adaptive_widths(
    passes: Passes, is_heldout: Tensor, config: OTPruningConfig, widths: list[int], moments: Sequence[Tensor]
) -> list[int]:
    """Share the channels of the layers without a width of their own by what removing them costs the loss.

    The cost of a removal is that of greedy elimination (OBS) with a refit of the others, on the dense model's hidden
    states: `tr(E[g gᵀ] E[e eᵀ])` with the output's error e, the usual weights of tokens, and the gradient g of the
    loss by the output. It is twice the empirical Fisher estimate of the change of the loss if g and e are independent.

    Args:
        passes: The dense model and the calibration samples of this process.
        is_heldout: Which of their tokens are held out, BoolTensor.
        config: The configuration to prune by.
        widths: Channels of each layer after pruning, from `plan_widths`.
        moments: Second moments of the gradients for each layer, from `layer_gradients`.

    Returns:
        Widths by layer, in sum at most that of `widths`.
    """
    prunable = passes.prunable
    blocks, given = prunable.blocks, given_widths(prunable.blocks, config)
    free = [block for block in blocks if block.layer not in given]
    budget = sum(widths[block.layer] for block in free)
    stream = passes.forward(stays_dense=True)
    costs = []
    for whole, group in tqdm(prunable.stack, desc="Removal costs", unit="layer", disable=not passes.settings.progress):
        if not group or group[0].layer in given:
            stream.skip(whole)
            continue
        block, dense = group[0], group[0].read()
        data = LayerData.of(block, dense, stream, is_heldout, config)
        weighed = metric_root(moments[block.layer]).to(block.device) @ data.dense.down
        costs.append(obs_elimination(data.statistics.total.gram, weighed, dense.intermediate_size).costs)
    multiple = width_multiple(blocks[0].intermediate_size, config)
    shared = iter(allocate_widths([part.cpu() for part in costs], budget, multiple))
    return [given[block.layer] if block.layer in given else next(shared) for block in blocks]
