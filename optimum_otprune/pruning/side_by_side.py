"""Measure a pruned model beside the dense one: data sets, then prompts. Everything is read before the first pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.config.checks import check_count
from optimum_otprune.config.comparison_options import MeasuringOptions
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.agreement import evaluate_model
from optimum_otprune.models.continuations import check_can_continue, greedy_continuation
from optimum_otprune.models.devices import model_sizes
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.perplexity import PROTOCOL
from optimum_otprune.models.quantizers import is_quantized, quantized_sizes, quantized_widths
from optimum_otprune.pruning.calibration.data import ModelLimits, TokenData, TokenSource, evaluation_tokens
from optimum_otprune.pruning.calibration.documents import chat_prompt
from optimum_otprune.pruning.calibration.overlap import seen_windows
from optimum_otprune.pruning.model_comparison import DataComparison, ModelComparison, ModelFacts, PromptComparison
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.versions import versions

# Short beginnings of several kinds of text; none asks for an opinion, and none is a test of skill.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small house by the sea, there lived",
    "Water boils at",
    "To plant a tree, first",
    "def is_even(number):",
)


class ComparedModel(NamedTuple):
    """One of two models that are compared.

    Attributes:
        name: What the model is called; never a path.
        model: The model.
        tokenizer: Its tokenizer, or None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def facts(self) -> ModelFacts:
        """The size of the model."""
        packed = is_quantized(self.model)
        parameters, size = quantized_sizes(self.model) if packed else model_sizes(self.model)
        return ModelFacts(
            name=self.name,
            parameters=parameters,
            weight_bytes=size,
            dtype=str(self.model.dtype).removeprefix("torch."),
            ffn_widths=quantized_widths(self.model) if packed else _widths(self.model),
        )


def _widths(model: PreTrainedModel) -> tuple[int, ...]:
    return tuple(block.intermediate_size for block in ffn_blocks(model))


class Exercises(NamedTuple):
    """What two models are compared on, as token ids.

    Attributes:
        data: The windows of each data set, by name.
        prompts: The token ids of each prompt, LongTensor `(seqlen,)`, with the prompt.
    """

    data: Mapping[str, TokenData]
    prompts: Sequence[tuple[str, Tensor]]


def read_exercises(
    pruned: ComparedModel,
    config: OTPruningConfig,
    data: Mapping[str, TokenSource] | TokenSource | None,
    prompts: Sequence[str] | None,
    options: MeasuringOptions,
) -> Exercises:
    """Read and tokenize all data and prompts, so that what cannot be used is refused before any pass.

    Args:
        pruned: The pruned model, whose tokenizer and limits hold for both.
        config: The configuration that it was pruned by, which names the data set that None stands for.
        data: Data sets by name, one data set, or None.
        prompts: The prompts; None is `PROMPTS`, or none for a model without a tokenizer.
        options: How to measure.

    Raises:
        CalibrationDataError: If data cannot be used.
        ConfigurationError: If an option or a prompt cannot be used.
        UnsupportedModelError: If there are prompts, and the model cannot write.
    """
    seqlen, limits = options["seqlen"], ModelLimits.of(pruned.model)
    config = config if seqlen is None else config.replace(seqlen=check_count("seqlen", seqlen, 2))
    max_windows = options["max_windows"]
    count = None if max_windows is None else check_count("max_windows", max_windows)
    new_tokens = check_count("new_tokens", options["new_tokens"])
    check_count("batch_size", options["batch_size"])
    if prompts is None:
        prompts = PROMPTS if pruned.tokenizer is not None else ()
    ids = [(prompt, _prompt_ids(prompt, pruned.tokenizer, options["chat"])) for prompt in _texts(prompts)]
    if ids:
        check_can_continue(pruned.model)
        longest = max(len(tokens) for _, tokens in ids)
        if limits.max_positions is not None and longest + new_tokens > limits.max_positions:
            raise ConfigurationError(
                f"A prompt of {longest} tokens and {new_tokens} new ones do not fit into the model's "
                f"{limits.max_positions} positions. Give shorter prompts or a smaller `new_tokens`."
            )
    sources = data if type(data) is dict else {_name(data, config): data}  # a DatasetDict is one data set
    windows = {
        name: evaluation_tokens(source, config, pruned.tokenizer, limits, count) for name, source in sources.items()
    }
    return Exercises(windows, ids)


def compare_side_by_side(
    dense: ComparedModel,
    pruned: ComparedModel,
    exercises: Exercises,
    report: PruningReport | None,
    options: MeasuringOptions,
) -> ModelComparison:
    """Measure both models.

    Args:
        dense: The dense model.
        pruned: The pruned one.
        exercises: What they are compared on.
        report: The report of pruning, which knows some of the text that was calibrated on; or None.
        options: How to measure.

    Raises:
        NumericalError: If a model's outputs are NaN.
    """
    sketch = None if report is None else report.calibration.get("passages")
    found = []
    for name, windows in exercises.data.items():
        metrics = evaluate_model(pruned.model, dense.model, windows.tokens, options["batch_size"], options["progress"])
        figures: dict[str, Any] = {field: value for field, value in metrics.items() if field in DataComparison._fields}
        seen = seen_windows(windows.tokens, None, sketch).get("seen_windows", 0)
        found.append(DataComparison(name=name, seen_windows=seen, **figures))
    prompts = tqdm(exercises.prompts, desc="Prompts", unit="prompt", disable=not options["progress"])
    return ModelComparison(
        dense=dense.facts,
        pruned=pruned.facts,
        data=tuple(found),
        prompts=tuple(_continued(dense, pruned, prompt, ids, options["new_tokens"]) for prompt, ids in prompts),
        settings={"protocol": PROTOCOL, "new_tokens": options["new_tokens"], "chat": options["chat"]},
        versions=versions(),
    )


def _continued(
    dense: ComparedModel, pruned: ComparedModel, prompt: str, ids: Tensor, new_tokens: int
) -> PromptComparison:
    """Return what both models write after a prompt."""
    assert pruned.tokenizer is not None
    written = [greedy_continuation(side.model, ids, new_tokens).tolist() for side in (dense, pruned)]
    one, other = (str(pruned.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written)
    same = next((n for n, tokens in enumerate(zip(*written)) if len({*tokens}) > 1), min(map(len, written)))
    return PromptComparison(prompt, one, other, same)


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase | None, is_chat: bool) -> Tensor:
    if tokenizer is None:
        raise ConfigurationError(
            "This model has no tokenizer, so prompts cannot be used. Give no prompts, or a `tokenizer`."
        )
    if is_chat:
        ids = tokenizer(chat_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ConfigurationError(f"The prompt {prompt!r:.60} has no tokens. Give one with text, or leave it out.")
    return torch.tensor(ids, dtype=torch.long)


def _texts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigurationError(f"`prompts` is {prompts!r:.60}; want a list of strings.")
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"Prompt {number} holds half a character. Give text in UTF-8.") from error
    return list(prompts)


def _name(data: object, config: OTPruningConfig) -> str:
    """Return what data are called that have no name of the user's."""
    name = config.dataset if data is None else data
    if isinstance(name, Path) or isinstance(name, str) and Path(name).expanduser().exists():
        return Path(name).name
    return name if isinstance(name, str) else "data"
