"""Divergences of two models' predictions."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from optimum_otprune.functional import distillation
from optimum_otprune.functional.distillation import divergence, kl_divergence


def two(num_tokens=7, vocab_size=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, num_tokens, vocab_size, generator=generator).to(dtype)
    return teacher, student.requires_grad_()


def test_a_divergence_computed_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4 and 1/4
    student = torch.zeros(1, 2)  # 1/2 and 1/2
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(teacher, student).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("positions", [1, 3, 100])
def test_value_and_gradient_are_those_of_all_positions_at_once(monkeypatch, positions):
    monkeypatch.setattr(distillation, "positions_together", lambda vocab_size: positions)
    teacher, student = two()
    value = kl_divergence(teacher, student)
    (gradient,) = torch.autograd.grad(value, student)
    plain = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="sum", log_target=True)
    (wanted,) = torch.autograd.grad(plain, student)
    torch.testing.assert_close((value, gradient), (plain, wanted))
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_no_gradient_flows_into_the_teacher():
    teacher, student = two()
    teacher.requires_grad_()
    kl_divergence(teacher, student).backward()
    assert teacher.grad is None


def test_a_window_is_measured_by_divergence_agreement_and_likelihoods():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = divergence(teacher, student, torch.tensor([0, 0]))
    assert found.agreement.item() == 1
    assert found.kl.item() == pytest.approx(kl_divergence(teacher, student).item())
    assert found.nll.item() == pytest.approx(-2 * math.log(math.e / (math.e + 1)))
    assert found.teacher_nll.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 1)) + math.log(math.e**2 + 1))
