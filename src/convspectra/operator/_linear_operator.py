"""Anything with two products: a layer, a Jacobian, a matrix behind functions of your own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LinearOperatorLike(Protocol):
    """A real linear map between arrays, by its products in both directions.

    Both products take batches: (b, *input_shape) to (b, *output_shape) and back, of the operator's
    dtype and device.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one array that `apply` takes."""
        ...

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one array that `apply` gives."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arrays."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        ...

    def apply(self, x: Tensor, /) -> Tensor:
        """The products with a batch of arrays."""
        ...

    def apply_adjoint(self, y: Tensor, /) -> Tensor:
        """The products of the transpose with a batch of arrays."""
        ...
