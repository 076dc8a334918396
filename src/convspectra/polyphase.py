"""A strided layer as one of stride 1: the inputs behind an output point become channels of it.

With stride s an output reads from s phases of the inputs per axis. Where a layer has exactly s
inputs to every output point, M is a stride-1 layer of g s^d channels on the points of the output,
after a permutation of its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import ConvOperator


def has_polyphase(op: ConvOperator) -> bool:
    """Whether there is a stride-1 layer with zero padding and as many output as input points."""
    g = op.geometry
    sizes = zip(g.input_size, g.stride, g.output_size, strict=True)
    return g.ndim > 0 and g.padding_mode == "zeros" and all(n == s * m for n, s, m in sizes)


def polyphase(op: ConvOperator) -> ConvOperator:
    """The stride-1 layer of an `op` that is not transposed and `has_polyphase`; differentiable.

    Its taps are those of `op`, and zeros where a phase has none at a point.
    """
    g = op.geometry
    taps = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    padding = []
    for axis in range(g.ndim):
        reads = [
            divmod(tap * g.dilation[axis] - g.padding[axis][0], g.stride[axis])
            for tap in range(g.kernel_size[axis])
        ]
        before, after = max(0, -reads[0][0]), max(0, reads[-1][0])
        table = taps.new_zeros(len(reads), g.stride[axis], before + 1 + after)
        for tap, (point, phase) in enumerate(reads):
            table[tap, phase, before + point] = 1
        taps = torch.tensordot(taps, table, dims=([3], [0]))
        padding.append((before, after))
    phases = range(3, 3 + 2 * g.ndim, 2)
    taps = taps.permute(0, 1, 2, *phases, *(i + 1 for i in phases))
    weight = taps.flatten(2, 2 + g.ndim).flatten(0, 1)
    return ConvOperator(weight, g.output_size, padding=padding, groups=op.groups)


def from_phases(op: ConvOperator, x: Tensor) -> Tensor:
    """Inputs of `polyphase(op)`, (b, channels, *output_size), as inputs of `op`."""
    g = op.geometry
    x = x.reshape(len(x), -1, *g.stride, *g.output_size)
    order = [i for axis in range(2, 2 + g.ndim) for i in (axis + g.ndim, axis)]
    return x.permute(0, 1, *order).reshape(len(x), *op.input_shape)
