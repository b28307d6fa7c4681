"""The results of a finished run, and its report."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict, Unpack

from transformers import PreTrainedModel

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.models.auto_classes import auto_classes
from optimum_otprune.models.devices import model_sizes
from optimum_otprune.models.tasks import CAUSAL
from optimum_otprune.pruning.calibration.data import TokenData
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import LayerReport, PruningReport
from optimum_otprune.pruning.versions import versions


class Origin(TypedDict):
    """What the report says of the model that no run finds out; see `PruningReport`."""

    base_model: str | None
    base_card: Mapping[str, object]
    evaluations: tuple[Mapping[str, object], ...]


class PrunedLayers(NamedTuple):
    """The results of pruning all layers.

    Attributes:
        reports: The report of each layer.
        padding_parameters: Zeros in the model that only fill up layers to a common width.
        added_biases: Whether the model's configuration had no biases before and has them now.
        written_samples: Number of calibration samples that the dense model wrote itself.
        attention: The report of the attention of each block, where heads were removed.
    """

    reports: list[LayerReport]
    padding_parameters: int
    added_biases: bool = False
    written_samples: int = 0
    attention: Sequence[LayerReport] = ()

    def report(
        self,
        model: PreTrainedModel,
        config: OTPruningConfig,
        recipe: Recipe,
        data: TokenData,
        sizes_before: tuple[int, int],
        **origin: Unpack[Origin],
    ) -> PruningReport:
        """Return the report of the whole run.

        Args:
            model: The pruned model.
            config: The configuration that it was pruned by, as the user gave it.
            recipe: That configuration with its functions.
            data: The calibration samples and where they come from.
            sizes_before: Parameters and bytes of the dense model.
            **origin: What is known of the model and was measured before.
        """
        parameters, size = model_sizes(model)
        return PruningReport(
            config=config.to_dict(),
            options=tuple(config.fewest_options()),
            layers=tuple(self.reports),
            attention=tuple(self.attention),
            calibration={**data.describe(), "written_samples": self.written_samples},
            versions=versions(),
            model_type=model.config.model_type,
            auto_class=(auto_classes(type(model).__name__) or [CAUSAL])[0],
            token_weighting=config.token_weighting or "uniform",
            parameters_before=sizes_before[0],
            parameters_after=parameters - self.padding_parameters,
            padding_parameters=self.padding_parameters,
            added_biases=self.added_biases,
            size_before=sizes_before[1],
            size_after=size,
            custom_functions=recipe.custom_functions,
            references=recipe.references,
            **origin,
        )
