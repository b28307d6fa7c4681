"""A model is pruned or it is what it was: whatever ends `prune`, and whatever functions of others do."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig, pipeline, pruner
from optimum_otprune.architectures import block, changes
from optimum_otprune.architectures.block import ffn_blocks
from optimum_otprune.devices import is_offloaded
from optimum_otprune.errors import (
    CustomFunctionError,
    HalfPrunedError,
    NumericalError,
    OTPruneError,
    ShapeError,
    TransportError,
    UnsupportedModelError,
)
from optimum_otprune.functional.costs import TransportCost, activation_cost
from optimum_otprune.functional.importance import importances, wanda
from optimum_otprune.functional.marginals import uniform
from optimum_otprune.functional.solvers import nearest
from tests.architectures.test_contract import build
from tests.conftest import make_llama
from tests.test_passes import DISK

FAST = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast"}
LAYERS = 3


def make_pruner(model, **options) -> OTPruner:
    return OTPruner.from_pretrained(model, OTPruningConfig(**{**FAST, **options}))


def small(**changes):
    return make_llama(num_hidden_layers=LAYERS, intermediate_size=24, **changes)


@pytest.fixture(scope="module")
def samples():
    return torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def fresh(samples):
    """What an undisturbed run leaves."""
    subject = make_pruner(small())
    report = subject.prune(samples, progress=False)
    return state_of(subject.model), report


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Everything:
    """All that there is to a model and its pruner, to be compared with what it is later."""

    def __init__(self, subject: OTPruner, samples):
        self.subject, self.samples = subject, samples
        self.before = self.now()

    def now(self):
        model = self.subject.model
        with torch.no_grad():
            seen = {
                "state": state_of(model),
                "logits": {"": model(input_ids=self.samples).logits},
                "parameters": {name: id(part) for name, part in model.named_parameters()},
                "config": copy.deepcopy(model.config.to_dict()),
                "generation": model.generation_config.to_dict(),
                "modules": [
                    {name: repr(part) for name, part in vars(module).items() if not name.startswith("_")}
                    for module in model.modules()
                ],
                "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
                "marks": sorted(vars(model)),
                "pruner": {name: id(part) for name, part in vars(self.subject).items()},
            }
        return seen

    def is_as_before(self) -> bool:
        now = self.now()
        tensors = all(same(self.before.pop(name), now.pop(name)) for name in ("state", "logits"))
        return tensors and self.before == now


FUNCTIONS = {
    "importance": wanda,
    "cost": activation_cost,
    "source_distribution": uniform,
    "target_distribution": uniform,
    "solver": lambda *inputs: importances and emd(*inputs),
}
