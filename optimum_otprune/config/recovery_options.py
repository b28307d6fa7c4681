"""The options of recovery, written once: signatures, checks and the command line come from them; no torch here."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, get_args

from optimum_otprune.config.checks import check_count
from optimum_otprune.config.quantities import COUNT_UNITS, LARGEST_SEED, parse_quantity, real_number
from optimum_otprune.errors import ConfigurationError, unknown_name
from optimum_otprune.models.defaults import BATCH_SIZE
from optimum_otprune.storage.hub.options import About, filled

Trained = Literal["ffn", "all", "lora"]


class RecoveryOptions(TypedDict, total=False):
    """The options of training a pruned model towards the dense one."""

    num_tokens: Annotated[
        str | int, About("1M", "tokens to train on, such as 250k; each is also read by the dense model", "N")
    ]
    trained: Annotated[
        str,
        About(
            "all",
            "the weights that are trained: all, ffn (the pruned layers alone), or lora (low-rank updates of those, "
            "which take little memory; needs the extra `recover`)",
            "NAME",
        ),
    ]
    learning_rate: Annotated[
        float | None, About(None, "peak learning rate (default: 0.1 / the model's hidden size)", "X")
    ]
    batch_tokens: Annotated[int, About(512, "tokens of one step of the optimizer", "N")]
    written_per_sample: Annotated[
        float, About(4.0, "samples that the dense model writes itself for each given one, if the budget is that large")
    ]
    gradient_checkpointing: Annotated[
        bool, About(False, "compute the inside of each block twice, so that training takes less memory")
    ]
    seed: Annotated[int | None, About(None, "seed of what is written and held out (default: that of pruning)", "N")]
    batch_size: Annotated[
        int, About(BATCH_SIZE, "the most samples of a forward pass, fewer if the vocabulary is large", "N", False)
    ]
    base_options: Annotated[
        dict[str, Any] | None, About(None, "options of loading the dense model, as in `from_pretrained`", None, False)
    ]
    resume_from: Annotated[
        str | os.PathLike[str] | None,
        About(None, "folder that keeps where the training is until the model is saved", None, False),
    ]
    cache_logits: Annotated[
        str | os.PathLike[str] | None,
        About(
            None,
            "folder for the dense model's largest logits, which are written before the training begins, so that the "
            "dense model is not in memory with it",
            None,
            False,
        ),
    ]
    logits_per_token: Annotated[int, About(64, "logits of each token in that folder", "N")]
    progress: Annotated[bool, About(True, "show progress bars", None, False)]


@dataclasses.dataclass(frozen=True)
class RecoverySettings:
    """Checked options of recovery that decide its result, and how it is run.

    Attributes:
        num_tokens: Number of tokens to train on.
        trained: The weights that are trained, `"ffn"`, `"all"` or `"lora"`.
        learning_rate: The peak learning rate, or None for the default of the model's size.
        batch_tokens: Number of tokens of one step of the optimizer.
        written_per_sample: The most samples that the dense model writes for each given one.
        seed: Seed of what is written and held out, and of the order of samples.
        batch_size: The most samples of a forward pass.
        gradient_checkpointing: Whether the inside of each block is computed twice.
        progress: Whether to show progress bars.
        logits_per_token: Number of the dense model's logits that are written for each token, if they are.
    """

    num_tokens: int
    trained: str
    learning_rate: float | None
    batch_tokens: int
    written_per_sample: float
    seed: int
    batch_size: int
    gradient_checkpointing: bool
    progress: bool
    logits_per_token: int

    @classmethod
    def of(cls, given: Mapping[str, object], seed: int) -> "RecoverySettings":
        """Check the options that a user gave; those that are not given have their defaults.

        Args:
            given: Values by name.
            seed: The seed where none is given.

        Raises:
            ConfigurationError: If there is no such option, or a value is of the wrong type or out of range.
        """
        options = filled(RecoveryOptions, given, "option of recovery")
        kinds = get_args(Trained)
        if options["trained"] not in kinds:
            raise ConfigurationError(unknown_name("`trained`", options["trained"], kinds))
        rate, written = options["learning_rate"], options["written_per_sample"]
        if rate is not None and not 0 < rate < 1:
            raise ConfigurationError(f"`learning_rate` is {rate!r:.60}; want a number > 0 and < 1, such as 2e-4.")
        number = real_number(written)
        if number is None or not 0 <= number <= 1000:
            raise ConfigurationError(f"`written_per_sample` is {written!r:.60}; want a number >= 0 and <= 1000.")
        chosen = seed if options["seed"] is None else options["seed"]
        if not 0 <= chosen <= LARGEST_SEED:
            raise ConfigurationError(f"`seed` is {chosen!r:.60}; want an integer >= 0 and <= {LARGEST_SEED}.")
        return cls(
            check_tokens("num_tokens", options["num_tokens"]),
            options["trained"],
            None if rate is None else float(rate),
            check_count("batch_tokens", options["batch_tokens"]),
            number,
            int(chosen),
            check_count("batch_size", options["batch_size"]),
            options["gradient_checkpointing"],
            options["progress"],
            check_count("logits_per_token", options["logits_per_token"]),
        )


def check_tokens(name: str, value: str | int) -> int:
    """Return a number of tokens as an int, or raise with the argument's name.

    Args:
        name: The name of the argument.
        value: A whole number, or a string such as `"250k"`.

    Raises:
        ConfigurationError: If it is no number, or out of range.
    """
    try:
        return check_count(name, parse_quantity(value, COUNT_UNITS) if isinstance(value, str) else value)
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"`{name}` {error}. Give a number, or such as '250k'.") from error
