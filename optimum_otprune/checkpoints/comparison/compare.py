"""`compare_models`: two models, loaded where they are names, measured side by side."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from transformers import PreTrainedModel

from optimum_otprune.checkpoints.check_loading import check_loading_options, refuse_loading_options
from optimum_otprune.checkpoints.dense import check_same_text, loading_of_dense
from optimum_otprune.checkpoints.load import hub_id, load_checkpoint
from optimum_otprune.config.comparison_options import ComparisonOptions, MeasuringOptions
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.models.changes import check_whole
from optimum_otprune.models.distributed import check_launch, check_single
from optimum_otprune.models.wrappers import checked_tokenizer, model_in_memory
from optimum_otprune.pruning.calibration.data import TokenSource
from optimum_otprune.pruning.model_comparison import ModelComparison
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.side_by_side import ComparedModel, compare_side_by_side, read_exercises
from optimum_otprune.storage.hub.options import filled, part


class LoadedPair(NamedTuple):
    """Two models that can be compared.

    Attributes:
        dense: The dense model.
        pruned: The pruned one.
        config: The configuration that it was pruned by; the default one if that is not known.
        report: The report of pruning, or None.
    """

    dense: ComparedModel
    pruned: ComparedModel
    config: OTPruningConfig
    report: PruningReport | None

    def compare(
        self,
        data: Mapping[str, TokenSource] | TokenSource | None,
        prompts: Sequence[str] | None,
        options: MeasuringOptions,
    ) -> ModelComparison:
        """Measure both models, as `compare_models` does.

        Args:
            data: The data sets, as in `compare_models`.
            prompts: The prompts, as in `compare_models`.
            options: How to measure; what is left out has its default.
        """
        settings = filled(MeasuringOptions, options)
        exercises = read_exercises(self.pruned, self.config, data, prompts, settings)
        return compare_side_by_side(self.dense, self.pruned, exercises, self.report, settings)


def compare_models(
    dense: str | os.PathLike | PreTrainedModel,
    pruned: str | os.PathLike | PreTrainedModel,
    data: Mapping[str, TokenSource] | TokenSource | None = None,
    prompts: Sequence[str] | None = None,
    **options: Unpack[ComparisonOptions],
) -> ModelComparison:
    """Return how a pruned model does beside the dense one: perplexity, KL, agreement, and what both write.

    Args:
        dense: The dense model: a Hub id, a local folder, or a model in memory.
        pruned: The pruned one, the same; it is loaded in the data type of the dense one.
        data: Data sets by name, each as `OTPruner.evaluate` takes it, or one of them; None is the data set that the
            pruned model's configuration names.
        prompts: What both models continue, greedily; None is a few neutral beginnings, and an empty list none.
        **options: Options of `optimum_otprune.config.comparison_options.ComparisonOptions`, which says what each
            means, such as `max_windows`, `new_tokens`, `chat`, `device_map` and, for models in memory, `tokenizer`.
            `revision` and `verify` are about the pruned model.

    Raises:
        ModelLoadError: If a model cannot be loaded.
        UnsupportedModelError: If the dense model is pruned, or vocabularies or tokenizers differ.
        CalibrationDataError: If data cannot be used.
        ConfigurationError: If an option or a prompt cannot be used.
        NumericalError: If a model's outputs are NaN.
    """
    given = filled(ComparisonOptions, options)
    return load_pair(dense, pruned, given).compare(data, prompts, part(MeasuringOptions, given))


def load_pair(
    dense: str | os.PathLike | PreTrainedModel,
    pruned: str | os.PathLike | PreTrainedModel,
    options: ComparisonOptions,
) -> LoadedPair:
    """Load two models where they are names, and check that they can be compared.

    Args:
        dense: The dense model, as in `compare_models`.
        pruned: The pruned one, the same.
        options: How to load them.

    Raises:
        OTPruneError: Whatever `compare_models` raises before it measures.
    """
    check_launch()
    check_single("Comparing two models", "Start one.")
    loading = check_loading_options(part(LoadingOptions, options))
    tokenizer = checked_tokenizer(options.get("tokenizer"))
    in_memory = model_in_memory(dense), model_in_memory(pruned)
    if in_memory[0] is not None and in_memory[1] is not None:
        refuse_loading_options(loading)
    one, _, _ = _side(dense, in_memory[0], loading_of_dense(loading))
    like = loading.copy()
    like["dtype"] = one.model.dtype
    other, config, report = _side(pruned, in_memory[1], like, may_be_quantized=True)
    check_whole(other.model)
    check_same_text(one.model, other.model, one.tokenizer, other.tokenizer)
    return LoadedPair(one, other._replace(tokenizer=tokenizer or other.tokenizer), config, report)


def _side(
    name: str | os.PathLike | PreTrainedModel,
    in_memory: PreTrainedModel | None,
    loading: LoadingOptions,
    may_be_quantized: bool = False,
) -> tuple[ComparedModel, OTPruningConfig, PruningReport | None]:
    """Return one model, and what pruning left beside it."""
    if in_memory is not None:
        shown = hub_id(in_memory.name_or_path) or type(in_memory).__name__
        return ComparedModel(shown, in_memory, None), OTPruningConfig(), None
    given = os.fspath(name)  # type: ignore[arg-type]
    found = load_checkpoint(given, loading, may_be_quantized=may_be_quantized)
    shown = hub_id(given) or Path(os.path.expanduser(given)).resolve().name
    return ComparedModel(shown, found.model, found.tokenizer), found.config or OTPruningConfig(), found.report
