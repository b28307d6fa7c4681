"""`OTPruningConfig`: what is done to a model, as names and numbers only."""

import copy
import inspect
import json
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

from optimum.configuration_utils import BaseConfig

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.functional.costs import costs
from optimum_otprune.functional.importance import NOT_AGGREGATED, importances
from optimum_otprune.functional.marginals import distributions, mixtures, strategies
from optimum_otprune.functional.solvers import solvers
from optimum_otprune.methods import (
    METHOD_FIELDS,
    METHODS,
    QUALITIES,
    QUALITY_FIELDS,
    RIDGE_FIELDS,
    TRANSPORT_FIELDS,
)
from optimum_otprune.options import BUDGET_FIELDS, OPTIONS, OPTIONS_BY_NAME, Option
from optimum_otprune.quantities import parse_quantity
from optimum_otprune.registry import Registry, unknown_name
from optimum_otprune.version import __version__

CONFIG_FILE = "otprune_config.json"

_VERSION_KEY = "optimum_otprune_version"
# Keys that transformers and optimum write into, or pass to, any configuration.
_FOREIGN_KEYS = frozenset({"model_type", "transformers_version", "optimum_version", "name_or_path", "_commit_hash"})
# Fields that name a registered function; `prune()` takes a plain callable for each.
FUNCTION_FIELDS: dict[str, Registry] = {
    "importance": importances,
    "cost": costs,
    "source_distribution": distributions,
    "target_distribution": distributions,
    "statistics": mixtures,
    "solver": solvers,
}
STRATEGY_FIELDS = ("statistics", "source_distribution", "target_distribution")
# Fields that make the method what its name says.
FIXED_FIELDS = {
    "random": ("importance",),
    "magnitude": ("importance",),
    "fo_snip": ("importance",),
    "wanda_sp": ("importance",),
    "flap": ("importance", "compensation"),
    "least_squares": ("compensation",),
}


class OTPruningConfig(BaseConfig):
    """Everything that decides what pruning does; saved beside the pruned model as `otprune_config.json`.

    Every option has a default that works. Fields that a method decides are None when given as None or left unset, and
    are filled in from the method, so a configuration always shows what will be done; a field stays None where the
    method has no use for it.

    Args:
        **options: By name, see `optimum_otprune.options.OPTIONS` or `otprune prune --help`.

    Raises:
        ConfigurationError: If a name is unknown, a value has the wrong type or is out of range, or an option
            contradicts another one or the method.

    Example:
        >>> config = OTPruningConfig(pruning_ratio=0.5)
        >>> config.method, config.selection, config.compensation
        ('otprune', 'obs', 'ridge')
    """

    CONFIG_NAME = CONFIG_FILE
    FULL_CONFIGURATION_FILE = CONFIG_FILE
    model_type = "otprune"  # a label in the file; never registered with AutoConfig

    def __init__(self, **options: Any):
        given = {name: value for name, value in options.items() if name not in _FOREIGN_KEYS and name != _VERSION_KEY}
        for name in given:
            if name not in OPTIONS_BY_NAME:
                raise ConfigurationError(unknown_name("option", name, OPTIONS_BY_NAME))
        # Nothing is forwarded: the base class drops unknown names and pops those of generation parameters in silence.
        super().__init__()
        absent = _absent_budgets(given)
        values = {
            option.name: None
            if option.name in absent
            else check_option(option, given.get(option.name, option.default))
            for option in OPTIONS
        }
        explicit = {name for name, value in given.items() if value is not None}
        values.update(_resolve(values, explicit))
        for name, value in values.items():
            setattr(self, name, value)
        self.optimum_otprune_version = str(options.get(_VERSION_KEY, __version__))

    def to_dict(self) -> dict[str, Any]:
        """Own fields and the version that wrote them, JSON-ready."""
        values: dict[str, Any] = {name: copy.deepcopy(getattr(self, name)) for name in OPTIONS_BY_NAME}
        values["fuse"] = list(values["fuse"])
        values[_VERSION_KEY] = self.optimum_otprune_version
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: a file that names every value stays true when defaults change."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The file's text: sorted keys, so that equal configurations give equal files."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OTPruningConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"OTPruningConfig {self.to_json_string()}"

    def replace(self, **changes: Any) -> "OTPruningConfig":
        """A copy with some options changed.

        A changed `method` or `quality` decides its fields again; a new ratio or target takes the old one's place.
        """
        values = _without_replaced_budget(self.to_dict(), changes)
        values.pop(_VERSION_KEY)
        if changes.get("method", self.method) != self.method:
            values = {name: value for name, value in values.items() if name not in (*METHOD_FIELDS, *QUALITY_FIELDS)}
        elif changes.get("quality", self.quality) != self.quality:
            values = {name: value for name, value in values.items() if name not in QUALITY_FIELDS}
        return OTPruningConfig(**{**values, **changes})

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a dictionary, such as a file's.

        Options that this version does not know are left out with a warning if a newer version wrote them.

        Args:
            config_dict: By name.
            **kwargs: Options that override those of the dictionary, checked like those of the constructor;
                `return_unused_kwargs=True` also returns the names that are no options.

        Raises:
            ConfigurationError: As for the constructor.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        if not isinstance(config_dict, Mapping):
            raise ConfigurationError(f"A configuration is an object of options by name, got {config_dict!r}.")
        values = {name: value for name, value in config_dict.items() if name not in _FOREIGN_KEYS}
        written_by = values.pop(_VERSION_KEY, __version__)
        unknown = sorted(name for name in values if name not in OPTIONS_BY_NAME)
        if unknown and _is_newer(str(written_by)):
            warnings.warn(
                f"This configuration was written by optimum_otprune {written_by}, this is {__version__}. Unknown "
                f"options are left out: {', '.join(unknown)}. Upgrade optimum_otprune to use them.",
                stacklevel=2,
            )
            values = {name: value for name, value in values.items() if name not in unknown}
        overrides = {name: value for name, value in kwargs.items() if name in OPTIONS_BY_NAME}
        unused = {name: value for name, value in kwargs.items() if name not in OPTIONS_BY_NAME}
        config = cls(**{**_without_replaced_budget(values, overrides), **overrides})
        return (config, unused) if return_unused else config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Read `otprune_config.json` from a folder, a repository of the Hub, or a file of any name.

        Args:
            pretrained_model_name_or_path: Where it is.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, and options that override the file's.

        Raises:
            ConfigurationError: If it cannot be found or read, or is not valid.
        """
        try:
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        except OSError as error:
            raise ConfigurationError(
                f"No pruning configuration could be read from "
                f"{os.path.basename(str(pretrained_model_name_or_path))!r}: want a file {CONFIG_FILE!r} there, valid "
                f"JSON. ({str(error).strip().splitlines()[0]})"
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `otprune_config.json` into a folder, and upload it if asked.

        Args:
            save_directory: Made if it does not exist.
            push_to_hub: Also upload the file to the repository `repo_id` (default: the folder's name).
            **kwargs: For `push_to_hub`.
        """
        super().save_pretrained(str(save_directory), push_to_hub=False)  # its own upload calls a method that is gone
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **kwargs)


OTPruningConfig.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    + [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
        for option in OPTIONS
    ]
)


def _is_newer(version: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part) for part in text.split(".") if part.isdigit()]

    return parts(version) > parts(__version__)


def _absent_budgets(given: Mapping[str, Any]) -> set[str]:
    """Of the ratio and the targets, those that another one stands in for."""
    budgets = [name for name in BUDGET_FIELDS if given.get(name) is not None]
    if len(budgets) > 1:
        both = " and ".join(f"`{name}={given[name]!r}`" for name in budgets)
        raise ConfigurationError(f"{both} say in more than one way how much to prune. Give one of them.")
    return set(BUDGET_FIELDS) - set(budgets) if budgets else set()


def _without_replaced_budget(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    replaced = BUDGET_FIELDS if any(changes.get(name) is not None for name in BUDGET_FIELDS) else ()
    return {name: value for name, value in values.items() if name not in replaced}


def check_option(option: Option, value: Any) -> Any:
    """Return the value in the option's type, or raise with the option's name, what was got and what would be right."""
    if value is None:
        if option.optional:
            return None
        raise ConfigurationError(f"`{option.name}` is None; want {_wanted(option)}.")
    problem = ConfigurationError(f"`{option.name}` is {value!r}; want {_wanted(option)}.")
    if option.kind is tuple:
        return _checked_names(option, value, problem)
    if option.units is not None and isinstance(value, str):
        return _checked_quantity(option, value, problem)
    if isinstance(value, bool) or not isinstance(value, (int, float) if option.kind is float else option.kind):
        raise problem
    if option.kind is float:
        value = float(value)  # type: ignore[arg-type]
    if option.kind is not str and not _in_range(option, value):
        raise problem
    if option.choices is not None and value not in option.choices:
        raise ConfigurationError(unknown_name(f"`{option.name}`", value, option.choices))
    return value


def _checked_quantity(option: Option, value: str, problem: ConfigurationError) -> str:
    """The string as it was given, once it is known to be a quantity in range."""
    assert option.units is not None
    try:
        quantity = parse_quantity(value, option.units)
    except ValueError as error:
        raise problem from error
    if not _in_range(option, quantity):
        raise problem
    return value


def _checked_names(option: Option, value: Any, problem: ConfigurationError) -> tuple[str, ...]:
    assert option.choices is not None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise problem
    for name in value:
        if name not in option.choices:
            raise ConfigurationError(unknown_name(f"entry of `{option.name}`", name, option.choices))
    return tuple(name for name in option.choices if name in value)


def _in_range(option: Option, value: float) -> bool:
    return (
        math.isfinite(value)
        and (option.minimum is None or value >= option.minimum)
        and (option.maximum is None or value <= option.maximum)
        and (option.below is None or value < option.below)
        and (option.above is None or value > option.above)
    )


def _wanted(option: Option) -> str:
    kind = {float: "a number", int: "an integer", str: "a string", tuple: "a list"}[option.kind]
    if option.units is not None:
        kind += f" or a string with a unit ({', '.join(filter(None, option.units))})"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (
            (">=", option.minimum),
            (">", option.above),
            ("<=", option.maximum),
            ("<", option.below),
        )
        if bound is not None
    ]
    of = f" of {', '.join(option.choices)}" if option.choices else ""
    return kind + of + (" " + " and ".join(bounds) if bounds else "")


def _resolve(values: dict[str, Any], explicit: set[str]) -> dict[str, Any]:
    """Fill in what the method decides, and refuse what contradicts it or another option."""
    method = values["method"]
    preset = METHODS[method]
    for name in FIXED_FIELDS.get(method, ()):
        if name in explicit and values[name] != preset[name]:
            raise ConfigurationError(
                f"`{name}={values[name]!r}` contradicts `method={method!r}`, which means {preset[name]!r}. Leave it "
                "out, or use method='otprune' and set the fields one by one."
            )
    chosen = {name: preset[name] if values[name] is None else values[name] for name in METHOD_FIELDS}
    for name, registry in FUNCTION_FIELDS.items():
        if chosen[name] is not None and chosen[name] not in registry:
            raise ConfigurationError(unknown_name(f"`{name}`", chosen[name], registry.names()))
    _apply_strategy(chosen, values, explicit)
    if chosen["compensation"] == "bias" and "intercept" not in explicit:
        chosen["intercept"] = "always"
    if "importance" in explicit and "selection" not in explicit and chosen["selection"] == "obs":
        warnings.warn(
            f"With selection='obs' the importance {chosen['importance']!r} only breaks ties; set selection='top' to "
            "select by it, or selection='obs' to silence this.",
            stacklevel=4,
        )
    unused = unused_fields(chosen)
    for name, reason in unused.items():
        if name in explicit:
            raise ConfigurationError(f"`{name}={values[name]!r}` would be ignored: {reason}.")
        chosen[name] = None
    for name in METHOD_FIELDS:
        if chosen[name] is None and name not in unused:
            chosen[name] = METHODS["otprune"][name]  # switched on by an override of a method that has no use for it
    _check_combinations(chosen)
    for name in QUALITY_FIELDS:
        chosen[name] = QUALITIES[str(chosen["quality"])][name] if values[name] is None else values[name]
    if "error_weighting" in explicit and chosen["error_weighting"] != "uniform" and not chosen["reconstruction_steps"]:
        raise ConfigurationError(
            f"`error_weighting={chosen['error_weighting']!r}` would be ignored: only reconstruction reads it. Set "
            "`reconstruction_steps`, or quality='balanced' or 'best'."
        )
    return chosen


def _apply_strategy(chosen: dict[str, Any], values: dict[str, Any], explicit: set[str]) -> None:
    if chosen["strategy"] is None:
        return
    if chosen["strategy"] not in strategies:
        raise ConfigurationError(unknown_name("`strategy`", chosen["strategy"], strategies))
    strategy = strategies[chosen["strategy"]]._asdict()
    contradicted = [name for name in STRATEGY_FIELDS if name in explicit and values[name] != strategy[name]]
    if contradicted and "strategy" in explicit:
        name = contradicted[0]
        raise ConfigurationError(
            f"`{name}={values[name]!r}` contradicts `strategy={chosen['strategy']!r}`, which sets {strategy[name]!r}. "
            "Leave one of them out."
        )
    for name in STRATEGY_FIELDS:
        if name not in explicit:
            chosen[name] = strategy[name]
    if contradicted:
        chosen["strategy"] = None  # the method's strategy, no longer what is done


def unused_fields(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return the method fields that nothing reads, given the others, with the reason."""
    unused: dict[str, str] = {}
    ridge = chosen["compensation"] == "ridge"
    transport = bool(chosen["fuse"]) or (ridge and chosen["ridge_prior"] == "transport")
    if not ridge:
        unused.update(dict.fromkeys(RIDGE_FIELDS, "only compensation='ridge' refits the down projection"))
    if chosen["compensation"] == "none":
        unused["intercept"] = "without compensation there is no intercept"
    if not transport:
        reason = "nothing is transported, since `fuse` is empty and the refit has no transport prior"
        unused.update(dict.fromkeys((*TRANSPORT_FIELDS, "strategy", "statistics"), reason))
    else:
        if chosen["solver"] == "nearest":
            unused["target_distribution"] = "the solver 'nearest' knows no capacities; choose another, such as 'emd'"
    if chosen["importance"] in NOT_AGGREGATED:
        unused["aggregation"] = f"the importance {chosen['importance']!r} has no weight scores to aggregate"
    return unused


def _check_combinations(chosen: dict[str, Any]) -> None:
    centroids = chosen["target"] == "cluster_centroid"
    if centroids and chosen["normalization"] == "identity":
        raise ConfigurationError(
            "`target='cluster_centroid'` contradicts `normalization='identity'`: centroids are no channels that "
            "could stay as they are. Use normalization='corrected'."
        )
    if centroids and chosen["cost"] == "activation":
        raise ConfigurationError(
            "`target='cluster_centroid'` contradicts `cost='activation'`: centroids of weights have no activations. "
            "Use cost='weight'."
        )
    if chosen["compensation"] == "bias" and chosen["intercept"] != "always":
        raise ConfigurationError("`compensation='bias'` is an intercept: it needs `intercept='always'`.")
    if chosen["ridge_prior"] == "transport" and "down" not in (chosen["fuse"] or ()):
        raise ConfigurationError(
            "`ridge_prior='transport'` shrinks towards the fused down projection, so `fuse` must hold 'down'. "
            "Add it, or use ridge_prior='identity'."
        )
