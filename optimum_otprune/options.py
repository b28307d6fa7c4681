"""The options of a pruning run, written once: configuration, command line and documentation are made from this table.

No torch here, so that `otprune --help` is fast.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from optimum_otprune.methods import METHODS, QUALITIES
from optimum_otprune.quantities import COUNT_UNITS, LARGEST_COUNT, LARGEST_SEED, SIZE_UNITS

# Alternatives: a configuration has exactly one of them.
BUDGET_FIELDS = ("pruning_ratio", "target_parameters", "target_size")


class Option(NamedTuple):
    """One field of `OTPruningConfig`.

    A None default means "the method decides" for method fields, "derived from the model" for `seqlen`, and "not asked
    for" for targets. Numbers lie in [minimum, maximum], or in [minimum, below); with `units` they may be strings, or
    shares of what the dense model has. A tuple holds some of `choices`, or indices of layers where there are none; a
    dict holds numbers by layer.
    """

    name: str
    kind: type
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None
    optional: bool = False
    units: Mapping[str, int] | None = None


def _method_option(name: str, help: str, **kwargs: Any) -> Option:
    return Option(name, kwargs.pop("kind", str), None, help, optional=True, **kwargs)


OPTIONS: tuple[Option, ...] = (
    Option(
        "pruning_ratio",
        float,
        0.2,
        "share of every FFN's channels to remove, not of the model's parameters; 0 changes nothing",
        0.0,
        below=1.0,
    ),
    Option(
        "target_parameters",
        int,
        None,
        "in place of pruning_ratio: parameters that the pruned model may have, 70% of the dense model's (or 0.7) or a "
        "number such as 900M or 1.2B",
        1,
        optional=True,
        units=COUNT_UNITS,
    ),
    Option(
        "target_size",
        int,
        None,
        "in place of pruning_ratio: bytes that the saved weights may have, 70% of the dense model's (or 0.7) or a "
        "number such as 500MB, 2GB or 1.5GiB",
        1,
        optional=True,
        units=SIZE_UNITS,
    ),
    Option(
        "allocation",
        str,
        "uniform",
        "width of each layer: the same for all, or by what removing channels costs there as the loss feels it "
        "(adaptive: no more channels in all than uniform; needs a backward pass)",
        choices=("uniform", "adaptive"),
    ),
    Option("skip_layers", tuple, (), "layers that are not pruned, by index; the ratio is that of the others", 0),
    Option("layer_ratios", dict, {}, "pruning ratios of single layers, by index", 0.0, below=1.0),
    Option(
        "non_uniform_format",
        str,
        "pad",
        "how layers of different widths are saved: filled up with zeros to the widest (pad: loads everywhere), or as "
        "they are with a modeling file beside them (per_layer_config: loads with trust_remote_code)",
        choices=("pad", "per_layer_config"),
    ),
    Option("method", str, "otprune", "preset of the fields below that are left unset", choices=tuple(METHODS)),
    Option(
        "multiple_of",
        int,
        128,
        "round the kept width to a multiple of this (lowered, with a warning, for layers too small for it)",
        1,
        LARGEST_COUNT,
    ),
    _method_option(
        "token_weighting",
        "what a token's error counts: the same for all, or by how much it disturbs the hidden state behind the layer "
        "(residual: 1 / its squared norm)",
        choices=("uniform", "residual"),
    ),
    _method_option("importance", "score of a channel: fluctuation, wanda, magnitude, snip, fo, fo_snip, random, …"),
    _method_option("aggregation", "how weight scores become a channel's score", choices=("absolute", "signed")),
    _method_option(
        "selection",
        "keep the channels with the top importance, or eliminate greedily by removal cost (obs; importance breaks "
        "ties)",
        choices=("top", "obs"),
    ),
    _method_option("cost", "transport cost between channels: activation, weight, weight_l2"),
    _method_option("source_distribution", "mass of the channels that are transported: uniform, importance, …"),
    _method_option("target_distribution", "mass that each kept channel receives: uniform, importance, …"),
    _method_option(
        "strategy",
        "sets statistics, source_distribution and target_distribution: comprehensive, conservative, balanced, "
        "aggressive",
    ),
    _method_option(
        "statistics", "mixture of weight-level statistics that the distributions read: comprehensive, conservative, …"
    ),
    _method_option(
        "target",
        "what the channels are transported to: the kept channels, or centroids of clusters of channels",
        choices=("most_important", "cluster_centroid"),
    ),
    _method_option("solver", "transport solver: nearest (no capacity), emd (exact), sinkhorn, partial, unbalanced"),
    _method_option(
        "normalization",
        "from plan to fusion map: identity (kept channels stay as they are), corrected (rows to 1 on gate and up, "
        "columns to 1 on down), source (columns to 1 everywhere, as the reference is coded)",
        choices=("identity", "corrected", "source"),
    ),
    _method_option(
        "fuse", "projections that the fusion map is applied to", kind=tuple, choices=("gate", "up", "down")
    ),
    _method_option(
        "compensation",
        "after fusion: nothing, a constant output bias, or a ridge refit of the down projection",
        choices=("none", "bias", "ridge"),
    ),
    _method_option(
        "ridge_prior",
        "what the refit shrinks towards: zero, the kept columns (identity), or the fused columns (transport)",
        choices=("zero", "identity", "transport"),
    ),
    _method_option(
        "target_correction",
        "share of the error of earlier layers that a layer's refit corrects",
        kind=float,
        minimum=0.0,
        maximum=1.0,
    ),
    _method_option(
        "intercept",
        "output bias, where the architecture has one: never, auto (where held-out tokens want it), always",
        choices=("never", "auto", "always"),
    ),
    _method_option(
        "quality",
        "preset of the four fields that follow and of target_correction, where they are unset: closed form only "
        "(fast), short reconstruction (balanced), long reconstruction on more tokens (best)",
        choices=tuple(QUALITIES),
    ),
    _method_option(
        "reconstruction_steps",
        "Adam steps on each layer's own output error after the refit, kept only where held-out tokens gain (0: none)",
        kind=int,
        minimum=0,
        maximum=LARGEST_COUNT,
    ),
    _method_option(
        "reconstruction_batch_tokens",
        "tokens of a minibatch of reconstruction",
        kind=int,
        minimum=1,
        maximum=LARGEST_COUNT,
    ),
    _method_option(
        "error_weighting",
        "which directions of a layer's output error reconstruction heeds: all alike, or as the loss feels them "
        "(gradient: needs a backward pass through the model)",
        choices=("uniform", "gradient"),
    ),
    _method_option(
        "self_calibration",
        "samples that the dense model writes itself, for each calibration sample, to have more tokens to fit "
        "(0: none)",
        kind=int,
        minimum=0,
        maximum=LARGEST_COUNT,
    ),
    Option("epsilon", float, 0.05, "entropic regularization of sinkhorn, in units of the median cost", above=0.0),
    Option("mass_share", float, 0.9, "share of the mass that the partial solver transports", above=0.0, maximum=1.0),
    Option(
        "marginal_penalty", float, 1.0, "penalty on marginals of unbalanced, in units of the median cost", above=0.0
    ),
    Option(
        "holdout_share", float, 0.25, "share of the calibration samples held out to choose λ", above=0.0, maximum=0.5
    ),
    Option(
        "score_batch_size",
        int,
        8,
        "samples per backward pass, and written at a time; FO's singular values depend on it",
        1,
        LARGEST_COUNT,
    ),
    Option("dataset", str, "Salesforce/wikitext", "Hub id of the default calibration and evaluation text"),
    Option("dataset_config", str, "wikitext-2-raw-v1", "configuration name of the dataset", optional=True),
    Option("calibration_split", str, "train", "split that calibration samples are drawn from"),
    Option("evaluation_split", str, "test", "split that is evaluated"),
    Option("text_column", str, "text", "column of the dataset that holds the text"),
    Option("num_samples", int, 128, "calibration samples drawn from text", 1, LARGEST_COUNT),
    Option(
        "seqlen",
        int,
        None,
        "tokens per sample and evaluation window (unset: 2048 or the model's positions)",
        2,
        LARGEST_COUNT,
        optional=True,
    ),
    Option("seed", int, 0, "seed of every random choice", 0, LARGEST_SEED),
)

OPTIONS_BY_NAME = {option.name: option for option in OPTIONS}
