"""A request for singular triplets of one block of a layer, and what every answer to it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.winograd import WinogradConvolution, faster_convolution

ZERO = 1e-11
"""A smallest singular value with an upper bound of this much of the norm of M counts as 0."""


@dataclass(frozen=True)
class Request:
    """The k largest or smallest triplets of a block.

    The block is detached, not transposed, in float64 and scaled to entries near 1.
    """

    op: ConvOperator
    k: int
    largest: bool
    values_only: bool
    tol: float
    maxiter: int | None
    generator: torch.Generator
    max_bytes: int
    separation: float | None

    @property
    def alone(self) -> bool:
        """Whether one value is asked for, and nothing of the others."""
        return self.k == 1 and self.separation is None

    def most_steps(self, default: int) -> int:
        """`maxiter`, or what a way takes by default."""
        return default if self.maxiter is None else self.maxiter

    @property
    def norm_estimate(self) -> float:
        """An upper bound on sigma_max of the right order: for rounding errors."""
        taps = math.prod(self.op.weight.shape[2:])
        weight = self.op.weight.reshape(self.op.groups, -1, *self.op.weight.shape[1:])
        return float(torch.linalg.vector_norm(weight.flatten(1), dim=1).amax()) * taps**0.5


class Product:
    """A layer as maps between rows, (b, n) -> (b, m) and back, for inner loops.

    Parameters
    ----------
    op : ConvOperator
    fast : bool
        By fewer multiplications where that can be: for many products to come.
    """

    def __init__(self, op: ConvOperator, *, fast: bool = False) -> None:
        self.op = op
        direct = op.T if op.transposed else op
        # PyTorch's transposed convolution is the slower one in float64.
        adjoint = _adjoint_layer(direct) or direct.T
        maps = [(fast and _faster(layer)) or layer for layer in (direct, adjoint)]
        self._forward, self._backward = reversed(maps) if op.transposed else maps

    @classmethod
    def tall(cls, op: ConvOperator, *, fast: bool = False) -> tuple[Product, bool]:
        """M, or M' if M has more columns than rows, and whether it has."""
        wide = op.shape[0] < op.shape[1]
        return cls(op.T if wide else op, fast=fast), wide

    def apply(self, x: Tensor) -> Tensor:
        """M x."""
        return self._forward.apply(x.reshape(-1, *self.op.input_shape)).flatten(1)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """M' y."""
        return self._backward.apply(y.reshape(-1, *self.op.output_shape)).flatten(1)

    def gram(self, x: Tensor) -> Tensor:
        """M'M x."""
        return self.apply_adjoint(self.apply(x))


def _adjoint_layer(op: ConvOperator) -> ConvOperator | None:
    """M' as a layer that is not transposed: taps reversed, channels exchanged; None if it is not.

    That of stride 1 with zero padding is, unless it pads farther than the taps reach or does not
    read its last inputs.
    """
    g = op.geometry
    if g.ndim == 0 or g.padding_mode != "zeros" or any(s != 1 for s in g.stride):
        return None
    padding = [
        (reach - 1 - before, reach - 1 - after)
        for reach, (before, after) in zip(g.reach, g.padding, strict=True)
    ]
    if min(map(min, padding)) < 0:
        return None
    blocks = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    weight = blocks.transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + g.ndim)))
    adjoint = ConvOperator(
        weight.contiguous(),
        g.output_size,
        padding=padding,
        dilation=g.dilation,
        groups=op.groups,
    )
    return adjoint if adjoint.geometry.output_size == g.input_size else None


def _faster(layer: ConvOperator) -> WinogradConvolution | None:
    if layer.transposed:
        return None
    return faster_convolution(layer.weight, layer.geometry, layer.groups)


def rounding_of(op: ConvOperator) -> float:
    """Rounding error of a product with M, and of sums of its entries, relative to its norm."""
    eps: float = torch.finfo(op.dtype).eps
    return (16 + 4 * max(op.shape) ** 0.5) * eps


def refined(tall: Product, vectors: Tensor, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (u, s, v) from Rayleigh-Ritz with M itself in the span of orthonormal rows."""
    images = tall.apply(vectors)
    left, s, right = torch.linalg.svd(images, full_matrices=False)
    if not largest:
        left, s, right = left.flip(1), s.flip(0), right.flip(0)
    return right, s, left.mT @ vectors


def group_matrices(op: ConvOperator, max_bytes: int) -> Tensor:
    """The diagonal blocks of M that its groups are, dense, (groups, m, n); with gradient.

    Raises
    ------
    ValueError
        If they take more than `max_bytes`.
    """
    geometry = op.geometry
    # Without groups the rows of one group's outputs are a block of their own.
    alone = ConvOperator(
        op.weight,
        geometry.input_size,
        stride=geometry.stride,
        padding=geometry.padding if geometry.ndim else 0,
        dilation=geometry.dilation,
        padding_mode=geometry.padding_mode,
    )
    rows, columns = (n // op.groups for n in op.shape)
    return alone.to_dense(max_bytes).reshape(op.groups, rows, columns)
