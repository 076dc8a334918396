"""Penalties on the weight of a convolution, as 0-dim float64 tensors with gradient.

The gradient of a singular value rests on the bilinear identity: M is linear in the weight, so
``u' M(w) v = <u, conv(v; w)>`` has the gradient ``sum of u_i v_j over Omega`` of the paper's
Theorems 2.2 and 3.2, for every stride, padding, dilation, group and dimension.

Note [Clustered values]. A repeated singular value has no gradient, but the sum over all its copies
has. Where the smallest singular values agree to `CLUSTER_TOLERANCE`, or to the accuracy to which
they are known, the gradient given is the mean over the cluster, a subgradient of sigma_min; the
value stays that of the smallest. Of more than `CLUSTER_LIMIT` copies, or of values that are 0 to
working precision, it is the mean over those at hand, a subgradient too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convspectra.batched_lu import differentiable_once
from convspectra.checks import check_type
from convspectra.inverse import logabsdet
from convspectra.matrices import squared_frobenius_norm
from convspectra.operator import ConvOperator
from convspectra.spectra import ConvergenceError, check_count, svds

CLUSTER_TOLERANCE = 1e-7
"""Singular values closer than this times sigma count as one repeated value."""
CLUSTER_LIMIT = 64
"""Copies of a repeated value after which no more are looked for."""


def frobenius(op: ConvOperator) -> Tensor:
    """1/2 ||M||_F^2.

    Returns
    -------
    Tensor
        0-dim, float64. Its gradient is |Omega| times the weight (Theorems 2.1 and 3.1): a weight
        decay that counts how often each tap is used. Differentiable twice.

    Notes
    -----
    Cost: a few operations per weight, none per pixel.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> weight = torch.ones(1, 1, 3, requires_grad=True)
    >>> penalty = cs.penalties.frobenius(cs.ConvOperator(weight, 50))
    >>> penalty.backward()
    >>> penalty.item(), weight.grad.tolist()
    (74.0, [[[49.0, 50.0, 49.0]]])
    """
    check_type("op", op, ConvOperator)
    return 0.5 * squared_frobenius_norm(op.weight.double(), op.geometry)


def sigma_min(op: ConvOperator, k: int = 1) -> Tensor:
    """-sigma_min(M); for k > 1, minus the mean of the k smallest singular values.

    Parameters
    ----------
    op : ConvOperator
    k : int
        1 to min(op.shape).

    Returns
    -------
    Tensor
        0-dim, float64. Its gradient is that of Theorems 2.2 and 3.2; where the k-th smallest value
        is repeated, the mean over its copies (Note [Clustered values]).

    Raises
    ------
    ValueError
        For a k that cannot be.
    ConvergenceError
        If the singular values cannot be computed to tolerance.
    RuntimeError
        On differentiating twice: the singular vectors are held fixed, so that a second derivative
        would be wrong.

    Notes
    -----
    Cost: that of `svds` for k values and their separation from the others, and one weight
    gradient of the convolution.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> weight = torch.tensor([[[1.0, 4.0, 1.0]]], requires_grad=True)
    >>> penalty = cs.penalties.sigma_min(cs.ConvOperator(weight, 50))
    >>> penalty.backward()
    >>> round(penalty.item(), 4), [round(g, 4) for g in weight.grad.flatten().tolist()]
    (-2.0038, [0.9981, -1.0, 0.9981])
    """
    check_type("op", op, ConvOperator)
    check_count(op, k)
    limit = min(op.shape)
    wanted, cluster = k, 0
    while cluster == 0:
        result = svds(op, wanted, "SM", separation=2 * CLUSTER_TOLERANCE)
        if not result.converged:
            raise ConvergenceError(
                f"the {len(result.s)} smallest singular values of {op!r} did not converge; use "
                "the frobenius penalty here, or exclude the layer",
                result,
            )
        s = result.s
        last, uncertainty = float(s[k - 1]), float(result.upper[k - 1] - s[k - 1])
        margin = max(CLUSTER_TOLERANCE * last, 2 * uncertainty)
        close = int((s <= last + margin).sum())
        complete = close < len(s) or result.others > last + margin
        if complete or last <= margin or len(s) >= min(limit, k + CLUSTER_LIMIT):
            cluster = close
        wanted = min(2 * len(s), limit)
    first = int((s < last - margin).sum())
    # Weights of a mean over the k smallest whose last, repeated value is shared by its copies.
    share = s.new_full((cluster,), 1 / k)
    share[first:] = (k - first) / (k * (cluster - first))
    assert result.u is not None
    assert result.v is not None
    value: Tensor = _MeanSingularValue.apply(  # type: ignore[no-untyped-call]
        op.weight, op, result.u[:cluster], result.v[:cluster], share, s[:k].mean()
    )
    return -value


def conditioning(op: ConvOperator) -> Tensor:
    """1/2 ||M||_F^2 - n sigma_min(M) with n = min(rows, columns), at least -n / 2.

    Returns
    -------
    Tensor
        0-dim, float64; equal to ``-n / 2`` exactly where all singular values are 1. The gradient
        is that of Theorem 2.3: the sum of those of `frobenius` and n times `sigma_min`.

    Notes
    -----
    Raises and costs what `sigma_min` does. A zero-padded square layer has many tiny singular
    values (Note [Border modes] in `convspectra.capacitance`); this lifts one at a time while the
    first term shrinks them all. `stein` has the same minimiser and lifts all of them.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.conditioning(cs.ConvOperator(torch.eye(2)[:, :, None], 10)).item()
    -10.0
    """
    return frobenius(op) + min(op.shape) * sigma_min(op)


def stein(op: ConvOperator) -> Tensor:
    """Stein's loss ``sum_i (s_i^2 / 2 - log s_i - 1/2)``: the LogDet divergence of M'M from I.

    Equal to ``1/2 ||M||_F^2 - logabsdet(M) - n / 2`` with n = min(rows, columns): non-negative, and
    0 exactly where all singular values are 1, as for `conditioning`; but smooth wherever M has full
    rank, and lifting every small singular value at once.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient.

    Raises
    ------
    ArithmeticError
        If M is rank deficient to working precision: the loss is infinite there and has no gradient.
    ValueError
        If the layer needs a matrix over the size limit of `logabsdet`.

    Notes
    -----
    Source: James and Stein (Proc. Fourth Berkeley Symposium, 1961). Costs what `logabsdet` does.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.stein(cs.ConvOperator(torch.eye(2)[:, :, None], 10)).item()
    0.0
    """
    log_det = logabsdet(op)
    if math.isinf(float(log_det.detach())):
        raise ArithmeticError(
            f"Stein's loss is infinite: {op!r} is rank deficient; expected a layer with full rank, "
            "for example one with random weights"
        )
    return frobenius(op) - log_det - 0.5 * min(op.shape)


class _MeanSingularValue(torch.autograd.Function):
    """Sum of weights times <u_i, M v_i> with singular vectors held fixed."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, op: ConvOperator, u: Tensor, v: Tensor, share: Tensor, s: Tensor
    ) -> Tensor:
        ctx.op = op.with_weight(weight.detach())
        ctx.save_for_backward(u, v, share, weight)
        return s.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, v, share, weight = ctx.saved_tensors
        with torch.enable_grad():
            variable = weight.detach().double().requires_grad_()
            products = ctx.op.with_weight(variable).apply(v)
            value = (share * (u * products).flatten(1).sum(1)).sum()
            (gradient,) = torch.autograd.grad(value, variable)
        with torch.no_grad():
            gradient = (grad * gradient).to(weight.dtype)
        return differentiable_once(gradient, weight), None, None, None, None, None
