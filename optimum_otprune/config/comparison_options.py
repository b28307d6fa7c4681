"""The options of comparing two models; torch is not imported, so that `otprune --help` is fast."""

from typing import TYPE_CHECKING, Annotated, TypedDict

from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.models.defaults import BATCH_SIZE
from optimum_otprune.storage.hub.options import About

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MeasuringOptions(TypedDict, total=False):
    """The options of comparing two models that are loaded."""

    seqlen: Annotated[int | None, About(None, "tokens per window (default: as the second model was pruned)", "N")]
    max_windows: Annotated[int | None, About(None, "measure on the first so many windows of each data set only", "N")]
    new_tokens: Annotated[int, About(40, "tokens that each model writes after a prompt", "N")]
    chat: Annotated[bool, About(False, "give each prompt as a user's turn, by the tokenizer's chat template")]
    batch_size: Annotated[int, About(BATCH_SIZE, "windows per forward pass", is_flag=False)]
    progress: Annotated[bool, About(True, "show progress bars", is_flag=False)]


class ComparisonOptions(MeasuringOptions, LoadingOptions, total=False):
    """The options of comparing two models, and of loading them where they are names."""

    tokenizer: Annotated[
        "PreTrainedTokenizerBase | None",
        About(None, "of both models; takes the place of the second model's own", is_flag=False),
    ]
