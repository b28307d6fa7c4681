"""`FFNBlock`: reads and installs the weights of one FFN; nothing else in the package assigns to a model's weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from optimum_otprune.errors import OTPruneError
from optimum_otprune.functional.ffn import Activation, FFNWeights, Gating, first_channels
from optimum_otprune.models.architectures import submodule
from optimum_otprune.models.block import Block
from optimum_otprune.models.devices import execution_device, keep_parameters, read_parameter, replace_parameter
from optimum_otprune.models.ffn_spec import SHARED, FFNSpec, Function, Method

_FEATURES = ("in_features", "out_features", "nx", "nf")


class FFNBlock(Block):
    """One FFN of a model, and the block that it is in; a block with experts has many.

    Attributes:
        layer: The index of the FFN among all of the model, from 0; that of its block where each block has one FFN.
        spec: The place of the FFN in the block.
        expert: The index of the FFN among the experts that a router chooses from, or None for another FFN.
        times: How many times the width that the model's configuration holds the FFN is wide.
        least_multiple: The number that the width in the configuration must be a multiple of once it is changed.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: FFNSpec,
        layer: int,
        *,
        block: int | None = None,
        expert: int | None = None,
        times: int = 1,
        least_multiple: int = 1,
    ):
        super().__init__(module, layer if block is None else block, spec.layers)
        self.spec, self.layer, self.expert, self.times = spec, layer, expert, times
        self.least_multiple = least_multiple

    @property
    def name(self) -> str:
        """What the FFN is called in messages and reports, such as "layer 3" or "expert 7 of block 3"."""
        if self.expert is not None:
            return f"expert {self.expert} of block {self.block}"
        if self.spec.kind == SHARED:
            return f"shared expert of block {self.block}"
        return f"layer {self.layer}" if self.layer == self.block else f"FFN of block {self.block}"

    def projection(self, name: str) -> nn.Module | None:
        """Return the module that holds `"gate"`, `"up"` or `"down"`; None for the gate of an FFN without one."""
        slot = self.spec.slots.get(name)
        return None if slot is None else submodule(self.module, slot.path)

    @property
    def modules(self) -> dict[nn.Module, tuple[str, ...]]:
        """The modules that hold the FFN, each with the names of its projections in the order of its outputs."""
        slots = self.spec.slots
        names: dict[nn.Module, tuple[str, ...]] = {}
        for name in sorted(slots, key=lambda name: slots[name].part):
            module = submodule(self.module, slots[name].path)
            assert module is not None
            names[module] = (*names.get(module, ()), name)
        return names

    @property
    def up(self) -> nn.Module:
        """The module of the up projection; its input is the FFN's input."""
        module = self.projection("up")
        assert module is not None
        return module

    @property
    def down(self) -> nn.Module:
        """The module of the down projection; its output is the FFN's output."""
        module = self.projection("down")
        assert module is not None
        return module

    @property
    def device(self) -> torch.device:
        """The device that the FFN computes on."""
        return execution_device(self.up)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights."""
        return self._up_weight.dtype

    @property
    def intermediate_size(self) -> int:
        """The number of channels that the FFN has now."""
        return self._up_weight.shape[-1 if self.spec.transposed else -2] // self.spec.slots["up"].parts

    @property
    def hidden_size(self) -> int:
        """The width of the FFN's inputs and outputs."""
        return self._up_weight.shape[-2 if self.spec.transposed else -1]

    @property
    def stored(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """The parameters that hold the weight matrices of the FFN, alone or with others, and whose those are."""
        slots = self.spec.slots
        found: list[tuple[Tensor, tuple[str, ...]]] = []
        for module, names in self.modules.items():
            for parameter in dict.fromkeys(slots[name].parameter for name in names):
                weight = module._parameters[parameter]
                assert weight is not None
                found.append((weight, tuple(name for name in names if slots[name].parameter == parameter)))
        return found

    @property
    def _up_weight(self) -> Tensor:
        """The stored weight of the up projection, `(out, in)`, or `(in, out)` where the architecture transposes it.

        Of experts it is a stack, `(num_experts, out, in)`.
        """
        return self.up.get_parameter(self.spec.slots["up"].parameter)

    @property
    def activation(self) -> Activation:
        """The FFN's elementwise activation function, or what joins its gate and its up projection."""
        return Gating(self._gated) if isinstance(self.spec.activation, Method) else self._activated

    def _activated(self, inputs: Tensor) -> Tensor:
        """Apply the activation function, to a multiple of the inputs where the architecture does."""
        spec = self.spec
        assert not isinstance(spec.activation, Method)
        if spec.gate_factor is not None:
            factor: Any = submodule(self.module, spec.gate_factor)
            inputs = inputs * factor
        if isinstance(spec.activation, Function):
            return ACT2FN[spec.activation.name](inputs)
        function = submodule(self.module, spec.activation)
        assert function is not None
        return function(inputs)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        assert isinstance(self.spec.activation, Method)
        function = submodule(self.module, self.spec.activation.path)
        assert function is not None
        return function(self.spec.slots["up"].join((gate, up), dim=gate.ndim - 1))

    def read(self) -> FFNWeights:
        """Return copies of the weights, channel-first, on the device that the FFN computes on."""
        gate, gate_bias = self._read("gate")
        up, up_bias = self._read("up")
        down, down_bias = self._read("down")
        assert up is not None
        assert down is not None
        weights = FFNWeights(up, down, gate, up_bias, gate_bias, down_bias)
        return weights.map(lambda part: part.to(up.dtype))  # T5 keeps the down projection in float32

    def _read(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return copies of a projection's weight, `(out, in)`, and bias; None for each that it does not have."""
        module, slot = self.projection(name), self.spec.slots.get(name)
        if module is None or slot is None:
            return None, None
        weight, bias = (read_parameter(module, part, self.expert) for part in (slot.parameter, slot.bias))
        if weight is not None and self.spec.transposed:
            weight = weight.T
        if slot.parts == 1:
            return weight, bias
        parts = [whole if whole is None else slot.piece(whole).clone() for whole in (weight, bias)]
        return parts[0], parts[1]

    def install(self, weights: FFNWeights) -> None:
        """Put weights, of any width, into the model; dtype and device stay the model's.

        Args:
            weights: The weights to install, channel-first; where a bias is None, the model's own stays as it is.
        """
        assert self.expert is None  # experts share their parameters, see `install_all`
        for module, names in self.modules.items():
            weight, bias = self._joined(weights, names, ""), self._joined(weights, names, "_bias")
            assert weight is not None
            replace_parameter(module, "weight", weight.T if self.spec.transposed else weight)
            if bias is not None:
                replace_parameter(module, "bias", bias)
            set_features(module, weight.shape[1], weight.shape[0])
        self._set_size(weights.intermediate_size)

    def install_experts(self, experts: Sequence[FFNWeights]) -> None:
        """Put the weights of all experts of a block into the model, where this FFN is one of them.

        Args:
            experts: The weights of each expert, in order, all of one width.
        """
        for module, names in self.modules.items():
            slots = [self.spec.slots[name] for name in names]
            for parameter in dict.fromkeys(slot.parameter for slot in slots):
                own = [name for name, slot in zip(names, slots) if slot.parameter == parameter]
                for suffix, holder in (("", parameter), ("_bias", f"{parameter}_bias")):
                    parts = [self._joined(weights, own, suffix) for weights in experts]
                    there = [part for part in parts if part is not None]
                    if there:
                        stack = torch.stack(there)
                        is_turned = self.spec.transposed and not suffix
                        replace_parameter(module, holder, stack.transpose(1, 2) if is_turned else stack)
        self._set_size(experts[0].intermediate_size)

    def _joined(self, weights: FFNWeights, names: Sequence[str], suffix: str) -> Tensor | None:
        """Return what one parameter holds, of the matrices or biases of an FFN; None where these are None."""
        parts = [getattr(weights, f"{name}{suffix}") for name in names]
        there = [part for part in parts if part is not None]
        assert len(there) in (0, len(parts))
        return self.spec.slots[names[0]].join(there, dim=0) if there else None

    def _set_size(self, size: int) -> None:
        """Correct the width that modules repeat."""
        for path in self.spec.size_attributes:
            owner_path, _, attribute = path.rpartition(".")
            owner = submodule(self.module, owner_path)
            if hasattr(owner, attribute):
                setattr(owner, attribute, size)

    def keep(self) -> Callable[[], None]:
        """Return a function that restores the FFN's present parameters bit for bit, on any device."""
        put_back = [keep_parameters(module) for module in self.modules]

        def undo() -> None:
            for step in put_back:
                step()

        return undo


@contextmanager
def named(block: Block) -> Iterator[None]:
    """Name the layer in the messages of errors that are raised inside the block of code."""
    try:
        yield
    except OTPruneError as error:
        name = block.name
        raise type(error)(f"{name[0].upper()}{name[1:]}: {error}") from error.__cause__ or error


def install_all(blocks: Sequence[FFNBlock], weights: Sequence[FFNWeights]) -> None:
    """Put the weights of all FFNs of one block into the model.

    Args:
        blocks: All FFNs of the block, in order.
        weights: The weights of each.
    """
    experts = [own for block, own in zip(blocks, weights, strict=True) if block.expert is not None]
    for block, own in zip(blocks, weights):
        if block.expert is None:
            block.install(own)
        elif block.expert == 0:
            block.install_experts(experts)


def set_features(module: nn.Module, in_features: int, out_features: int) -> None:
    """Correct the shape that a linear module records (`nn.Linear`, transformers' `Conv1D`)."""
    for attribute, value in zip(_FEATURES, (in_features, out_features) * 2):
        if hasattr(module, attribute):
            setattr(module, attribute, value)


def cut_all(blocks: Sequence[FFNBlock], width: int) -> None:
    """Cut all FFNs of a model to their first channels, to measure speed with.

    Args:
        blocks: All FFNs.
        width: Number of channels that stay in each.
    """
    for group in by_block(blocks):
        install_all(group, [first_channels(block.read(), width) for block in group])


def is_alone(group: Sequence[FFNBlock]) -> bool:
    """Return whether a block has one FFN, which every token passes; one expert is not, since a router weighs it.

    Args:
        group: All FFNs of the block.
    """
    return len(group) == 1 and group[0].expert is None


def by_block(blocks: Sequence[FFNBlock]) -> list[list[FFNBlock]]:
    """Return the FFNs of each block of a model together, in order."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.block)]
