"""What devices can do."""

import pytest
import torch

from optimum_otprune.models.devices import multiplies_bfloat16
from optimum_otprune.models.training import computing
from tests.conftest import make_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "is_fast"),
    [
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
)
def test_training_multiplies_in_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch, found, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert multiplies_bfloat16(CPU) is is_fast
    linear, inputs = torch.nn.Linear(4, 4), torch.zeros(1, 4)
    for model, wanted in [(make_llama(), is_fast), (make_llama().bfloat16(), True)]:
        with computing(model):
            assert (linear(inputs).dtype == torch.bfloat16) is wanted


def test_a_torch_that_does_not_say_multiplies_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(CPU)
    assert not multiplies_bfloat16(torch.device("meta"))
