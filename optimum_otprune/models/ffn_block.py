"""`FFNBlock`: reads and installs the weights of one FFN; nothing else in the package assigns to a model's weights."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_otprune.errors import OTPruneError, UnsupportedModelError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.models.architectures import FFNSpec, find_blocks, find_spec, submodule
from optimum_otprune.models.devices import execution_device, keep_parameters, read_parameter, replace_parameter
from optimum_otprune.models.wrappers import check_plain

_FEATURES = ("in_features", "out_features", "nx", "nf")


class FFNBlock:
    """One block of a model, and the FFN in it.

    Attributes:
        layer: Index of the block.
        module: The block.
        spec: Where its FFN is.
    """

    def __init__(self, module: nn.Module, spec: FFNSpec, layer: int):
        self.module, self.spec, self.layer = module, spec, layer

    def projection(self, name: str) -> nn.Module | None:
        """The module of `"gate"`, `"up"` or `"down"`; None for the gate of an FFN without one."""
        path = getattr(self.spec, name)
        return None if path is None else submodule(self.module, path)

    @property
    def up(self) -> nn.Module:
        """The up projection; its input is the FFN's input."""
        module = self.projection("up")
        assert module is not None
        return module

    @property
    def device(self) -> torch.device:
        """Where the FFN computes."""
        return execution_device(self.up)

    @property
    def intermediate_size(self) -> int:
        """Channels now."""
        shape = self.up.weight.shape
        return int(shape[1] if self.spec.transposed else shape[0])  # type: ignore[index, arg-type]

    def activation(self, inputs: Tensor) -> Tensor:
        """The elementwise activation function."""
        return submodule(self.module, self.spec.activation)(inputs)  # type: ignore[misc]

    def read(self) -> FFNWeights:
        """Copies of the weights, channel-first, on the device that the FFN computes on."""
        tensors: dict[str, Tensor | None] = {}
        for name in ("gate", "up", "down"):
            module = self.projection(name)
            weight = None if module is None else read_parameter(module, "weight")
            tensors[name] = weight.T if weight is not None and self.spec.transposed else weight
            tensors[f"{name}_bias"] = None if module is None else read_parameter(module, "bias")
        return FFNWeights(**tensors)  # type: ignore[arg-type]

    def install(self, weights: FFNWeights) -> None:
        """Put weights, of any width, into the model; dtype and device stay the model's.

        Args:
            weights: Channel-first; a bias that is None where the model has one stays as it is.
        """
        for name in ("gate", "up", "down"):
            module, weight, bias = self.projection(name), getattr(weights, name), getattr(weights, f"{name}_bias")
            if module is None:
                continue
            replace_parameter(module, "weight", weight.T if self.spec.transposed else weight)
            if bias is not None:
                replace_parameter(module, "bias", bias)
            _set_features(module, weight.shape[1], weight.shape[0])
        for path in self.spec.size_attributes:
            owner_path, _, attribute = path.rpartition(".")
            owner = submodule(self.module, owner_path)
            if hasattr(owner, attribute):
                setattr(owner, attribute, weights.intermediate_size)

    def keep(self) -> Callable[[], None]:
        """Return a function that makes the FFN's parameters what they are now, bit for bit, wherever they are."""
        names = ("gate", "up", "down")
        put_back = [keep_parameters(module) for name in names if (module := self.projection(name)) is not None]

        def undo() -> None:
            for step in put_back:
                step()

        return undo


@contextmanager
def named(block: FFNBlock) -> Iterator[None]:
    """A block of code in whose errors it says in which layer they happened."""
    try:
        yield
    except OTPruneError as error:
        raise type(error)(f"Layer {block.layer}: {error}") from error.__cause__ or error


def _set_features(module: nn.Module, in_features: int, out_features: int) -> None:
    """Keep a linear module's own record of its shape true (`nn.Linear`, transformers' `Conv1D`)."""
    for attribute, value in zip(_FEATURES, (in_features, out_features) * 2):
        if hasattr(module, attribute):
            setattr(module, attribute, value)


def ffn_blocks(model: PreTrainedModel) -> list[FFNBlock]:
    """Return the FFN blocks of a model, in the order of its forward pass.

    Raises:
        UnsupportedModelError: If the model has no known FFN, is quantized or adapted, or its layers share a module.
    """
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "This model is quantized already; its packed weights cannot be pruned. Prune the original model first, "
            "save it, and quantize the pruned one."
        )
    check_plain(model)
    _, spec = find_spec(model)
    blocks = [FFNBlock(module, spec, layer) for layer, module in enumerate(find_blocks(model, spec))]
    if len({block.module for block in blocks}) < len(blocks):
        raise UnsupportedModelError(
            "Layers of this model share one module, so that none can be pruned for itself. Prune a model whose layers "
            "have weights of their own."
        )
    for block in blocks:
        if not block.up.weight.is_floating_point():  # type: ignore[union-attr, operator]
            raise UnsupportedModelError(
                f"The FFN weights of layer {block.layer} are {block.up.weight.dtype}. Prune the model before it is "
                "quantized."
            )
        _check_alone(block)
    return blocks


def dense_width(blocks: list[FFNBlock]) -> int:
    """Return the width that all FFNs have now.

    Raises:
        UnsupportedModelError: If they differ.
    """
    widths = {block.intermediate_size for block in blocks}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"The layers of this model have different FFN widths ({min(widths)} to {max(widths)}): it was pruned "
            "already. Prune the dense model instead."
        )
    return widths.pop()


def loadable_blocks(model: PreTrainedModel) -> list[FFNBlock]:
    """Return the FFN blocks of a model that can be loaded again once it is saved.

    Raises:
        UnsupportedModelError: See `ffn_blocks`, `dense_width` and `check_loadable`.
    """
    blocks = ffn_blocks(model)
    dense_width(blocks)
    check_loadable(model)
    return blocks


def check_loadable(model: PreTrainedModel) -> None:
    """Raise where a saved model could not be loaded: its class does not build the weights that it holds.

    Its class is built from a copy of its configuration, on the meta device; a class whose constructor wants more than
    a configuration is not known to transformers' loading either, and is left to its maker.

    Raises:
        UnsupportedModelError: Names the first weight that is not built, not there, or of another shape.
    """
    try:
        inspect.signature(type(model)).bind(model.config)
    except TypeError:
        return
    config, uneven = copy.deepcopy(model.config), set()
    if getattr(config, "is_heterogeneous", False) and type(model).__module__.startswith("transformers.models."):
        _, spec = find_spec(model)
        # Only the modeling file that is saved with such a model builds its widths.
        if spec.size_key in (config.per_layer_attributes or ()):
            config.per_layer_config = None
            blocks = [FFNBlock(module, spec, layer) for layer, module in enumerate(find_blocks(model, spec))]
            uneven = {block.projection(name) for block in blocks for name in ("gate", "up", "down")}
    with torch.device("meta"):
        built = _shapes(type(model)(config))
    held = _shapes(model)
    ignored = {
        f"{path}.{name}" for path, part in model.named_modules() if part in uneven for name in ("weight", "bias")
    }
    for name in (*held, *built):
        if name in held and name in built and (held[name] == built[name] or name in ignored):
            continue
        found = f"of shape {held[name]}" if name in held else "not there"
        wanted = f"of shape {built[name]}" if name in built else "not known"
        raise UnsupportedModelError(
            f"The weight {name!r} is {found} in the model, but {wanted} to {type(model).__name__} with the model's "
            "configuration, so that what is saved could not be loaded. Put back the module that stood there: merge "
            "adapters, remove parametrizations, masks of `torch.nn.utils.prune` and wrappers."
        )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}


def _check_alone(block: FFNBlock) -> None:
    """Raise where a block has experts, or other FFNs, beside the one that is known: only that would be cut.

    Experts are stacked in one tensor of three dimensions, or are a list of modules with FFN-like weights each.
    """
    hidden_size = int(block.up.weight.shape[0 if block.spec.transposed else 1])  # type: ignore[index, arg-type]
    for name, module in block.module.named_modules():
        stacked = not isinstance(module, nn.modules.conv._ConvNd) and any(
            part is not None and part.ndim == 3 and min(part.shape) > 1 and hidden_size in part.shape[1:]
            for part in module._parameters.values()
        )
        listed = isinstance(module, nn.ModuleList) and sum(_is_ffn(part, hidden_size) for part in module) > 1
        if stacked or listed:
            raise UnsupportedModelError(
                f"Layer {block.layer} has experts, or other FFNs, beside its dense FFN (at {name!r}): only the dense "
                "part would be pruned. Mixture-of-experts models are not supported; prune a dense one."
            )


def _is_ffn(module: nn.Module, hidden_size: int) -> bool:
    """Whether a module has matrices from the hidden size to another, and back."""
    shapes = [part.shape for part in module.parameters() if part.ndim == 2 and part.shape[0] != part.shape[1]]
    return any(shape[1] == hidden_size for shape in shapes) and any(shape[0] == hidden_size for shape in shapes)


def native_intercept(model: PreTrainedModel, spec: FFNSpec) -> bool:
    """Return whether the architecture can hold a bias on the down projection, so that plain loading finds it.

    Found out by building the model from its configuration, with biases switched on, on the meta device.
    """
    down = FFNBlock(find_blocks(model, spec)[0], spec, 0).projection("down")
    if getattr(down, "bias", None) is not None:
        return True
    if spec.bias_key is None or not hasattr(model.config, spec.bias_key):
        return False
    config = copy.deepcopy(model.config)
    setattr(config, spec.bias_key, True)
    with torch.device("meta"):
        probe = type(model)(config)
    down = FFNBlock(find_blocks(probe, spec)[0], spec, 0).projection("down")
    return getattr(down, "bias", None) is not None
