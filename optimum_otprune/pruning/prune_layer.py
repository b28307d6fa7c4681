"""One layer: its calibration data, its compression, its reconstruction and its line of the report."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.compensation import refit_down
from optimum_otprune.functional.error_metric import error_metric
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.ratios import RescueEnergies, dilution_ratio, relative_error, rescue_ratio
from optimum_otprune.functional.reconstruction import ReconstructionSettings, Share, TrainingTokens, reconstruct
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.devices import multiplies_bfloat16
from optimum_otprune.models.distributed import gathered, process_index, summed
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.ffn_spec import DENSE
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.block_tokens import BlockTokens
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


class Run(NamedTuple):
    """The values that all layers of a run share.

    Attributes:
        prunable: The model, checked; its layers are pruned one after the other.
        recipe: The configuration with its functions.
        prepared: What was computed with the dense model.
        stream: The hidden states of this process's calibration samples before the next layer.
        is_heldout: Which of the samples' tokens are held out, BoolTensor.
    """

    prunable: PrunableModel
    recipe: Recipe
    prepared: Prepared
    stream: CalibrationStream
    is_heldout: Tensor

    @classmethod
    def begun(cls, passes: Passes, recipe: Recipe, prepared: Prepared) -> "Run":
        """Return a run whose calibration samples are before the first layer."""
        prunable, own = passes.prunable, prepared.samples.own()
        corrects = any(_correction(prunable, recipe, block) for block in prunable.blocks)
        stream = passes.of(own.tokens).forward(track_dense=corrects)
        return cls(prunable, recipe, prepared, stream, own.is_heldout)

    def seed(self, block: FFNBlock) -> int:
        """Return the random seed of one layer."""
        return seed_of(self.recipe.config.seed, block.layer)


def prune_layer(
    block: FFNBlock, dense: FFNWeights, width: int, run: Run, tokens: BlockTokens | None = None
) -> FinishedLayer:
    """Prune one FFN, on what the pruned layers below it produce; the block stays as it is.

    Args:
        block: The FFN that is next in the run.
        dense: Its weights.
        width: Number of channels to keep.
        run: What all layers of the run share.
        tokens: The calibration tokens of its block, where that has other FFNs, too.
    """
    config = run.recipe.config
    if tokens is None:
        correction = _correction(run.prunable, run.recipe, block)
        data = LayerData.of(block, dense, run.stream, run.is_heldout, config, correction)
    else:
        data = LayerData.of_one(block, dense, tokens, run.is_heldout, config)
    refitted = compress(_layer_inputs(block, dense, data, run), run.recipe, width)
    final = _reconstructed(block, refitted, data, run) if config.reconstruction_steps else refitted
    return FinishedLayer(final.weights, _report(block, data, final, refitted.judged))


def _correction(prunable: PrunableModel, recipe: Recipe, block: FFNBlock) -> float:
    """Return the share of the earlier layers' error in a layer's targets, divided by the layer's factor."""
    assert prunable.factors is not None
    factor = prunable.factors[block.layer]
    return (recipe.config.target_correction or 0.0) / factor if block.spec.residual and factor else 0.0


def _layer_inputs(block: FFNBlock, dense: FFNWeights, data: LayerData, run: Run) -> LayerInputs:
    scores = None if run.prepared.scores is None else run.prepared.scores[block.layer]
    return LayerInputs(
        weights=dense,
        fit=data.statistics.fit,
        heldout=data.statistics.heldout,
        snip=None if scores is None else scores.snip,
        fo=None if scores is None else scores.fo,
        seed=run.seed(block),
        can_hold_intercept=run.prunable.can_hold_intercept,
        remeasure=partial(remeasured_statistics, data),
    )


def _reconstructed(block: FFNBlock, compression: Compression, data: LayerData, run: Run) -> Compression:
    """Return the compression after local optimization, or unchanged if held-out tokens gain nothing."""
    like, config, moments = compression.judged, run.recipe.config, run.prepared.moments
    generator = torch.Generator().manual_seed(run.seed(block))
    assert config.reconstruction_steps is not None
    assert config.reconstruction_batch_tokens is not None
    settings = ReconstructionSettings(
        config.reconstruction_steps,
        batch_tokens=config.reconstruction_batch_tokens,
        mixed_precision=multiplies_bfloat16(block.device),
    )
    metric = None if moments is None else error_metric(moments[block.layer].to(block.device))
    fit, heldout = token_sets(data, run.stream.spill)
    counts = gathered(len(fit.inputs))
    tokens = TrainingTokens(fit, heldout, Share(sum(counts[: process_index()]), sum(counts), summed))
    with torch.enable_grad():
        result = reconstruct(like.map(Tensor.float), tokens, block.activation, settings, generator, metric)
    if result.best_step == 0:
        return compression
    weights, judged = _refitted_once_more(result.weights, data)
    return compression._replace(
        weights=weights.map(lambda part: part.to(like.up.dtype)),
        judged=judged.map(lambda part: part.to(like.up.dtype)),
    )


def _refitted_once_more(trained: FFNWeights, data: LayerData) -> tuple[FFNWeights, FFNWeights]:
    """Return the down projection, shrunk towards the trained one, fitted to all and to fitted tokens alone."""
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
        unit=unit_name(block),
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
    rest = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, None, False, nothing)
    return LayerReport(block.layer, size, size, kept, *rest, unit=unit_name(block))


def unit_name(block: FFNBlock) -> str:
    """Return the name of an FFN in reports; empty where it is the only one of its block, and every block has one."""
    return "" if block.layer == block.block and block.spec.kind == DENSE else block.name
