"""A layer as a block-banded matrix: the points of one axis are its lines, one after the other.

A line of outputs reads the few lines of inputs that the taps of that axis tell, and each tap is the
dense matrix of the layer along the other axes. So the lines of the shorter side of M are block
columns, and those of the longer side block rows of few blocks each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from convspectra.operator._blocks import group_matrices
from convspectra.operator._conv_operator import ConvOperator, derived_operator
from convspectra.operator._geometry import ConvGeometry
from convspectra.operator._structure import is_wide

SHORT_BLOCK = 2**17
"""Numbers in a block row, of all groups, up to which neighboring lines are taken together.

A line takes some 20 microseconds of calls in a solve, and this many numbers no longer. At half of
it a solve of 80 -> 384 channels at 1,000 points takes twice as long; at much more the factors of
layers with many groups do.
"""
Row: TypeAlias = "tuple[tuple[int, int], ...]"
"""A block row: the pairs (lines beyond the first, tap) of its blocks."""


class Lines:
    """The lines of an axis of M, or of M' if M is wide.

    Parameters
    ----------
    op : ConvOperator
        Not transposed.
    axis : int or None
        None for the whole layer as one line.
    together : int
        So many neighboring lines are one, a divisor of their number.
    adjoint : bool
        M' for a square M instead.

    Attributes
    ----------
    count, width : int
        Block columns, and the columns of each that belong to one group.
    reach : int
        Block columns that a block row extends over, at most.
    height : int
        Rows of a block row that belong to one group.
    starts : list of tuple of Row
        For every block column the block rows that begin there.
    """

    def __init__(
        self, op: ConvOperator, axis: int | None, together: int = 1, *, adjoint: bool = False
    ) -> None:
        self._op, self.axis = op, axis
        self._wide = is_wide(op) or (adjoint and op.shape[0] == op.shape[1])
        g = op.geometry
        sizes = (g.output_size, g.input_size)
        long, short = sizes[::-1] if self._wide else sizes
        rows, columns = sorted(op.shape, reverse=True)
        lines = 1 if axis is None else short[axis]
        self._together = together
        self.count = lines // together
        self.width = columns // op.groups // self.count
        self.height = rows // op.groups // (1 if axis is None else long[axis])
        self.starts, self.reach = _starts(g, axis, lines, together, self._wide)

    @property
    def rows_per_line(self) -> float:
        """Rows of a group to a block column, on the average."""
        return max(self._op.shape) / self._op.groups / self.count

    @functools.cached_property
    def _taps(self) -> list[Tensor]:
        """The blocks, (groups, height, width), one a tap of the axis."""
        op, axis = self._op, self.axis
        if axis is None:
            layers = [op]
        else:
            rest = _without_axis(op.geometry, axis)
            weights = op.weight.unbind(2 + axis)
            layers = [derived_operator(w.contiguous(), rest, op.groups) for w in weights]
        most = 8 * math.prod(op.shape)
        found = [group_matrices(layer, most) for layer in layers]
        return [matrix.mT.contiguous() if self._wide else matrix for matrix in found]

    def block_rows(self, rows: Sequence[Row]) -> Tensor:
        """These block rows, (groups, rows, reach * width)."""
        width = self.width // self._together
        found = self._op.weight.new_zeros(
            self._op.groups, len(rows), self.height, self.reach * self._together, width
        )
        for i, row in enumerate(rows):
            for line, tap in row:
                found[:, i, :, line] += self._taps[tap]
        return found.flatten(3).flatten(1, 2)

    def split(self, x: Tensor) -> Tensor:
        """Vectors of the shorter side, (b, n), line by line, (count, groups, width, b)."""
        op = self._op
        shape = op.output_shape if self._wide else op.input_shape
        blocks = x.reshape(len(x), op.groups, shape[0] // op.groups, *shape[1:])
        if self.axis is None:
            return blocks.flatten(2).permute(1, 2, 0)[None]
        blocks = blocks.movedim(3 + self.axis, 0).flatten(3)
        return blocks.unflatten(0, (self.count, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3)

    def join(self, lines: Tensor) -> Tensor:
        """The inverse of `split`."""
        op = self._op
        shape = op.output_shape if self._wide else op.input_shape
        channels = shape[0] // op.groups
        if self.axis is None:
            return lines[0].permute(2, 0, 1).flatten(1)
        others = [n for i, n in enumerate(shape[1:]) if i != self.axis]
        # (count, groups, together * channels * others, b) -> (b, groups, channels, others, line)
        apart = lines.unflatten(2, (self._together, -1)).permute(4, 1, 3, 0, 2).flatten(3)
        blocks = apart.unflatten(2, (channels, *others))
        return blocks.movedim(-1, 3 + self.axis).flatten(1)


def best_lines(op: ConvOperator, *, adjoint: bool = False) -> Lines:
    """The lines of the axis along which a factorization costs least, short ones together."""
    axes: list[int | None] = list(range(op.geometry.ndim)) or [None]
    lines = min((Lines(op, axis, adjoint=adjoint) for axis in axes), key=elimination_flops)
    together = 1
    for n in range(2, lines.count + 1):
        reach = 1 + math.ceil((lines.reach - 1) / n)
        if lines.count % n == 0 and op.groups * reach * (n * lines.width) ** 2 <= SHORT_BLOCK:
            together = n
    return lines if together == 1 else Lines(op, lines.axis, together, adjoint=adjoint)


def elimination_flops(lines: Lines) -> float:
    """The flops of a QR factorization, line by line, of one group."""
    c, across = lines.width, (lines.reach - 1) * lines.width
    rows = across + lines.rows_per_line
    whole, first = c + across, 2 * rows * c**2 + (4 * rows - 2 * c) * c * across
    everything = 2 * rows * whole**2 - 2 / 3 * whole**3
    tall = rows - c > across
    return lines.count * (everything if tall else first - 2 / 3 * c**3)


def _starts(
    g: ConvGeometry, axis: int | None, count: int, together: int, wide: bool
) -> tuple[list[tuple[Row, ...]], int]:
    """The block rows by their first block column, and how far they extend at most."""
    if axis is None:
        return [(((0, 0),),)], 1
    rows: dict[int, list[tuple[int, int]]] = {}
    for tap, sources in enumerate(g.tap_sources(axis).tolist()):
        for output, source in enumerate(sources):
            if source >= 0:
                row, column = (source, output) if wide else (output, source)
                rows.setdefault(row, []).append((column, tap))
    found: list[list[Row]] = [[] for _ in range(count // together)]
    reach = 1
    for row in sorted(rows):
        first = min(column for column, _ in rows[row]) // together
        found[first].append(tuple((column - first * together, tap) for column, tap in rows[row]))
        reach = max(reach, *(column // together - first + 1 for column, _ in rows[row]))
    return [tuple(begin) for begin in found], reach


def _without_axis(g: ConvGeometry, axis: int) -> ConvGeometry:
    def rest(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(v for i, v in enumerate(values) if i != axis)

    return ConvGeometry(
        rest(g.input_size),
        rest(g.output_size),
        rest(g.kernel_size),
        rest(g.stride),
        rest(g.dilation),
        tuple(p for i, p in enumerate(g.padding) if i != axis),
        g.padding_mode,
    )
