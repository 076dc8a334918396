"""Substitution for a block triangular layer, such as a causal or a masked one.

Note [Triangular layers]. With zero padding and stride 1 a tap reads the point at a fixed offset
from the output. If along one axis no used tap looks ahead, M is block triangular along that axis,
and its diagonal blocks are the layer of the taps with offset 0 on that axis, which may be
triangular along the next one. In the end one tap is left, K_0: all diagonal blocks of M are K_0,
``log |det M| = points * log |det K_0|`` whatever the other taps are, and a system is solved point
by point. A factorization of M as a whole fails where its inverse grows from point to point.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, is_square_toeplitz
from convspectra.solvers import lu_factor
from convspectra.spectra.ways._pseudo_determinant import log_pseudo_determinant
from convspectra.spectra.ways._way import Cost, Question, Way, product_flops


@dataclass(frozen=True)
class _Order:
    """How the points of a layer follow each other: no used tap reads a later one.

    Attributes
    ----------
    axes : tuple of int
        Spatial axes, the slowest first.
    signs : tuple of int
        1 for an axis that is walked upwards, -1 for one that is walked downwards; by axis.
    taps : list of tuple of int
        The indices of the used taps except the one with offset 0.
    """

    axes: tuple[int, ...]
    signs: tuple[int, ...]
    taps: list[tuple[int, ...]]


class Triangular(Way):
    """The diagonal block for determinants, substitution for systems."""

    name = "triangular"
    needs = (
        "a square zero-padded layer of stride 1 none of whose taps looks ahead along an axis, such "
        "as a causal one"
    )
    answers = ("logabsdet", "solve")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Whether the points can be put in order.

        A gradient of the log-determinant by a tap that is 0 and would look ahead is not known here.
        """
        order = _order_of(op)
        if order is None or question == "solve" or not op.weight.requires_grad:
            return order is not None
        return not any(_looks_ahead(offset, order) for offset in _offsets(op).values())

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """A factorization of the center tap; one product for a system."""
        channels = op.weight.shape[1]
        flops = 2 / 3 * op.groups * channels**3
        if question == "solve":
            flops += product_flops(op)
        return Cost(flops, 8.0 * op.weight.numel())

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """The number of points times that of the center tap."""
        center = _center(op)
        if center is None:
            return op.weight.new_full((), -math.inf)
        points = math.prod(op.geometry.output_size)
        return points * log_pseudo_determinant(_grouped(op, center))

    def solve(self, op: ConvOperator, y: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
        """Point by point: what the solved points give is subtracted from the right-hand side."""
        order, center = _order_of(op), _center(op)
        if order is None or center is None:
            raise ArithmeticError("a diagonal block of 0")
        offsets = _offsets(op)
        diagonal = _grouped(op, center)
        lu, pivots = lu_factor(diagonal.mT if adjoint else diagonal)
        matrices = {
            tuple(-o if adjoint else o for o in offsets[tap]): (
                _grouped(op, tap).mT if adjoint else _grouped(op, tap)
            )
            for tap in order.taps
        }
        direction = [-s if adjoint else s for s in order.signs]
        x = torch.zeros_like(y)
        by_group = x.unflatten(1, (op.groups, -1))
        right = y.unflatten(1, (op.groups, -1))
        sizes = op.geometry.input_size
        walks = [range(sizes[a])[:: direction[a]] for a in order.axes]
        for walked in itertools.product(*walks):
            point = _point(order, walked)
            rest = right[(..., *point)]
            for offset, matrix in matrices.items():
                read = [p + o for p, o in zip(point, offset, strict=True)]
                if all(0 <= r < n for r, n in zip(read, sizes, strict=True)):
                    rest = rest - torch.einsum("ghk,bgk->bgh", matrix, by_group[(..., *read)])
            solved = torch.linalg.lu_solve(lu, pivots, rest.permute(1, 2, 0))
            by_group[(..., *point)] = solved.permute(2, 0, 1)
        return x


def _point(order: _Order, walked: tuple[int, ...]) -> list[int]:
    """The point whose places are given in the order of the walk."""
    point = [0] * len(walked)
    for axis, place in zip(order.axes, walked, strict=True):
        point[axis] = place
    return point


def _offsets(op: ConvOperator) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Offsets of the points that the taps read, relative to the output."""
    g = op.geometry
    return {
        tap: tuple(
            t * d - before for t, d, (before, _) in zip(tap, g.dilation, g.padding, strict=True)
        )
        for tap in itertools.product(*map(range, g.kernel_size))
    }


def _order_of(op: ConvOperator) -> _Order | None:
    """An order of the points in which no used tap looks ahead; None if there is none."""
    if not is_square_toeplitz(op):
        return None
    used = op.weight.detach().flatten(2).ne(0).flatten(0, 1).any(0)
    offsets = _offsets(op)
    taps = [tap for tap, is_used in zip(offsets, used.tolist(), strict=True) if is_used]
    left, axes, signs = taps, [], [1] * op.geometry.ndim
    remaining = list(range(op.geometry.ndim))
    while remaining:
        for axis in remaining:
            along = {math.copysign(1, offsets[tap][axis]) for tap in left if offsets[tap][axis]}
            if len(along) < 2:
                break
        else:
            return None
        signs[axis] = -1 if 1.0 in along else 1
        axes.append(axis)
        remaining.remove(axis)
        left = [tap for tap in left if offsets[tap][axis] == 0]
    return _Order(tuple(axes), tuple(signs), [tap for tap in taps if any(offsets[tap])])


def _looks_ahead(offset: tuple[int, ...], order: _Order) -> bool:
    """Whether a tap of this offset reads a point that comes later."""
    first = next((axis for axis in order.axes if offset[axis]), None)
    return first is not None and offset[first] * order.signs[first] > 0


def _center(op: ConvOperator) -> tuple[int, ...] | None:
    """The tap that reads the point of the output itself."""
    return next((tap for tap, offset in _offsets(op).items() if not any(offset)), None)


def _grouped(op: ConvOperator, tap: tuple[int, ...]) -> Tensor:
    """The matrix of one tap, (groups, h, g)."""
    index: Any = (..., *tap)
    return op.weight[index].unflatten(0, (op.groups, -1))
