"""Methods are presets: one value for each of the orthogonal method fields of the configuration.

Pure data without torch, so that `otprune --help` is fast. A value of None means that the method has no use for the
field (no transport: no solver), and setting it is an error.
"""

from collections.abc import Mapping
from types import MappingProxyType

TRANSPORT_FIELDS = ("cost", "source_distribution", "target_distribution", "target", "solver", "normalization")
RIDGE_FIELDS = ("ridge_prior", "target_correction")
QUALITY_FIELDS = (
    "reconstruction_steps",
    "reconstruction_batch_tokens",
    "error_weighting",
    "self_calibration",
    "target_correction",
)
METHOD_FIELDS = (
    "quality",
    "token_weighting",
    "importance",
    "aggregation",
    "selection",
    "cost",
    "source_distribution",
    "target_distribution",
    "strategy",
    "statistics",
    "target",
    "solver",
    "normalization",
    "fuse",
    "compensation",
    "ridge_prior",
    "target_correction",
    "intercept",
)

_DROP: dict[str, object] = {
    **dict.fromkeys(METHOD_FIELDS),
    "quality": "fast",
    "token_weighting": "uniform",
    "selection": "top",
    "fuse": (),
    "compensation": "none",
    "ridge_prior": "identity",
    "target_correction": 0.0,
}

METHODS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "otprune": {
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
        },
        "structured_afr_with_intrafusion": {
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
        },
        "random": {**_DROP, "importance": "random"},
        "magnitude": {**_DROP, "importance": "magnitude", "aggregation": "absolute"},
        "fo_snip": {**_DROP, "importance": "fo_snip", "aggregation": "absolute"},
        "wanda_sp": {**_DROP, "importance": "wanda"},
        "flap": {**_DROP, "importance": "fluctuation", "compensation": "bias", "intercept": "always"},
        "least_squares": {
            **_DROP,
            "importance": "fluctuation",
            "compensation": "ridge",
            "ridge_prior": "zero",
            "intercept": "never",
        },
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
            "self_calibration": 0,
            "target_correction": 0.75,
        },
        "balanced": {
            "reconstruction_steps": 300,
            "reconstruction_batch_tokens": 1024,
            "error_weighting": "uniform",
            "self_calibration": 0,
            "target_correction": 0.5,
        },
        "best": {
            "reconstruction_steps": 1000,
            "reconstruction_batch_tokens": 2048,
            "error_weighting": "uniform",
            "self_calibration": 3,
            "target_correction": 0.5,
        },
    }
)
