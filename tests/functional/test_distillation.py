"""Divergences of two models' predictions."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from optimum_otprune.functional import distillation
from optimum_otprune.functional.distillation import TopLogits, divergence, kl_divergence


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
    assert found.agreement == 1
    assert found.kl == pytest.approx(kl_divergence(teacher, student).item())
    assert found.nll == pytest.approx(-2 * math.log(math.e / (math.e + 1)))
    assert found.teacher_nll == pytest.approx(-math.log(math.e**2 / (math.e**2 + 1)) + math.log(math.e**2 + 1))


def test_a_token_that_the_teacher_rules_out_adds_nothing_and_one_that_the_student_does_is_infinitely_far():
    likely, never = torch.tensor([[0.0, 0.0, -math.inf]]), torch.zeros(1, 3)
    target = torch.tensor([0])
    assert divergence(likely, never, target).kl == pytest.approx(math.log(1.5))
    assert divergence(never, likely, target).kl == math.inf
    student = never.clone().requires_grad_()
    kl_divergence(likely, student).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1.0, -1.0, 2.0]]) / 6)


def by_hand(teacher, student, k):
    """Sum over positions of the divergence where all but the k most likely tokens count as one, in float64."""
    p, q = (logits.double().softmax(-1) for logits in (teacher, student))
    top, ids = p.topk(k)
    found = q.gather(-1, ids)
    wanted, had = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (top, found))
    return (wanted * (wanted / had).log()).sum()


@pytest.mark.parametrize("positions", [2, 100])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_of_the_largest_logits_the_divergence_counts_all_others_as_one_token(monkeypatch, k, positions):
    monkeypatch.setattr(distillation, "positions_together", lambda vocab_size: positions)
    teacher, student = two()
    targets = torch.arange(7)
    kept = TopLogits.of(teacher, targets, k)
    value = kl_divergence(kept, student)
    (gradient,) = torch.autograd.grad(value, student)
    wanted = by_hand(teacher, student, k)
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close((value, gradient), (wanted.float(), wanted_gradient))
    full = kl_divergence(teacher, student).item()
    assert value.item() <= full + 1e-5
    assert (value.item() == pytest.approx(full, rel=1e-5)) == (k == 10)  # of 11, so that nothing is lumped together
    found, asked = divergence(kept, student, targets), divergence(teacher, student, targets)
    assert found.kl == pytest.approx(value.item(), rel=1e-5)
    assert found[1:] == pytest.approx(asked[1:], rel=1e-6)


def test_a_rest_that_is_nearly_nothing_is_kept_exactly():
    teacher = torch.tensor([[0.0, -40.0, -41.0]])
    kept = TopLogits.of(teacher, torch.tensor([1]), 1)
    assert kept.rest.item() == pytest.approx(math.log(math.exp(-40) + math.exp(-41)), rel=1e-6)
    assert kept.nll.item() == pytest.approx(40)
    assert kl_divergence(kept, teacher.clone()).item() == 0
