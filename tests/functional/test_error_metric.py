"""Errors count as the loss feels them."""

import torch

from optimum_otprune.functional.error_metric import error_metric, metric_root


def random_moment(size: int, seed: int = 0) -> torch.Tensor:
    gradients = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return gradients.T @ gradients


def test_a_root_measures_errors_by_the_moment():
    moment, error = random_moment(5), torch.randn(5, generator=torch.Generator().manual_seed(1))
    root = metric_root(moment)
    torch.testing.assert_close(root, root.T)
    expected = (error.double() @ moment @ error.double()).float()
    torch.testing.assert_close((root @ error).square().sum(), expected, rtol=1e-4, atol=1e-4)


def test_a_direction_that_no_gradient_has_is_free_in_the_root_and_cheap_in_the_metric():
    moment = torch.diag(torch.tensor([4.0, 0.0]))
    assert metric_root(moment)[1, 1] == 0
    metric = error_metric(moment)
    torch.testing.assert_close(metric[1, 1].square(), torch.tensor(0.1))
    torch.testing.assert_close(metric.square().sum() / 2, torch.tensor(1.0))


def test_without_gradients_all_directions_count_the_same():
    assert torch.equal(error_metric(torch.zeros(3, 3)).float(), torch.eye(3))
