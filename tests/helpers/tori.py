"""Layers with an embedding, and the circulant around them, dense."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._structure import has_embedding
from convspectra.torus._embedding import CirculantEmbedding


@st.composite
def embedded(draw: st.DrawFn) -> tuple[ConvOperator, Tensor]:
    """An operator with an embedding, not transposed, and its naive matrix."""
    layer = draw(layers(kinds=("conv", "transposed")))
    op, dense = layer.operator(), layer.dense().detach()
    op, dense = (op.T, dense.T) if op.transposed else (op, dense)
    assume(has_embedding(op))
    return op, dense


CIRCULAR = {
    "1 axis, even": Layer(random(2, 2, 3), (8,)),
    "1 axis, odd": Layer(random(2, 3, 3), (7,)),
    "one tap": Layer(random(3, 2, 1), (4,)),
    "even kernel": Layer(random(2, 2, 4), (6,)),
    "kernel as long as the input": Layer(random(1, 2, 5), (5,)),
    "dilated": Layer(random(2, 2, 3), (9,), {"dilation": 2}),
    "asymmetric": Layer(random(2, 1, 3), (5,), {"padding": [(0, 2)]}),
    "stride 2": Layer(random(3, 2, 3), (8,), {"stride": 2, "padding": 1}),
    "stride 3, dilated": Layer(random(2, 1, 3), (9,), {"stride": 3, "dilation": 2, "padding": 2}),
    "stride, square": Layer(random(4, 2, 2), (6,), {"stride": 2, "padding": [(1, 0)]}),
    "2 axes": Layer(random(2, 2, 3, 3), (4, 5)),
    "2 axes, even": Layer(random(2, 3, 3, 2), (4, 4)),
    "groups": Layer(random(4, 2, 3, 3), (4, 3), {"groups": 2}),
    "depthwise": Layer(random(3, 1, 3, 3), (4, 4), {"groups": 3}),
    "2 axes, strides": Layer(random(2, 2, 3, 3), (4, 6), {"stride": (2, 3), "padding": 1}),
    "strided groups": Layer(random(4, 1, 3), (6,), {"stride": 2, "groups": 2, "padding": 1}),
    "3 axes": Layer(random(2, 1, 3, 2, 3), (3, 4, 3)),
    "3 axes, stride": Layer(
        random(2, 2, 2, 2, 2), (4, 2, 2), {"stride": 2, "padding": [(1, 0), (0, 1), (1, 0)]}
    ),
}
for layer in CIRCULAR.values():
    layer.options["padding_mode"] = "circular"
each_circular = pytest.mark.parametrize("layer", CIRCULAR.values(), ids=CIRCULAR.keys())


def matrix(preconditioner: Callable[[Tensor], Tensor], order: int) -> Tensor:
    """B, by its action on the identity."""
    return preconditioner(torch.eye(order, dtype=torch.float64)).T


def torus_tables(op: ConvOperator, twisted: bool = False) -> list[np.ndarray]:
    """Per axis the (taps, outputs, inputs) table of the circulant; twisted: -1 once around."""
    g, tables = op.geometry, []
    for axis, period in enumerate(CirculantEmbedding(op).periods):
        stride, dilation, before = g.stride[axis], g.dilation[axis], g.padding[axis][0]
        table = np.zeros((g.kernel_size[axis], period, period * stride))
        for tap, point in itertools.product(range(len(table)), range(period)):
            turns, source = divmod(stride * point + dilation * tap - before, period * stride)
            table[tap, point, source] = (-1) ** turns if twisted else 1
        tables.append(table)
    return tables


def torus_matrix(op: ConvOperator, twisted: bool = False) -> Tensor:
    """The circulant around a layer, dense, tap by tap: rows (h, *P), columns (g, *(s P))."""
    h, g = op.weight.shape[:2]
    tables = torus_tables(op, twisted)
    result: np.ndarray | float = 0.0
    for tap in itertools.product(*map(range, op.weight.shape[2:])):
        full = np.zeros((h, g * op.groups))
        for row in range(h):
            first = row // (h // op.groups) * g
            full[row, first : first + g] = op.weight[(row, slice(None), *tap)].double()
        parts = (table[p] for table, p in zip(tables, tap, strict=True))
        result = result + functools.reduce(np.kron, parts, full)
    return torch.from_numpy(result)


def restricted(
    op: ConvOperator, torus: Tensor, *, rows: dict[int, int], columns: dict[int, int]
) -> Tensor:
    """Rows and columns of the first points along some axes, {axis: points}."""
    periods = CirculantEmbedding(op).periods
    sizes = [p * s for p, s in zip(periods, op.geometry.stride, strict=True)]
    kept = torus.reshape(op.output_shape[0], *periods, op.input_shape[0], *sizes)
    for axis, points in rows.items():
        kept = kept.narrow(1 + axis, 0, points)
    for axis, points in columns.items():
        kept = kept.narrow(2 + len(periods) + axis, 0, points)
    return kept.reshape(math.prod(kept.shape[: 1 + len(periods)]), -1)


BLOCKS_APART = {
    "kernel == stride": ConvOperator(random(8, 2, 2, 2), (6, 4), stride=2, padding=0),
    "kernel == stride, tall": ConvOperator(random(10, 2, 2, 2), (6, 4), stride=2, padding=0),
    "kernel == stride, wide": ConvOperator(random(3, 2, 2, 2), (6, 4), stride=2, padding=0),
    "kernel 1": ConvOperator(random(3, 5, 1), 4),
    "kernel 1, groups": ConvOperator(random(6, 2, 1), 4, groups=2),
    "linear": ConvOperator(random(4, 6), ()),
    "linear, tall": ConvOperator(random(6, 4), ()),
    "circular": ConvOperator(random(3, 2, 3, 3), (4, 5), padding_mode="circular"),
    "circular, strided, groups": ConvOperator(
        random(4, 2, 3), 6, stride=2, groups=2, padding=1, padding_mode="circular"
    ),
}


def dominated(h: int, g: int, size: tuple[int, ...], **options) -> ConvOperator:
    """An orthogonal center tap and small other ones: the border changes little."""
    weight = 0.05 * random(h, g, *[3] * len(size))
    q = torch.linalg.qr(random(max(h, g), min(h, g), seed=1)).Q
    weight[(..., *[1] * len(size))] = q if h >= g else q.T
    return ConvOperator(weight, size, **options)


INTERIOR = {
    "square": dominated(2, 2, (12,)),
    "square, 2 axes": dominated(2, 2, (6, 5)),
    "tall": dominated(4, 2, (5, 5)),
    "wide": dominated(2, 3, (12,)),
    "3 axes": dominated(2, 1, (3, 4, 3)),
}

NEAR_NORM = {
    "square": ConvOperator(random(3, 3, 3), 9),
    "square, 2 axes": ConvOperator(random(2, 2, 3, 3), (5, 4)),
    "tall": ConvOperator(random(5, 2, 3, 3), (5, 4)),
    "wide": ConvOperator(random(2, 5, 3, 3), (5, 4)),
    "even kernel": ConvOperator(random(2, 2, 4, 2), (5, 6)),
    "groups": ConvOperator(random(6, 1, 3, 3), (5, 5), groups=2),
    "wide groups": ConvOperator(random(2, 3, 3), 9, groups=2),
    "strided": ConvOperator(random(3, 2, 3, 3), (6, 6), stride=2, padding=1),
    "strided, tall": ConvOperator(random(10, 2, 3, 3), (6, 6), stride=2, padding=1),
    "strided, dilated": ConvOperator(random(3, 2, 3), 21, stride=2, dilation=3, padding=3),
    "linear": ConvOperator(random(4, 6), ()),
    "3 axes": ConvOperator(random(4, 1, 3, 2, 3), (3, 4, 3)),
    "long": ConvOperator(random(2, 2, 3), 70),
    "circular": ConvOperator(random(3, 2, 3, 3), (4, 5), padding_mode="circular"),
    "circular, strided": ConvOperator(random(3, 2, 3), 8, stride=2, padding=1),
}
