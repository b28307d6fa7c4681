"""Prune every layer of a model, in order: the steps of one `prune()` call."""

import logging
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock, named
from optimum_otprune.architectures.changes import mark_half_pruned
from optimum_otprune.architectures.resize import finish_resize, switches_biases
from optimum_otprune.block_runner import unchunked
from optimum_otprune.compression import Compression, LayerInputs, Recipe, compress
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.devices import is_offloaded
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.faithfulness import check_logits, check_parameters, measured_factors
from optimum_otprune.feasibility import check_feasible, warn_of_empty
from optimum_otprune.functional.compensation import refit_down
from optimum_otprune.functional.ffn import FFNWeights, check_weights, empty_channels
from optimum_otprune.functional.metric import error_metric
from optimum_otprune.functional.reconstruction import ReconstructionSettings, Share, reconstruct
from optimum_otprune.gradients import GradientScores, gradient_moments, gradient_scores
from optimum_otprune.heap import large_blocks_returned, return_freed_memory
from optimum_otprune.layer_data import (
    LayerData,
    heldout_mask,
    measure_rescue,
    remeasured_statistics,
    token_sets,
)
from optimum_otprune.layer_store import FinishedLayer, LayerStore
from optimum_otprune.option_checks import check_size
from optimum_otprune.outcome import PrunedLayers
from optimum_otprune.prepared import Expected, Prepared
from optimum_otprune.processes import from_main, gathered, is_main_process, own_samples, process_index, summed
from optimum_otprune.ratios import RescueEnergies, dilution_ratio, relative_error, rescue_ratio
from optimum_otprune.report import ADDED_BIASES, LayerReport
from optimum_otprune.self_calibration import self_calibration_tokens
from optimum_otprune.spill import DEFAULT_LIMIT, TensorSpill
from optimum_otprune.streaming import CalibrationStream
from optimum_otprune.widths import adaptive_widths, plan_widths

logger = logging.getLogger(__name__)


class PassSettings(NamedTuple):
    """What a pass over the data may vary without changing its result (but for rounding).

    Attributes:
        batch_size: Samples per forward pass.
        progress: Whether to show progress bars.
        max_hidden_memory: Bytes of hidden states that wait in memory; others wait in files.
        spill_folder: Where those files are; default: the system's folder for temporary ones.
    """

    batch_size: int = 8
    progress: bool = True
    max_hidden_memory: int = DEFAULT_LIMIT
    spill_folder: Path | None = None

    @classmethod
    def of(
        cls, batch_size: int, progress: bool, max_hidden_memory: int | str, spill_folder: str | os.PathLike | None
    ) -> "PassSettings":
        """Settings as a user gives them; only the first of several processes shows progress.

        Raises:
            ConfigurationError: If a limit is no size, or a folder is not there.
        """
        limit, folder = hidden_memory(max_hidden_memory), spill_path(spill_folder)
        return cls(batch_size, progress and is_main_process(), limit, folder)

    def spill(self) -> TensorSpill:
        """Return where hidden states wait."""
        return TensorSpill(self.max_hidden_memory, self.spill_folder)


def spill_path(folder: str | os.PathLike | None) -> Path | None:
    """Return where hidden states are spilled.

    Raises:
        ConfigurationError: If it is no folder.
    """
    path = None if folder is None else Path(os.path.expanduser(folder))
    if path is not None and not path.is_dir():
        raise ConfigurationError(f"`spill_folder` {path.name!r} is no folder. Make it, or leave it out.")
    return path


def hidden_memory(limit: int | float | str) -> int:
    """Return a limit such as `"4GB"` in bytes.

    Raises:
        ConfigurationError: If it is no size.
    """
    return check_size("max_hidden_memory", limit)


def prune_model(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    recipe: Recipe,
    tokens: Tensor,
    settings: PassSettings,
    store: LayerStore,
    factors: Sequence[float | None] | None = None,
) -> PrunedLayers:
    """Prune the FFN of every block in place and write the new widths into the model's configuration.

    Args:
        model: The dense model.
        blocks: All its FFN blocks, in order.
        recipe: What to do.
        tokens: Calibration samples, LongTensor `(num_samples, seqlen)`.
        settings: Of the passes.
        store: Where finished layers are found and kept.
        factors: From `measured_factors`, if the model was checked already.

    Raises:
        OTPruneError: Of the kind that fits; the message names the layer.
    """
    config = recipe.config
    widths = plan_widths(blocks, config)
    check_parameters(model, blocks)
    empty = sum(empty_channels(block.read()) for block in blocks)
    if all(width == block.intermediate_size for width, block in zip(widths, blocks)):
        check_logits(model, tokens)
        return PrunedLayers([_untouched(block) for block in blocks], 0)
    warn_of_empty(empty, sum(block.intermediate_size for block in blocks))
    can_hold_intercept = check_feasible(model, blocks, config, widths)
    model.eval()
    factors = measured_factors(model, blocks, tokens) if factors is None else factors
    spill = settings.spill()
    with unchunked(model), large_blocks_returned(is_offloaded(model)):
        prepared = store.prepared(
            lambda: _prepare(model, blocks, widths, recipe, tokens, settings, spill),
            lambda: Expected.of(
                (block.read() for block in blocks), tokens, recipe.needs_gradients, recipe.weighs_errors
            ),
        )
        reports = _prune_layers(model, blocks, recipe, prepared, settings, store, can_hold_intercept, spill, factors)
        had_biases = switches_biases(model, blocks[0].spec)
        padding = finish_resize(model, blocks, config.non_uniform_format)
    check_logits(model, tokens)
    added_biases = switches_biases(model, blocks[0].spec) and not had_biases
    if added_biases:
        logger.warning(ADDED_BIASES)
    _warn_of_padding(reports, padding)
    return PrunedLayers(reports, padding, added_biases)


def _prune_layers(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    recipe: Recipe,
    prepared: Prepared,
    settings: PassSettings,
    store: LayerStore,
    can_hold_intercept: bool,
    spill: TensorSpill,
    factors: Sequence[float | None],
) -> list[LayerReport]:
    """All layers in order, each on what those below it, pruned now or before, produce."""
    share = recipe.config.target_correction or 0.0
    corrections = [share / factor if block.spec.residual and factor else 0.0 for block, factor in zip(blocks, factors)]
    tokens, is_heldout = _own_part(prepared.tokens, prepared.is_heldout, 1)
    stream = CalibrationStream(model, blocks, tokens, settings.batch_size, any(corrections), spill, factors)
    prune_layer = partial(
        _prune_layer,
        stream=stream,
        prepared=prepared,
        is_heldout=is_heldout,
        recipe=recipe,
        can_hold_intercept=can_hold_intercept,
    )
    reports = []
    with logging_redirect_tqdm([logging.getLogger("optimum_otprune")]):
        for block, width in tqdm(
            list(zip(blocks, prepared.widths)), desc="Pruning", unit="layer", disable=not settings.progress
        ):
            if width == block.intermediate_size:
                reports.append(_untouched(block))
                stream.skip(block)
                continue
            with named(block):
                dense = block.read()
                finished = store.finished(block.layer, dense, width)
                if finished is None:
                    finished = from_main(prune_layer(block, dense, width, correction=corrections[block.layer]))
                    check_weights(finished.weights, "the pruned FFN")
                    store.save(finished)
                else:
                    stream.replay(block)
                mark_half_pruned(model)
                block.install(finished.weights)
                reports.append(finished.report)
                if block is not blocks[-1]:  # nobody asks what comes out of the last one
                    stream.advance(block)
            logger.info("%s", reports[-1])
            return_freed_memory()  # else a run takes more with every layer
    return reports


def _warn_of_padding(reports: list[LayerReport], padding: int) -> None:
    if padding and any(report.pruned_channels == 0 for report in reports):
        warnings.warn(
            f"The saved model is as large as the dense one: {padding:,} zeros fill up all layers to the width of one "
            "that kept every channel. Use non_uniform_format='per_layer_config' to save memory.",
            stacklevel=4,
        )


def _prune_layer(
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


def _own_part(tokens: Tensor, is_heldout: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Samples of this process, and which of their tokens are held out."""
    own = own_samples(len(tokens), batch_size)
    return tokens[own], is_heldout.view(tokens.shape)[own].flatten()


def _prepare(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    widths: list[int],
    recipe: Recipe,
    tokens: Tensor,
    settings: PassSettings,
    spill: TensorSpill,
) -> Prepared:
    config = recipe.config
    is_heldout = heldout_mask(tokens.shape[0], tokens.shape[1], config.holdout_share, config.seed)
    scores = moments = None
    together = config.score_batch_size if recipe.needs_gradients or recipe.needs_moments else 1
    own_tokens, own_heldout = _own_part(tokens, is_heldout, together)
    passes = (config.score_batch_size, settings.progress, spill)
    if recipe.needs_gradients:
        scores = gradient_scores(model, blocks, own_tokens, *passes)
    if recipe.needs_moments:
        moments = gradient_moments(model, blocks, own_tokens, *passes)
        if config.allocation == "adaptive":
            stream = CalibrationStream(model, blocks, own_tokens, settings.batch_size, track_dense=False, spill=spill)
            found = adaptive_widths(blocks, widths, config, stream, own_heldout, moments, settings.progress)
            widths = from_main(found)  # others may have rounded otherwise
    if config.self_calibration:
        written = from_main(
            self_calibration_tokens(
                model, tokens, config.self_calibration, config.score_batch_size, config.seed, settings.progress
            )
        )
        tokens = torch.cat([tokens, written])
        is_heldout = torch.cat([is_heldout, torch.zeros(written.numel(), dtype=torch.bool)])
    return Prepared(widths, tokens, is_heldout, scores, moments if recipe.weighs_errors else None)


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


def _untouched(block: FFNBlock) -> LayerReport:
    size = block.intermediate_size
    nothing = RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0)
    kept = tuple(range(size))
    return LayerReport(block.layer, size, size, kept, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, None, False, nothing)
