"""The options of a pruning run, written once: configuration, command line and documentation are made from them.

No torch here, so that `otprune --help` is fast.
"""

import copy
import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin, get_type_hints

from optimum_otprune.config.presets import METHODS, QUALITIES
from optimum_otprune.config.quantities import COUNT_UNITS, LARGEST_COUNT, LARGEST_SEED, MULTIPLES, SIZE_UNITS
from optimum_otprune.functional.registry import Registry
from optimum_otprune.models.save_formats import save_formats

# Alternatives: a configuration has exactly one of them.
BUDGET_FIELDS = ("pruning_ratio", "target_parameters", "target_size")
VERSION_KEY = "optimum_otprune_version"
WRITTEN = "self"  # in place of calibration data: the dense model writes all samples itself


class Rules(NamedTuple):
    """The meaning of a field and the values that it takes beyond its type.

    Attributes:
        help: The text for the command line and the documentation.
        minimum: The smallest number that is allowed.
        maximum: The largest number that is allowed.
        below: A number that all values are smaller than.
        above: A number that all values are larger than.
        choices: The names that are allowed, where the type does not list them, or the registry that knows them.
        words: The numbers that names stand for, for integers that may be given by name.
        units: The multipliers by suffix, for numbers that may be given as strings, or as shares of the dense model's.
        registry: The kind of registered function that the field names, as `otprune list` calls it.
        shared: A phrase for what the field decides, if it must be the same in all trials of a search.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | Registry[Any] | None = None
    words: Mapping[str, int] | None = None
    units: Mapping[str, int] | None = None
    registry: str | None = None
    shared: str | None = None


class Option(NamedTuple):
    """One field of `PruningOptions`, for programs.

    A None default means "the method decides" for method fields, "derived from the model" for `seqlen`, and "not asked
    for" for targets. A tuple holds some of `choices`, or indices of layers where there are none; a dict holds numbers
    by layer.
    """

    name: str
    kind: type
    default: Any
    rules: Rules
    names: tuple[str, ...] | Registry[Any] | None
    optional: bool

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The names that are known now, or None where any is allowed; `in` of a registry in `names` knows more."""
        return tuple(self.names.names()) if isinstance(self.names, Registry) else self.names

    @property
    def help(self) -> str:
        """The meaning of the option."""
        return self.rules.help


def _field(default: Any, help: str, minimum: float | None = None, **bounds: Any) -> Any:
    rules = Rules(help, minimum, **bounds)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"rules": rules})
    return dataclasses.field(default=default, metadata={"rules": rules})


def _decided(help: str, minimum: float | None = None, **bounds: Any) -> Any:
    """Make a field that the method or the quality sets unless the user does."""
    return _field(None, help, minimum, **bounds)


# A registered function, with values of its parameters or without; it is held as a string.
Function: TypeAlias = str | Mapping[str, Any]

_SIZE = "how much is pruned"
_DATA = "the data"


def _function(registry: str, help: str) -> Any:
    return _decided(f"{help}; `otprune list {registry}` shows all", registry=registry)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PruningOptions:
    """All options of pruning, names and numbers only.

    A field comes after those that decide whether it is read and which of its values are allowed.
    """

    pruning_ratio: float | None = _field(
        0.2,
        "share of every FFN's channels to remove, not of the model's parameters; 0 changes nothing",
        minimum=0.0,
        below=1.0,
        shared=_SIZE,
    )
    target_parameters: int | float | str | None = _field(
        None,
        "in place of pruning_ratio: parameters that the pruned model may have, 70% of the dense model's (or 0.7) or "
        "a number such as 900M or 1.2B",
        minimum=1,
        units=COUNT_UNITS,
        shared=_SIZE,
    )
    target_size: int | float | str | None = _field(
        None,
        "in place of pruning_ratio: bytes that the saved weights may have, 70% of the dense model's (or 0.7) or a "
        "number such as 500MB, 2GB or 1.5GiB",
        minimum=1,
        units=SIZE_UNITS,
        shared=_SIZE,
    )
    allocation: Literal["uniform", "adaptive"] = _field(
        "uniform",
        "width of each layer: the same for all, or by what removing channels costs there as the loss feels it "
        "(adaptive: no more channels in all than uniform; needs a backward pass)",
    )
    skip_layers: Sequence[int] = _field(
        (),
        "layers that are not pruned, by index; the ratio is that of the others",
        minimum=0,
        maximum=LARGEST_COUNT,
        shared=_SIZE,
    )
    layer_ratios: Mapping[int, float] = _field(
        {}, "pruning ratios of single layers, by index", minimum=0.0, below=1.0, shared=_SIZE
    )
    kind_ratios: Mapping[Literal["dense", "experts", "shared", "attention"], float] = _field(
        {},
        "pruning ratios by what an FFN is in its block: dense, experts (that a router chooses from), shared (experts "
        "of all tokens); and of attention, whose heads are removed with their keys and values (unset: none)",
        minimum=0.0,
        below=1.0,
        shared=_SIZE,
    )
    non_uniform_format: str = _field(
        "pad",
        "how layers of different widths are saved "
        + " ".join(f"({name}: {save_formats.entry(name).summary.rstrip('.')})" for name in save_formats.names())
        + "; `otprune list save_formats` shows all",
        choices=save_formats,
        shared="how the result is saved",
    )
    method: str = _field("otprune", "preset of the fields below that are left unset", choices=tuple(METHODS))
    multiple_of: int | Literal["gguf", "int4", "tensor-cores"] = _field(
        128,
        "round the kept width to a multiple of this number (lowered, with a warning, for layers too small for it), or "
        f"of what a purpose needs: {', '.join(f'{name} ({number})' for name, number in MULTIPLES.items())}",
        minimum=1,
        maximum=LARGEST_COUNT,
        words=MULTIPLES,
        shared=_SIZE,
    )
    token_weighting: Literal["uniform", "residual"] | None = _decided(
        "what a token's error counts: the same for all, or by how much it disturbs the hidden state behind the layer "
        "(residual: 1 / its squared norm)"
    )
    selection: Literal["top", "obs"] | None = _decided(
        "keep the channels with the top importance, or eliminate greedily by removal cost (obs; importance breaks "
        "ties)"
    )
    importance: Function | None = _function(
        "importances", "score of a channel: fluctuation, wanda, magnitude, snip, fo, fo_snip, random"
    )
    aggregation: Literal["absolute", "signed"] | None = _decided("how weight scores become a channel's score")
    compensation: Literal["none", "bias", "ridge"] | None = _decided(
        "after fusion: nothing, a constant output bias, or a ridge refit of the down projection"
    )
    ridge_prior: Literal["zero", "identity", "transport"] | None = _decided(
        "what the refit shrinks towards: zero, the kept columns (identity), or the fused columns (transport)"
    )
    fuse: Sequence[Literal["gate", "up", "down"]] | None = _decided("projections that the fusion map is applied to")
    solver: Function | None = _function(
        "solvers", "transport solver: nearest (no capacity), emd (exact), sinkhorn, partial, unbalanced"
    )
    cost: Function | None = _function("costs", "transport cost between channels: activation, weight, weight_l2")
    normalization: Literal["identity", "corrected", "source"] | None = _decided(
        "from plan to fusion map: identity (kept channels stay as they are), corrected (rows to 1 on gate and up, "
        "columns to 1 on down), source (columns to 1 everywhere, as the reference is coded)"
    )
    target: Literal["most_important", "cluster_centroid"] | None = _decided(
        "what the channels are transported to: the kept channels, or centroids of clusters of channels"
    )
    statistics: Function | None = _function(
        "mixtures", "mixture of weight-level statistics that the distributions read: comprehensive, conservative, …"
    )
    source_distribution: Function | None = _function(
        "distributions", "mass of the channels that are transported: uniform, importance, …"
    )
    target_distribution: Function | None = _function(
        "distributions", "mass that each kept channel receives: uniform, importance, …"
    )
    strategy: str | None = _decided(
        "sets statistics, source_distribution and target_distribution: comprehensive, conservative, balanced, "
        "aggressive"
    )
    target_correction: float | None = _decided(
        "share of the error of earlier layers that a layer's refit corrects", minimum=0.0, maximum=1.0
    )
    intercept: Literal["never", "auto", "always"] | None = _decided(
        "output bias, where the architecture has one: never, auto (where held-out tokens want it), always"
    )
    quality: str | None = _decided(
        "preset of the four fields that follow and of target_correction, where they are unset: closed form only "
        "(fast), short reconstruction (balanced), long reconstruction on more tokens (best)",
        choices=tuple(QUALITIES),
    )
    reconstruction_steps: int | None = _decided(
        "Adam steps on each layer's own output error after the refit, kept only where held-out tokens gain (0: none)",
        minimum=0,
        maximum=LARGEST_COUNT,
    )
    reconstruction_batch_tokens: int | None = _decided(
        "tokens of a minibatch of reconstruction", minimum=1, maximum=LARGEST_COUNT
    )
    error_weighting: Literal["uniform", "gradient"] | None = _decided(
        "which directions of a layer's output error reconstruction heeds: all alike, or as the loss feels them "
        "(gradient: needs a backward pass through the model)"
    )
    self_calibration: float | None = _decided(
        "samples that the dense model writes itself, each from a random token, for each given sample (0: none): "
        "text of all the kinds it knows, so that it does not lose the other kinds",
        minimum=0,
        maximum=1000,
    )
    epsilon: float = _field(0.05, "entropic regularization of sinkhorn, in units of the median cost", above=0.0)
    mass_share: float = _field(0.9, "share of the mass that the partial solver transports", maximum=1.0, above=0.0)
    marginal_penalty: float = _field(1.0, "penalty on marginals of unbalanced, in units of the median cost", above=0.0)
    holdout_share: float = _field(
        0.25, "share of the calibration samples held out to choose λ", maximum=0.5, above=0.0
    )
    score_batch_size: int = _field(
        8,
        "samples per backward pass; FO's singular values depend on it",
        minimum=1,
        maximum=LARGEST_COUNT,
    )
    dataset: str = _field("Salesforce/wikitext", "Hub id of the default calibration and evaluation text", shared=_DATA)
    dataset_config: str | None = _field("wikitext-2-raw-v1", "configuration name of the dataset", shared=_DATA)
    calibration_split: str = _field("train", "split that calibration samples are drawn from", shared=_DATA)
    evaluation_split: str = _field("test", "split that is evaluated", shared=_DATA)
    text_column: str = _field("text", "column of the dataset that holds the text", shared=_DATA)
    num_samples: int = _field(
        128, "calibration samples drawn from text", minimum=1, maximum=LARGEST_COUNT, shared=_DATA
    )
    seqlen: int | None = _field(
        None,
        "tokens per sample and evaluation window (unset: 2048 or the model's positions)",
        minimum=2,
        maximum=LARGEST_COUNT,
        shared=_DATA,
    )
    seed: int = _field(0, "seed of every random choice", minimum=0, maximum=LARGEST_SEED)

    optimum_otprune_version: str = dataclasses.field(default=version("optimum_otprune"), init=False)

    @property
    def multiple(self) -> int:
        """The number that `multiple_of` is or stands for."""
        return MULTIPLES[self.multiple_of] if isinstance(self.multiple_of, str) else self.multiple_of

    def to_dict(self) -> dict[str, Any]:
        """Return every option and the version that wrote them, JSON-ready."""
        values: dict[str, Any] = {name: copy.deepcopy(getattr(self, name)) for name in OPTIONS_BY_NAME}
        values["fuse"], values["skip_layers"] = list(values["fuse"]), list(values["skip_layers"])
        values["layer_ratios"] = {str(layer): ratio for layer, ratio in values["layer_ratios"].items()}
        values[VERSION_KEY] = self.optimum_otprune_version
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the text of the file: keys are sorted, so that equal configurations give equal files."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _option(field: dataclasses.Field[Any], annotation: object) -> Option:
    rules: Rules = field.metadata["rules"]
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kind, names = members[0], rules.choices
    origin = get_origin(kind)
    if origin is Sequence:
        (entry,) = get_args(kind)
        kind, names = tuple, get_args(entry) or None
    elif origin is Mapping:
        keys, _ = get_args(kind)
        kind, names = dict, get_args(keys) or None
    elif origin is Literal:
        kind, names = str, get_args(kind)
    default = {} if field.default is dataclasses.MISSING else field.default
    optional = type(None) in members and field.name != "pruning_ratio"  # it may be None only beside a target
    return Option(field.name, kind, default, rules, names, optional)


_ANNOTATIONS = get_type_hints(PruningOptions)
_FIELDS = tuple(field for field in dataclasses.fields(PruningOptions) if field.init)
OPTIONS = tuple(_option(field, _ANNOTATIONS[field.name]) for field in _FIELDS)
OPTIONS_BY_NAME = {option.name: option for option in OPTIONS}
