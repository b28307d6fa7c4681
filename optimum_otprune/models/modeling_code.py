"""The modeling file beside a model whose layers differ in width; it needs nothing but transformers."""

import copy
from string import Template
from typing import NamedTuple

import transformers
from transformers import PreTrainedModel
from transformers.utils.versions import require_version

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.architectures import find_spec, is_built_in
from optimum_otprune.models.auto_classes import auto_classes
from optimum_otprune.models.ffn_spec import FFNSpec
from optimum_otprune.models.save_formats import called, save_format, save_formats
from optimum_otprune.models.tasks import CAUSAL

MODELING_FILE = "modeling_otprune.py"


class ModelingCode(NamedTuple):
    """The files and entries that a folder needs to be loaded with `trust_remote_code=True`.

    Attributes:
        text: The text of the modeling file.
        auto_map: The entry `auto_map` of the model's configuration.
    """

    text: str
    auto_map: dict[str, str]


def check_can_save(model: PreTrainedModel, spec: FFNSpec, non_uniform_format: str) -> None:
    """Raise an error if layers of different widths could not be saved as asked for.

    Args:
        model: The dense model; its weights are not read.
        spec: The place of the FFN in its blocks.
        non_uniform_format: The registered name of the save format.

    Raises:
        UnsupportedModelError: If transformers is too old, or modeling code is needed that cannot be written.
    """
    chosen = save_format(non_uniform_format)
    if chosen.needs_transformers is not None:
        try:
            require_version(f"transformers>={chosen.needs_transformers}")
        except ImportError as error:
            raise UnsupportedModelError(
                f"`non_uniform_format={non_uniform_format!r}` needs transformers {chosen.needs_transformers} or "
                f"newer; this is {transformers.__version__}. Upgrade it, or use non_uniform_format='pad'."
            ) from error
    if chosen.needs_remote_code:
        _library_class(model, spec)
    called(non_uniform_format, "check", model)


def needed_modeling_code(model: PreTrainedModel) -> ModelingCode | None:
    """Write the modeling file that a finished model needs; return None if it loads without one.

    Args:
        model: The model as it is saved.

    Raises:
        UnsupportedModelError: If none can be written; see `modeling_code`.
    """
    _, spec = find_spec(model)
    config = model.config
    if not spec.is_per_layer(config) and spec.others_per_layer(config):  # what a family itself holds layer by layer
        config = copy.deepcopy(config)
        spec.fields_of(config).per_layer_config = None
    for name in save_formats.names():
        template = save_format(name).modeling_template(config)
        if template is not None:
            return modeling_code(model, spec, template)
    return None


def modeling_code(model: PreTrainedModel, spec: FFNSpec, template: str) -> ModelingCode:
    """Fill in the modeling file of a model with names of transformers and of this package alone.

    Args:
        model: An instance of a class of transformers.
        spec: The place of the FFN in its blocks, for an architecture of this package.
        template: The file's text with placeholders, from `SaveFormat.modeling_template`.

    Raises:
        UnsupportedModelError: If the model or its architecture is of somebody's own.
    """
    name = _library_class(model, spec)
    projections = {slot.path: slot.parts for slot in spec.slots.values()}
    text = Template(template).substitute(
        base=name,
        name=f"OTPruned{name}",
        layers=spec.layers,
        projections=repr(tuple(projections.items())),
        fields=f"config.{spec.config}" if spec.config else "config",
        size_key=spec.size_key,
        size_factor=spec.size_factor,
    )
    entry = f"{MODELING_FILE.removesuffix('.py')}.OTPruned{name}"
    return ModelingCode(text, dict.fromkeys(auto_classes(name) or [CAUSAL], entry))


def _library_class(model: PreTrainedModel, spec: FFNSpec) -> str:
    """Return the name of the model's class in transformers, or of the one that a modeling file extends."""
    if is_built_in(spec) and spec.then is None:
        for kind in type(model).__mro__:
            is_listed = getattr(transformers, kind.__name__, None) is kind
            if is_listed and kind.__module__.startswith("transformers.models."):
                return kind.__name__
    raise UnsupportedModelError(
        "Modeling code for layers of different widths is written for classes of transformers and the layouts that "
        f"this package knows, of one list of layers; {type(model).__name__} is not one. Use non_uniform_format='pad'."
    )
