"""Structured pruning of the feed-forward layers of Llama-like models by optimal transport.

Names are loaded on first use, so that the command line answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimum_otprune.version import __version__

if TYPE_CHECKING:
    from optimum_otprune.architectures.spec import FFNSpec, register_architecture
    from optimum_otprune.configuration import OTPruningConfig
    from optimum_otprune.errors import OTPruneError
    from optimum_otprune.plan import PruningPlan
    from optimum_otprune.pruner import OTPruner
    from optimum_otprune.report import LayerReport, PruningReport

_HOMES = {
    "FFNSpec": "architectures.spec",
    "LayerReport": "report",
    "OTPruneError": "errors",
    "OTPruner": "pruner",
    "OTPruningConfig": "configuration",
    "PruningPlan": "plan",
    "PruningReport": "report",
    "register_architecture": "architectures.spec",
}

__all__ = [
    "FFNSpec",
    "LayerReport",
    "OTPruneError",
    "OTPruner",
    "OTPruningConfig",
    "PruningPlan",
    "PruningReport",
    "__version__",
    "register_architecture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optimum_otprune' has no attribute {name!r}")
    return getattr(import_module(f"optimum_otprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
