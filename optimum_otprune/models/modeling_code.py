"""The modeling file beside a model whose layers differ in width; it needs nothing but transformers."""

from importlib.resources import files
from string import Template
from typing import NamedTuple

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.architectures import ARCHITECTURES, BUILT_IN, FFNSpec

MODELING_FILE = "modeling_otprune.py"
_AUTO_CLASS = "AutoModelForCausalLM"


class ModelingCode(NamedTuple):
    """What a folder needs to be loaded with `trust_remote_code=True`.

    Attributes:
        text: The text of the modeling file.
        auto_map: The entry `auto_map` of the model's configuration.
    """

    text: str
    auto_map: dict[str, str]


def modeling_code(model: PreTrainedModel, spec: FFNSpec) -> ModelingCode:
    """Return the modeling file of a model, made from names of transformers and of this package alone.

    Args:
        model: An instance of a class of transformers.
        spec: The spec of the model's architecture, which must be one of this package's own.

    Raises:
        UnsupportedModelError: If the model's class is not one of transformers, its architecture was registered by a
            user, or transformers is too old.
    """
    name = _library_class(model)
    if not hasattr(PreTrainedConfig, "per_layer_config"):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} knows no `per_layer_config`. Upgrade it to 5.15 or newer, or "
            "use non_uniform_format='pad'."
        )
    if name is None or spec not in (ARCHITECTURES[known] for known in BUILT_IN):
        raise UnsupportedModelError(
            f"`non_uniform_format='per_layer_config'` writes modeling code for classes of transformers and the "
            f"layouts that this package knows; {type(model).__name__} is not one. Use non_uniform_format='pad'."
        )
    projections = tuple(path for path in (spec.gate, spec.up, spec.down) if path is not None)
    template = files("optimum_otprune.models").joinpath("modeling_otprune.py.txt").read_text(encoding="utf-8")
    text = Template(template).substitute(
        base=name, name=f"OTPruned{name}", layers=spec.layers, projections=repr(projections), size_key=spec.size_key
    )
    return ModelingCode(text, {_AUTO_CLASS: f"{MODELING_FILE.removesuffix('.py')}.OTPruned{name}"})


def _library_class(model: PreTrainedModel) -> str | None:
    """Return the name of the model's class, or of the class of transformers that a modeling file derives it from."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and getattr(transformers, kind.__name__, None) is kind:
            return kind.__name__
    return None
