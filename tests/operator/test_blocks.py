"""Independent blocks against the naive matrix and the connected components of its pattern."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, direct, layers, random
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._blocks import Block, gather, independent_blocks, scatter


def assembled(op: ConvOperator, blocks: list[Block]) -> Tensor:
    """The sum of the scattered blocks, by their action on the identity."""
    columns = math.prod(op.input_shape)
    x = torch.eye(columns, dtype=torch.float64).reshape(columns, *op.input_shape)
    total = torch.zeros(columns, *op.output_shape, dtype=torch.float64)
    for block in blocks:
        for place in block.places:
            image = block.op.matvec(gather(x, place.inputs))
            total += scatter(image, place.outputs, op.geometry.output_size)
    return total.flatten(1).T


def components(layer: Layer) -> int:
    """Connected components, with an entry, of the pattern of one channel: by SciPy."""
    options = {k: v for k, v in layer.options.items() if k != "groups"}
    ones = torch.ones(1, 1, *layer.weight.shape[2:], dtype=torch.float64)
    rows, columns = np.nonzero(Layer(ones, layer.input_size, options).dense().detach().numpy())
    if len(rows) == 0:
        return 0
    height, width = rows.max() + 1, columns.max() + 1
    graph = coo_array(
        (np.ones(len(rows)), (rows, height + columns)), shape=(height + width, height + width)
    )
    labels = connected_components(graph, directed=False)[1]
    return len(np.unique(labels[rows]))


# --- the sum --------------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=250)
def test_a_layer_is_the_sum_of_its_blocks(layer):
    op, dense = direct(layer)
    total = assembled(op, independent_blocks(op))
    assert torch.allclose(total, dense, atol=1e-13 * max(1.0, float(dense.abs().max())))


@given(layers())
@settings(max_examples=200)
def test_blocks_share_no_input_and_no_output(layer):
    op, dense = direct(layer)
    blocks = independent_blocks(op)
    for side, sizes in (
        ("inputs", op.geometry.input_size),
        ("outputs", op.geometry.output_size),
    ):
        covered = torch.zeros(1, 1, *sizes)
        for block in blocks:
            for place in block.places:
                points = getattr(place, side)
                ones = torch.ones(1, 1, *map(len, points))
                covered += scatter(ones, points, sizes)
        assert covered.max() <= 1
        used = dense.abs().amax(0 if side == "inputs" else 1)
        channels = len(used) // math.prod(sizes)
        # Random weights: what is not 0 is covered, and only that.
        used = used.reshape(channels, *sizes).amax(0) > 0
        if op.geometry.padding_mode == "zeros":
            assert torch.equal(covered[0, 0] > 0, used)
        else:
            assert (covered[0, 0] >= used).all()


@given(layers())
@settings(max_examples=250)
def test_blocks_cannot_be_divided_further(layer):
    """With zero padding there are as many as the pattern has connected components."""
    op, _ = direct(layer)
    if op.geometry.padding_mode != "zeros":
        return
    places = [place for block in independent_blocks(op) for place in block.places]
    assert len(places) == components(layer)


@given(layers())
@settings(max_examples=150)
def test_equal_blocks_are_given_once(layer):
    op, _ = direct(layer)
    blocks = independent_blocks(op)
    kinds = [(block.op.geometry, block.op.groups) for block in blocks]
    assert len(set(kinds)) == len(kinds)
    for block in blocks:
        assert block.op.weight is op.weight
        assert not block.op.transposed
        for place in block.places:
            assert block.op.input_shape[1:] == tuple(map(len, place.inputs))
            assert block.op.output_shape[1:] == tuple(map(len, place.outputs))


def test_blocks_are_differentiable():
    weight = random(2, 2, 3).requires_grad_()
    op = ConvOperator(weight, 7, dilation=2)
    (gradient,) = torch.autograd.grad(assembled(op, independent_blocks(op)).square().sum(), weight)
    (expected,) = torch.autograd.grad(op.to_dense().square().sum(), weight)
    assert torch.allclose(gradient, expected)


# --- scatter and gather ---------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=100)
def test_gather_is_the_adjoint_of_scatter(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    points = []
    for n in sizes:
        start = data.draw(st.integers(0, n - 1))
        step = data.draw(st.integers(1, 3))
        points.append(range(start, data.draw(st.integers(start + 1, n)), step))
    inner = tuple(map(len, points))
    x, y = random(2, 3, *inner), random(2, 3, *sizes, seed=1)
    left = (scatter(x, tuple(points), sizes) * y).sum()
    right = (x * gather(y, tuple(points))).sum()
    assert torch.isclose(left, right, rtol=1e-12, atol=1e-12)
    assert torch.equal(gather(scatter(x, tuple(points), sizes), tuple(points)), x)
    assert scatter(x, tuple(points), sizes).count_nonzero() == x.count_nonzero()
    # Where the points are: written out with NumPy's own indexing.
    expected = y.numpy()[np.ix_(range(2), range(3), *points)]
    assert np.array_equal(gather(y, tuple(points)).numpy(), expected)


def test_a_linear_layer_is_one_block():
    op = ConvOperator(random(3, 4), ())
    (block,) = independent_blocks(op)
    assert block.op.shape == (3, 4)
    assert [(p.inputs, p.outputs) for p in block.places] == [((), ())]
    x = random(2, 4)
    assert torch.equal(gather(scatter(x, (), ()), ()), x)


# --- known cases ----------------------------------------------------------------------------------


def places(op: ConvOperator) -> list[int]:
    return sorted(len(block.places) for block in independent_blocks(op))


def shapes(op: ConvOperator) -> list[tuple[int, int]]:
    return sorted(block.op.shape for block in independent_blocks(op))


W = random(2, 3, 3, 3)
COUNTS = {
    "stride 1": (ConvOperator(W, 6), [1], [(72, 108)]),
    "stride 2": (ConvOperator(W, 6, stride=2, padding=1), [1], [(18, 108)]),
    "kernel 1": (ConvOperator(random(2, 3, 1, 1), (4, 5)), [20], [(2, 3)]),
    "kernel 1, strided": (
        ConvOperator(random(2, 3, 1, 1), (4, 5), stride=2, padding=0),
        [6],
        [(2, 3)],
    ),
    "kernel == stride": (ConvOperator(W, 6, stride=3, padding=0), [4], [(2, 27)]),
    "kernel < stride": (ConvOperator(W, 8, stride=4, padding=0), [4], [(2, 27)]),
    "kernel == stride on one axis": (
        ConvOperator(W, (6, 5), stride=(3, 1), padding=(0, 1)),
        [2],
        [(10, 45)],
    ),
    "dilation 2, even": (ConvOperator(W, 6, dilation=2), [4], [(18, 27)]),
    "dilation 2, odd": (
        ConvOperator(W, 5, dilation=2),
        [1, 1, 1, 1],
        [(8, 12), (12, 18), (12, 18), (18, 27)],
    ),
    "dilation 3": (ConvOperator(random(1, 1, 3), 9, dilation=3), [3], [(3, 3)]),
    "dilation past the input": (ConvOperator(random(1, 1, 3), 4, dilation=9), [4], [(1, 1)]),
    "dilation 2, stride 2": (
        ConvOperator(random(1, 1, 3), 8, dilation=2, stride=2, padding=2),
        [1],
        [(4, 4)],
    ),
    # Inputs 0 3 6 9 and 2 5 8 11 with a zero before them, 1 4 7 10 with one behind.
    "dilation 3, stride 2": (
        ConvOperator(random(1, 1, 3), 12, dilation=3, stride=2, padding=3),
        [1, 2],
        [(2, 4), (2, 4)],
    ),
    "circular, dilated": (
        ConvOperator(W, 6, dilation=2, padding_mode="circular"),
        [1],
        [(72, 108)],
    ),
    "reflect, kernel == stride, no padding": (
        ConvOperator(W, 6, stride=3, padding=0, padding_mode="reflect"),
        [4],
        [(2, 27)],
    ),
    "circular on one axis, dilated on the other": (
        ConvOperator(
            random(1, 1, 3, 2),
            (4, 6),
            dilation=(1, 2),
            padding=[(1, 1), (0, 0)],
            padding_mode="circular",
        ),
        [2],
        [(8, 12)],
    ),
    "groups": (ConvOperator(random(4, 1, 3), 6, groups=2, dilation=2), [2], [(12, 6)]),
    # Input 7 of 8 is read by no tap.
    "unread inputs": (ConvOperator(random(1, 1, 3), 8, stride=2, padding=0), [1], [(3, 7)]),
    # Outputs 0, 1 and 6, 7 of 8 read nothing but zeros.
    "rows that read only padding": (ConvOperator(random(1, 1, 1), 4, padding=2), [4], [(1, 1)]),
    "more such rows": (ConvOperator(random(1, 1, 2), 3, padding=4), [1], [(4, 3)]),
    "taps that read only padding": (ConvOperator(random(1, 1, 5), 1, padding=2), [1], [(1, 1)]),
}


@pytest.mark.parametrize(("op", "count", "shape"), COUNTS.values(), ids=COUNTS.keys())
def test_known_cases(op, count, shape):
    assert places(op) == count
    assert shapes(op) == shape


def test_a_layer_that_reads_nothing_has_no_block():
    """Kernel 1, stride 4, one point of padding: the one output reads a padded zero."""
    assert independent_blocks(ConvOperator(random(1, 1, 1), 3, stride=4, padding=[(1, 0)])) == []
    assert independent_blocks(ConvOperator(random(1, 1, 2), 1, dilation=2, padding=[(1, 1)])) == []


def test_where_dilated_blocks_stand():
    op = ConvOperator(random(1, 1, 3), 6, dilation=2)
    (block,) = independent_blocks(op)
    assert {place.inputs for place in block.places} == {(range(0, 5, 2),), (range(1, 6, 2),)}
    assert all(list(p.inputs[0]) == list(p.outputs[0]) for p in block.places)
    assert block.op.geometry.padding == ((1, 1),)
    assert block.op.geometry.dilation == (1,)


def test_outputs_cut_off_by_output_padding():
    """The convolution behind a transposed layer may have fewer outputs than its inputs allow."""
    layer = Layer(
        random(2, 2, 2),
        (3,),
        {"transposed": True, "stride": 2, "dilation": 3, "padding": 0, "output_padding": 2},
    )
    op, dense = direct(layer)
    assert torch.allclose(assembled(op, independent_blocks(op)), dense, atol=1e-14)
