"""Symmetric matrices of which only the upper triangle is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.functional.linalg import symmetric
from optimum_otprune.functional.linalg.symmetric import add_product, block_rows, compact, gather, invert, mirror, row
from tests.functional.helpers import law, normal, permutation, seeds, untouched


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(symmetric, "_LEAST_ROWS", 3)
    monkeypatch.setattr(symmetric, "_PIVOTS", 4)


def gram(seed, size):
    hidden = normal(seed, size + 5, size)
    return whole(hidden.T @ hidden)


def whole(matrix):
    """The matrix that the upper triangle means."""
    return matrix.triu() + matrix.triu(1).T


sizes = st.sampled_from([1, 2, 3, 4, 8, 13, 25, 40])


@law
@given(size=st.integers(1, 20_000))
def test_block_rows_cover_every_row_once(size):
    blocks = block_rows(size)
    assert [start for start, _ in blocks] == [0, *[end for _, end in blocks[:-1]]]
    assert blocks[-1][1] == size
    assert len(blocks) <= symmetric._BLOCK_ROWS


def test_eight_block_rows_are_nine_sixteenths_of_the_work():
    assert sum((end - start) * (4096 - start) for start, end in block_rows(4096)) == 4096**2 * 9 // 16


@law
@given(seed=seeds, size=sizes)
def test_a_product_is_added_to_the_upper_triangle_and_mirrored(seed, size):
    matrix, left = gram(seed, size), normal(seed + 1, 6, size)
    result = matrix.clone()
    with untouched(left):
        add_product(result, left, left, alpha=-0.5)
    torch.testing.assert_close(whole(result), matrix - 0.5 * left.T @ left, rtol=1e-12, atol=1e-12)
    mirror(result)
    assert torch.equal(result, result.T)
    torch.testing.assert_close(result, matrix - 0.5 * left.T @ left, rtol=1e-12, atol=1e-12)


@law
@given(seed=seeds, size=sizes)
def test_rows_are_read_from_the_upper_triangle(seed, size):
    matrix = gram(seed, size)
    upper = matrix.clone()
    for start, end in block_rows(size):
        upper[end:, start:end] = float("nan")
    for index in range(size):
        assert torch.equal(row(upper, index), matrix[index])


@law
@given(seed=seeds, size=sizes)
def test_gathering_reorders_rows_and_columns(seed, size):
    matrix, channels = gram(seed, size), permutation(seed, size)[: max(1, size // 2)]
    with untouched(matrix):
        gathered = gather(matrix.float(), channels, torch.float64)
    assert gathered.dtype == torch.float64
    assert torch.equal(whole(gathered), matrix.float()[channels][:, channels].double())


@law
@given(seed=seeds, size=sizes, data=st.data())
def test_compacting_in_place_is_gathering(seed, size, data):
    matrix = gram(seed, size)
    channels = permutation(seed, size)[: data.draw(st.integers(1, size))].sort().values
    upper = matrix.triu()
    small = compact(upper, channels)
    assert small.data_ptr() == upper.data_ptr()
    assert torch.equal(whole(small), matrix[channels][:, channels])


@law
@given(seed=seeds, size=sizes, scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_inverse_in_place_is_the_inverse(seed, size, scale):
    matrix = scale * gram(seed, size)
    upper = matrix.triu()
    assert invert(upper)
    product = whole(upper) @ matrix
    torch.testing.assert_close(product, torch.eye(size).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_matrix_that_is_not_positive_definite_is_noticed(position):
    matrix = torch.eye(10, dtype=torch.float64)
    matrix[position, position] = -1.0
    assert not invert(matrix)
    assert not invert(torch.zeros(10, 10, dtype=torch.float64))
