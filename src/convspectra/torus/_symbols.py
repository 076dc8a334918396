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

from convspectra.operator import ConvGeometry, ConvOperator, check_bytes, inputs_per_point


def angles(period: int, phase: float = 0.0, count: int | None = None) -> Tensor:
    """The first `count` frequencies of a cycle of `period` points, in radians per point, float64.

    Functions on the cycle are multiplied by ``exp(2 pi i phase)`` as they go around.
    """
    steps = torch.arange(period if count is None else count, dtype=torch.float64, device="cpu")
    return (steps + phase) * (2 * math.pi / period)


def half_count(period: int, phase: float) -> int:
    """How many frequencies determine a real function, for phase 0 or 1/2."""
    return period // 2 + 1 if phase == 0 else (period + 1) // 2


def half_multiplicity(period: int, phase: float) -> Tensor:
    """For how many of all frequencies each of those `half_count` stands, 1 or 2, float64."""
    k = torch.arange(half_count(period, phase), dtype=torch.float64, device="cpu")
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
        table = _waves_of_taps(geometry, axis, frequencies[axis])
        before, behind = result.shape[: 1 + axis], result.shape[2 + axis :]
        rows = result.reshape(*before, table.shape[2], -1)
        result = table.flatten(0, 1).to(result) @ rows
        result = result.reshape(*before, *table.shape[:2], *behind)
    # Now (groups, f_first, s_first, ..., f_last, s_last, h, g).
    of_axis = range(1, 1 + 2 * ndim, 2)
    order = [0, *of_axis, 1 + 2 * ndim, 2 + 2 * ndim, *(i + 1 for i in of_axis)]
    return result.permute(order).flatten(2 + ndim)


def _waves_of_taps(geometry: ConvGeometry, axis: int, theta: Tensor) -> Tensor:
    """``exp(i theta (dilation p // stride))`` for tap p, in the row of its phase, 0 in the others.

    (frequencies, stride, taps), complex: Note [Polyphase].
    """
    taps = torch.arange(geometry.kernel_size[axis], device="cpu") * geometry.dilation[axis]
    stride = geometry.stride[axis]
    waves = theta[:, None] * (taps // stride)
    in_phase = torch.arange(stride, device="cpu")[:, None] == taps % stride
    return torch.polar(torch.ones_like(waves), waves)[:, None] * in_phase


def symbol_shape(op: ConvOperator) -> tuple[int, int]:
    """Rows and columns of the symbols of one group."""
    return op.weight.shape[0] // op.groups, inputs_per_point(op)


def half_frequencies(op: ConvOperator) -> tuple[Tensor, Tensor]:
    """One of each pair of opposite frequencies of a layer that `is_circulant`, and 1 or 2 copies.

    Frequencies are numbered as the points of the torus are, (b,); the copies are float64.
    """
    periods = op.geometry.output_size
    index = torch.arange(math.prod(periods), device=op.device).reshape(periods)
    mirror = index
    for axis in range(len(periods)):
        mirror = mirror.roll(-1, axis).flip(axis)
    kept = torch.nonzero(index.flatten() <= mirror.flatten()).flatten()
    return kept, 1.0 + (mirror.flatten()[kept] != kept).double()


def symbols_at(op: ConvOperator, frequencies: Tensor, max_bytes: int) -> Tensor:
    """The symbols of a layer that `is_circulant` at these frequencies.

    Returns
    -------
    Tensor
        (groups * b, h / groups, g / groups * prod(stride)), complex, group after group: those of
        `symbols`, which is cheaper where all frequencies of a grid are wanted.

    Raises
    ------
    ValueError
        If they take more than `max_bytes`.

    Notes
    -----
    Cost: a complex product of the taps with waves: ``8 h g prod(k) prod(stride)`` flops per symbol.
    """
    g, weight = op.geometry, op.weight
    rows, columns = symbol_shape(op)
    size = 2 * weight.element_size() * op.groups * len(frequencies) * rows * columns
    check_bytes("the symbols", size, max_bytes)
    table = torch.ones(len(frequencies), 1, 1, dtype=torch.complex128, device="cpu")
    for axis, step in enumerate(torch.unravel_index(frequencies.cpu(), g.output_size)):
        of_axis = _waves_of_taps(g, axis, angles(g.output_size[axis])[step])
        table = torch.einsum("bsp,btq->bstpq", table, of_axis).flatten(3).flatten(1, 2)
    flat = weight.reshape(op.groups, rows * weight.shape[1], -1).mT
    flat = torch.complex(flat, torch.zeros_like(flat))
    result = table.flatten(0, 1).to(flat) @ flat
    result = result.reshape(-1, math.prod(g.stride), rows, weight.shape[1])
    return result.permute(0, 2, 3, 1).reshape(-1, rows, columns)


def row_grams_at(op: ConvOperator, frequencies: Tensor, max_bytes: int) -> Tensor:
    """S S* for the symbols S of a layer that `is_circulant` at these frequencies.

    M M' is a convolution of stride 1 itself: its taps are sums of products of two taps of M that
    lie a multiple of the stride apart.

    Returns
    -------
    Tensor
        (groups * b, h / groups, h / groups), complex, group after group.

    Raises
    ------
    ValueError
        If they take more than `max_bytes`.

    Notes
    -----
    Cost: ``h h g / groups prod(2 k / stride - 1)`` flops, about, and a product of its taps with
    waves, ``4 h h / groups prod(2 k / stride - 1)`` flops per symbol.
    """
    g = op.geometry
    rows, _ = symbol_shape(op)
    size = 2 * op.weight.element_size() * op.groups * len(frequencies) * rows**2
    check_bytes("the Gram matrices of the symbols", size, max_bytes)
    weight = op.weight.reshape(op.groups, rows, op.weight.shape[1], -1)
    taps = torch.stack(_taps(op), 1).tolist()
    pairs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, one in enumerate(taps):
        for j, other in enumerate(taps):
            apart = [a - b for a, b in zip(one, other, strict=True)]
            shift = tuple(a // stride for a, stride in zip(apart, g.stride, strict=True))
            whole = all(a % stride == 0 for a, stride in zip(apart, g.stride, strict=True))
            if whole and shift >= (0,) * len(shift):  # the others are the transposes of these
                pairs.setdefault(shift, []).append((i, j))
    even, odd = [], []
    for shift, those in pairs.items():
        left, right = (weight[..., list(part)].flatten(2) for part in zip(*those, strict=True))
        tap = left @ right.mT
        transposed = tap.mT if any(shift) else torch.zeros_like(tap)
        even.append(tap + transposed)
        odd.append(tap - transposed if any(shift) else transposed)
    steps = torch.unravel_index(frequencies, g.output_size)
    turns = weight.new_zeros(len(frequencies), len(pairs))
    shifts = torch.tensor(list(pairs), device=op.device)
    for axis, (step, period) in enumerate(zip(steps, g.output_size, strict=True)):
        turns += (step[:, None] * shifts[:, axis] % period).to(turns) / period
    angles = 2 * math.pi * turns
    real, imag = (
        wave @ torch.stack(part, 1).flatten(2)
        for wave, part in ((angles.cos(), even), (angles.sin(), odd))
    )
    return torch.complex(real, imag).reshape(-1, rows, rows)


def _taps(op: ConvOperator) -> list[Tensor]:
    """Where the taps of the kernel lie, an array for every axis."""
    g = op.geometry
    axes = [
        torch.arange(k, device=op.device) * d
        for k, d in zip(g.kernel_size, g.dilation, strict=True)
    ]
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]
