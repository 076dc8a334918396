"""A short run of Lanczos: lower bounds on singular values, from any start."""

from __future__ import annotations

import pytest
import torch
from helpers.checker import MATRICES
from helpers.strategies import random

from convspectra.solvers import warm_lanczos


def run(matrix: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    return warm_lanczos(lambda x: x @ matrix.T, lambda y: y @ matrix, start, steps)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_those_of_the_vectors_and_none_is_too_large(
    matrix: torch.Tensor, dtype: torch.dtype
) -> None:
    if float(matrix.abs().max()) > torch.finfo(dtype).max ** 0.5:
        pytest.skip("products overflow in this type")
    n, size = matrix.shape[1], float(torch.linalg.matrix_norm(matrix, 2))
    tol = 100 * torch.finfo(dtype).eps * max(size, 1)
    start = random(min(3, n), n, seed=3).to(dtype)
    s, v = run(matrix.to(dtype), start, max(1, n - 1))
    norms = torch.linalg.vector_norm(v, dim=1)
    assert torch.equal((norms - 1).abs() < 1e-5, norms > 0)
    images = torch.linalg.vector_norm(v.double() @ matrix.T, dim=1)
    squares = s.square() * (norms > 0)
    torch.testing.assert_close(images.square(), squares, rtol=0, atol=tol * max(size, 1))
    assert float(s[0]) <= size + tol
    assert float(s[0]) >= size - max(tol, 1e-3 * size)  # the space is all there is


def test_vectors_that_have_been_overtaken_are_left() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.2, *[0.1] * 30], dtype=torch.float64))
    start = torch.zeros(2, 32, dtype=torch.float64)
    start[0, 0], start[0, 1] = 1.0, 1e-5
    s, v = run(matrix, start, 8)
    assert float(s[0]) == pytest.approx(1.2)
    assert float(v[0, 1].abs()) == pytest.approx(1.0)


def test_rows_of_zeros_stay_finite() -> None:
    s, v = run(random(4, 6), torch.zeros(2, 6, dtype=torch.float64), 3)
    assert not bool(s.any())
    assert not bool(v.any())
