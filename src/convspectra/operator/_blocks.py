"""A convolution as independent convolutions on sub-lattices of its points.

Outputs that share no input, however many others lie between, belong to different diagonal blocks of
M (after a permutation). With dilation d and stride s the points of an axis fall into
d / gcd(d, s) such classes; where the taps of two outputs never meet (kernel 1, or a kernel
no longer than the stride) every output is a class of its own. The weight is the same in all blocks;
blocks of the same size and padding are the same matrix.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from convspectra.operator._conv_operator import ConvOperator, derived_operator
from convspectra.operator._geometry import ConvGeometry, conv_geometry


@dataclass(frozen=True)
class Place:
    """Where one block lies: the points of the layer's input and output that it has, per axis."""

    inputs: tuple[range, ...]
    outputs: tuple[range, ...]


@dataclass(frozen=True)
class Block:
    """A diagonal block of M, as an operator, with all the places where it stands."""

    op: ConvOperator
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _AxisPart:
    """A class of connected points on one axis; `sizes` tells whether two classes are alike."""

    inputs: range
    outputs: range
    stride: int
    padding: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, ...]:
        return len(self.inputs), len(self.outputs), self.stride, *self.padding


def independent_blocks(op: ConvOperator) -> list[Block]:
    """The diagonal blocks of M, without its zero rows and columns; equal ones once.

    Parameters
    ----------
    op : ConvOperator
        Not transposed.

    Notes
    -----
    Groups are not taken apart: they stay a batch dimension of every block. With circular, reflect
    or replicate padding, axes that are padded are left whole.
    """
    geometry = op.geometry
    axes: list[list[list[_AxisPart]]] = []
    for axis in range(geometry.ndim):
        alike: dict[tuple[int, ...], list[_AxisPart]] = {}
        for part in _axis_parts(geometry, axis):
            alike.setdefault(part.sizes, []).append(part)
        axes.append(list(alike.values()))
    blocks = []
    for combination in itertools.product(*axes):
        first = [parts[0] for parts in combination]
        block = conv_geometry(
            [len(part.inputs) for part in first],
            geometry.kernel_size,
            stride=[part.stride for part in first],
            padding=[part.padding for part in first] if first else 0,
            padding_mode=geometry.padding_mode if any(map(sum, geometry.padding)) else "zeros",
            dilation=[
                geometry.dilation[axis] if _whole(geometry, axis) else 1
                for axis in range(geometry.ndim)
            ],
        )
        places = tuple(
            Place(tuple(p.inputs for p in parts), tuple(p.outputs for p in parts))
            for parts in itertools.product(*combination)
        )
        blocks.append(Block(derived_operator(op.weight, block, op.groups), places))
    return blocks


def scatter(array: Tensor, points: tuple[range, ...], sizes: tuple[int, ...]) -> Tensor:
    """Arrays (b, channels, *block points) put at these points of (b, channels, *sizes)."""
    whole = array.new_zeros(*array.shape[:2], *sizes)
    whole[_index(points)] = array
    return whole


def gather(array: Tensor, points: tuple[range, ...]) -> Tensor:
    """Some points of arrays (b, channels, *sizes): the adjoint of `scatter`."""
    return array[_index(points)]


def _index(points: tuple[range, ...]) -> tuple[slice, ...]:
    """An index of the last axes, behind a batch and channels."""
    ends = (slice(r.start, r.start + (len(r) - 1) * r.step + 1, r.step) for r in points)
    return slice(None), slice(None), *ends


def _whole(geometry: ConvGeometry, axis: int) -> bool:
    return geometry.padding_mode != "zeros" and sum(geometry.padding[axis]) > 0


def _axis_parts(geometry: ConvGeometry, axis: int) -> list[_AxisPart]:
    n, outputs = geometry.input_size[axis], geometry.output_size[axis]
    k, stride = geometry.kernel_size[axis], geometry.stride[axis]
    dilation, before = geometry.dilation[axis], geometry.padding[axis][0]
    if _whole(geometry, axis):
        return [_AxisPart(range(n), range(outputs), stride, geometry.padding[axis])]
    common = math.gcd(stride, dilation)
    apart = k <= stride // common
    classes = outputs if apart else min(dilation // common, outputs)
    parts = []
    for first in range(classes):
        members = range(first, outputs, classes if apart else dilation // common)
        sub_stride = 1 if len(members) == 1 else stride // common
        # Output members[t] reads, with tap p, the input at dilation * (sub_stride t + p) + offset.
        offset = first * stride - before
        low = max(0, -(offset // dilation))
        high = min(sub_stride * (len(members) - 1) + k - 1, (n - 1 - offset) // dilation)
        if high < low:
            continue
        from_output = max(0, -((k - 1 - low) // sub_stride))
        to_output = min(len(members) - 1, high // sub_stride)
        if to_output < from_output:
            continue
        members = members[from_output : to_output + 1]
        sub_stride = 1 if len(members) == 1 else sub_stride
        shift = (stride // common) * from_output
        last = sub_stride * (len(members) - 1) + k - 1
        parts.append(
            _AxisPart(
                range(dilation * low + offset, dilation * high + offset + 1, dilation),
                members,
                sub_stride,
                (low - shift, last - (high - shift)),
            )
        )
    return parts


def group_matrices(op: ConvOperator, max_bytes: int) -> Tensor:
    """The diagonal blocks of M that its groups are, dense, (groups, m, n); with gradient.

    Raises
    ------
    ValueError
        If they take more than `max_bytes`.
    """
    # Without groups the rows of one group's outputs are a block of their own.
    alone = derived_operator(op.weight, op.geometry)
    rows, columns = (n // op.groups for n in op.shape)
    return alone.to_dense(max_bytes).reshape(op.groups, rows, columns)
