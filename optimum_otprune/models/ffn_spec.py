"""`FFNSpec`: where the FFN is in a model, and how its width is written in the model's configuration, as data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

DENSE, EXPERTS, SHARED = "dense", "experts", "shared"  # kinds of FFNs, as `kind_ratios` names them
PROJECTIONS = ("gate", "up", "down")  # in the order in which an FFN is read and installed


class Slot(NamedTuple):
    """The place of one matrix of an FFN.

    Attributes:
        path: The path, relative to a block, of the module that holds the matrix, alone or with others.
        part: Which piece of the module's outputs belongs to the matrix, from 0.
        parts: In how many pieces of one size the module's outputs are cut, as a fused gate and up projection in two.
        parameter: The name of the parameter that holds the matrix, which for experts is a stack of them, one each.
        is_interleaved: Whether outputs of the pieces take turns, instead of standing one piece behind the other.
    """

    path: str
    part: int = 0
    parts: int = 1
    parameter: str = "weight"
    is_interleaved: bool = False

    def piece(self, whole: Tensor) -> Tensor:
        """Return the piece of what the module holds, along its first dimension."""
        return whole[self.part :: self.parts] if self.is_interleaved else whole.chunk(self.parts)[self.part]

    def join(self, pieces: Sequence[Tensor], dim: int) -> Tensor:
        """Return what the module holds, of all its pieces in order, along a dimension, counted from 0."""
        if self.is_interleaved:
            return torch.stack(list(pieces), dim=dim + 1).flatten(dim, dim + 1)
        return torch.cat(list(pieces), dim=dim)

    @property
    def bias(self) -> str:
        """The name of the parameter that holds the bias."""
        return "bias" if self.parameter == "weight" else f"{self.parameter}_bias"


class Function(NamedTuple):
    """An activation function that the code of a model calls by its name, and that no module holds.

    Attributes:
        name: The name of the function in transformers' `ACT2FN`.
    """

    name: str


class Method(NamedTuple):
    """A method of a module that makes the channel activations of gate and up projection, which it takes as one tensor.

    Attributes:
        path: The path of the method, relative to a block.
    """

    path: str


@dataclass(frozen=True)
class FFNSpec:
    """Where the FFN is in a model; it is recognized by these paths, never by a model's name.

    Attributes:
        layers: Path of the list of blocks, relative to `model.base_model`, or to the text model inside it.
        up: Path of the up projection, relative to a block; a `Slot` for a piece of a fused matrix.
        down: Path of the down projection, relative to a block.
        activation: Path of the activation function, relative to a block; a `Function` for one that has no place, a
            `Method` for one of gate and up together.
        gate: Path of the gate projection, or a `Slot`; None for an FFN that is not gated.
        size_key: Field of the configuration from which the FFN's width follows; None for a width that is written in
            the model's code, so that no configuration can hold another.
        bias_key: Field of the configuration that gives all three projections a bias, or None.
        size_attributes: Attributes of modules, relative to a block, that repeat the width.
        transposed: Whether weights are stored (in, out), as in GPT-2's Conv1D.
        residual: Whether the FFN's output is added to the residual stream as it is, without a norm after it.
        requires: Other paths that must exist in a block, to tell look-alikes apart.
        size_factor: How many times the width `size_key` holds.
        also_set: Fields of the configuration that are set with the width, where it has them, and their values.
        gate_factor: Path, relative to a block, of a number that multiplies what goes into the activation, or None.
        config: Name of the part of the configuration that holds all these fields; empty for the configuration itself.
        kind: What the FFN is in its block: `"dense"`, one of the `"experts"` that a router chooses from, or an expert
            that is `"shared"` by all tokens.
        times_key: Field of the configuration that says how many times the width `size_key` holds is wide, as for
            several shared experts in one; None for once.
        beside: Where other FFNs are that blocks of the list have beside this one or in place of it, as shared experts
            and the dense FFNs of some layers. Of several entries at one place, the first that fits is taken.
        then: Where the FFN is in a second list of blocks that runs behind the first, as a decoder behind its encoder.
    """

    layers: str
    up: str | Slot
    down: str | Slot
    activation: str | Function | Method
    gate: str | Slot | None = None
    size_key: str | None = "intermediate_size"
    bias_key: str | None = None
    size_attributes: tuple[str, ...] = ()
    transposed: bool = False
    residual: bool = True
    requires: tuple[str, ...] = ()
    size_factor: int = 1
    also_set: tuple[tuple[str, object], ...] = ()
    gate_factor: str | None = None
    config: str = ""
    kind: str = DENSE
    times_key: str | None = None
    beside: "tuple[FFNSpec, ...]" = ()
    then: "FFNSpec | None" = None

    @property
    def lists(self) -> "tuple[FFNSpec, ...]":
        """The places of the FFN in each list of blocks, in the order in which a model runs them."""
        return (self,) if self.then is None else (self, *self.then.lists)

    def inside(self, path: str, config: str) -> "FFNSpec":
        """Return the same places for a model that is part of a larger one.

        Args:
            path: Path of the part from the larger model.
            config: Name of the part of the configuration that is this model's.
        """
        beside = tuple(one.inside(path, config) for one in self.beside)
        return replace(self, layers=f"{path}.{self.layers}", config=config, beside=beside)

    @property
    def kinds(self) -> "tuple[FFNSpec, ...]":
        """The places of all FFNs that a block of the list may have."""
        return (self, *self.beside)

    @property
    def is_stacked(self) -> bool:
        """Whether one parameter holds the matrices of many FFNs, which a router chooses from for each token."""
        return self.kind == EXPERTS

    @property
    def slots(self) -> dict[str, Slot]:
        """The places of the matrices that are there, by the name of the projection."""
        given = {name: getattr(self, name) for name in PROJECTIONS}
        return {
            name: place if isinstance(place, Slot) else Slot(place)
            for name, place in given.items()
            if place is not None
        }

    def fields_of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the part of a model's configuration that holds the fields of the FFN."""
        found = getattr(config, self.config) if self.config else config
        assert isinstance(found, PreTrainedConfig)
        return found

    def others_per_layer(self, config: PreTrainedConfig) -> dict[int | str, dict[str, Any]]:
        """Return what a model's configuration says of each layer for itself, beside widths; empty for nothing."""
        fields = self.fields_of(config)
        names = sorted(set(getattr(fields, "per_layer_attributes", None) or ()) - {self.size_key})
        if not names:
            return {}
        return {
            layer: {name: getattr(own, name) for name in names} for layer, own in enumerate(fields.per_layer_config)
        }

    def times(self, config: PreTrainedConfig) -> int:
        """Return how many times the width that a model's configuration holds the FFN is wide."""
        return 1 if self.times_key is None else int(getattr(self.fields_of(config), self.times_key))

    def width_in(self, config: PreTrainedConfig) -> int | None:
        """Return the width that a model's configuration gives all FFNs of this kind; None where it gives no such."""
        assert self.size_key is not None
        fields = self.fields_of(config)
        if self.size_key in (getattr(fields, "per_layer_attributes", None) or ()):
            return None  # reading it raises
        held = getattr(fields, self.size_key, None)
        times = 1 if self.times_key is None else getattr(fields, self.times_key, None)
        if type(held) is not int or type(times) is not int:
            return None
        return held * times // self.size_factor

    def write_width(self, config: PreTrainedConfig, width: int) -> None:
        """Let a model's configuration say a width.

        Args:
            config: The model's configuration.
            width: The number of channels of all FFNs of this kind.
        """
        assert self.size_key is not None
        fields = self.fields_of(config)
        value, now = width * self.size_factor // self.times(config), vars(fields).get(self.size_key)
        setattr(fields, self.size_key, [value] * len(now) if isinstance(now, list) else value)  # one for each layer
        for name, other in self.also_set:
            if hasattr(fields, name):
                setattr(fields, name, other)
