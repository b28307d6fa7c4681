"""The configurations that a search may try, composed so that their fields do not contradict each other."""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from optimum_otprune.config.checks import check_option
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import OPTIONS_BY_NAME
from optimum_otprune.config.presets import METHOD_FIELDS, METHODS, QUALITY_FIELDS
from optimum_otprune.config.resolve import FUNCTION_FIELDS, function_name, unused_fields, unused_numbers
from optimum_otprune.errors import ConfigurationError, unknown_name
from optimum_otprune.functional.marginals import Strategy


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float


class Choices(NamedTuple):
    """One of a few values."""

    values: tuple[object, ...]


Domain: TypeAlias = Range | Choices
# Picks a value of a domain; the label tells apart domains of one field that combinations have made smaller.
Pick: TypeAlias = Callable[[str, str, Domain], object]

_WALKS = 200


def default_search_space(config: OTPruningConfig, residual: bool, can_hold_intercept: bool) -> dict[str, object]:
    """Return the default search space: the fields that the configuration's method leaves open.

    Args:
        config: The configuration to start from.
        residual: Whether the FFN's output is added to the residual stream unchanged; otherwise `target_correction` has
            no effect.
        can_hold_intercept: Whether the architecture can hold an output bias.

    Returns:
        By field, a tuple `(low, high)` or a list of choices.

    Raises:
        ConfigurationError: If the method leaves nothing open.
    """
    space: dict[str, object] = {}
    if "importance" not in METHODS[config.method].fixed:
        cheap = ["fluctuation", "wanda", "magnitude"]  # this needs no backward pass
        space["selection"] = ["obs", "top"]
        space["importance"] = [*dict.fromkeys([config.importance, *cheap])]
    if config.compensation == "ridge":
        space["ridge_prior"] = ["zero", "identity", *(["transport"] if "down" in (config.fuse or ()) else [])]
        if residual:
            space["target_correction"] = (0.0, 1.0)
        if can_hold_intercept:
            space["intercept"] = ["never", "auto", "always"]
    if config.reconstruction_steps:
        space["reconstruction_steps"] = (max(1, config.reconstruction_steps // 2), 2 * config.reconstruction_steps)
    if config.compensation == "ridge" or config.reconstruction_steps:
        space["holdout_share"] = (0.1, 0.5)
    if not space:
        raise ConfigurationError(
            f"The method {config.method!r} leaves nothing to search over. Give `search_space`, or another method."
        )
    return space


def check_search_space(search_space: Mapping[str, object], base: OTPruningConfig) -> dict[str, Domain]:
    """Return the domains by field, in the order in which they are picked.

    Args:
        search_space: For each field, a tuple `(low, high)` of numbers or a list of choices.
        base: The configuration that all other fields come from.

    Raises:
        ConfigurationError: If a field is unknown, not searchable, or never read; or a value is out of range or cannot
            be combined with any of the others.
    """
    if not isinstance(search_space, Mapping) or not search_space:
        raise ConfigurationError(
            f"`search_space` is {search_space!r}; want a dictionary with a tuple (low, high) or a list of choices for "
            "each field."
        )
    domains = {name: _domain(name, domain) for name, domain in search_space.items()}
    space = {name: domains[name] for name in OPTIONS_BY_NAME if name in domains}
    _check_reachable(space, base)
    return space


def _domain(name: str, domain: object) -> Domain:
    if name not in OPTIONS_BY_NAME:
        raise ConfigurationError(unknown_name("field of `search_space`:", name, OPTIONS_BY_NAME))
    option = OPTIONS_BY_NAME[name]
    if option.rules.shared is not None:
        raise ConfigurationError(
            f"`{name}` decides {option.rules.shared}, which must be the same in all trials for them to be compared. "
            "Leave it out of `search_space` and set it in the configuration."
        )
    if isinstance(domain, list) and domain:
        values = tuple(check_option(option, value) for value in domain)
        if name in FUNCTION_FIELDS:
            values = tuple(function_name(name, value) for value in values)
        if len(set(values)) < len(values):
            raise ConfigurationError(f"`search_space[{name!r}]` names a choice twice: {domain!r}.")
        return Choices(values)
    if isinstance(domain, tuple) and len(domain) == 2 and option.kind in (int, float):
        low, high = (check_option(option, value) for value in domain)
        if low is not None and high is not None and low < high:
            return Range(low, high)
    kinds = "a tuple (low, high) with low < high, or a list" if option.kind in (int, float) else "a list"
    raise ConfigurationError(f"`search_space[{name!r}]` is {domain!r}; want {kinds} of choices, not empty.")


def _check_reachable(space: Mapping[str, Domain], base: OTPruningConfig) -> None:
    """Raise an error if a field or a choice is never taken in any trial."""
    seen: dict[str, set] = {}
    rng = random.Random(0)

    def pick(name: str, label: str, domain: Domain) -> object:
        values = domain.values if isinstance(domain, Choices) else (domain.low, domain.high)
        fresh = [value for value in values if value not in seen.get(name, ())]
        value = rng.choice(fresh or values)
        seen.setdefault(name, set()).add(value)
        return value

    def missed() -> list[tuple[str, Any]]:
        choices = [
            (name, value) for name, domain in space.items() if isinstance(domain, Choices) for value in domain.values
        ]
        ranges = [(name, domain.low) for name, domain in space.items() if isinstance(domain, Range)]
        return [(name, value) for name, value in choices + ranges if value not in seen.get(name, ())]

    for _ in range(_WALKS):
        sample_config(base, space, pick)
        if not missed():
            return
    name, value = missed()[0]
    reason = unread_fields(base).get(name) or _contradiction(base, {name: value})
    raise ConfigurationError(
        f"`search_space[{name!r}]` holds {value!r}, which no combination can take: {reason or 'others exclude it'}. "
        "Leave it out, or change the configuration."
    )


def _contradiction(base: OTPruningConfig, sampled: Mapping[str, object]) -> str:
    """Return the reason why fields cannot be combined; empty if they can."""
    try:
        assemble(base, sampled)
    except ConfigurationError as error:
        return str(error).rstrip(".")
    return ""


def unread_fields(config: OTPruningConfig) -> dict[str, str]:
    """Return the fields that do not change the result of a configuration, with the reason."""
    preset = METHODS[config.method].fields
    values = {name: getattr(config, name) for name in METHOD_FIELDS}
    unread = unused_fields({name: preset[name] if value is None else value for name, value in values.items()})
    unread |= unused_numbers({name: getattr(config, name) for name in OPTIONS_BY_NAME})
    if config.compensation == "bias":
        unread["intercept"] = "compensation='bias' is an intercept"
    if config.selection == "obs":
        unread |= dict.fromkeys(("importance", "aggregation"), "with selection='obs' the importance only breaks ties")
    return unread


def assemble(base: OTPruningConfig, sampled: Mapping[str, object]) -> OTPruningConfig:
    """Return the base with sampled fields; fields of the base that are then not used are dropped.

    Args:
        base: The configuration to start from.
        sampled: The sampled values by field.

    Raises:
        ConfigurationError: If sampled fields contradict each other, or a field that the base uses.
    """
    values = {name: getattr(base, name) for name in OPTIONS_BY_NAME}
    if sampled.get("method", base.method) != base.method:
        values |= dict.fromkeys((*METHOD_FIELDS, *QUALITY_FIELDS))
    elif sampled.get("quality", base.quality) != base.quality:
        values |= dict.fromkeys(QUALITY_FIELDS)
    if "strategy" in sampled:
        values |= dict.fromkeys(Strategy._fields)
    elif set(Strategy._fields) & set(sampled):
        values["strategy"] = None
    values |= sampled
    if values["compensation"] == "bias" and "intercept" not in sampled:
        values["intercept"] = None  # the base always has it
    return OTPruningConfig.assembled(values, asked=sampled)


def sample_config(base: OTPruningConfig, space: Mapping[str, Domain], pick: Pick) -> OTPruningConfig:
    """Put a configuration together field by field.

    A field that makes no difference given the earlier ones is not picked, and only choices that can be combined with
    these are offered.

    Args:
        base: The configuration that all other fields come from.
        space: The domains by field, from `check_search_space`.
        pick: A function of field, label and domain that returns the value to try.
    """
    sampled: dict[str, object] = {}
    completion: dict[str, object] = {}
    config = base
    rest = dict(space)
    for name, domain in space.items():
        del rest[name]
        if name in unread_fields(config):
            continue
        label = name
        if isinstance(domain, Choices):
            allowed = tuple(
                value for value in domain.values if _completion(base, {**sampled, name: value}, rest) is not None
            )
            if not allowed:
                continue
            if allowed != domain.values:
                label = f"{name} of {', '.join(map(str, allowed))}"
            domain = Choices(allowed)
        sampled[name] = pick(name, label, domain)
        completion = _completion(base, sampled, rest) or {}
        config = assemble(base, {**sampled, **completion})
    return config


def _completion(
    base: OTPruningConfig, sampled: Mapping[str, object], rest: Mapping[str, Domain]
) -> dict[str, object] | None:
    """Return the choice of a later field that resolves a contradiction, empty if there is none to resolve."""
    later = [{name: value} for name, domain in rest.items() if isinstance(domain, Choices) for value in domain.values]
    return next((added for added in ({}, *later) if not _contradiction(base, {**sampled, **added})), None)


def contains(space: Mapping[str, Domain], config: OTPruningConfig) -> bool:
    """Return whether a configuration's own values lie in the space."""
    for name, domain in space.items():
        value = getattr(config, name)
        if name in unread_fields(config):
            continue
        if isinstance(domain, Choices) and value not in domain.values:
            return False
        if isinstance(domain, Range) and not domain.low <= value <= domain.high:
            return False
    return True
