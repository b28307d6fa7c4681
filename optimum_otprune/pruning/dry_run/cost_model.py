"""Expected memory and time of pruning, by laws of shapes: good enough for a decision."""

from collections.abc import Mapping
from typing import NamedTuple

_FLOAT, _DOUBLE = 4, 8  # bytes
IMPORT_BYTES = 620_000_000  # Python, torch (its code is read when needed), transformers, datasets, tokenizer
_REFIT_MATRICES = 15  # float32 ones of kept by kept channels: second moments in both precisions, factors, their copies
_TRAINED_COPIES = 8  # of a trained FFN: weights, gradients, both moments of Adam, and the best so far
_TRAINING_ACTIVATIONS = 8  # of a minibatch, each as large as its channel activations
_LOSS_COPIES = 3  # of a batch's logits: logarithms of probabilities, the gradient by them, and the one by the logits
_GRAPH_STATES = 16  # as large as a batch's hidden states, that a block run with gradients keeps beside its channels
_SINGULAR_STATES = 32  # additional such copies for gradients of singular values
_PASSES = 4  # cost of the closed form of all layers, in forward passes over the calibration tokens
_MOMENT_PASSES = 3  # forward and backward
_SCORE_PASSES = 6  # the same for SNIP and for FO
_CHECKS = 20  # evaluations on held-out tokens while a layer is trained


class Workload(NamedTuple):
    """The sizes and choices of a run that the laws of time and memory read.

    Attributes:
        num_layers: Number of layers that are pruned.
        hidden_size: The hidden size of the model.
        intermediate_size: Channels of each FFN before pruning.
        kept_size: Channels of each FFN after pruning, the mean over pruned layers.
        num_projections: Projections of an FFN: 3 if it is gated, else 2.
        tokens: Number of calibration tokens, those that the model writes included.
        written_tokens: Number of calibration tokens that the model writes itself.
        batch_tokens: Number of tokens of a forward pass.
        heldout_share: Share of the tokens that is held out.
        element_size: Bytes of a number in the model's dtype.
        block_bytes: Bytes of the largest block's weights.
        eliminates: Whether channels are eliminated greedily, or widths are shared out.
        tracks_dense: Whether the dense model's hidden states are kept beside the pruned one's.
        needs_scores: Whether weight × gradient scores are read.
        needs_moments: Whether second moments of gradients are read.
        steps: Steps of reconstruction for each layer.
        step_tokens: Number of tokens of one such step.
        vocab_size: The vocabulary size of the model.
        score_tokens: Number of tokens of a batch whose gradients are read.
        written_at_once: Number of samples that the model writes at once.
        cache_bytes: Bytes of the keys and values of the samples that the model writes at once.
        refits: Whether the down projection is fitted anew.
        transports: Whether a transport problem is solved.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    kept_size: int
    num_projections: int
    tokens: int
    written_tokens: int
    batch_tokens: int
    heldout_share: float
    element_size: int
    block_bytes: int
    eliminates: bool
    tracks_dense: bool
    needs_scores: bool
    needs_moments: bool
    steps: int
    step_tokens: int
    vocab_size: int
    score_tokens: int
    written_at_once: int
    cache_bytes: int
    refits: bool
    transports: bool

    @property
    def ffn_parameters(self) -> int:
        """Parameters of the FFN of one layer before pruning."""
        return self.num_projections * self.hidden_size * self.intermediate_size

    @property
    def kept_parameters(self) -> int:
        """Parameters of the FFN of one layer after pruning."""
        return self.num_projections * self.hidden_size * self.kept_size


def working_bytes(work: Workload) -> dict[str, int]:
    """Return the bytes that the computing device needs beside its weights, by purpose.

    Args:
        work: The sizes and choices of the run.
    """
    pruning = {
        "one FFN in float32, before and after": 2 * _FLOAT * work.ffn_parameters,
        "second moments of channels": _moment_bytes(work),
        "activations of one batch": activation_bytes(work, work.batch_tokens),
    }
    stages = [pruning, *_asking_bytes(work)]
    if work.steps:  # this follows the fit, of which only the sums are left
        trained = _TRAINED_COPIES * work.kept_parameters + _TRAINING_ACTIVATIONS * work.step_tokens * work.kept_size
        sums = 2 * _FLOAT * work.intermediate_size**2
        after = {"second moments of channels": sums, "training of one FFN": _FLOAT * trained}
        stages.append({**pruning, **after, "activations of one batch": 0})
    stage = max(stages, key=lambda part: sum(part.values()))
    return {"one block": work.block_bytes, **{purpose: size for purpose, size in stage.items() if size}}


def _asking_bytes(work: Workload) -> list[dict[str, int]]:
    """Return the bytes of each pass over the dense model before pruning, which come one after the other."""
    stages: list[dict[str, int]] = []
    if work.needs_scores or work.needs_moments:
        logits = _LOSS_COPIES * _FLOAT * work.score_tokens * work.vocab_size
        stages += [{"logits of one batch and their gradients": logits}, _backward_bytes(work)]
    if work.written_tokens:
        stages.append({"keys and values of what the model writes": 2 * work.cache_bytes})
    return stages


def _backward_bytes(work: Workload) -> dict[str, int]:
    """Return the bytes of one block in the backward pass: its graph, and what its gradients become."""
    inner = work.num_projections - 1
    # Outputs of gate and up, copies of them that the block goes on with, and what follows; their gradients; one on its
    # way.
    channels, states = 3 * inner + inner + 1, _GRAPH_STATES
    results = inner + 1  # gradients, and the inputs of the down projection
    sums = 3 * _DOUBLE * work.hidden_size**2 if work.needs_moments else 0
    if work.needs_scores:  # copies of outputs in float32, gradients of a second objective, one more on its way
        channels, states = channels + work.num_projections + inner + 1, states + _SINGULAR_STATES
        results += inner
        sums += 3 * _FLOAT * work.ffn_parameters  # products of both objectives, and the weights
    if work.tokens > work.score_tokens:
        channels += results  # gradients of the previous batch
    graph = work.score_tokens * (channels * work.intermediate_size + states * work.hidden_size)
    return {"one block with its gradients": _FLOAT * graph, "sums of gradients": sums}


def _moment_bytes(work: Workload) -> int:
    """Return the bytes of the largest of elimination, transport and refit, which come one after the other."""
    n, m = work.intermediate_size, work.kept_size
    sums = 2 * _FLOAT * n * n  # one sum of fitted and one of held-out tokens
    return sums + max(
        (_FLOAT + 2 * _DOUBLE) * n * n if work.eliminates else 0,
        3 * _DOUBLE * n * m if work.transports else 0,
        _REFIT_MATRICES * _FLOAT * m * m if work.refits else 0,
    )


def activation_bytes(work: Workload, tokens: int) -> int:
    """Return the bytes of the activations of some tokens in one block.

    Args:
        work: The sizes and choices of the run.
        tokens: How many go through it at once.
    """
    return _FLOAT * tokens * ((work.num_projections + 1) * work.intermediate_size + 8 * work.hidden_size)


def calibration_bytes(work: Workload) -> dict[str, int]:
    """Return the bytes that wait in main memory or in files in the most demanding stage, by purpose.

    Args:
        work: The sizes and choices of the run.
    """
    states = work.tokens * work.hidden_size * work.element_size
    pruning = {"hidden states": states * (2 if work.tracks_dense else 1), "inputs of one FFN": states}
    if work.tracks_dense and work.steps:
        pruning["corrections in float32"] = _FLOAT * work.tokens * work.hidden_size
    if work.steps:
        pruning["inputs and targets of one FFN in float32"] = 2 * _FLOAT * work.tokens * work.hidden_size
    scoring: dict[str, int] = {}
    if work.needs_scores or work.needs_moments:
        scoring["hidden states before every layer"] = states * (work.num_layers + 1)
        scoring["gradients by hidden states"] = states * (2 if work.needs_scores else 1)
    stage = max(pruning, scoring, key=lambda part: sum(part.values()))
    return stage | _gradient_bytes(work)


def _gradient_bytes(work: Workload) -> dict[str, int]:
    """Return the bytes of all layers' scores and moments after the pass of gradients."""
    found = {}
    if work.needs_scores:
        found["scores of all FFN weights"] = 2 * _FLOAT * work.ffn_parameters * work.num_layers
    if work.needs_moments:
        found["second moments of gradients"] = _DOUBLE * work.hidden_size**2 * work.num_layers
    return found


class Rates(NamedTuple):
    """The floating-point operations per second that matrix products reach on the computing device.

    Attributes:
        model: The rate in the model's dtype with many rows.
        single: The rate in float32 with many rows.
        double: The rate in float64 for square matrices.
        generation: The rate in the model's dtype with as few rows as sequences are written at once.
    """

    model: float
    single: float
    double: float
    generation: float


def expected_seconds(work: Workload, forward_flops: int, decode_flops: int, rates: Rates) -> Mapping[str, float]:
    """Return the expected time by stage, in seconds; saving and loading are not counted.

    Args:
        work: The sizes and choices of the run.
        forward_flops: Floating point operations of one dense forward pass over all calibration tokens.
        decode_flops: Floating point operations of writing the samples that the model writes itself.
        rates: The measured speed of the device.
    """
    kept = work.kept_parameters * work.num_layers
    stages = {}
    gradients = _SCORE_PASSES if work.needs_scores else _MOMENT_PASSES * work.needs_moments  # one walk serves both
    if gradients:
        stages["gradients"] = gradients * forward_flops / rates.model
    if work.written_tokens:
        stages["writing samples"] = decode_flops / rates.generation
    stages["closed form"] = _PASSES * forward_flops / rates.model
    if work.eliminates:
        stages["elimination"] = work.num_layers * 2 * work.intermediate_size**3 / rates.double
    if work.steps:
        trained = 6 * work.steps * work.step_tokens * kept
        checked = 2 * _CHECKS * work.heldout_share * work.tokens * kept
        stages["reconstruction"] = (trained + checked) / rates.single
    return stages
