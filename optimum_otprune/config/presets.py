"""Methods are presets: one value for each of the orthogonal method fields of the configuration.

Pure data without torch, so that `otprune --help` is fast. A value of None means that the method has no use for the
field (no transport: no solver), and setting it is an error.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Preset(NamedTuple):
    """The values that a method sets.

    Attributes:
        summary: What the method does, in one sentence.
        fields: The value of each field that the method decides.
        fixed: The fields that make the method what its name says; setting another value is an error.
    """

    summary: str
    fields: Mapping[str, object]
    fixed: tuple[str, ...] = ()


TRANSPORT_FIELDS = ("cost", "source_distribution", "target_distribution", "target", "solver", "normalization")
RIDGE_FIELDS = ("ridge_prior", "target_correction")

_OTPRUNE: Mapping[str, object] = MappingProxyType(
    {
        "quality": "balanced",
        "token_weighting": "residual",
        "importance": "fluctuation",
        "aggregation": "absolute",
        "selection": "obs",
        "cost": "activation",
        "source_distribution": "uniform",
        "target_distribution": "uniform",
        "strategy": None,
        "statistics": None,
        "target": "most_important",
        "solver": "nearest",
        "normalization": "identity",
        "fuse": ("down",),
        "compensation": "ridge",
        "ridge_prior": "transport",
        "target_correction": 0.5,
        "intercept": "auto",
        "self_calibration": 1.0,
    }
)
METHOD_FIELDS = tuple(_OTPRUNE)


def _baseline(summary: str, importance: str, fixed: tuple[str, ...], **fields: object) -> Preset:
    """Return a method that drops channels and moves none of their function to others."""
    decided: dict[str, object] = {
        "quality": "fast",
        "token_weighting": "uniform",
        "importance": importance,
        "selection": "top",
        "fuse": (),
        "compensation": "none",
        "ridge_prior": "identity",
        "target_correction": 0.0,
        "self_calibration": 0.0,
    }
    return Preset(summary, MappingProxyType({**dict.fromkeys(METHOD_FIELDS), **decided, **fields}), fixed)


METHODS: Mapping[str, Preset] = MappingProxyType(
    {
        "otprune": Preset(
            "Greedy elimination, transport of what is removed, and a ridge refit towards the fused weights.", _OTPRUNE
        ),
        "structured_afr_with_intrafusion": Preset(
            "FO and SNIP scores with optimal-transport fusion of whole channels, as the reference is coded.",
            MappingProxyType(
                {
                    "quality": "fast",
                    "token_weighting": "uniform",
                    "importance": "fo_snip",
                    "aggregation": "signed",
                    "selection": "top",
                    "cost": "weight",
                    "source_distribution": "entropy_regularized",
                    "target_distribution": "adaptive",
                    "strategy": "comprehensive",
                    "statistics": "comprehensive",
                    "target": "most_important",
                    "solver": "emd",
                    "normalization": "source",
                    "fuse": ("gate", "up", "down"),
                    "compensation": "none",
                    "ridge_prior": "transport",
                    "target_correction": 0.0,
                    "intercept": "never",
                    "self_calibration": 0.0,
                }
            ),
        ),
        "random": _baseline("Random channels are removed: what every method must beat.", "random", ("importance",)),
        "magnitude": _baseline(
            "The channels with the smallest weights are removed.",
            "magnitude",
            ("importance",),
            aggregation="absolute",
        ),
        "fo_snip": _baseline(
            "The channels with the lowest FO and SNIP scores are removed.",
            "fo_snip",
            ("importance",),
            aggregation="absolute",
        ),
        "wanda_sp": _baseline("The channels with the lowest Wanda scores are removed.", "wanda", ("importance",)),
        "flap": _baseline(
            "The channels that fluctuate least are removed, and a bias stands in for their mean.",
            "fluctuation",
            ("importance", "compensation"),
            compensation="bias",
            intercept="always",
        ),
        "least_squares": _baseline(
            "The channels that fluctuate least are removed, and the down projection is refit by ridge regression.",
            "fluctuation",
            ("compensation",),
            compensation="ridge",
            ridge_prior="zero",
            intercept="never",
        ),
    }
)

# How much work goes into a layer after the refit, with any method. A method that corrects nothing of earlier layers'
# errors keeps to that; where nothing follows the refit, it pays to correct more.
QUALITIES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "fast": {
            "reconstruction_steps": 0,
            "reconstruction_batch_tokens": 1024,
            "error_weighting": "uniform",
            "self_calibration": 1.0,
            "target_correction": 0.75,
        },
        "balanced": {
            "reconstruction_steps": 300,
            "reconstruction_batch_tokens": 1024,
            "error_weighting": "uniform",
            "self_calibration": 1.0,
            "target_correction": 0.5,
        },
        "best": {
            "reconstruction_steps": 1000,
            "reconstruction_batch_tokens": 2048,
            "error_weighting": "uniform",
            "self_calibration": 3.0,
            "target_correction": 0.5,
        },
    }
)
QUALITY_FIELDS = tuple(QUALITIES["balanced"])
