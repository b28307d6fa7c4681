"""Checks of a configuration against a model's architecture, before any work."""

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError, warn_user
from optimum_otprune.models.modeling_code import check_can_save
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.save_formats import saved_widths


def check_feasible(prunable: PrunableModel, config: OTPruningConfig, widths: list[int]) -> None:
    """Raise an error if the result could not be made or saved.

    Args:
        prunable: The dense model; its weights are not read.
        config: The configuration to prune by.
        widths: Channels of each layer after pruning, from `plan_widths`.

    Raises:
        ConfigurationError: If an intercept is needed that the architecture cannot hold.
        UnsupportedModelError: If layers of different widths could not be saved as asked for.
        CustomFunctionError: If the save format gives widths that cannot be.
    """
    if config.intercept == "always" and not prunable.can_hold_intercept:
        raise ConfigurationError(
            "`intercept='always'` (as method 'flap' has it) needs an output bias, which this architecture cannot hold "
            "so that plain loading finds it. Use intercept='auto' or 'never' with compensation='ridge'."
        )
    may_differ = config.allocation == "adaptive" or len(set(widths)) > 1
    if may_differ:
        check_can_save(prunable.model, prunable.spec, config.non_uniform_format)
        saved_widths(config.non_uniform_format, widths, prunable.widths)  # called for its errors


def warn_of_empty(empty: int, channels: int) -> None:
    """Warn if the ratio counts channels whose weights are zero: a few may be dead, many are padding.

    Args:
        empty: Number of channels of zeros in all FFNs.
        channels: Number of channels of all FFNs.
    """
    if empty:
        warn_user(
            f"{empty:,} of {channels:,} FFN channels hold nothing but zeros, yet the ratio counts them. If the model "
            "was pruned before and filled up with zeros, prune the dense model instead."
        )
