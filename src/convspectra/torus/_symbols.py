"""Fourier symbols of a convolution embedded in a torus.

On a torus of enough points per axis no tap wraps around to an input, and M is the submatrix of a
block circulant C with output points for rows and input points for columns. C is block diagonal in
Fourier space, one matrix (the symbol) per frequency.

Note [Polyphase]. With stride s the s inputs behind one torus point become channels of it, per axis:
input i of the padded array is channel i mod s of point i // s. M is then a stride-1 convolution
of s times as many channels per axis, and its symbol has h rows and g s^d columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convspectra.operator import ConvGeometry, ConvOperator


def angles(period: int, phase: float = 0.0, count: int | None = None) -> Tensor:
    """The first `count` frequencies of a cycle of `period` points, in radians per point, float64.

    Functions on the cycle are multiplied by ``exp(2 pi i phase)`` as they go around.
    """
    steps = torch.arange(period if count is None else count, dtype=torch.float64)
    return (steps + phase) * (2 * math.pi / period)


def half_count(period: int, phase: float) -> int:
    """How many frequencies determine a real function, for phase 0 or 1/2."""
    return period // 2 + 1 if phase == 0 else (period + 1) // 2


def half_multiplicity(period: int, phase: float) -> Tensor:
    """For how many of all frequencies each of those `half_count` stands, 1 or 2, float64."""
    k = torch.arange(half_count(period, phase), dtype=torch.float64)
    own_mirror = torch.remainder(2 * (k + phase), period) == 0
    return 2.0 - own_mirror.double()


def smallest_periods(geometry: ConvGeometry) -> tuple[int, ...]:
    """Fewest torus points per axis on which M is a submatrix of the circulant.

    All inputs and outputs must find room, and a tap that wraps around must land before the first
    input: ``N + max(padding)`` for stride 1 and a kernel that fits.
    """
    periods = []
    for axis in range(geometry.ndim):
        n, outputs = geometry.input_size[axis], geometry.output_size[axis]
        stride, before = geometry.stride[axis], geometry.padding[axis][0]
        period = max(outputs, -((-before - n) // stride))
        for tap in range(geometry.kernel_size[axis]):
            point, channel = divmod(tap * geometry.dilation[axis], stride)
            first_input = max(0, -((channel - before) // stride))
            period = max(period, outputs + point - first_input)
        periods.append(period)
    return tuple(periods)


def symbols(op: ConvOperator, frequencies: Sequence[Tensor]) -> Tensor:
    """The symbol at every point of a grid of frequencies.

    Parameters
    ----------
    op : ConvOperator
        Not transposed; float64 or float32.
    frequencies : sequence of Tensor
        One vector of angles per axis.

    Returns
    -------
    Tensor
        (groups, *frequencies, h / groups, g / groups * prod(stride)), complex:
        ``sum_p weight[..., p] exp(i theta (dilation p // stride))`` in the column of the phase
        ``dilation p mod stride``. Differentiable.

    Notes
    -----
    Cost: about ``h g`` times the frequencies times the first kernel size, in complex operations.
    """
    geometry, ndim = op.geometry, op.geometry.ndim
    blocks = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])
    result = torch.complex(blocks, torch.zeros_like(blocks)).permute(0, *range(3, 3 + ndim), 1, 2)
    # From the left, so that the entries of a symbol stay side by side.
    for axis in reversed(range(ndim)):
        taps = torch.arange(geometry.kernel_size[axis]) * geometry.dilation[axis]
        stride = geometry.stride[axis]
        waves = frequencies[axis][:, None] * (taps // stride)
        in_phase = torch.arange(stride)[:, None] == taps % stride
        table = torch.polar(torch.ones_like(waves), waves)[:, None] * in_phase
        before, behind = result.shape[: 1 + axis], result.shape[2 + axis :]
        rows = result.reshape(*before, len(taps), -1)
        result = table.flatten(0, 1).to(result) @ rows
        result = result.reshape(*before, *table.shape[:2], *behind)
    # Now (groups, f_first, s_first, ..., f_last, s_last, h, g).
    of_axis = range(1, 1 + 2 * ndim, 2)
    order = [0, *of_axis, 1 + 2 * ndim, 2 + 2 * ndim, *(i + 1 for i in of_axis)]
    return result.permute(order).flatten(2 + ndim)
