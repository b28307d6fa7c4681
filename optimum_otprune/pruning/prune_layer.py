"""One layer: its calibration data, its compression, its reconstruction and its line of the report."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.functional.compensation import refit_down
from optimum_otprune.functional.error_metric import error_metric
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.ratios import RescueEnergies, dilution_ratio, relative_error, rescue_ratio
from optimum_otprune.functional.reconstruction import ReconstructionSettings, Share, reconstruct
from optimum_otprune.models.distributed import gathered, process_index, summed
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.gradients import GradientScores
from optimum_otprune.pruning.calibration.layer_statistics import (
    LayerData,
    measure_rescue,
    remeasured_statistics,
    token_sets,
)
from optimum_otprune.pruning.compress import Compression, LayerInputs, compress
from optimum_otprune.pruning.layer_store import FinishedLayer
from optimum_otprune.pruning.preparation import Prepared
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import LayerReport


def prune_layer(
    block: FFNBlock,
    dense: FFNWeights,
    width: int,
    stream: CalibrationStream,
    prepared: Prepared,
    is_heldout: Tensor,
    recipe: Recipe,
    correction: float,
    can_hold_intercept: bool,
) -> FinishedLayer:
    """One layer, on what the pruned layers below it produce; the block stays as it is."""
    config = recipe.config
    data = LayerData.of(block, dense, stream, is_heldout, config, correction)
    inputs = _layer_inputs(block, dense, data, prepared.scores, recipe, can_hold_intercept)
    compression = compress(inputs, recipe, width)
    refitted = compression.judged
    if config.reconstruction_steps:
        compression = _reconstructed(block, compression, data, config, prepared.moments, stream.spill)
    return FinishedLayer(compression.weights, _report(block, data, compression, refitted))


def layer_seed(config: OTPruningConfig, layer: int) -> int:
    """One seed a layer, so that no layer depends on what another drew."""
    return config.seed + 100_003 * layer


def _layer_inputs(
    block: FFNBlock,
    dense: FFNWeights,
    data: LayerData,
    scores: Sequence[GradientScores] | None,
    recipe: Recipe,
    can_hold_intercept: bool,
) -> LayerInputs:
    of_layer = None if scores is None else scores[block.layer]
    return LayerInputs(
        weights=dense,
        fit=data.statistics.fit,
        heldout=data.statistics.heldout,
        snip=None if of_layer is None else of_layer.snip,
        fo=None if of_layer is None else of_layer.fo,
        seed=layer_seed(recipe.config, block.layer),
        can_hold_intercept=can_hold_intercept,
        remeasure=partial(remeasured_statistics, data),
    )


def _reconstructed(
    block: FFNBlock,
    compression: Compression,
    data: LayerData,
    config: OTPruningConfig,
    moments: Sequence[Tensor] | None,
    spill: TensorSpill,
) -> Compression:
    """The compression after local optimization, or as it was where held-out tokens gain nothing."""
    like = compression.judged
    generator = torch.Generator().manual_seed(layer_seed(config, block.layer))
    assert config.reconstruction_steps is not None
    assert config.reconstruction_batch_tokens is not None
    settings = ReconstructionSettings(config.reconstruction_steps, batch_tokens=config.reconstruction_batch_tokens)
    metric = None if moments is None else error_metric(moments[block.layer].to(block.device))
    sets = token_sets(data, spill)
    counts = gathered(len(sets[0].inputs))
    share = Share(sum(counts[: process_index()]), sum(counts), summed)
    with torch.enable_grad():
        result = reconstruct(like.map(Tensor.float), *sets, block.activation, settings, generator, metric, share)
    if result.best_step == 0:
        return compression
    weights, judged = _refitted_once_more(result.weights, data)
    return compression._replace(
        weights=weights.map(lambda part: part.to(like.up.dtype)),
        judged=judged.map(lambda part: part.to(like.up.dtype)),
    )


def _refitted_once_more(trained: FFNWeights, data: LayerData) -> tuple[FFNWeights, FFNWeights]:
    """The down projection shrunk towards the trained one, fitted to all tokens, and without the held-out ones."""
    fit, heldout = remeasured_statistics(data, trained)
    if trained.down_bias is not None:
        bias = trained.down_bias if data.dense.down_bias is None else trained.down_bias - data.dense.down_bias
        nothing = torch.zeros_like(fit.hidden_sum)
        fit, heldout = fit.shifted(nothing, bias), heldout.shifted(nothing, bias)
    refits = refit_down(fit, heldout, trained.down)
    weights, judged = (trained._replace(down=refit.down.to(trained.down.dtype)) for refit in refits)
    return weights, judged


def _report(block: FFNBlock, data: LayerData, compression: Compression, refitted: FFNWeights) -> LayerReport:
    kept = compression.kept_channels
    is_trained = compression.judged is not refitted
    measured = measure_rescue(data, [compression.fused, refitted, *([compression.judged] if is_trained else [])], kept)
    fused, before_reconstruction, energies = measured[0], measured[1], measured[-1]
    return LayerReport(
        layer=block.layer,
        intermediate_size_before=data.dense.intermediate_size,
        intermediate_size_after=len(kept),
        kept_channels=tuple(kept.tolist()),
        rescue_ratio=rescue_ratio(energies),
        dilution_ratio=dilution_ratio(energies),
        transported_mass=compression.transported_mass,
        self_share=compression.self_share,
        relative_error_before_refit=relative_error(fused),
        relative_error_after_refit=relative_error(before_reconstruction),
        relative_error_after_reconstruction=relative_error(energies),
        ridge_lambda=compression.ridge,
        intercept=compression.intercept,
        energies=energies,
    )


def untouched(block: FFNBlock) -> LayerReport:
    """Return the report of a layer that keeps all its channels."""
    size = block.intermediate_size
    nothing = RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0)
    kept = tuple(range(size))
    return LayerReport(block.layer, size, size, kept, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, None, False, nothing)
