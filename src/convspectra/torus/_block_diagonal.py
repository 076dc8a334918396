"""Symbols of a circularly padded layer, and their Gram matrices, at chosen frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    check_bytes,
)


def symbol_shape(op: ConvOperator) -> tuple[int, int]:
    """Rows and columns of the symbols of one group."""
    return op.weight.shape[0] // op.groups, op.weight.shape[1] * math.prod(op.geometry.stride)


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
        (groups * b, h / groups, g / groups * prod(stride)), complex, group after group. The order
        of the columns is not that of `symbol.symbols`, which the singular values do not show.

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
    steps = torch.unravel_index(frequencies, g.output_size)
    taps = _taps(op)
    turns = weight.new_zeros(len(frequencies), len(taps[0]))
    phase = torch.zeros_like(taps[0])
    for step, tap, stride, period in zip(steps, taps, g.stride, g.output_size, strict=True):
        turns += (step[:, None] * (tap // stride) % period).to(turns) / period
        phase = phase * stride + tap % stride
    phases = math.prod(g.stride)
    in_phase = (phase == torch.arange(phases, device=op.device)[:, None]).to(turns)
    flat = weight.reshape(op.groups, rows * weight.shape[1], -1).mT
    waves = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
    result = (waves[:, None] * in_phase).flatten(0, 1) @ flat.to(waves.dtype)
    result = result.reshape(-1, phases, rows, weight.shape[1])
    return result.transpose(1, 2).reshape(-1, rows, columns)


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
