"""The log-pseudo-determinant of matrices in hand, by QR, with its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convspectra.solvers import differentiable_once


def log_pseudo_determinant(matrices: Tensor) -> Tensor:
    """The sum of log s over all the matrices (..., m, n), real or complex, with gradient."""
    fixed = matrices.detach()
    tall = fixed if fixed.shape[-2] >= fixed.shape[-1] else fixed.mH
    negligible = tall.shape[-2] * math.prod(tall.shape[:-2]) * torch.finfo(tall.dtype).eps
    q, r = torch.linalg.qr(tall)
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    r_inverse = torch.linalg.solve_triangular(r, identity.expand_as(r), upper=True)
    # Frobenius norms bound sigma_min from below and sigma_max from above.
    smallest = 1 / torch.linalg.matrix_norm(r_inverse).amax()
    largest = torch.linalg.matrix_norm(r).amax()
    if not float(smallest) > negligible * float(largest):
        values = torch.linalg.svdvals(tall)
        if float(values.amin()) <= negligible * float(values.amax()):
            return values.new_full((), -math.inf)
    total: Tensor = r.diagonal(dim1=-2, dim2=-1).abs().log().sum()
    if matrices.requires_grad:
        gradient = q @ r_inverse.mH
        if tall.shape != fixed.shape:
            gradient = gradient.mH
        anchor = matrices.sum()
        total = _LogPseudoDet.apply(matrices, gradient, total, anchor)  # type: ignore[no-untyped-call]
    return total


class _LogPseudoDet(torch.autograd.Function):
    """A log-pseudo-determinant whose gradient, the adjoint of the pseudo-inverse, is at hand."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, gradient: Tensor, value: Tensor, anchor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gradient, anchor)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, anchor = ctx.saved_tensors
        with torch.no_grad():
            scaled = grad * gradient
        return differentiable_once(scaled, anchor), None, None, None
