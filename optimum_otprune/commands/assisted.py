"""A pruned model as the dense one's assistant: the same text, written with fewer calls of the dense model."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.checkpoints.dense import check_same_text
from optimum_otprune.commands.speed import BenchmarkSettings
from optimum_otprune.config.comparison_options import MeasuringOptions
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import UsageError
from optimum_otprune.models.continuations import greedy_continuation
from optimum_otprune.models.timing import devices_of, wait_for_devices
from optimum_otprune.pruning.side_by_side import ComparedModel, read_exercises
from optimum_otprune.storage.hub.options import filled


class Writing(NamedTuple):
    """How the dense model wrote the continuations of all prompts, one after the other.

    Attributes:
        seconds: Time for all of them.
        calls: Forward passes of the dense model.
        texts: The token ids of each continuation.
    """

    seconds: float
    calls: int
    texts: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """The number of tokens that were written."""
        return sum(map(len, self.texts))


class AssistedSpeed(NamedTuple):
    """The dense model alone and with an assistant, medians over the repeats.

    Attributes:
        alone: The dense model without help.
        assisted: The dense model that checks what the pruned one drafts.
    """

    alone: Writing
    assisted: Writing

    @property
    def identical(self) -> int:
        """The number of prompts after which both wrote the same tokens."""
        return sum(one == other for one, other in zip(self.alone.texts, self.assisted.texts, strict=True))

    @property
    def speedup(self) -> float:
        """How many times as many tokens per second are written with the assistant."""
        return self.assisted.tokens / self.assisted.seconds / (self.alone.tokens / self.alone.seconds)

    @property
    def share_of_calls_saved(self) -> float:
        """The share of the dense model's calls for a token that the assistant saves; negative where it costs some."""
        return 1 - self.assisted.calls / self.assisted.tokens / (self.alone.calls / self.alone.tokens)

    def to_dict(self) -> dict[str, object]:
        """Return all results, JSON-ready, without the texts."""
        sides = {
            name: {
                "tokens": writing.tokens,
                "calls": writing.calls,
                "seconds": writing.seconds,
                "tokens_per_second": writing.tokens / writing.seconds,
            }
            for name, writing in (("alone", self.alone), ("assisted", self.assisted))
        }
        return {
            "prompts": len(self.alone.texts),
            "identical": self.identical,
            **sides,
            "share_of_calls_saved": self.share_of_calls_saved,
            "speedup": self.speedup,
        }


def read_prompts(
    dense: ComparedModel, pruned: ComparedModel, prompts: Sequence[str], settings: BenchmarkSettings
) -> list[Tensor]:
    """Return the token ids of prompts that both models can go on with, each LongTensor `(seqlen,)`.

    Args:
        dense: The dense model.
        pruned: The pruned one.
        prompts: The texts; a few neutral beginnings if there are none.
        settings: The settings of the measurement, which say how many tokens are written.

    Raises:
        UsageError: If no tokens are to be written, or the models have no tokenizer.
        ConfigurationError: If a prompt cannot be used.
        UnsupportedModelError: If the models cannot write text, or not the same.
    """
    if settings.new_tokens < 1:
        raise UsageError("With `--assistant` the models write text. Give `--new-tokens` of at least 1.")
    if pruned.tokenizer is None:
        raise UsageError(
            "The pruned model has no tokenizer, so there is no text to go on with. Save one beside it, or leave out "
            "`--assistant`."
        )
    check_same_text(dense.model, pruned.model, dense.tokenizer, pruned.tokenizer)
    options = filled(MeasuringOptions, {"new_tokens": settings.new_tokens})
    exercises = read_exercises(pruned, OTPruningConfig(), {}, prompts or None, options)
    return [ids for _, ids in exercises.prompts]


def measure_assisted(
    dense: PreTrainedModel, assistant: PreTrainedModel, prompts: Sequence[Tensor], settings: BenchmarkSettings
) -> AssistedSpeed:
    """Let the dense model write after each prompt, alone and with an assistant, taking turns.

    Both write greedily. A different token is written where two are as likely as one another within rounding, which
    16 bits make likelier.

    Args:
        dense: The model that writes.
        assistant: The model that drafts.
        prompts: The token ids of each prompt, LongTensor `(seqlen,)`.
        settings: The number of new tokens, and of the rounds that warm up and count.
    """
    runs: dict[str, list[Writing]] = {"alone": [], "assisted": []}
    helpers = {"alone": None, "assisted": assistant.eval()}
    for number in range(settings.warm_up + settings.repeats):
        for name in helpers if number % 2 == 0 else reversed(helpers):
            writing = _written(dense, helpers[name], prompts, settings.new_tokens)
            if number >= settings.warm_up:
                runs[name].append(writing)
    return AssistedSpeed(_median(runs["alone"]), _median(runs["assisted"]))


def _written(
    model: PreTrainedModel, assistant: PreTrainedModel | None, prompts: Sequence[Tensor], new_tokens: int
) -> Writing:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    counter = model.register_forward_pre_hook(count)
    devices = devices_of(model)
    try:
        wait_for_devices(devices)
        start = time.perf_counter()
        texts = [greedy_continuation(model, prompt, new_tokens, assistant).tolist() for prompt in prompts]
        wait_for_devices(devices)
        seconds = time.perf_counter() - start
    finally:
        counter.remove()
    return Writing(seconds, calls, tuple(map(tuple, texts)))


def _median(runs: Sequence[Writing]) -> Writing:
    return runs[-1]._replace(seconds=statistics.median(run.seconds for run in runs))
