"""How layers of different widths are saved: all that is to be known of a save format is in its class.

No torch here, so that `otprune --help` is fast and so that a card is rendered fast.
"""

import operator
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_otprune.errors import CustomFunctionError, OTPruneError, raised
from optimum_otprune.functional.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_otprune.models.ffn_block import FFNBlock


class SaveFormat:
    """A way to save layers of different widths; register a subclass to add one.

    Layers of one width are saved as they are, whatever the format.

    Attributes:
        needs_remote_code: Whether plain transformers cannot load the result without code from its folder.
        needs_transformers: The oldest version of transformers that loads the result, where the format sets a limit.
    """

    needs_remote_code: ClassVar[bool] = False
    needs_transformers: ClassVar[str | None] = None

    def check(self, model: "PreTrainedModel") -> None:
        """Raise an error if the result could not be saved; called before any work.

        Whether the installed transformers is new enough, and whether modeling code can be written where it is needed,
        is checked for every format. Nothing more is refused by default.

        Args:
            model: The dense model; its weights are not read.
        """

    def saved_widths(self, widths: Sequence[int]) -> list[int]:
        """Return the width that each layer has in the saved files, which plans and size targets count with.

        Args:
            widths: The channels that each layer keeps; they are not all the same.

        Returns:
            One width per layer, none smaller than the one given. By default they are the same.
        """
        return list(widths)

    def finish(self, model: "PreTrainedModel", blocks: Sequence["FFNBlock"]) -> int:
        """Change the pruned model and its configuration to what is saved; the outputs of the model do not change.

        By default every layer is filled up with channels of zeros to its saved width.

        Args:
            model: The pruned model, whose configuration already has the largest saved width.
            blocks: All its FFN blocks, in order.

        Returns:
            The number of parameters that are zeros which only fill up.
        """
        before = model.num_parameters()
        for block, width in zip(blocks, self.saved_widths([block.intermediate_size for block in blocks]), strict=True):
            if width > block.intermediate_size:
                block.install(block.read().padded(width))
        return model.num_parameters() - before

    def modeling_template(self, config: "PreTrainedConfig") -> str | None:
        """Return the template of the modeling file that must lie beside a model, or None where it needs none.

        Args:
            config: The configuration of a model as it is saved; it may be one of another format.

        Returns:
            The text of a Python module with the placeholders of `modeling_otprune.py.txt`.
        """
        del config
        return None

    @property
    def fills_up(self) -> bool:
        """Whether layers may be saved wider than they were pruned to."""
        return type(self).saved_widths is not SaveFormat.saved_widths


save_formats: Registry[type[SaveFormat]] = Registry("save format")


@save_formats.register("pad")
class Pad(SaveFormat):
    """Every layer is filled up with zeros to the widest one, so that the model loads everywhere."""

    def saved_widths(self, widths: Sequence[int]) -> list[int]:
        """Return the largest width for each layer."""
        return [max(widths)] * len(widths)


@save_formats.register("per_layer_config")
class PerLayerConfig(SaveFormat):
    """Every layer keeps its width, which the configuration holds layer by layer; a modeling file builds it."""

    needs_remote_code = True
    needs_transformers = "5.15"  # the first version whose configurations have `per_layer_config`

    def finish(self, model: "PreTrainedModel", blocks: Sequence["FFNBlock"]) -> int:
        """Write the width of each layer into the configuration."""
        padding = super().finish(model, blocks)
        widths = [block.intermediate_size for block in blocks]
        if len(set(widths)) > 1:
            spec = blocks[0].spec
            assert spec.size_key is not None
            others = spec.others_per_layer(model.config)
            spec.fields_of(model.config).per_layer_config = others | {
                block.block: {**others.get(block.block, {}), spec.size_key: spec.size_factor * width}
                for block, width in zip(blocks, widths)
            }
        return padding

    def modeling_template(self, config: "PreTrainedConfig") -> str | None:
        """Return a class that builds each layer with its own width, for configurations that hold such widths."""
        if not any(getattr(part, "is_heterogeneous", False) for part in (config, config.get_text_config())):
            return None
        return files("optimum_otprune.models").joinpath("modeling_otprune.py.txt").read_text(encoding="utf-8")


def save_format(name: str) -> SaveFormat:
    """Return the save format that is registered under a name.

    Raises:
        RegistryError: If the name is unknown.
    """
    return save_formats[name]()


def saved_widths(name: str, widths: Sequence[int], dense: Sequence[int] | None = None) -> list[int]:
    """Return the width that each layer has in the saved files: its own where all layers are of one width.

    Args:
        name: The registered name of a save format.
        widths: The channels that each layer keeps.
        dense: The channels of each layer before pruning, which no saved layer exceeds; None where not known.

    Raises:
        CustomFunctionError: If the format gives too few widths, or one that is too small or too large.

    Example:
        >>> saved_widths("pad", [2, 4]), saved_widths("per_layer_config", [2, 4])
        ([4, 4], [2, 4])
    """
    if len(set(widths)) <= 1:
        return list(widths)
    if dense is not None and len(set(dense)) > 1:  # an encoder and a decoder: each has a width of its own
        starts = [layer for layer in range(len(dense)) if layer == 0 or dense[layer] != dense[layer - 1]]
        parts = [slice(*bounds) for bounds in zip(starts, [*starts[1:], len(dense)])]
        return [wide for part in parts for wide in saved_widths(name, widths[part], dense[part])]
    saved = called(name, "saved_widths", list(widths))
    try:
        found = [operator.index(width) for width in saved]
    except TypeError:  # no list, or not of integers
        found = []
    if len(found) != len(widths) or any(wide < width for wide, width in zip(found, widths)):
        raise CustomFunctionError(
            f"The save format {name!r} gives the widths {saved!r:.200} to layers that keep {list(widths)} channels; "
            "want one width per layer, none smaller, all integers. Mend its `saved_widths`."
        )
    if dense is not None and any(wide > most for wide, most in zip(found, dense)):
        raise CustomFunctionError(
            f"The save format {name!r} gives the widths {found!r:.200} to layers that had {list(dense)!r:.200} "
            "channels before pruning; want none larger. Mend its `saved_widths`, or use non_uniform_format='pad'."
        )
    return found


def called(name: str, method: str, *inputs: Any) -> Any:
    """Call a method of a save format; what a format of somebody's own raises says whose it is.

    Args:
        name: The registered name of a save format.
        method: The name of the method.
        *inputs: What the method takes.

    Raises:
        RegistryError: If the name is unknown.
        CustomFunctionError: If the method raises anything but an error of this package, which is the cause.
    """
    chosen = save_format(name)
    try:
        return getattr(chosen, method)(*inputs)
    except (OTPruneError, MemoryError):
        raise
    except Exception as error:
        raise CustomFunctionError(
            f"The save format {name!r} {raised(error)} in its `{method}`. Mend it, or use non_uniform_format='pad'."
        ) from error
