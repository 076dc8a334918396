"""A weight divided by a power of two, so that neither tiny nor huge layers lose anything."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from convspectra.operator._checks import check_finite_weight
from convspectra.operator._conv_operator import ConvOperator
from convspectra.operator._geometry import ConvGeometry


def normalized(op: ConvOperator) -> tuple[ConvOperator, int | None]:
    """The layer detached, in float64, divided by 2^exponent; the exponent is None for M = 0.

    Taps that read no pixel are dropped, and those that read the same one are added: they may be far
    larger than M.

    Raises
    ------
    ValueError
        For a weight that is not finite.
    """
    weight = op.weight.detach().double()
    largest = weight.abs().amax()
    # The weight may have changed since it was checked; NaN and Inf come through the maximum.
    check_finite_weight(math.isfinite(largest))
    op = with_distinct_taps(op.with_weight(weight, check=False))
    if op.weight is not weight:
        largest = op.weight.abs().amax()
    if float(largest) == 0.0:
        return op, None
    exponent = int(torch.frexp(largest).exponent)
    return op.with_weight(ldexp(op.weight, -exponent), check=False), exponent


def with_distinct_taps(op: ConvOperator) -> ConvOperator:
    """The same matrix M by taps that read pixels, no two of them the same; with gradient.

    Taps that only ever fall on the padding become 0. Taps that always read the same pixel, as under
    replicated or circular padding of small inputs, become their sum at the first of them, correctly
    rounded: they may cancel.

    Examples
    --------
    >>> import torch
    >>> op = ConvOperator(torch.tensor([[[7.0, 1.0, 7.0]]]), 1)
    >>> with_distinct_taps(op).weight
    tensor([[[0., 1., 0.]]])
    >>> weight = torch.tensor([[[1.0, 1e-8, -1.0]]], dtype=torch.float64)
    >>> op = ConvOperator(weight, 1, padding=1, padding_mode="replicate")
    >>> with_distinct_taps(op).weight.tolist()
    [[[1e-08, 0.0, 0.0]]]
    """
    counts = np.asarray(op.geometry.tap_counts())
    groups = _taps_of_one_pixel(op.geometry)
    if (counts > 0).all() and not groups:
        return op
    read = counts.ravel() > 0
    weight = torch.where(torch.from_numpy(read).to(op.device), op.weight.flatten(2), 0.0)
    for group in groups:
        if read[group[0]]:
            weight = weight.clone()
            weight[..., group[0]] = _exact_sum(weight[..., group])
            weight[..., group[1:]] = 0.0
    return op.with_weight(weight.reshape(op.weight.shape), check=False)


@functools.lru_cache(maxsize=256)
def _taps_of_one_pixel(geometry: ConvGeometry) -> tuple[tuple[int, ...], ...]:
    """Groups of two or more taps, flat, that read the same pixel for every output."""
    axes = []
    for axis in range(geometry.ndim):
        _, same = np.unique(geometry.tap_sources(axis), axis=0, return_inverse=True)
        axes.append(same.ravel())
    if all(len(np.unique(same)) == len(same) for same in axes):
        return ()
    together: dict[tuple[int, ...], list[int]] = {}
    for flat, labels in enumerate(itertools.product(*(same.tolist() for same in axes))):
        together.setdefault(labels, []).append(flat)
    return tuple(tuple(group) for group in together.values() if len(group) > 1)


def _exact_sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, correctly rounded; with gradient."""
    rows = terms.detach().double().flatten(0, -2).tolist()
    exact = torch.tensor([math.fsum(row) for row in rows], dtype=terms.dtype, device=terms.device)
    rounded = terms.sum(-1)
    return exact.reshape(rounded.shape) + (rounded - rounded.detach())


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
