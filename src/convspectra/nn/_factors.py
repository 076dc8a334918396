"""One factorization of a layer for its inverse, its determinant and the gradient of that."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.solvers import differentiable_once
from convspectra.spectra import solve
from convspectra.torus import CapacitanceFactorization

DENSE_ORDER = 512
"""Order of M up to which it is formed: its LU factorization takes some milliseconds.

At twice that a step takes eight times as long; at half of it the fixed costs of the capacitance
method, some 10 ms, are paid earlier.
"""


class Factors:
    """The factors of M for one weight, float64, detached.

    Parameters
    ----------
    op : ConvOperator
        Square, stride 1, zero padding, float64.
    center : Tensor, optional
        The diagonal block, for a layer that is triangular: nothing else is factored then.

    Raises
    ------
    ArithmeticError
        If M is singular to working precision.
    """

    def __init__(self, op: ConvOperator, center: tuple[int, int] | None = None) -> None:
        self.weight = op.weight.detach().clone()
        self._op = op.with_weight(self.weight, check=False)
        self._variable = self.weight.clone().requires_grad_()
        self._capacitance: CapacitanceFactorization | None = None
        self._gradient: Tensor | None = None
        self._triangular = center is not None
        with torch.enable_grad():
            variable = op.with_weight(self._variable, check=False)
            if center is not None:
                points = math.prod(op.geometry.output_size)
                self._dense(self._variable[:, :, center[0], center[1]], points)
            elif op.shape[0] <= DENSE_ORDER:
                self._dense(variable.to_dense(), 1)
            else:
                self._capacitance = CapacitanceFactorization(variable)
                if self._capacitance.is_singular():
                    raise ArithmeticError("singular to working precision")
                self._logabsdet = self._capacitance.logabsdet()
        self.value = self._logabsdet.detach()

    def _dense(self, matrix: Tensor, copies: int) -> None:
        factors, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)
        diagonal = factors.diagonal().abs()
        least = float(diagonal.detach().amin())
        scale = len(matrix) * torch.finfo(matrix.dtype).eps
        if not least > scale * float(diagonal.detach().amax()):
            raise ArithmeticError("singular to working precision")
        self._lu = factors.detach()
        self._logabsdet = copies * diagonal.log().sum()

    def equals(self, weight: Tensor) -> bool:
        """Whether the factors are those of this weight, on the same device."""
        return torch.equal(self.weight, weight)

    def gradient(self) -> Tensor:
        """The gradient of log |det M| by the weight, computed when it is first asked for."""
        if self._gradient is None:
            (self._gradient,) = torch.autograd.grad(self._logabsdet, self._variable)
            self._logabsdet = self.value
        return self._gradient

    def solve(self, y: Tensor, adjoint: bool) -> Tensor:
        """M^{-1} y, or M'^{-1} y, for a batch in float64."""
        if self._triangular:
            return solve(self._op, y, adjoint)
        if self._capacitance is not None:
            method = self._capacitance.solve_adjoint if adjoint else self._capacitance.solve
            return method(y)
        columns = y.flatten(1).T
        x = torch.linalg.lu_solve(self._lu, self._pivots, columns, adjoint=adjoint).T
        return x.reshape(y.shape)


class LogAbsDet(torch.autograd.Function):
    """Log |det M| as a function of the weight, from factors at hand."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: Factors) -> Tensor:
        """The value, float64."""
        ctx.factors = factors
        ctx.save_for_backward(weight)
        return factors.value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """M'^{-1} summed over the index sets."""
        (weight,) = ctx.saved_tensors
        gradient = grad.detach() * ctx.factors.gradient()
        return differentiable_once(gradient.to(weight.dtype), weight), None


class Inverse(torch.autograd.Function):
    """M^{-1} y as a function of y and the weight, from factors at hand."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, op: ConvOperator, factors: Factors) -> Tensor:
        """The solution, of y's dtype."""
        x = factors.solve(y.detach().double(), adjoint=False)
        ctx.op, ctx.factors = op, factors
        ctx.save_for_backward(x, weight)
        return x.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Dx = M^{-1} (dy - dM x)."""
        x, weight = ctx.saved_tensors
        left = ctx.factors.solve(grad.detach().double(), adjoint=True)
        with torch.enable_grad():
            variable = weight.detach().double().requires_grad_()
            product = (left * ctx.op.with_weight(variable, check=False).apply(x)).sum()
            (by_weight,) = torch.autograd.grad(product, variable)
        by_y = differentiable_once(left.to(grad.dtype), weight)
        return by_y, differentiable_once(-by_weight.to(weight.dtype), weight), None, None
