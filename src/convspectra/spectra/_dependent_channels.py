"""Filters and input channels that depend linearly on others, and the singular values 0 they make.

M = (W x I) P, where W, h x g prod(k), has the filters for its rows and P lays out the window of
every output; so r independent filters leave M at most r N_out nonzero singular values. Likewise r'
independent input channels, the rows of the weight as g x h prod(k), leave at most r' N_in. What W
has below max(h, g prod(k)) eps ||W|| is dropped, which moves no singular value of M by more than
its size times ||P||.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.solvers import SingularTriplets

DEPENDENT = 1e-12
"""Without a pivot below this, relative to the largest entry, of ``W W'`` no rows are dependent."""


@dataclass(frozen=True)
class _Slices:
    """Rows of the weight, group by group, and how they depend on one another.

    Attributes
    ----------
    rows : Tensor
        (groups, rows, columns)
    ranks : Tensor
        (groups,), how many singular values of each group are above the tolerance.
    tolerance : float
    """

    rows: Tensor
    ranks: Tensor
    tolerance: float

    @property
    def rank(self) -> int:
        return int(self.ranks.sum())

    @property
    def mirrored(self) -> _Slices:
        """The columns instead."""
        return _Slices(self.rows.mT, self.ranks, self.tolerance)

    @cached_property
    def left(self) -> Tensor:
        """Left singular vectors in columns, those of the largest values first, all of them."""
        count, columns = self.rows.shape[1:]
        padded = torch.nn.functional.pad(self.rows, (0, max(0, count - columns)))
        vectors: Tensor = torch.linalg.svd(padded, full_matrices=False).U
        return vectors


def zero_triplets(op: ConvOperator, k: int) -> SingularTriplets | None:
    """The k smallest triplets where dependent channels make that many values 0; else None.

    Of each pair one vector is given, that of the dependent side; the other is 0.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64.

    Notes
    -----
    Cost: two Gram matrices of the weight, the smaller ones, and their Cholesky factorizations where
    nothing is dependent; else dense SVDs of the weight. Nothing for a layer of one point, which is
    its weight: a dense matrix tells its zeros as well.
    """
    geometry = op.geometry
    if math.prod((*geometry.input_size, *geometry.output_size)) == 1:
        return None
    filters = _filters(op)
    one_tap = math.prod(geometry.kernel_size) == 1
    channels = filters.mirrored if one_tap else _input_channels(op)
    outputs, inputs = (math.prod(n) for n in (op.geometry.output_size, op.geometry.input_size))
    by_filters, by_channels = filters.rank * outputs, channels.rank * inputs
    zeros = min(op.shape) - min(by_filters, by_channels)
    if k > zeros:
        return None
    # Of two sides that tell as many, the one of fewer rows: an SVD of that order gives vectors.
    by_rows = (by_filters, filters.rows.shape[1]) <= (by_channels, channels.rows.shape[1])
    used, points = (filters, outputs) if by_rows else (channels, inputs)
    null = _null_rows(used, points, k)
    u, v = null, null.new_zeros(k, op.shape[1])
    if used is channels:
        u, v = null.new_zeros(k, op.shape[0]), null
    bound = 2 * used.tolerance * _layout_norm(op)
    zero = null.new_zeros(k)
    return SingularTriplets(
        u=u,
        s=zero,
        v=v,
        lower=zero,
        upper=zero + bound,
        others=0.0,
        converged=True,
        matvecs=0,
        certificate="zeros by linearly dependent filters or input channels, up to rounding",
        logabsdet=-math.inf,
    )


def without_dependent_channels(op: ConvOperator) -> ConvOperator:
    """A layer with fewer channels and, up to rounding, the same nonzero singular values.

    As many of each group as the group with the most independent ones has; the layer itself where
    there is nothing to leave out.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64.
    """
    weight = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    weight = _combined(weight, _filters(op), 1)
    weight = _combined(weight, _input_channels(op), 2)
    if weight.shape[1:3] == (op.weight.shape[0] // op.groups, op.weight.shape[1]):
        return op
    geometry = op.geometry
    fewer = ConvOperator(
        weight.flatten(0, 1).contiguous(),
        geometry.input_size,
        stride=geometry.stride,
        padding=geometry.padding if geometry.ndim else 0,
        dilation=geometry.dilation,
        padding_mode=geometry.padding_mode,
        groups=op.groups,
    )
    # Some transposed layers use the first outputs of their convolution only.
    return fewer if fewer.geometry.output_size == geometry.output_size else op


def _filters(op: ConvOperator) -> _Slices:
    weight = op.weight
    return _dependence(weight.reshape(op.groups, weight.shape[0] // op.groups, -1))


def _input_channels(op: ConvOperator) -> _Slices:
    weight = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    return _dependence(weight.transpose(1, 2).flatten(2))


def _dependence(rows: Tensor) -> _Slices:
    """How the rows, (groups, rows, columns), depend on one another; none is most often the case."""
    groups, count, columns = rows.shape
    most = min(count, columns)
    every = torch.full((groups,), most, device=rows.device)
    gram = rows @ rows.mT if count <= columns else rows.mT @ rows
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal -= DEPENDENT * diagonal.amax()
    _, info = torch.linalg.cholesky_ex(gram)
    if not bool(info.any()):
        return _Slices(rows, every, 0.0)
    s = torch.linalg.svdvals(rows if count >= columns else rows.mT)
    tolerance = max(count, columns) * torch.finfo(rows.dtype).eps * float(s.amax())
    ranks = (s > tolerance).sum(1)
    if bool((ranks == most).all()):  # nothing to drop
        tolerance = 0.0
    return _Slices(rows, ranks, tolerance)


def _null_rows(slices: _Slices, points: int, k: int) -> Tensor:
    """Null vectors of the dependent side, (k, groups * rows * points): each at one point."""
    groups, rows = slices.rows.shape[:2]
    order = torch.arange(rows, device=slices.rows.device)
    places = torch.nonzero(order >= slices.ranks[:, None])
    found = slices.rows.new_zeros(k, groups, rows, points)
    for i in range(k):
        group, column = places[i // points].tolist()
        found[i, group, :, i % points] = slices.left[group, :, column]
    return found.flatten(1)


def _combined(weight: Tensor, slices: _Slices, axis: int) -> Tensor:
    """The weight, (groups, h / groups, g / groups, *k), with fewer entries along an axis."""
    rank = max(1, int(slices.ranks.amax()))
    if rank == weight.shape[axis]:
        return weight
    basis = slices.left[:, :, :rank].mT  # singular values descend
    moved = weight.movedim(axis, 1)
    return (basis @ moved.flatten(2)).unflatten(2, moved.shape[2:]).movedim(1, axis)


def _layout_norm(op: ConvOperator) -> float:
    """A bound on ||P||: the root of the taps times the most that one of them reads one input."""
    geometry = op.geometry
    reads = math.prod(int(geometry.tap_reads(axis).max()) for axis in range(geometry.ndim))
    return math.sqrt(math.prod(geometry.kernel_size) * reads)
