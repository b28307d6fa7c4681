"""Work out a `PruningPlan` from configuration files alone: no weights are read, nothing is written."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import PlacementOptions
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.architectures import find_spec
from optimum_otprune.models.attention_heads import AttentionHeads, kept_groups
from optimum_otprune.models.changes import check_dense
from optimum_otprune.models.devices import execution_device, planned_weights, weight_bytes
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.flops import cache_bytes, forward_flops, token_shares
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.perplexity import evaluation_bytes, windows_together
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.save_formats import saved_widths
from optimum_otprune.models.timing import matmul_rate
from optimum_otprune.pruning.calibration.data import ExpectedSamples, ModelLimits, TokenSource, expected_samples
from optimum_otprune.pruning.calibration.self_calibration import check_can_write, rows_at_once
from optimum_otprune.pruning.dry_run.cost_model import (
    IMPORT_BYTES,
    Rates,
    Workload,
    activation_bytes,
    calibration_bytes,
    expected_seconds,
    working_bytes,
)
from optimum_otprune.pruning.dry_run.plan import MemoryUse, PruningPlan
from optimum_otprune.pruning.preflight import check_feasible
from optimum_otprune.pruning.prune_heads import ATTENTION, check_recipe, cost_of_heads, planned_heads
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.size_target import added_biases, channel_cost, with_pruning_ratio
from optimum_otprune.pruning.widths import given_widths, plan_widths

_MEASURE_SECONDS = 0.12  # seconds of measuring for each of four rates
_KIND_NAMES = {"dense": "dense FFNs", "experts": "experts", "shared": "shared experts"}
_LARGEST_SIDE = 4096  # the size of the square matrices whose product is timed
_LARGEST_SQUARE = 1024


class Skeleton(NamedTuple):
    """A model as a dry run sees it, without its weights being read.

    Attributes:
        model: The model; its weights are not read and may be on the meta device.
        places: The options `device_map` and `max_memory` of loading.
        has_tokenizer: Whether the model has a tokenizer; None if nobody looked.
        is_loaded: Whether the model is in memory and could be changed in place.
    """

    model: PreTrainedModel
    places: PlacementOptions
    has_tokenizer: bool | None = None
    is_loaded: bool = False

    @classmethod
    def of_loaded(cls, model: PreTrainedModel) -> "Skeleton":
        """Return the skeleton of a model in memory, which stays where it is."""
        where = getattr(model, "hf_device_map", None) or execution_device(model)
        return cls(model, {"device_map": where, "max_memory": None}, is_loaded=True)


def plan_pruning(
    skeleton: Skeleton,
    config: OTPruningConfig,
    calibration_data: TokenSource | None,
    settings: PassSettings,
    evaluate: bool = False,
    evaluation_data: TokenSource | None = None,
) -> PruningPlan:
    """Return the plan of a pruning run; see `OTPruner.plan`.

    Args:
        skeleton: The model, in memory or on the meta device.
        config: The configuration to prune by.
        calibration_data: The calibration data, as in `OTPruner.prune`.
        settings: How the passes are run.
        evaluate: Whether the model is evaluated before and after.
        evaluation_data: The evaluation data, as in `OTPruner.evaluate`.

    Raises:
        OTPruneError: Whatever `prune` would raise before it starts to work.
    """
    model, options, has_tokenizer, is_loaded = skeleton
    batch_size = settings.batch_size
    check_dense(model)
    prunable = PrunableModel.loadable(model) if is_loaded else PrunableModel.of(model)
    config = with_pruning_ratio(config, prunable)
    recipe = Recipe.resolve(config, {})
    widths = plan_widths(prunable.blocks, config)
    check_recipe(recipe)
    heads = planned_heads(prunable, config)
    is_idle = widths == prunable.widths and not heads
    biases = 0 if is_idle else _bias_parameters(prunable, config, widths)
    limits = ModelLimits.of(model)
    samples = expected_samples(calibration_data, config, limits, has_tokenizer)
    windows = expected_samples(evaluation_data, config, limits, has_tokenizer) if evaluate else None
    weights = weights_by_device(model, options)
    device = next((name for name in weights if name not in ("cpu", "disk")), "cpu")
    shape = (samples.num_samples, samples.seqlen)
    written = 0 if is_idle else check_can_write(model, config, shape, _loaded_often(weights, device))
    work = _workload(prunable, widths, recipe, samples, written, settings)
    working = [] if is_idle else _working_memory(work, weights, settings.spill.limit)
    if windows is not None:
        working += _evaluation_memory(model, work, windows, batch_size, working, device)
    return PruningPlan(
        **_shapes(prunable, config, widths, heads),
        bias_parameters=biases,
        samples=samples,
        written_samples=written,
        memory=(*_resting_memory(prunable.blocks, widths, weights), *working),
        computing_device=device,
        seconds={} if is_idle else _seconds(prunable, work, samples, device),
    )


def _shapes(
    prunable: PrunableModel, config: OTPruningConfig, widths: list[int], heads: list[AttentionHeads]
) -> dict[str, Any]:
    """Return the fields of the plan about the model before and after."""
    model, blocks = prunable.model, prunable.blocks
    adaptive = set(range(len(blocks))) - set(given_widths(blocks, config)) if config.allocation == "adaptive" else ()
    saved = saved_widths(config.non_uniform_format, widths, prunable.widths)
    return {
        "config": config.to_dict(),
        "architecture": find_spec(model)[0],
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "hidden_size": blocks[0].hidden_size,
        "widths_before": tuple(prunable.widths),
        "widths_after": tuple(widths),
        "adaptive_layers": tuple(sorted(adaptive)),
        "parameters_before": model.num_parameters(),
        "parameters_after": model.num_parameters()
        - _removed(blocks, widths, "parameters")
        - cost_of_heads(heads, config, "parameters"),
        "bytes_before": weight_bytes(model),
        "bytes_after": weight_bytes(model) - _removed(blocks, saved, "bytes") - cost_of_heads(heads, config, "bytes"),
        "kinds": tuple(_KIND_NAMES[block.spec.kind] for block in blocks) if prunable.has_experts else (),
        "heads": None if not heads else (heads[0].num_groups, kept_groups(heads[0], config.kind_ratios[ATTENTION])),
    }


def _bias_parameters(prunable: PrunableModel, config: OTPruningConfig, widths: list[int]) -> int:
    """Return how many biases may be added; raise what pruning would raise before any work."""
    check_feasible(prunable, config, widths)
    if not prunable.can_hold_intercept or config.intercept not in ("auto", "always"):
        return 0
    costs = [added_biases(block, "parameters") for block in prunable.blocks]
    return sum(once + each * width for (once, each), width in zip(costs, widths))


def weights_by_device(model: PreTrainedModel, options: PlacementOptions) -> dict[str, int]:
    """Return how many bytes of a model's weights loading would put where.

    Args:
        model: The model; its weights are not read.
        options: The options `device_map` and `max_memory` of loading.

    Raises:
        ConfigurationError: If they cannot be followed.
    """
    try:
        return planned_weights(model, options["device_map"], options["max_memory"])
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"`device_map={options['device_map']!r}` with `max_memory={options['max_memory']!r}` cannot be followed: "
            f"{str(error).splitlines()[0]}. Use 'auto', a device such as 'cuda:0', or a dictionary of them by module."
        ) from error


def _loaded_often(weights: Mapping[str, int], device: str) -> int:
    """Return the bytes of weights that are loaded each time they are used."""
    return weights.get("disk", 0) + (weights.get("cpu", 0) if device != "cpu" else 0)


def _removed(blocks: list[FFNBlock], widths: list[int], unit: str) -> int:
    return sum((block.intermediate_size - width) * channel_cost(block, unit) for block, width in zip(blocks, widths))


def _workload(
    prunable: PrunableModel,
    widths: list[int],
    recipe: Recipe,
    samples: ExpectedSamples,
    written: int,
    settings: PassSettings,
) -> Workload:
    model, blocks, config = prunable.model, prunable.blocks, recipe.config
    at_once = min(written, rows_at_once(model, samples.seqlen, settings.spill.limit))
    is_cut = [width < block.intermediate_size for block, width in zip(blocks, widths)]
    pruned = [width for width, is_own in zip(widths, is_cut) if is_own] or widths[:1]
    passed = sum(share for share, is_own in zip(token_shares(prunable), is_cut) if is_own)
    is_adaptive = config.allocation == "adaptive"
    num_samples = samples.num_samples + written
    parameters = [list(block.module.parameters()) for block, _ in prunable.stack]
    return Workload(
        num_layers=max(1, round(passed)),
        hidden_size=blocks[0].hidden_size,
        intermediate_size=max(prunable.widths),
        kept_size=sum(pruned) // len(pruned),
        num_projections=len(blocks[0].spec.slots),
        tokens=num_samples * samples.seqlen,
        written_tokens=written * samples.seqlen,
        batch_tokens=min(settings.batch_size, num_samples) * samples.seqlen,
        heldout_share=config.holdout_share,
        element_size=blocks[0].dtype.itemsize,
        block_bytes=max(sum(part.numel() * part.element_size() for part in parts) for parts in parameters),
        eliminates=config.selection == "obs" or is_adaptive,
        tracks_dense=bool(config.target_correction) and blocks[0].spec.residual,
        needs_scores=recipe.needs_gradients,
        needs_moments=recipe.needs_moments,
        steps=config.reconstruction_steps or 0,
        step_tokens=config.reconstruction_batch_tokens or 0,
        vocab_size=ModelLimits.of(model).vocab_size,
        score_tokens=min(config.score_batch_size, num_samples) * samples.seqlen,
        written_at_once=at_once,
        cache_bytes=cache_bytes(model) * at_once * samples.seqlen,
        refits=config.compensation == "ridge",
        transports=recipe.transports,
    )


def _resting_memory(blocks: list[FFNBlock], widths: list[int], weights: Mapping[str, int]) -> list[MemoryUse]:
    """Return memory that is used all the time; dense FFNs are kept to undo failures, unless offloaded."""
    uses = [MemoryUse("cpu", "Python and its libraries", IMPORT_BYTES)]
    uses += [MemoryUse(name, "weights", size) for name, size in weights.items()]
    if len(weights) > 1 and {"cpu", "disk"} & set(weights):
        return uses
    sizes = [width * channel_cost(block, "bytes") for block, width in zip(blocks, widths)]
    pruned = sum(size for block, width, size in zip(blocks, widths, sizes) if width < block.intermediate_size)
    total = sum(weights.values())
    shares = {name: pruned * size // total for name, size in weights.items()}
    return uses + [MemoryUse(name, "pruned FFNs beside the dense ones", size) for name, size in shares.items() if size]


def _evaluation_memory(
    model: PreTrainedModel,
    work: Workload,
    windows: ExpectedSamples,
    batch_size: int,
    pruning: list[MemoryUse],
    device: str,
) -> list[MemoryUse]:
    """Return the memory that evaluation needs beyond that of pruning on the computing device."""
    shape = (windows.seqlen, work.vocab_size, model.dtype.itemsize)
    tokens = windows_together(batch_size, *shape) * windows.seqlen
    needed = evaluation_bytes(batch_size, *shape) + activation_bytes(work, tokens)
    more = needed - sum(use.bytes for use in pruning if use.device == device)
    return [MemoryUse(device, "more for evaluation", more)] if more > 0 else []


def _working_memory(work: Workload, weights: Mapping[str, int], max_hidden_memory: int) -> list[MemoryUse]:
    """Return the memory beside the weights: on computing devices, in main memory, and on disk."""
    computing = [name for name in weights if name not in ("cpu", "disk")] or ["cpu"]
    uses = [MemoryUse(name, purpose, size) for name in computing for purpose, size in working_bytes(work).items()]
    if set(weights) <= set(computing):
        uses = [use for use in uses if use.purpose != "one block"]  # the blocks are there with all weights
    kept, spilled = 0, 0
    for purpose, size in calibration_bytes(work).items():
        fits = min(size, max(0, max_hidden_memory - kept))
        kept, spilled = kept + fits, spilled + size - fits
        if fits:
            uses.append(MemoryUse("cpu", purpose, fits))
    return [*uses, MemoryUse("disk", "spilled", spilled)] if spilled else uses


def _seconds(
    prunable: PrunableModel, work: Workload, samples: ExpectedSamples, device: str
) -> Mapping[str, float] | None:
    if not is_here(torch.device(device)):
        return None
    count = work.tokens // samples.seqlen
    forward = forward_flops(prunable, count, samples.seqlen)
    decode = forward_flops(prunable, work.written_tokens // samples.seqlen, samples.seqlen, samples.seqlen)
    rates = _rates(work, torch.device(device), prunable.model.dtype)
    return expected_seconds(work, forward.total - forward.head, decode.total, rates)


def is_here(device: torch.device) -> bool:
    """Return whether a device is on this machine."""
    if device.type == "cpu":
        return True
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_kind = accelerator is not None and accelerator.type == device.type
    return is_kind and (device.index or 0) < torch.accelerator.device_count()


def _rates(work: Workload, device: torch.device, dtype: torch.dtype) -> Rates:
    inner, columns = (min(size, _LARGEST_SIDE) for size in (work.hidden_size, work.intermediate_size))
    side = min(work.intermediate_size, _LARGEST_SQUARE)
    many, few = min(work.batch_tokens, 2048), max(1, work.written_at_once)
    return Rates(
        model=matmul_rate(device, dtype, (many, inner, columns), _MEASURE_SECONDS),
        single=matmul_rate(device, torch.float32, (many, inner, columns), _MEASURE_SECONDS),
        double=matmul_rate(device, torch.float64, (side, side, side), _MEASURE_SECONDS),
        generation=matmul_rate(device, dtype, (few, inner, columns), _MEASURE_SECONDS),
    )
