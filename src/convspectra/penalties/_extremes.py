"""Penalties on the singular values at the ends of the spectrum.

The gradient of a singular value rests on the bilinear identity: M is linear in the weight, so
``u' M(w) v = <u, conv(v; w)>`` has the gradient ``sum of u_i v_j over Omega`` of the paper's
Theorems 2.2 and 3.2, for every stride, padding, dilation, group and dimension.

Note [Clustered values]. A repeated singular value has no gradient, but the sum over all its copies
has. Where the last of the values asked for agrees with others to `CLUSTER_TOLERANCE`, or to the
accuracy to which they are known, it is given the mean gradient of the copies, a subgradient of the
sum of the k smallest; the values stay as they are. For more than `CLUSTER_LIMIT` copies, and
for values that are 0 to working precision, it is the mean over the copies at hand, a subgradient
too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, check_band, check_gain, check_type, not_compiled
from convspectra.penalties._spectrum import frobenius
from convspectra.solvers import differentiable_once
from convspectra.spectra import ConvergenceError, check_count, svds

CLUSTER_TOLERANCE = 1e-7
"""Singular values closer than this times sigma count as one repeated value."""
CLUSTER_LIMIT = 64
"""Copies of a repeated value after which no more are looked for."""


@not_compiled
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
    return -_extreme_values(op, k, "SM").mean()


@not_compiled
def sigma_max(op: ConvOperator, k: int = 1) -> Tensor:
    """sigma_max(M), the operator norm; for k > 1, the mean of the k largest singular values.

    Parameters, result, errors and cost as for `sigma_min`, at the other end of the spectrum.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> round(cs.penalties.sigma_max(cs.ConvOperator(torch.ones(1, 1, 3), 50)).item(), 4)
    2.9962
    """
    return _extreme_values(op, k, "LM").mean()


@not_compiled
def conditioning(op: ConvOperator, gain: float = 1.0, k: int = 1) -> Tensor:
    """1/2 ||M||_F^2 - n gain sigma_min(M) with n = min(rows, columns), at least -n gain^2 / 2.

    Parameters
    ----------
    op : ConvOperator
    gain : float
        The singular value to reach, above 0; 1 in the paper.
    k : int
        The mean of the k smallest singular values instead of sigma_min; 1 in the paper.

    Returns
    -------
    Tensor
        0-dim, float64; equal to ``-n gain^2 / 2`` exactly where all singular values are the gain.
        The gradient is that of Theorem 2.3: the sum of those of `frobenius` and n gain times
        `sigma_min`.

    Notes
    -----
    Raises and costs what `sigma_min` does. A zero-padded square layer has many tiny singular
    values (Note [Border modes] in `torus/_capacitance.py`); this lifts one at a time while the
    first term shrinks them all, and with `k` it lifts k at a time. `stein` has the same minimizer
    and lifts all of them.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.conditioning(cs.ConvOperator(torch.eye(2)[:, :, None], 10)).item()
    -10.0
    """
    check_gain(gain)
    return frobenius(op) + gain * min(op.shape) * sigma_min(op, k)


@not_compiled
def cond(op: ConvOperator) -> Tensor:
    """The logarithm of the condition number, log sigma_max(M) - log sigma_min(M).

    Returns
    -------
    Tensor
        0-dim, float64, at least 0; the same for every multiple of the weight.

    Raises
    ------
    ArithmeticError
        If sigma_min is 0: the penalty is infinite there.

    Notes
    -----
    Other errors and the cost are those of `sigma_max` and `sigma_min` together. Its gradient grows
    like 1 / sigma_min.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> weight = torch.tensor([[[1.0, 4.0, 1.0]]])
    >>> round(cs.penalties.cond(cs.ConvOperator(weight, 50)).exp().item(), 4)
    2.9924
    """
    smallest = _extreme_values(op, 1, "SM")
    if float(smallest.detach()) == 0.0:
        raise ArithmeticError(
            f"the condition number is infinite: {op!r} is rank deficient; expected a layer with "
            "full rank, for example one with random weights"
        )
    return (_extreme_values(op, 1, "LM").log() - smallest.log()).sum()


@not_compiled
def band(
    op: ConvOperator, lower: float = 0.5, upper: float = 2.0, k: int = 1, gain: float = 1.0
) -> Tensor:
    """Hinge on the k values at each end: ``1/2 mean (lower - s)_+^2 + 1/2 mean (s - upper)_+^2``.

    Parameters
    ----------
    op : ConvOperator
    lower, upper : float
        The band in which nothing is penalized, ``0 <= lower <= upper``.
    k : int
        How many of the smallest and of the largest singular values, 1 to min(op.shape).
    gain : float
        Both ends of the band are multiplied by it.

    Returns
    -------
    Tensor
        0-dim, float64, with a continuous gradient where the values are simple; 0 where all of them
        lie in [lower, upper].

    Raises
    ------
    ValueError
        For a band or a k that cannot be.

    Notes
    -----
    Other errors and the cost are those of `sigma_max` and `sigma_min` together.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 4.0, 1.0]]]), 50)  # singular values in [2, 6]
    >>> round(cs.penalties.band(op, 3.0, 6.0).item(), 4)
    0.4962
    """
    check_band(lower, upper)
    check_gain(gain)
    lower, upper = gain * lower, gain * upper
    below = (lower - _extreme_values(op, k, "SM")).clamp_min(0)
    above = (_extreme_values(op, k, "LM") - upper).clamp_min(0)
    return 0.5 * (below.square().mean() + above.square().mean())


def _extreme_values(op: ConvOperator, k: int, which: str) -> Tensor:
    """The k smallest or largest singular values (k,) with gradient (Note [Clustered values])."""
    check_type("op", op, ConvOperator)
    check_count(op, k)
    limit = min(op.shape)
    wanted, cluster = k, 0
    while cluster == 0:
        result = svds(op, wanted, which, separation=2 * CLUSTER_TOLERANCE)
        if not result.converged:
            raise ConvergenceError(
                f"the {len(result.s)} {'smallest' if which == 'SM' else 'largest'} singular values "
                f"of {op!r} did not converge; use the frobenius penalty here, or exclude the layer",
                result,
            )
        # Distance inwards from the end of the spectrum.
        sign = 1.0 if which == "SM" else -1.0
        s, others = sign * result.s, sign * result.others
        last = float(s[k - 1])
        uncertainty = float((result.upper if which == "SM" else -result.lower)[k - 1]) - last
        margin = max(CLUSTER_TOLERANCE * abs(last), 2 * uncertainty)
        close = int((s <= last + margin).sum())
        complete = close < len(s) or others > last + margin
        unbounded = which == "SM" and last <= margin  # zero to working precision
        if complete or unbounded or len(s) >= min(limit, k + CLUSTER_LIMIT):
            cluster = close
        wanted = min(2 * len(s), limit)
    first = int((s < last - margin).sum())
    assert result.u is not None
    assert result.v is not None
    values: Tensor = _SingularValues.apply(  # type: ignore[no-untyped-call]
        op.weight, op, result.u[:cluster], result.v[:cluster], result.s[:cluster]
    )
    repeated = values[first:].mean()
    # The mean over the copies has a gradient; which of them is k-th has none.
    shared = result.s[first:k] + (repeated - repeated.detach())
    return torch.cat([values[:first], shared])


class _SingularValues(torch.autograd.Function):
    """The values <u_i, M v_i> with singular vectors held fixed."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, op: ConvOperator, u: Tensor, v: Tensor, s: Tensor
    ) -> Tensor:
        ctx.op = op.with_weight(weight.detach())
        ctx.save_for_backward(u, v, weight)
        return s.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, v, weight = ctx.saved_tensors
        with torch.enable_grad():
            variable = weight.detach().double().requires_grad_()
            products = ctx.op.with_weight(variable).apply(v)
            value = (grad.detach() * (u * products).flatten(1).sum(1)).sum()
            (gradient,) = torch.autograd.grad(value, variable)
        return differentiable_once(gradient.to(weight.dtype), weight), None, None, None, None
