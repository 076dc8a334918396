"""The structure of M, as far as the options of a layer alone tell it."""

from __future__ import annotations

import math

from convspectra.operator._conv_operator import ConvOperator


def is_wide(op: ConvOperator) -> bool:
    """Whether M has more columns than rows."""
    return op.shape[0] < op.shape[1]


def has_augmented(op: ConvOperator) -> bool:
    """Whether K is part of a convolution whose circulant may be regular.

    That takes zero padding, a point of every phase, and as many channels on the longer side of M as
    on the other at least.
    """
    g = op.geometry
    if g.ndim == 0 or g.padding_mode != "zeros":
        return False
    outputs, inputs = op.weight.shape[0] // op.groups, inputs_per_point(op)
    agree = outputs <= inputs if is_wide(op) else outputs >= inputs
    return agree and all(s <= n for s, n in zip(g.stride, g.input_size, strict=True))


def is_square_toeplitz(op: ConvOperator) -> bool:
    """Whether M is square with zero padding and stride 1: what the capacitance method inverts."""
    g = op.geometry
    return (
        g.ndim > 0
        and g.padding_mode == "zeros"
        and all(s == 1 for s in g.stride)
        and g.output_size == g.input_size
        and op.weight.shape[0] == op.weight.shape[1] * op.groups
    )


def is_circulant(op: ConvOperator) -> bool:
    """Whether M is the circulant: circular padding, and as many outputs as the stride leaves."""
    g = op.geometry
    return (
        g.ndim > 0
        and g.padding_mode == "circular"
        and all(
            n == s * out for n, s, out in zip(g.input_size, g.stride, g.output_size, strict=True)
        )
    )


def has_embedding(op: ConvOperator) -> bool:
    """Whether M is a submatrix of a circulant: zero padding, or circular all around."""
    g = op.geometry
    return g.ndim > 0 and (g.padding_mode == "zeros" or is_circulant(op))


def is_square_grid(op: ConvOperator) -> bool:
    """Whether every output and every phase has all points of the grid."""
    g = op.geometry
    return all(n == s * m for n, s, m in zip(g.input_size, g.stride, g.output_size, strict=True))


def inputs_per_point(op: ConvOperator) -> int:
    """Channels of the inputs of a group on the grid."""
    return op.weight.shape[1] * math.prod(op.geometry.stride)
