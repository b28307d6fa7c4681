"""Attention: groups of query heads with their keys and values, read, removed, and put into a model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError, raised
from optimum_otprune.functional.selection import kept_width
from optimum_otprune.models.architectures import find_blocks, find_spec, submodule
from optimum_otprune.models.devices import keep_parameters, read_parameter, replace_parameter
from optimum_otprune.models.ffn_block import set_features

_OUTWARD = ("self_attn.o_proj", "self_attn.dense", "self_attn.out_proj")
_INWARD = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v"))
_HEADS, _GROUPS, _DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
_BIASES = "attention_bias"  # a switch of all four projections
_REPEATED = {"num_heads": 0, "num_attention_heads": 0, "num_key_value_heads": 1, "num_kv_heads": 1}  # of a module


class AttentionHeads:
    """The attention of one block, whose query heads are pruned in groups that share one head of keys and values.

    Attributes:
        block: The index of the block, from 0.
        module: The module of the whole block.
        num_groups: Number of heads of keys and values.
        num_heads: Number of query heads.
        head_dim: Width of a head.
    """

    def __init__(self, module: nn.Module, block: int, config: PreTrainedConfig):
        self.module, self.block = module, block
        self.num_heads, self.num_groups = getattr(config, _HEADS), getattr(config, _GROUPS)
        self.head_dim = _head_dim(config)

    @property
    def name(self) -> str:
        """What it is called in messages and reports."""
        return f"attention of block {self.block}"

    @property
    def output(self) -> nn.Module:
        """The module that reads all heads and puts out what attention adds."""
        return _modules(self.module)["o"]

    @property
    def group_size(self) -> int:
        """Number of columns of the output projection that belong to one group."""
        return self.num_heads // self.num_groups * self.head_dim

    def read_output(self) -> tuple[Tensor, Tensor | None]:
        """Return copies of the output projection's weight, `(hidden_size, num_heads * head_dim)`, and bias."""
        weight = read_parameter(self.output, "weight")
        assert weight is not None
        return weight, read_parameter(self.output, "bias")

    def columns(self, groups: Tensor) -> Tensor:
        """Return the columns of the output projection that belong to groups, LongTensor."""
        return _rows(groups, self.group_size)

    def install(self, groups: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Leave some groups in the model, with a new output projection.

        Args:
            groups: The groups to keep, LongTensor, sorted.
            weight: The weight of the output projection, `(hidden_size, len(groups) * group_size)`.
            bias: The bias of the output projection, `(hidden_size,)`; None where it stays as it is.
        """
        before = (self.num_heads, self.num_groups)
        parts = _modules(self.module)
        for name, module in parts.items():
            if name == "o":
                replace_parameter(module, "weight", weight)
                if bias is not None:
                    replace_parameter(module, "bias", bias)
                set_features(module, weight.shape[1], weight.shape[0])
                continue
            rows = _rows(groups, self.group_size if name == "q" else self.head_dim)
            for parameter in ("weight", "bias"):
                value = read_parameter(module, parameter)
                if value is not None:
                    replace_parameter(module, parameter, value[rows.to(value.device)])
            set_features(module, module.get_parameter("weight").shape[1], len(rows))
        self.num_heads, self.num_groups = self.num_heads // self.num_groups * len(groups), len(groups)
        now = (self.num_heads, self.num_groups)
        holder = submodule(self.module, "self_attn")
        for attribute, which in _REPEATED.items():
            if getattr(holder, attribute, None) == before[which]:
                setattr(holder, attribute, now[which])

    def keep(self) -> Callable[[], None]:
        """Return a function that puts back what `install` changes, bit for bit."""
        holder = submodule(self.module, "self_attn")
        assert holder is not None
        put_back = [keep_parameters(module) for module in _modules(self.module).values()]
        owners = [holder, *_modules(self.module).values()]
        kept = [{name: value for name, value in vars(owner).items() if type(value) is int} for owner in owners]
        sizes = (self.num_heads, self.num_groups)

        def undo() -> None:
            for step in put_back:
                step()
            for owner, values in zip(owners, kept):
                vars(owner).update(values)
            self.num_heads, self.num_groups = sizes

        return undo

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Let a block of code change the attention, and put everything back afterwards."""
        undo = self.keep()
        try:
            yield
        finally:
            undo()


def kept_groups(heads: AttentionHeads, ratio: float) -> int:
    """Return how many groups stay, at least one."""
    return kept_width(heads.num_groups, ratio, 1)


def attention_heads(model: PreTrainedModel) -> list[AttentionHeads]:
    """Return the attention of every block that has some, in order.

    Raises:
        UnsupportedModelError: If it cannot be pruned; the message says why.
    """
    spec = find_spec(model)[1]
    config = spec.fields_of(model.config)
    why = _why_not(config) if spec.then is None else "it has an encoder and a decoder"
    found = []
    for index, block in enumerate(find_blocks(model, spec)):
        if why is None and submodule(block, "self_attn") is not None:
            found.append(AttentionHeads(block, index, config))
            why = _why_not_block(block, found[-1])
    if why is None and not found:
        why = "no block has `self_attn`"
    if why is not None:
        raise UnsupportedModelError(
            f"Heads of attention of {type(model).__name__} cannot be pruned: {why}. Leave `attention` out of "
            "`kind_ratios`."
        )
    return found


def removed_weights(heads: list[AttentionHeads], kept: int) -> list[tuple[Tensor, int]]:
    """Return the parameters that lose entries where groups of heads are removed, each with the number of these.

    Args:
        heads: The attention of the blocks that lose heads; weights are not read.
        kept: Number of groups that stay.
    """
    found: list[tuple[Tensor, int]] = []
    for own in heads:
        for name, module in _modules(own.module).items():
            for parameter in ("weight",) if name == "o" else ("weight", "bias"):
                part = module._parameters.get(parameter)
                if part is not None:
                    found.append((part, part.numel() // own.num_groups * (own.num_groups - kept)))
    return found


def finish_heads(model: PreTrainedModel, heads: list[AttentionHeads]) -> None:
    """Let a model's configuration say how many heads its attention has now, and whether it has biases.

    A configuration knows biases of all projections or of none, so that those that lack one get zeros if any has one
    that the dense model had not.

    Args:
        model: The model.
        heads: The attention of all its blocks, pruned.
    """
    config = find_spec(model)[1].fields_of(model.config)
    _write(config, heads[0])
    if getattr(config, _BIASES, True) or all(own.read_output()[1] is None for own in heads):
        return
    setattr(config, _BIASES, True)
    for module in (module for own in heads for module in _modules(own.module).values()):
        weight = read_parameter(module, "weight")
        assert weight is not None
        if read_parameter(module, "bias") is None:
            replace_parameter(module, "bias", weight.new_zeros(len(weight)))


def check_heads(model: PreTrainedModel, heads: list[AttentionHeads], kept: int, needs_bias: bool) -> None:
    """Raise if a model that is built with fewer heads has other weights than one whose heads are removed.

    Args:
        model: The dense model.
        heads: Its attention.
        kept: Number of groups that stay.
        needs_bias: Whether the output projections must have biases.

    Raises:
        UnsupportedModelError: If it has, or cannot be built.
    """
    config, smaller = copy.deepcopy(model.config), copy.copy(heads[0])
    smaller.num_heads, smaller.num_groups = kept * heads[0].num_heads // heads[0].num_groups, kept
    fields = find_spec(model)[1].fields_of(config)
    _write(fields, smaller)
    if needs_bias and hasattr(fields, _BIASES):
        setattr(fields, _BIASES, True)
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} {raised(error)} when it is built with {kept} groups of heads, so no pruned model "
            "could be loaded. Leave `attention` out of `kind_ratios`."
        ) from error
    if needs_bias and any(own.output._parameters.get("bias") is None for own in attention_heads(built)):
        raise UnsupportedModelError(
            f"compensation='bias' (as method 'flap' has it) needs biases of the output projections, which the "
            f"configuration of {type(model).__name__} cannot hold. Leave `attention` out of `kind_ratios`."
        )
    wanted = {name: tuple(part.shape) for name, part in built.named_parameters()}
    owners = {module: (own, part) for own in heads for part, module in _modules(own.module).items()}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = list(parameter.shape)
            if module in owners:
                own, part = owners[module]
                width = kept * (own.group_size if part in ("q", "o") else own.head_dim)
                if not (part == "o" and name == "bias"):
                    shape[-1 if part == "o" else 0] = width
            full = f"{path}.{name}".lstrip(".")
            if full in wanted and wanted[full] != tuple(shape):
                raise UnsupportedModelError(
                    f"Built with {kept} groups of heads, {type(model).__name__} has {full!r} of shape {wanted[full]}, "
                    f"and heads that are removed leave {tuple(shape)}. Leave `attention` out of `kind_ratios`."
                )


def _write(config: PreTrainedConfig, heads: AttentionHeads) -> None:
    """Let a configuration say how many heads there are, and their width, which else would follow from their number."""
    for name, value in ((_HEADS, heads.num_heads), (_GROUPS, heads.num_groups), (_DIM, heads.head_dim)):
        setattr(config, name, value)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, _DIM, None) or config.hidden_size // getattr(config, _HEADS)


def _rows(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _modules(block: nn.Module) -> dict[str, nn.Module]:
    """Return the projections of a block's attention that are there, by the names q, k, v and o."""
    found = {name: submodule(block, path) for name, path in zip("qkv", _INWARD)}
    found["o"] = next((module for path in _OUTWARD if (module := submodule(block, path)) is not None), None)
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def _why_not(config: PreTrainedConfig) -> str | None:
    of_layers = set(getattr(config, "per_layer_attributes", None) or ()) & {_HEADS, _GROUPS, _DIM}
    if of_layers:  # reading one raises
        return f"its configuration has `{min(of_layers)}` of each layer for itself"
    for name in (_HEADS, _GROUPS):
        if type(getattr(config, name, None)) is not int:
            return f"its configuration has no `{name}`"
    if getattr(config, _GROUPS) == 1:
        return "all query heads share one head of keys and values, so there is no group to remove"
    return None


def _why_not_block(block: nn.Module, heads: AttentionHeads) -> str | None:
    parts = _modules(block)
    if set(parts) != set("qkvo"):
        return f"block {heads.block} has no separate projections of queries, keys, values and outputs"
    queries, groups = heads.num_heads * heads.head_dim, heads.num_groups * heads.head_dim
    sizes = {"q": queries, "k": groups, "v": groups}
    found = {name: parts[name].get_parameter("weight").shape[0] for name in sizes}
    if found != sizes or parts["o"].get_parameter("weight").shape[1] != queries:
        return f"the projections of block {heads.block} have other widths than its heads"
    attention = submodule(block, "self_attn")
    assert attention is not None
    known = {id(part) for module in parts.values() for part in module.parameters()}
    for name, part in attention.named_parameters():
        if id(part) not in known and tuple(part.shape) != (heads.head_dim,):
            return f"`self_attn.{name}` of block {heads.block} belongs to all heads together"
    return None
