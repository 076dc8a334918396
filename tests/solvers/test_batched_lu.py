"""Batched LU, inverse and log-determinant against one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.strategies import random
from torch import Tensor

from convspectra.solvers._batched_lu import (
    ORDER_SAFE_IN_BATCH,
    differentiable_once,
    inverse_and_logabsdet,
    logabsdet,
    lu_factor,
)

DTYPES = (torch.float64, torch.complex128)
SHAPES = [(1, 1), (3, 3), (4, 2, 2), (2, 3, 5, 5), (2, 32, 32), (2, 33, 33), (0, 4, 4), (3, 0, 0)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def assert_factors(matrix: Tensor, lu: Tensor, pivots: Tensor) -> None:
    permutation, lower, upper = torch.lu_unpack(lu, pivots)
    assert torch.allclose(permutation @ lower @ upper, matrix, atol=1e-12)
    # Partial pivoting; LAPACK measures complex numbers by |re| + |im|.
    assert (lower.abs() <= 2**0.5 + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lu_factor(shape, dtype):
    matrix = random(*shape, dtype=dtype)
    lu, pivots = lu_factor(matrix)
    assert lu.shape == matrix.shape
    assert lu.dtype == dtype
    assert pivots.shape == matrix.shape[:-1]
    assert_factors(matrix, lu, pivots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_in_a_batch_are_right_after_set_num_threads(two_threads, dtype):
    """Note [Batched LU on the CPU]: torch.linalg.lu_factor_ex(matrix) is off by 25 here."""
    matrix = random(24, 272, 272, dtype=dtype)
    lu, pivots = lu_factor(matrix)
    assert_factors(matrix, lu, pivots)
    identity = torch.eye(272, dtype=dtype).expand_as(matrix)
    for adjoint in (False, True):
        inverse = torch.linalg.lu_solve(lu, pivots, identity, adjoint=adjoint)
        product = (matrix.mH if adjoint else matrix) @ inverse
        assert (product - identity).abs().max() < 1e-9


@pytest.mark.parametrize("order", [ORDER_SAFE_IN_BATCH, ORDER_SAFE_IN_BATCH + 1, 150])
def test_inverse_of_a_batch_is_right_after_set_num_threads(two_threads, order):
    matrix = random(24, order, order)
    inverse, log_det = inverse_and_logabsdet(matrix)
    identity = torch.eye(order, dtype=torch.float64)
    assert (matrix @ inverse - identity).abs().max() < 1e-8
    expected = torch.stack([torch.linalg.slogdet(one).logabsdet for one in matrix])
    assert torch.allclose(log_det, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_and_logabsdet(shape, dtype):
    matrix = random(*shape, dtype=dtype)
    inverse, log_det = inverse_and_logabsdet(matrix)
    identity = torch.eye(shape[-1], dtype=dtype)
    assert torch.allclose(matrix @ inverse, identity.expand_as(matrix), atol=1e-11)
    assert log_det.shape == shape[:-2]
    assert log_det.dtype == torch.float64
    assert torch.allclose(log_det, torch.linalg.slogdet(matrix).logabsdet, atol=1e-11)
    known = logabsdet(matrix, *lu_factor(matrix))
    assert torch.equal(known, log_det)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 2), (1, 33, 33)])
def test_gradients(shape, dtype):
    fast = shape[-1] > 3
    matrix = random(*shape, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(inverse_and_logabsdet, (matrix,), fast_mode=fast)
    lu, pivots = lu_factor(matrix.detach())
    # Its factors are constants to autograd, so that finite differences need fresh ones.
    (gradient,) = torch.autograd.grad(logabsdet(matrix, lu, pivots).sum(), matrix)
    (expected,) = torch.autograd.grad(torch.linalg.slogdet(matrix).logabsdet.sum(), matrix)
    assert torch.allclose(gradient, expected, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_both_outputs_together(dtype):
    matrix = random(2, 3, 3, dtype=dtype).requires_grad_()
    weights = random(2, 3, 3, dtype=dtype, seed=1)

    def value(inverse: Tensor, log_det: Tensor) -> Tensor:
        return (inverse * weights).sum().abs() + (log_det * torch.tensor([1.0, -2.0])).sum()

    (gradient,) = torch.autograd.grad(value(*inverse_and_logabsdet(matrix)), matrix)
    reference = torch.linalg.inv(matrix), torch.linalg.slogdet(matrix).logabsdet
    (expected,) = torch.autograd.grad(value(*reference), matrix)
    assert torch.allclose(gradient, expected, atol=1e-11)


@pytest.mark.parametrize("order", [3, ORDER_SAFE_IN_BATCH + 1])
def test_one_singular_matrix_shows_and_spoils_no_other(order):
    matrix = random(3, order, order)
    matrix[1] = 0
    inverse, log_det = inverse_and_logabsdet(matrix)
    assert log_det[1] == -torch.inf
    assert not inverse[1].isfinite().all()
    for i in (0, 2):
        assert torch.allclose(inverse[i], torch.linalg.inv(matrix[i]), atol=1e-11)
        assert torch.isclose(log_det[i], torch.linalg.slogdet(matrix[i]).logabsdet)


def functions() -> list:
    def of_known_factors(matrix: Tensor) -> Tensor:
        return logabsdet(matrix, *lu_factor(matrix.detach())).sum()

    return [
        lambda matrix: inverse_and_logabsdet(matrix)[0].sum(),
        lambda matrix: inverse_and_logabsdet(matrix)[1].sum(),
        of_known_factors,
    ]


@pytest.mark.parametrize("function", functions(), ids=["inverse", "logabsdet", "known factors"])
def test_second_derivatives_are_refused_also_in_a_sum(function):
    matrix = random(2, 3, 3).requires_grad_()
    total = function(matrix) + matrix.square().sum()
    (gradient,) = torch.autograd.grad(total, matrix, create_graph=True)
    (expected,) = torch.autograd.grad(function(matrix), matrix)
    assert torch.allclose(gradient, expected + 2 * matrix)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        torch.autograd.grad(gradient.sum(), matrix)


def test_differentiable_once_leaves_the_first_derivative_without_a_graph():
    gradient, anchor = random(3), random(2).requires_grad_()
    assert differentiable_once(gradient, anchor).requires_grad
    with torch.no_grad():
        assert differentiable_once(gradient, anchor) is gradient
