"""A weight divided by a power of two, so that neither tiny nor huge layers lose anything."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from convspectra.operator._checks import check_finite_weight
from convspectra.operator._conv_operator import ConvOperator


def normalized(op: ConvOperator) -> tuple[ConvOperator, int | None]:
    """The layer detached, in float64, divided by 2^exponent; the exponent is None for M = 0.

    Taps that no pixel reads are dropped: they are no part of M, and may be far larger than it.

    Raises
    ------
    ValueError
        For a weight that is not finite.
    """
    weight = op.weight.detach().double()
    largest = weight.abs().amax()
    # The weight may have changed since it was checked; NaN and Inf come through the maximum.
    check_finite_weight(math.isfinite(largest))
    op = without_unread_taps(op.with_weight(weight, check=False))
    if op.weight is not weight:
        largest = op.weight.abs().amax()
    if float(largest) == 0.0:
        return op, None
    exponent = int(torch.frexp(largest).exponent)
    return op.with_weight(ldexp(op.weight, -exponent), check=False), exponent


def without_unread_taps(op: ConvOperator) -> ConvOperator:
    """The same matrix M with 0 at the taps that only ever fall on the padding; with gradient.

    Examples
    --------
    >>> import torch
    >>> op = ConvOperator(torch.tensor([[[7.0, 1.0, 7.0]]]), 1)
    >>> without_unread_taps(op).weight
    tensor([[[0., 1., 0.]]])
    """
    counts = np.asarray(op.geometry.tap_counts())
    if (counts > 0).all():
        return op
    read = torch.from_numpy(counts > 0).to(op.device)
    return op.with_weight(torch.where(read, op.weight, 0.0), check=False)


def ldexp(x: Tensor, exponent: int | Tensor) -> Tensor:
    """The product x 2^exponent, in two factors so that neither overflows before x does.

    An exponent a row where it is a tensor, (b,).
    """
    if isinstance(exponent, Tensor):
        halves = exponent.double().div(2).floor()
        factors = (halves, exponent - halves)
        shape = (-1, *(1,) * (x.ndim - 1))
        first, second = (torch.pow(2.0, factor).to(x).reshape(shape) for factor in factors)
        return x * first * second
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
