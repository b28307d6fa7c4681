"""Structured pruning of the feed-forward layers of language models by optimal transport.

Names are loaded on first use, so that the command line answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_otprune.checkpoints.comparison.compare import compare_models
    from optimum_otprune.checkpoints.quantize import quantize_model
    from optimum_otprune.config.configuration import OTPruningConfig
    from optimum_otprune.errors import OTPruneError
    from optimum_otprune.models.architectures import register_architecture
    from optimum_otprune.models.ffn_spec import FFNSpec
    from optimum_otprune.pruner import OTPruner
    from optimum_otprune.pruning.dry_run.plan import PruningPlan
    from optimum_otprune.pruning.model_comparison import ModelComparison
    from optimum_otprune.pruning.quantization_report import QuantizationReport
    from optimum_otprune.pruning.report import LayerReport, PruningReport

__version__ = "0.1.0"

_HOMES = {
    "FFNSpec": "models.ffn_spec",
    "LayerReport": "pruning.layer_report",
    "OTPruneError": "errors",
    "OTPruner": "pruner",
    "OTPruningConfig": "config.configuration",
    "ModelComparison": "pruning.model_comparison",
    "PruningPlan": "pruning.dry_run.plan",
    "PruningReport": "pruning.report",
    "QuantizationReport": "pruning.quantization_report",
    "compare_models": "checkpoints.comparison.compare",
    "quantize_model": "checkpoints.quantize",
    "register_architecture": "models.architectures",
}

__all__ = [
    "FFNSpec",
    "LayerReport",
    "ModelComparison",
    "OTPruneError",
    "OTPruner",
    "OTPruningConfig",
    "PruningPlan",
    "PruningReport",
    "QuantizationReport",
    "__version__",
    "compare_models",
    "quantize_model",
    "register_architecture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_otprune' has no attribute {name!r}")
    return getattr(import_module(f"optimum_otprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
