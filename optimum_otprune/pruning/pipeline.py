"""Prune every layer of a model, in order: the steps of one `prune()` call."""

import logging
from collections.abc import Sequence
from functools import partial

from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from optimum_otprune.errors import warn_user
from optimum_otprune.functional.ffn import check_weights
from optimum_otprune.models.block_runner import unchunked
from optimum_otprune.models.changes import mark_half_pruned
from optimum_otprune.models.devices import is_offloaded, large_blocks_returned, return_freed_memory
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.faithfulness import check_logits, check_parameters, measured_factors
from optimum_otprune.models.ffn_block import FFNBlock, named
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.resize import finish_resize, switches_biases
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.samples import own_part
from optimum_otprune.pruning.layer_store import LayerStore
from optimum_otprune.pruning.outcome import PrunedLayers
from optimum_otprune.pruning.preflight import check_feasible, warn_of_empty
from optimum_otprune.pruning.preparation import Expected, Prepared, prepare
from optimum_otprune.pruning.prune_layer import prune_layer, untouched
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import ADDED_BIASES, LayerReport
from optimum_otprune.pruning.settings import PassSettings
from optimum_otprune.pruning.widths import plan_widths

logger = logging.getLogger(__name__)


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
    empty = check_parameters(model, blocks)
    if all(width == block.intermediate_size for width, block in zip(widths, blocks)):
        check_logits(model, tokens)
        return PrunedLayers([untouched(block) for block in blocks], 0)
    warn_of_empty(empty, sum(block.intermediate_size for block in blocks))
    can_hold_intercept = check_feasible(model, blocks, config, widths)
    model.eval()
    factors = measured_factors(model, blocks, tokens) if factors is None else factors
    spill = settings.spill()
    with unchunked(model), large_blocks_returned(is_offloaded(model)):
        prepared = store.prepared(
            lambda: prepare(model, blocks, widths, recipe, tokens, settings, spill),
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
    tokens, is_heldout = own_part(prepared.tokens, prepared.is_heldout, 1)
    stream = CalibrationStream(model, blocks, tokens, settings.batch_size, any(corrections), spill, factors)
    prune = partial(
        prune_layer,
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
                reports.append(untouched(block))
                stream.skip(block)
                continue
            with named(block):
                dense = block.read()
                finished = store.finished(block.layer, dense, width)
                if finished is None:
                    finished = from_main(prune(block, dense, width, correction=corrections[block.layer]))
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
        warn_user(
            f"The saved model is as large as the dense one: {padding:,} zeros fill up all layers to the width of one "
            "that kept every channel. Use non_uniform_format='per_layer_config' to save memory."
        )
