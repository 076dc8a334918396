"""A request for singular triplets of one block of a layer, and what every answer to it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import ConvOperator


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
    maxiter: int
    generator: torch.Generator
    max_bytes: int
    separation: float | None

    @property
    def alone(self) -> bool:
        """Whether one value is asked for, and nothing of the others."""
        return self.k == 1 and self.separation is None

    @property
    def norm_estimate(self) -> float:
        """An upper bound on sigma_max of the right order: for rounding errors."""
        taps = math.prod(self.op.weight.shape[2:])
        weight = self.op.weight.reshape(self.op.groups, -1, *self.op.weight.shape[1:])
        return float(torch.linalg.vector_norm(weight.flatten(1), dim=1).amax()) * taps**0.5


@dataclass(frozen=True)
class Product:
    """A layer as maps between rows, (b, n) -> (b, m) and back."""

    op: ConvOperator

    @classmethod
    def tall(cls, op: ConvOperator) -> tuple[Product, bool]:
        """M, or M' if M has more columns than rows, and whether it has."""
        wide = op.shape[0] < op.shape[1]
        return cls(op.T if wide else op), wide

    def apply(self, x: Tensor) -> Tensor:
        """M x."""
        return self.op.apply(x.reshape(-1, *self.op.input_shape)).flatten(1)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """M' y."""
        return self.op.apply_adjoint(y.reshape(-1, *self.op.output_shape)).flatten(1)

    def gram(self, x: Tensor) -> Tensor:
        """M'M x."""
        return self.apply_adjoint(self.apply(x))


def rounding_of(op: ConvOperator) -> float:
    """Rounding error of a product with M, and of sums of its entries, relative to its norm."""
    eps: float = torch.finfo(op.dtype).eps
    return (16 + 4 * max(op.shape) ** 0.5) * eps


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
