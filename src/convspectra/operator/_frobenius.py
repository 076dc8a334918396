"""The Frobenius norm of M as a quadratic form in the weight, from tap counts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from convspectra.operator._explicit import ENTRIES_AT_ONCE
from convspectra.operator._geometry import ConvGeometry


def frobenius_form(
    weight: Tensor, geometry: ConvGeometry, divisor: int = 1, factor: Tensor | float = 1.0
) -> Tensor:
    """The symmetric form of factor ||M||_F^2 / divisor applied to the weight: half its gradient.

    Per axis it is the Gram matrix of the taps; for zero padding, |Omega| times the weight.
    """
    if geometry.padding_mode == "zeros":
        counts = factor * _counts(weight, geometry, divisor)
        return (weight.flatten(1) * counts).view_as(weight)
    with torch.autocast(weight.device.type, enabled=False):
        for axis in range(geometry.ndim):
            gram = torch.from_numpy(geometry.tap_gram(axis)).to(weight)
            weight = torch.tensordot(weight, gram, dims=([2], [0]))
    return weight * (factor / divisor)


def subtract_frobenius_form(
    weight: Tensor, geometry: ConvGeometry, divisor: int, factor: Tensor | float
) -> None:
    """Subtract `frobenius_form` from a contiguous weight, in place."""
    if geometry.padding_mode == "zeros":
        flat, counts = weight.view(len(weight), -1), _counts(weight, geometry, divisor)
        if isinstance(factor, Tensor):
            flat.addcmul_(flat, factor * counts, value=-1)
        else:
            flat.addcmul_(flat, counts, value=-factor)
    else:
        weight.sub_(frobenius_form(weight, geometry, divisor, factor))


def _counts(weight: Tensor, geometry: ConvGeometry, divisor: int) -> Tensor:
    return _column_counts(geometry, divisor, weight.shape[1], weight.dtype, weight.device)


@lru_cache(maxsize=256)
def _column_counts(
    geometry: ConvGeometry, divisor: int, in_channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """|Omega| / divisor of each column of a flat weight with so many input channels per group.

    Twice as fast a factor as |Omega| of each tap, which is broadcast over short rows.
    """
    counts = torch.as_tensor(geometry.tap_counts() / divisor, dtype=dtype, device=device)
    return counts.flatten().repeat(in_channels)


def squared_frobenius_norm_now(weight: Tensor, geometry: ConvGeometry, divisor: int) -> Tensor:
    """`squared_frobenius_norm` over the divisor, 0-dim, without gradient.

    With zero padding part by part, without another array of the size of the weight; products of
    squares with a vector share the threads, which an inner product does not.
    """
    if geometry.padding_mode != "zeros":
        return torch.dot(weight.flatten(), frobenius_form(weight, geometry, divisor).flatten())
    counts = _counts(weight, geometry, divisor)
    total = weight.new_zeros(())
    rows = weight.contiguous().view(len(weight), -1)
    for part in rows.split(max(1, ENTRIES_AT_ONCE // max(1, len(counts)))):
        total += torch.mv(part.square(), counts).sum()
    return total


def squared_frobenius_norm(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """||M||_F^2 as a quadratic form in the weight: a 0-dim tensor, differentiable twice."""
    return (weight * frobenius_form(weight, geometry)).sum()
