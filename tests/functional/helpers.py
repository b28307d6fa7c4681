"""Layers, data and hypothesis settings that the tests of the mathematics share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_otprune.functional.ffn import FFNWeights

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "25"))
law = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 25)
seeds = st.integers(0, 10_000)


def random_numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=random_numbers(seed), dtype=torch.float64).to(dtype)


def probabilities(seed: int, size: int) -> Tensor:
    mass = torch.rand(size, generator=random_numbers(seed), dtype=torch.float64) + 0.05
    return mass / mass.sum()


def permutation(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=random_numbers(seed))


def make_ffn(seed=0, n=12, d=5, gated=True, biases=False, dtype=torch.float64) -> FFNWeights:
    """A random FFN; 12 channels and hidden size 5 unless told otherwise."""
    base = 100 * seed
    return FFNWeights(
        up=normal(base + 1, n, d, dtype=dtype),
        down=normal(base + 2, d, n, dtype=dtype),
        gate=normal(base + 3, n, d, dtype=dtype) if gated else None,
        up_bias=normal(base + 4, n, dtype=dtype) if biases else None,
        gate_bias=normal(base + 5, n, dtype=dtype) if biases and gated else None,
        down_bias=normal(base + 6, d, dtype=dtype) if biases else None,
    )


def repeat_channels(weights: FFNWeights, cluster_of: Tensor, same_down: bool = True, seed: int = 0) -> FFNWeights:
    """An FFN whose channel j is a copy of channel `cluster_of[j]`; with down columns of its own unless `same_down`."""
    repeated = weights.select(cluster_of)
    if same_down:
        return repeated
    return repeated._replace(down=normal(seed + 77, *repeated.down.shape))


def first_of_each(cluster_of: Tensor) -> Tensor:
    """The first channel of every cluster, sorted."""
    return torch.tensor(sorted({int(c): j for j, c in reversed(list(enumerate(cluster_of.tolist())))}.values()))


@contextmanager
def untouched(*tensors: Tensor | None) -> Iterator[None]:
    """The tensors hold the same bits afterwards."""
    there = [tensor for tensor in tensors if tensor is not None]
    copies = [tensor.clone() for tensor in there]
    yield
    for tensor, copy in zip(there, copies):
        assert torch.equal(tensor, copy)
