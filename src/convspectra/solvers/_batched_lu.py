"""LU factorization, inverse and log-determinant of a batch of matrices.

Note [Batched LU on the CPU]. PyTorch factors the matrices of a batch in several threads at once,
and the LAPACK below is not safe so for matrices of a hundred rows or more once
``torch.set_num_threads`` has been called: pivots and factors come out wrong, in silence (pytorch
pull request 181570). Larger matrices on the CPU are therefore factored one after the other here,
each with all threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ORDER_SAFE_IN_BATCH = 32
"""Order of matrices that are factored in one call on the CPU: Note [Batched LU on the CPU].

Wrong factors were seen from about 100 on. At a half of it more matrices are factored one by one,
which is slow and safe; at much more factors may be wrong in silence.
"""


def lu_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors and pivots of (..., n, n); a zero pivot is left to show in the factors."""
    if matrix.is_cuda or matrix.shape[-1] <= ORDER_SAFE_IN_BATCH:
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return lu, pivots
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    if len(flat) == 1:
        lu, pivots, _ = torch.linalg.lu_factor_ex(flat[0])
        return lu.reshape(matrix.shape), pivots.reshape(matrix.shape[:-1])
    lu = torch.empty_like(flat).mT  # LAPACK's order: a solve would copy rows into it every time
    pivots = torch.empty(flat.shape[:-1], dtype=torch.int32, device=flat.device)
    for i, one in enumerate(flat):
        lu[i], pivots[i], _ = torch.linalg.lu_factor_ex(one)
    return lu.reshape(matrix.shape), pivots.reshape(matrix.shape[:-1])


def inverse_and_logabsdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse (..., n, n) and log |det| (...,) of real or complex matrices, with gradient.

    One factorization serves both. A singular matrix gives Inf or NaN, and -inf. A second
    derivative raises.
    """
    result: tuple[Tensor, Tensor] = _InverseAndLogAbsDet.apply(matrix)  # type: ignore[no-untyped-call]
    return result


def log_diagonal(lu: Tensor) -> Tensor:
    """Log |det| (...,) of the matrices with these LU factors, (..., n, n)."""
    diagonal: Tensor = lu.diagonal(dim1=-2, dim2=-1)
    logarithms: Tensor = diagonal.abs().log().sum(-1)
    return logarithms


def logabsdet(matrix: Tensor, lu: Tensor, pivots: Tensor) -> Tensor:
    """Log |det| (...,) of matrices whose LU factors are known, with gradient ``matrix^{-H}``.

    A second derivative raises.
    """
    anchor = matrix.diagonal(dim1=-2, dim2=-1).sum()
    result: Tensor = _LogAbsDet.apply(matrix, lu, pivots, anchor)  # type: ignore[no-untyped-call]
    return result


def differentiable_once(gradient: Tensor, *anchors: Tensor) -> Tensor:
    """The gradient that a backward pass returns, made to raise if it is differentiated in its turn.

    Autograd's own ``once_differentiable`` raises only where the incoming gradient has a graph; a
    penalty in a sum of terms has none, and its second derivative would be taken for 0 in silence.

    Parameters
    ----------
    gradient : Tensor
    *anchors : Tensor
        Tensors that together depend on all that the gradient depends on, with their graphs.
    """
    if not torch.is_grad_enabled():
        return gradient
    result: Tensor = _DifferentiableOnce.apply(gradient, *anchors)  # type: ignore[no-untyped-call]
    return result


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "expected at most one derivative, got a second one: the factors or singular vectors "
            "behind this gradient are held fixed, so that its own derivative would be wrong"
        )


class _InverseAndLogAbsDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        lu, pivots = lu_factor(matrix)
        inverse = _inverse(lu, pivots)
        ctx.save_for_backward(inverse)
        return inverse, log_diagonal(lu)

    @staticmethod
    def backward(ctx: Any, grad_inverse: Tensor, grad_log: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        with torch.no_grad():
            adjoint = inverse.mH
            gradient = grad_log[..., None, None] * adjoint - adjoint @ grad_inverse @ adjoint
        return differentiable_once(gradient, inverse)


class _LogAbsDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, lu: Tensor, pivots: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(lu, pivots, anchor)
        return log_diagonal(lu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        lu, pivots, anchor = ctx.saved_tensors
        with torch.no_grad():
            gradient = grad[..., None, None] * _inverse(lu, pivots).mH
        return differentiable_once(gradient, anchor), None, None, None


def _inverse(lu: Tensor, pivots: Tensor) -> Tensor:
    identity = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
    inverse: Tensor = torch.linalg.lu_solve(lu, pivots, identity.expand_as(lu))
    return inverse.contiguous()  # LAPACK's order would make every product with few vectors slow
