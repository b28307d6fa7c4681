"""Prune every layer of a model, in order: the steps of one `prune()` call."""

import logging

from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import warn_user
from optimum_otprune.functional.ffn import check_weights
from optimum_otprune.models.attention_heads import AttentionHeads, finish_heads
from optimum_otprune.models.block import Block
from optimum_otprune.models.changes import mark_half_pruned
from optimum_otprune.models.devices import (
    is_offloaded,
    large_blocks_returned,
    offloaded_bytes,
    return_freed_memory,
)
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.faithfulness import check_parameters
from optimum_otprune.models.ffn_block import FFNBlock, install_all, is_alone, named
from optimum_otprune.models.ffn_hooks import unchunked
from optimum_otprune.models.head_checks import check_removal
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.resize import finish_resize, switches_biases
from optimum_otprune.models.save_formats import saved_widths
from optimum_otprune.pruning.calibration.block_tokens import BlockTokens
from optimum_otprune.pruning.calibration.self_calibration import check_can_write, probe_passes
from optimum_otprune.pruning.layer_store import FinishedLayer, LayerStore
from optimum_otprune.pruning.outcome import PrunedLayers
from optimum_otprune.pruning.preflight import check_feasible, warn_of_empty
from optimum_otprune.pruning.preparation import Expected, WrittenText, prepare
from optimum_otprune.pruning.prune_heads import check_recipe, planned_heads, prune_heads
from optimum_otprune.pruning.prune_layer import Run, prune_layer, untouched
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import LayerReport
from optimum_otprune.pruning.serving import not_read_everywhere
from optimum_otprune.pruning.widths import plan_widths

logger = logging.getLogger(__name__)


def prune_model(
    prunable: PrunableModel, recipe: Recipe, tokens: Tensor, settings: PassSettings, store: LayerStore
) -> PrunedLayers:
    """Prune the FFN of every block in place and write the new widths into the model's configuration.

    Args:
        prunable: The dense model; it is checked unless that was done before.
        recipe: The configuration with its functions.
        tokens: The given calibration samples, LongTensor `(num_samples, seqlen)`. Where there are none, the model
            writes them all.
        settings: How the passes are run.
        store: Where finished layers are looked up and kept.

    Raises:
        OTPruneError: If the model cannot be pruned, of the fitting class; the message names the layer.
    """
    model, blocks, config = prunable.model, prunable.blocks, recipe.config
    passes = Passes(prunable, tokens, settings)
    widths, heads = plan_widths(blocks, config), planned_heads(prunable, config)
    check_recipe(recipe)
    empty = check_parameters(model, blocks)
    if widths == prunable.widths and not heads:
        passes.check_logits()
        return PrunedLayers([untouched(block) for block in blocks], 0)
    _check(prunable, config, widths, empty)
    num_written = check_can_write(model, config, tokens.shape, offloaded_bytes(model))
    probe = probe_passes(passes, config.seed).checked()
    if heads:
        check_removal(probe.prunable, heads, probe.tokens)
    passes = probe.of(tokens)
    written = WrittenText.beside(passes, num_written, config.seed)
    with unchunked(model), large_blocks_returned(is_offloaded(model)):
        prepared = store.prepared(
            lambda: prepare(passes, widths, recipe, written, store.written),
            lambda: Expected.of(
                (block.read() for block in blocks), tokens, written, recipe.needs_gradients, recipe.weighs_errors
            ),
            settings.spill,
        )
        saved_widths(config.non_uniform_format, prepared.widths, prunable.widths)  # as shared; called for its errors
        run = Run.begun(passes, recipe, prepared)
        reports, attention = _prune_layers(run, heads, store, settings.progress)
        pruned = _resized(prunable, reports, config)._replace(attention=attention)
        if heads:
            finish_heads(model, heads)
    pruned = pruned._replace(written_samples=len(prepared.samples.tokens) - len(tokens))
    probe.check_logits()
    _tell_of_saved(pruned, config)
    return pruned


def _check(prunable: PrunableModel, config: OTPruningConfig, widths: list[int], empty: int) -> None:
    """Raise all errors that need no pass, and make the model ready for passes."""
    warn_of_empty(empty, sum(prunable.widths))
    check_feasible(prunable, config, widths)
    prunable.model.eval()


def _prune_layers(
    run: Run, heads: list[AttentionHeads], store: LayerStore, progress: bool
) -> tuple[list[LayerReport], list[LayerReport]]:
    """Prune all layers in order, each on the outputs of those below it, pruned now or before.

    Returns:
        The reports of all FFNs, and those of attention.
    """
    stack, widths = run.prunable.stack, iter(run.prepared.widths)
    reports, attention = [], []
    own = {one.block: one for one in heads}
    with logging_redirect_tqdm([logging.getLogger("optimum_otprune")]):
        for whole, group in tqdm(stack, desc="Pruning", unit="layer", disable=not progress):
            if whole.block in own:
                attention.append(_next_heads(own[whole.block], whole, run))
            reports += _next_block(whole, group, [next(widths) for _ in group], run, store)
    return reports, attention


def _next_heads(heads: AttentionHeads, block: Block, run: Run) -> LayerReport:
    """Prune the attention of a block, whose FFNs then see what it puts out."""
    with named(block):
        pruned = prune_heads(heads, block, run)
        mark_half_pruned(run.prunable.model)
        heads.install(pruned.groups, pruned.weight, pruned.bias)
    logger.info("%s", pruned.report)
    return pruned.report


def _next_block(
    whole: Block, group: list[FFNBlock], widths: list[int], run: Run, store: LayerStore
) -> list[LayerReport]:
    """Prune all FFNs of a block, or find what was done before; then pass on what the block puts out now."""
    if widths == [block.intermediate_size for block in group]:
        run.stream.skip(whole)
        return [untouched(block) for block in group]
    first = group[0]
    weights, reports = [], []
    tokens = BlockTokens.of(group, run.stream) if not is_alone(group) else None
    for block, width in zip(group, widths):
        with named(block):
            finished = _next_layer(block, width, run, store, tokens)
        weights.append(finished.weights)
        reports.append(finished.report)
    with named(first):
        mark_half_pruned(run.prunable.model)
        install_all(group, weights)
        if whole is not run.prunable.stack[-1][0]:  # the output of the last block is not needed
            run.stream.advance(first)
    for report in reports:
        logger.info("%s", report)
    return_freed_memory()  # otherwise memory grows with every layer
    return reports


def _next_layer(block: FFNBlock, width: int, run: Run, store: LayerStore, tokens: BlockTokens | None) -> FinishedLayer:
    """Prune one FFN, and keep the result, or find it."""
    dense = block.read()
    if width == block.intermediate_size:
        return FinishedLayer(dense, untouched(block))
    finished = store.finished(block.layer, dense, width)
    if finished is None:
        finished = from_main(prune_layer(block, dense, width, run, tokens))
        check_weights(finished.weights, "the pruned FFN")
        store.save(finished)
    elif tokens is None:
        run.stream.replay(block)
    return finished


def _resized(prunable: PrunableModel, reports: list[LayerReport], config: OTPruningConfig) -> PrunedLayers:
    """Make the model's configuration, and layers of different widths, fit to be saved."""
    had_biases = switches_biases(prunable.model, prunable.spec)
    padding = finish_resize(prunable.model, prunable.blocks, config.non_uniform_format)
    return PrunedLayers(reports, padding, switches_biases(prunable.model, prunable.spec) and not had_biases)


def _tell_of_saved(pruned: PrunedLayers, config: OTPruningConfig) -> None:
    """Log what the saved model will contain beyond narrower layers of one width."""
    widths = [report.intermediate_size_after for report in pruned.reports]
    for sentence in not_read_everywhere(pruned.added_biases, widths, config.to_dict()):
        logger.warning(sentence)
    if pruned.padding_parameters and any(report.pruned_channels == 0 for report in pruned.reports):
        warn_user(
            f"The saved model is as large as the dense one: {pruned.padding_parameters:,} zeros fill up all layers to "
            "the width of one that kept every channel. Use non_uniform_format='per_layer_config' to save memory."
        )
