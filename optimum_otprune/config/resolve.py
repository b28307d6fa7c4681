"""Fill in unset options by the method, the strategy and the quality, and refuse contradictions."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from optimum_otprune.config.options import OPTIONS, OPTIONS_BY_NAME
from optimum_otprune.config.presets import (
    METHOD_FIELDS,
    METHODS,
    QUALITIES,
    QUALITY_FIELDS,
    RIDGE_FIELDS,
    TRANSPORT_FIELDS,
)
from optimum_otprune.errors import ConfigurationError, RegistryError, unregistered_name, warn_user
from optimum_otprune.functional.costs import CENTROID_COSTS, costs
from optimum_otprune.functional.importance import importances
from optimum_otprune.functional.marginals import distributions, mixtures, strategies
from optimum_otprune.functional.parameters import split_name
from optimum_otprune.functional.registry import ACTIVATIONS, GRADIENTS, Entry, Registry, can_be_registered
from optimum_otprune.functional.solvers import solvers
from optimum_otprune.functional.transport.plans import SolverSettings
from optimum_otprune.models.save_formats import save_formats

REGISTRIES: Mapping[str, Registry[Any]] = MappingProxyType(
    {
        "importances": importances,
        "costs": costs,
        "distributions": distributions,
        "mixtures": mixtures,
        "solvers": solvers,
        "save_formats": save_formats,
    }
)
# Fields that name a registered function; `prune()` takes a plain callable for each.
FUNCTION_FIELDS: Mapping[str, Registry[Any]] = MappingProxyType(
    {option.name: REGISTRIES[option.rules.registry] for option in OPTIONS if option.rules.registry is not None}
)


def resolve(
    values: dict[str, Any], explicit: set[str], asked: set[str], saved: Collection[str] = ()
) -> dict[str, object]:
    """Fill in the options that the method decides, and refuse those that contradict it or another option.

    Args:
        values: The value of every option, None where the method decides.
        explicit: Names of the options that were given.
        asked: Names of the given options that are an error if nothing reads them; others are dropped then.
        saved: Names of the options that may name what is not registered here.

    Returns:
        The options that were filled in or dropped.

    Raises:
        ConfigurationError: If options contradict each other; the message names the option.
    """
    _check_layers(values)
    missing = {name for name in FUNCTION_FIELDS if name in saved and _is_missing(name, values[name])}
    values = values | {name: function_name(name, values[name]) for name in FUNCTION_FIELDS if name not in missing}
    method = values["method"]
    preset = METHODS[method].fields
    for name in METHODS[method].fixed:
        if name in explicit and values[name] != preset[name]:
            raise ConfigurationError(
                f"`{name}={values[name]!r}` contradicts `method={method!r}`, which means {preset[name]!r}. Leave it "
                "out, or use method='otprune' and set the fields one by one."
            )
    chosen = {name: preset[name] if values[name] is None else values[name] for name in METHOD_FIELDS}
    if "strategy" not in saved or chosen["strategy"] in strategies:  # its parts are saved beside one that is missing
        _apply_strategy(chosen, values, explicit)
    if chosen["compensation"] == "bias" and "intercept" not in explicit:
        chosen["intercept"] = "always"
    _warn_of_ties(chosen, explicit)
    unused = unused_fields(chosen)
    if missing:  # what they read was known where the configuration was saved
        unused |= {name: "it was left unset" for name in METHOD_FIELDS if name in saved and values[name] is None}
    for name, reason in unused.items():
        if name in asked:
            raise _ignored(name, values[name], reason)
        chosen[name] = None
    for name in METHOD_FIELDS:
        if chosen[name] is None and name not in unused:
            chosen[name] = METHODS["otprune"].fields[
                name
            ]  # switched on by an override of a method that has no use for it
    _check_combinations(chosen)
    for name in QUALITY_FIELDS:
        decides = name not in METHOD_FIELDS or chosen[name]  # a method that sets none keeps none
        if values[name] is None and decides:
            chosen[name] = QUALITIES[str(chosen["quality"])][name]
        elif name not in METHOD_FIELDS:
            chosen[name] = values[name]
    everything = {**values, **chosen}
    for name, reason in unused_numbers(everything).items():
        default = _default(name, chosen["quality"])
        if name in asked and everything[name] != default:
            raise _ignored(name, values[name], reason)
        chosen[name] = default
    return chosen


def function_name(field: str, given: str | None) -> str | None:
    """Return a registered function's name with a value for each of its parameters.

    Args:
        field: The field that names the function.
        given: The name that was given, with some of the parameters or none.

    Raises:
        ConfigurationError: If the name or a parameter is unknown, or a value has the wrong type.
    """
    if given is None:
        return None
    name, _ = split_name(given)
    if name not in FUNCTION_FIELDS[field]:
        raise ConfigurationError(unregistered_name(f"`{field}`", name, FUNCTION_FIELDS[field].names()))
    try:
        return FUNCTION_FIELDS[field].entry(given).name
    except RegistryError as error:
        raise ConfigurationError(f"`{field}`: {error}") from error


def _warn_of_ties(chosen: Mapping[str, object], explicit: set[str]) -> None:
    if "importance" in explicit and "selection" not in explicit and chosen["selection"] == "obs":
        warn_user(
            f"With selection='obs' the importance {chosen['importance']!r} only breaks ties; set selection='top' to "
            "select by it, or selection='obs' to silence this."
        )


def _is_missing(field: str, given: object) -> bool:
    """Return whether a text names a function that is not registered here, but could be."""
    name = split_name(given)[0] if isinstance(given, str) else ""
    return can_be_registered(name) and name not in FUNCTION_FIELDS[field]


def _entry(field: str, given: Any) -> Entry:
    """Look up a function; one that is not registered here may read every option and need every statistic."""
    if _is_missing(field, given):
        return Entry(given, _is_missing, None, frozenset({ACTIVATIONS, GRADIENTS}))
    return FUNCTION_FIELDS[field].entry(given)


def check_replaced(values: Mapping[str, object], functions: Mapping[str, Any]) -> None:
    """Raise an error if given functions leave a number of the configuration unread, or would not be called.

    Args:
        values: The value of every option.
        functions: The given functions, or names of registered ones, by field.

    Raises:
        ConfigurationError: If a number that is not its default is read by none, or centroids would ignore a cost.
    """
    for name, reason in unused_numbers({**values, **functions}).items():
        if values[name] != _default(name, values["quality"]):
            raise _ignored(name, values[name], reason)
    cost = functions.get("cost")
    if cost is not None and values["target"] == "cluster_centroid":
        entry = costs.entry(cost)
        if callable(cost) or entry.name not in CENTROID_COSTS:
            raise _no_cost_of_centroids(entry.name)


def _default(name: str, quality: object) -> object:
    return QUALITIES[str(quality)].get(name, OPTIONS_BY_NAME[name].default)


def _ignored(name: str, value: object, reason: str) -> ConfigurationError:
    return ConfigurationError(f"`{name}={value!r}` would be ignored: {reason}. Leave it out.")


def _check_layers(values: dict[str, Any]) -> None:
    twice = sorted(set(values["skip_layers"]) & set(values["layer_ratios"]))
    if twice:
        raise ConfigurationError(
            f"`layer_ratios` says how much to prune of layer {twice[0]}, which `skip_layers` leaves as it is. Take it "
            "out of one of them."
        )


def _apply_strategy(chosen: dict[str, Any], values: dict[str, object], explicit: set[str]) -> None:
    if chosen["strategy"] is None:
        return
    if chosen["strategy"] not in strategies:
        raise ConfigurationError(unregistered_name("`strategy`", chosen["strategy"], strategies))
    strategy = strategies[chosen["strategy"]]._asdict()
    contradicted = [name for name in strategy if name in explicit and values[name] != strategy[name]]
    if contradicted and "strategy" in explicit:
        name = contradicted[0]
        raise ConfigurationError(
            f"`{name}={values[name]!r}` contradicts `strategy={chosen['strategy']!r}`, which sets {strategy[name]!r}. "
            "Leave one of them out."
        )
    chosen |= {name: value for name, value in strategy.items() if name not in explicit}
    if contradicted:
        chosen["strategy"] = None  # the strategy of the method, which an option replaced


def unused_fields(chosen: Mapping[str, object]) -> dict[str, str]:
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
    elif chosen["solver"] and not _entry("solver", chosen["solver"]).may_read("target_distribution"):
        unused["target_distribution"] = (
            f"the solver {chosen['solver']!r} knows no capacities; choose another, such as 'emd'"
        )
    if chosen["importance"] and not _entry("importance", chosen["importance"]).may_read("aggregation"):
        unused["aggregation"] = f"the importance {chosen['importance']!r} has no weight scores to aggregate"
    return unused


def unused_numbers(chosen: Mapping[str, object]) -> dict[str, str]:
    """Return the numbers, and options that go with them, that nothing reads given all others, with the reason.

    Such options have a value as well, their default.
    """
    unused: dict[str, str] = {}
    entries = {name: _entry(name, chosen[name]) for name in FUNCTION_FIELDS if chosen[name]}
    for name in SolverSettings._fields:
        if "solver" not in entries:
            unused[name] = "nothing is transported"
        elif not entries["solver"].may_read(name):
            unused[name] = f"the solver {entries['solver'].name!r} does not read it"
    if chosen["compensation"] != "ridge" and not chosen["reconstruction_steps"]:
        unused["holdout_share"] = "without a refit or reconstruction nothing is chosen on held-out tokens"
    if not chosen["reconstruction_steps"]:
        reason = (
            "only reconstruction reads it, which `reconstruction_steps` or quality='balanced' or 'best' switches on"
        )
        unused |= dict.fromkeys(("error_weighting", "reconstruction_batch_tokens"), reason)
    weighs_errors = chosen["reconstruction_steps"] and chosen["error_weighting"] == "gradient"
    takes_gradients = weighs_errors or any(GRADIENTS in entry.requires for entry in entries.values())
    if not (takes_gradients or chosen["allocation"] == "adaptive"):
        unused["score_batch_size"] = "there is no backward pass"
    return unused


def _no_cost_of_centroids(given: str) -> ConfigurationError:
    return ConfigurationError(
        f"`target='cluster_centroid'` contradicts `cost={given!r:.60}`: centroids are no channels, so another cost "
        f"would be ignored. Use {' or '.join(f'cost={name!r}' for name in CENTROID_COSTS)}."
    )


def _check_combinations(chosen: dict[str, Any]) -> None:
    centroids = chosen["target"] == "cluster_centroid"
    if centroids and chosen["normalization"] == "identity":
        raise ConfigurationError(
            "`target='cluster_centroid'` contradicts `normalization='identity'`: centroids are no channels that "
            "could stay as they are. Use normalization='corrected'."
        )
    if centroids and chosen["cost"] not in CENTROID_COSTS:
        raise _no_cost_of_centroids(chosen["cost"])
    if chosen["compensation"] == "bias" and chosen["intercept"] != "always":
        raise ConfigurationError("`compensation='bias'` is an intercept: it needs `intercept='always'`.")
    if chosen["ridge_prior"] == "transport" and "down" not in (chosen["fuse"] or ()):
        raise ConfigurationError(
            "`ridge_prior='transport'` shrinks towards the fused down projection, so `fuse` must hold 'down'. "
            "Add it, or use ridge_prior='identity'."
        )
