"""What a comparison of a pruned model with the dense one finds: numbers and texts, ready for JSON."""

import dataclasses
import math
import os.path
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class ModelFacts(NamedTuple):
    """The size of a model.

    Attributes:
        name: The Hub id, the folder's name, or the class of a model in memory; never a path.
        parameters: The number of parameters.
        weight_bytes: The bytes of the weights.
        dtype: The data type that it ran in.
        ffn_widths: The number of channels of each FFN.
    """

    name: str
    parameters: int
    weight_bytes: int
    dtype: str
    ffn_widths: tuple[int, ...]


class DataComparison(NamedTuple):
    """Both models on one data set.

    Attributes:
        name: The name that the user gave it.
        dense_perplexity: The perplexity of the dense model.
        perplexity: That of the pruned one.
        kl: The mean of KL(dense || pruned) in nats per token.
        agreement: The share of tokens for which both models find the same token most likely.
        num_tokens: Number of predicted tokens.
        num_windows: Number of windows.
        seqlen: Tokens of a window.
        seen_windows: How many windows are known to hold text that the pruned model was calibrated on.
    """

    name: str
    dense_perplexity: float
    perplexity: float
    kl: float
    agreement: float
    num_tokens: int
    num_windows: int
    seqlen: int
    seen_windows: int

    @property
    def ratio(self) -> float:
        """Pruned perplexity over dense perplexity."""
        return self.perplexity / self.dense_perplexity


class PromptComparison(NamedTuple):
    """What both models write after one prompt.

    Attributes:
        prompt: The prompt as it was given.
        dense: What the dense model writes.
        pruned: What the pruned one writes.
        same_tokens: The number of tokens up to which both write the same.
    """

    prompt: str
    dense: str
    pruned: str
    same_tokens: int

    @property
    def same_text(self) -> str:
        """The beginning that both texts have in common."""
        return os.path.commonprefix([self.dense, self.pruned])


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """A pruned model beside the dense one.

    Attributes:
        dense: The size of the dense model.
        pruned: The size of the pruned one.
        data: Perplexities, KL divergence and agreement by data set.
        prompts: What both write after each prompt.
        settings: How it was measured: `protocol`, `new_tokens`, `chat`.
        versions: The versions of the libraries.
        speed: What `optimum_otprune.commands.speed` measured by shape, if that was asked for.
    """

    dense: ModelFacts
    pruned: ModelFacts
    data: tuple[DataComparison, ...]
    prompts: tuple[PromptComparison, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    speed: tuple[Mapping[str, Any], ...] = ()

    @property
    def size_ratio(self) -> float:
        """Parameters of the pruned model over those of the dense one."""
        return self.pruned.parameters / self.dense.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return everything JSON-ready; numbers that are not finite as `"inf"` or `"nan"`."""
        return {
            "dense": _plain(self.dense._asdict()),
            "pruned": _plain(self.pruned._asdict()),
            "size_ratio": self.size_ratio,
            "data": [_plain({**entry._asdict(), "ratio": entry.ratio}) for entry in self.data],
            "prompts": [_plain(entry._asdict()) for entry in self.prompts],
            "settings": _plain(self.settings),
            "speed": [_plain(entry) for entry in self.speed],
            "versions": dict(self.versions),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
