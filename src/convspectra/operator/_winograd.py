"""Convolution by Winograd's minimal filtering: half of the multiplications, in double precision.

F(m, r) has m outputs of r taps along an axis by m + r - 1 products instead of m r: values of two
polynomials at as many points, one of them infinity, and the transpose of interpolation between
them (Winograd 1980). Along all axes at once, for every
tile of outputs, the products are matrices over the channels (Lavin and Gray 2015).

The points are small and near 1 in size: rounding is 1 to 3 times that of PyTorch's convolution.

References
----------
S. Winograd (1980), "Arithmetic complexity of computations", SIAM,
    doi:10.1137/1.9781611970364.
A. Lavin and S. Gray (2015), "Fast algorithms for convolutional neural networks", arXiv:1509.09308.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convspectra.operator._convolution import pad
from convspectra.operator._geometry import ConvGeometry

POINTS = {1: (), 4: (0.0, 1.0, -1.0), 6: (0.0, 0.75, -0.75, 1.5, -1.5)}
"""By the number of products along an axis: where polynomials are evaluated, besides infinity.

More or larger points save more products and lose more digits: with these, rounding is 1 to 3 times
that of PyTorch's convolution.
"""
COLUMNS_TO_READ = 17
"""A product of a matrix with so many columns takes as long as it takes to read the matrix.

This and the next three are a model of time alone: a wrong one takes the slower of two ways to the
same product.
"""
FLOPS_TO_TRANSFORM = 150
"""Time for one number of a transformed tile of two axes to be made, in flops of a product of
matrices."""
DIRECT_FLOPS = 1.5
"""Time for one flop of PyTorch's convolution, likewise."""
WORTH = 0.9
"""Estimated time over PyTorch's from which on there is nothing to win: room for its errors."""
WEIGHT_BYTES = 1 << 28
"""Most memory for the transformed weight, several times that of the weight itself: a choice."""
TILE_BYTES = 1 << 24
"""Memory of transformed tiles at once, a row of tiles at least: more is not kept by the C library
for the next call."""


class WinogradConvolution:
    """A convolution without groups, of stride and dilation 1 and zero padding, with this weight.

    Parameters
    ----------
    weight : Tensor
        (h, g, *kernel), float64.
    geometry : ConvGeometry
    products : tuple of int
        n, by axis: m + r - 1, a key of `POINTS`; 1 for an axis with one tap.

    Notes
    -----
    Memory: ``h g prod(n)`` numbers for the transformed weight. Cost of `apply`: ``2 h g prod(n)``
    flops for each of the ``prod(N_out / m)`` tiles of an array, and some for the transforms.
    """

    def __init__(self, weight: Tensor, geometry: ConvGeometry, products: tuple[int, ...]) -> None:
        taps = geometry.kernel_size
        self._tile = tuple(n - r + 1 for n, r in zip(products, taps, strict=True))
        self._output_size, self._products = geometry.output_size, products
        self._counts = tuple(
            -(-n // m) for n, m in zip(geometry.output_size, self._tile, strict=True)
        )
        lengths = zip(self._counts, self._tile, taps, strict=True)
        self._sides = [
            (before, count * m + r - 1 - before - n)
            for (count, m, r), (before, _), n in zip(
                lengths, geometry.padding, geometry.input_size, strict=True
            )
        ]
        along = [_transforms(n, r) for n, r in zip(products, taps, strict=True)]
        self._of_inputs, of_weight, self._of_outputs = (
            functools.reduce(torch.kron, of_axes) for of_axes in zip(*along, strict=True)
        )
        rows, columns = weight.shape[:2]
        transformed = of_weight @ weight.reshape(rows * columns, -1).mT
        self._weight = transformed.reshape(-1, rows, columns)

    def apply(self, x: Tensor) -> Tensor:
        """The layer without bias: (b, g, *input_size) -> (b, h, *output_size)."""
        row = 8 * max(self._weight.shape[1:]) * math.prod(self._products + self._counts[1:])
        arrays = max(1, TILE_BYTES // row)
        outputs = [self._of_padded(pad(self._sides, part), row) for part in x.split(arrays)]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        for axis, length in enumerate(self._output_size):
            y = y.narrow(2 + axis, 0, length)
        return y.contiguous()

    def _of_padded(self, x: Tensor, row: int) -> Tensor:
        """All tiles of padded arrays, some rows of them at a time."""
        at_once = max(1, TILE_BYTES // (row * max(1, len(x))))
        first = self._counts[0]
        if first <= at_once:
            return self._of_tiles(x, first)
        parts = []
        for start in range(0, first, at_once):
            count = min(at_once, first - start)
            length = (count - 1) * self._tile[0] + self._products[0]
            parts.append(self._of_tiles(x.narrow(2, start * self._tile[0], length), count))
        return torch.cat(parts, dim=2)

    def _of_tiles(self, x: Tensor, first: int) -> Tensor:
        """The outputs of `first` rows of tiles, (b, h, first m, ...)."""
        counts = (first, *self._counts[1:])
        steps = x.stride()[2:]
        batch, channels = x.shape[:2]
        # Axes: *products, channels, batch, *tiles. Tiles overlap: a view cannot be flattened.
        tiles = x.as_strided(
            (*self._products, channels, batch, *counts),
            (
                *steps,
                x.stride(1),
                x.stride(0),
                *(step * m for step, m in zip(steps, self._tile, strict=True)),
            ),
            x.storage_offset(),
        )
        transformed, columns = len(self._of_inputs), batch * math.prod(counts)
        tiles = self._of_inputs @ tiles.reshape(transformed, channels * columns)
        products = torch.bmm(self._weight, tiles.view(transformed, channels, columns))
        rows, axes = products.shape[1], len(counts)
        outputs = self._of_outputs @ products.view(transformed, rows * columns)
        outputs = outputs.view(*self._tile, rows, batch, *counts)
        order = [axes + 1, axes]
        for axis in range(axes):
            order += [axes + 2 + axis, axis]
        sizes = (count * m for count, m in zip(counts, self._tile, strict=True))
        return outputs.permute(order).reshape(batch, rows, *sizes)


def faster_convolution(
    weight: Tensor, geometry: ConvGeometry, groups: int
) -> WinogradConvolution | None:
    """The layer as a `WinogradConvolution`; None where PyTorch's convolution is as fast, or for
    other layers than that can be.
    """
    plain = all(n == 1 for n in (groups, *geometry.stride, *geometry.dilation))
    if weight.dtype != torch.float64 or not weight.is_cpu or not plain or geometry.ndim == 0:
        return None
    if geometry.padding_mode != "zeros":
        return None
    rows, columns = weight.shape[:2]
    taps, outputs = math.prod(geometry.kernel_size), math.prod(geometry.output_size)
    best = None
    least = WORTH * DIRECT_FLOPS * 2 * rows * columns * taps * (outputs + COLUMNS_TO_READ)
    for products in _candidates(geometry.kernel_size):
        transformed = math.prod(products)
        tiles = math.prod(
            -(-size // (n - r + 1))
            for size, n, r in zip(geometry.output_size, products, geometry.kernel_size, strict=True)
        )
        product = 2 * rows * columns * (tiles + COLUMNS_TO_READ)
        time = transformed * (product + FLOPS_TO_TRANSFORM * (rows + columns) * tiles)
        if time < least and 8 * rows * columns * transformed <= WEIGHT_BYTES:
            best, least = products, time
    return None if best is None else WinogradConvolution(weight, geometry, best)


def _candidates(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Numbers of products that are fewer than those of the outputs with the taps, by axis."""
    found = []
    for most in POINTS:
        products = tuple(1 if r == 1 else most for r in kernel_size)
        if all(r == 1 or n > r for n, r in zip(products, kernel_size, strict=True)):
            found.append(products)
    return found


@functools.lru_cache(maxsize=64)
def _transforms(products: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of inputs (n, n), of the weight (n, r) and of outputs (m, n), along an axis."""
    outputs = products - taps + 1
    at_points = _vandermonde(products, products)
    of_inputs = torch.linalg.inv(at_points).mT
    return of_inputs, _vandermonde(products, taps), _vandermonde(products, outputs).mT


def _vandermonde(products: int, columns: int) -> Tensor:
    """Powers of the points, (n, columns); infinity has the leading coefficient."""
    points = torch.tensor(POINTS[products], dtype=torch.float64, device="cpu")
    finite = points[:, None] ** torch.arange(columns, dtype=torch.float64, device="cpu")
    infinity = torch.zeros(1, columns, dtype=torch.float64, device="cpu")
    infinity[0, -1] = 1
    return torch.cat([finite, infinity])
