"""A strided layer as one of stride 1: the inputs behind an output point become channels of it.

With stride s an output reads from s phases of the inputs per axis. Point q of phase f of an axis is
input s q + f. On a grid that has all points of outputs and phases M is a stride-1 layer of g s^d
channels with zero padding, after a permutation of its columns, less the rows and columns of points
that an output or a phase does not have.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from convspectra.operator._conv_operator import ConvOperator, derived_operator
from convspectra.operator._geometry import conv_geometry
from convspectra.operator._structure import is_square_grid


def polyphase(op: ConvOperator) -> ConvOperator:
    """The stride-1 layer on the grid, of an `op` that is not transposed; differentiable.

    Its taps are those of `op`, and zeros where a phase has none at a point.
    """
    g, padding = op.geometry, grid_padding(op)
    if is_square_grid(op) and all(n == 1 for n in (*g.stride, *g.dilation)):
        return op
    taps = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    for axis, (before, after) in enumerate(padding):
        table = taps.new_zeros(g.kernel_size[axis], g.stride[axis], before + 1 + after)
        for tap, (point, phase) in enumerate(_reads(op, axis)):
            table[tap, phase, before + point] = 1
        taps = torch.tensordot(taps, table, dims=([3], [0]))
    phases = range(3, 3 + 2 * g.ndim, 2)
    taps = taps.permute(0, 1, 2, *phases, *(i + 1 for i in phases))
    weight = taps.flatten(2, 2 + g.ndim).flatten(0, 1)
    kernel_size = tuple(weight.shape[2:])
    return derived_operator(
        weight, conv_geometry(grid(op), kernel_size, padding=padding), op.groups
    )


def grid_padding(op: ConvOperator) -> list[tuple[int, int]]:
    """How many points before and after an output its taps reach, per axis: from integers alone."""
    reads = [_reads(op, axis) for axis in range(op.geometry.ndim)]
    return [(max(0, -of_axis[0][0]), max(0, of_axis[-1][0])) for of_axis in reads]


def grid(op: ConvOperator) -> tuple[int, ...]:
    """Points per axis of outputs and phases together."""
    g = op.geometry
    axes = zip(g.input_size, g.stride, g.output_size, strict=True)
    return tuple(max(-(-n // s), m) for n, s, m in axes)


def phase_lengths(op: ConvOperator) -> Tensor:
    """How many points, from the first, each channel of `polyphase(op)` has, (axes, channels)."""
    g = op.geometry
    lengths = [
        [-(-(n - phase) // s) for n, s, phase in zip(g.input_size, g.stride, phases, strict=True)]
        for phases in itertools.product(*map(range, g.stride))
    ]
    return torch.tensor(lengths, device="cpu").repeat(op.weight.shape[1], 1).T.contiguous()


def to_phases(op: ConvOperator, x: Tensor) -> Tensor:
    """Inputs of `op`, (b, channels, *input_size), on the grid, 0 at points that they lack."""
    g, points = op.geometry, grid(op)
    axes = zip(reversed(points), reversed(g.stride), reversed(g.input_size), strict=True)
    x = F.pad(x, [amount for m, s, n in axes for amount in (0, s * m - n)])
    return split_phases(x, g.stride)


def from_phases(op: ConvOperator, x: Tensor) -> Tensor:
    """The adjoint of `to_phases`."""
    return _first(join_phases(x, op.geometry.stride), op.geometry.input_size)


def split_phases(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Phases as channels: (b, c, P_1 s_1, P_2 s_2, ...) -> (b, c * prod(s), P_1, P_2, ...).

    Point ``s q + f`` of an axis is point q of phase f; the phases of a channel stay side by side.
    """
    ndim, points = len(strides), [n // s for n, s in zip(x.shape[2:], strides, strict=True)]
    x = x.reshape(*x.shape[:2], *(n for pair in zip(points, strides, strict=True) for n in pair))
    order = [*range(3, 3 + 2 * ndim, 2), *range(2, 2 + 2 * ndim, 2)]
    return x.permute(0, 1, *order).reshape(len(x), -1, *points)


def join_phases(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The inverse of `split_phases`, and its adjoint."""
    ndim, points = len(strides), x.shape[2:]
    x = x.reshape(len(x), -1, *strides, *points)
    order = [i for axis in range(2, 2 + ndim) for i in (axis + ndim, axis)]
    x = x.permute(0, 1, *order)
    return x.reshape(*x.shape[:2], *(m * s for m, s in zip(points, strides, strict=True)))


def to_grid(op: ConvOperator, y: Tensor) -> Tensor:
    """Outputs of `op`, (b, channels, *output_size), on the grid, 0 at points that they lack."""
    ends = zip(reversed(grid(op)), reversed(op.geometry.output_size), strict=True)
    return F.pad(y, [amount for m, n in ends for amount in (0, m - n)])


def from_grid(op: ConvOperator, y: Tensor) -> Tensor:
    """The adjoint of `to_grid`."""
    return _first(y, op.geometry.output_size)


def _reads(op: ConvOperator, axis: int) -> list[tuple[int, int]]:
    """The point, from that of an output, and the phase that each tap reads."""
    g = op.geometry
    return [
        divmod(tap * g.dilation[axis] - g.padding[axis][0], g.stride[axis])
        for tap in range(g.kernel_size[axis])
    ]


def _first(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for axis, n in enumerate(sizes):
        x = x.narrow(2 + axis, 0, n)
    return x
