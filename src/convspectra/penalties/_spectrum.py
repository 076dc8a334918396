"""Penalties that all singular values enter alike, in closed form or by a log-determinant."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    IntArray,
    check_gain,
    check_type,
    not_compiled,
    squared_frobenius_norm,
)
from convspectra.spectra import logabsdet
from convspectra.torus import angles, half_count, half_multiplicity, symbols


@not_compiled
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


@not_compiled
def stein(op: ConvOperator, gain: float = 1.0) -> Tensor:
    """Stein's loss ``sum_i (t_i^2 / 2 - log t_i - 1/2)``, t = s / gain, of the singular values s.

    The LogDet divergence of M'M / gain^2 from I. Equal to ``1/2 ||M||_F^2 - logabsdet(M) - n / 2``
    for gain 1, with n = min(rows, columns): non-negative, and 0 exactly where all singular values
    are the gain, as for `conditioning`, except that it is smooth wherever M has full rank and
    lifts every small singular value at once.

    Parameters
    ----------
    op : ConvOperator
    gain : float
        The singular value to reach, above 0.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient.

    Raises
    ------
    ArithmeticError
        If M is rank deficient to working precision: the loss is infinite there and has no gradient.
    ValueError
        If the layer needs a matrix over the size limit of `logabsdet`, or for a gain that cannot
        be.

    Notes
    -----
    Source: James and Stein (Proc. Fourth Berkeley Symposium, 1961). Costs what `logabsdet` does.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.stein(cs.ConvOperator(torch.eye(2)[:, :, None], 10)).item()
    0.0
    """
    check_type("op", op, ConvOperator)
    check_gain(gain)
    log_det = logabsdet(op)
    if math.isinf(float(log_det.detach())):
        raise _rank_deficient(op)
    return frobenius(op) / gain**2 - log_det - (0.5 - math.log(gain)) * min(op.shape)


@not_compiled
def circular_stein(op: ConvOperator, gain: float = 1.0) -> Tensor:
    """Stein's loss of the layer wrapped around a torus: an approximation of `stein`.

    The singular vectors of a zero-padded layer that live at its border are not seen (Note [Border
    modes] in `torus/_capacitance.py`), so this can be small where `stein` is large. Scaled to the
    number of singular values of the layer itself.

    Parameters
    ----------
    op : ConvOperator
    gain : float
        The singular value to reach, above 0.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient.

    Raises
    ------
    ArithmeticError
        If a symbol is singular to working precision: the Cholesky factorization of its Gram matrix
        fails, at a singular value of about 1e-8 of the largest.

    Notes
    -----
    Cost: an FFT of the weight and one Cholesky factorization of the smaller Gram matrix for half of
    the frequencies: ``N^d / s^d c^3`` flops, no matrix over the pixels.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.circular_stein(cs.ConvOperator(torch.eye(2)[:, :, None], 10)).item()
    0.0
    """
    check_type("op", op, ConvOperator)
    check_gain(gain)
    weight, geometry = op.weight.double(), op.geometry
    axes = list(enumerate(geometry.output_size))
    counts = [half_count(n, 0.0) if axis == geometry.ndim - 1 else None for axis, n in axes]
    grid = [angles(n, count=count) for (_, n), count in zip(axes, counts, strict=True)]
    direct = op.T if op.transposed else op
    blocks = symbols(direct.with_weight(weight), grid)
    if blocks.shape[-2] > blocks.shape[-1]:
        blocks = blocks.mH
    factors, failures = torch.linalg.cholesky_ex(blocks @ blocks.mH)
    if bool(failures.any()):
        raise _rank_deficient(op)
    log_dets = factors.diagonal(dim1=-2, dim2=-1).real.log().sum(-1)
    if axes:
        log_dets = log_dets * half_multiplicity(geometry.output_size[-1], 0.0).to(log_dets)
    points = math.prod(geometry.output_size)
    count = points * blocks.shape[-2] * op.groups
    squares = 0.5 * points * weight.square().sum() / gain**2
    loss = squares - log_dets.sum() - (0.5 - math.log(gain)) * count
    return loss * (min(op.shape) / count)


@not_compiled
def orthogonality(op: ConvOperator, gain: float = 1.0) -> Tensor:
    """||M'M - gain^2 I||_F^2 of the smaller Gram matrix: ``sum_i (s_i^2 - gain^2)^2``.

    Exact for every padding, stride and dilation: ``M'M = sum_pq (K_p' K_q) (x) (S_p' S_q)`` with
    K_p the channels by channels matrix of tap p and S_p the 0/1 matrix of its index set, so that
    ``||M'M||_F^2`` is a quadratic form in the products ``K_p' K_q``, with integers that are
    products over the axes.

    Parameters
    ----------
    op : ConvOperator
    gain : float
        The singular value to reach, above 0; its square is the alpha of Guo and Ye (On
        regularization of convolutional kernel tensors in neural networks), ||M'M - alpha I||.

    Returns
    -------
    Tensor
        0-dim, float64. Its gradient is ``4 M (M'M - gain^2 I)`` summed over the index sets Omega.
        Differentiable twice.

    Notes
    -----
    Cost, for t taps: ``2 t^2 g^2 h / groups^2`` flops for the products and ``2 t^4 g^2 / groups``
    for the form, none per pixel; memory ``8 t^2 g^2 / groups`` bytes. Wang et al. (Orthogonal
    convolutional neural networks, CVPR 2020) penalize the same
    without the border.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.penalties.orthogonality(cs.ConvOperator(2 * torch.eye(2)[:, :, None], 10)).item()
    180.0
    """
    check_type("op", op, ConvOperator)
    check_gain(gain)
    weight = op.weight.double()
    count = math.prod(weight.shape[2:])
    per_group = weight.reshape(op.groups, -1, weight.shape[1], count)
    products = torch.einsum("gabp,gacq->gpqbc", per_group, per_group).flatten(3).flatten(1, 2)
    inner = (products @ products.mT).sum(0)
    form = np.ones((1, 1), dtype=np.int64)
    for axis in range(op.geometry.ndim):
        form = _interleaved(form, op.geometry.tap_product_gram(axis))
    fourth_powers = (inner * torch.from_numpy(form).to(inner)).sum()
    squares = squared_frobenius_norm(weight, op.geometry)
    return fourth_powers - 2 * gain**2 * squares + gain**4 * min(op.shape)


def _interleaved(outer: IntArray, inner: IntArray) -> IntArray:
    """The Kronecker product of two forms over pairs of taps, with pairs ordered (p p1, q q1)."""
    m, n = (math.isqrt(len(form)) for form in (outer, inner))
    product = np.multiply.outer(outer.reshape(m, m, m, m), inner.reshape(n, n, n, n))
    result: IntArray = product.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape((m * n) ** 2, -1)
    return result


def _rank_deficient(op: ConvOperator) -> ArithmeticError:
    return ArithmeticError(
        f"Stein's loss is infinite: {op!r} is rank deficient; expected a layer with full rank, "
        "for example one with random weights"
    )
