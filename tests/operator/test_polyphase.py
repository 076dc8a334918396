"""Strided layers as stride-1 ones, against their own products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convspectra.operator._conv_operator import ConvOperator
from convspectra.operator._polyphase import (
    from_grid,
    from_phases,
    grid,
    phase_lengths,
    polyphase,
    to_grid,
    to_phases,
)
from convspectra.operator._structure import is_square_grid


@st.composite
def zero_padded(draw):
    sizes, strides, kernels, dilations, padding = [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        n, k = draw(st.integers(stride, 7)), draw(st.integers(1, 4))
        before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        after = max(after, dilation * (k - 1) + 1 - n - before)
        sizes.append(n), strides.append(stride), kernels.append(k), dilations.append(dilation)
        padding.append((before, after))
    groups, h, g = (draw(st.integers(1, n)) for n in (2, 3, 2))
    weight = torch.randn(groups * h, g, *kernels, dtype=torch.float64)
    return ConvOperator(
        weight, sizes, stride=strides, padding=padding, dilation=dilations, groups=groups
    )


@given(zero_padded())
@settings(max_examples=150)
def test_it_is_the_layer_between_its_points_on_the_grid(op):
    layer = polyphase(op)
    assert set(layer.geometry.stride) == {1}
    assert layer.geometry.output_size == layer.geometry.input_size == grid(op)
    x = torch.randn(2, *op.input_shape, dtype=torch.float64)
    y = from_grid(op, layer.apply(to_phases(op, x)))
    assert torch.allclose(y, op.apply(x), rtol=0, atol=1e-12)
    y = torch.randn(2, *op.output_shape, dtype=torch.float64)
    x = from_phases(op, layer.apply_adjoint(to_grid(op, y)))
    assert torch.allclose(x, op.apply_adjoint(y), rtol=0, atol=1e-12)


@given(zero_padded())
@settings(max_examples=80)
def test_the_points_are_those_of_the_lengths(op):
    there = to_phases(op, torch.ones(1, *op.input_shape, dtype=torch.float64))[0]
    expected = torch.ones(1)
    for n, lengths in zip(grid(op), phase_lengths(op), strict=True):
        along = torch.arange(n) < lengths.reshape(-1, *(1,) * expected.ndim)
        expected = expected[..., None] * along
    assert torch.equal(there, expected.repeat(op.groups, *(1,) * op.geometry.ndim).double())
    assert is_square_grid(op) == (bool(there.all()) and op.geometry.output_size == grid(op))


def test_stride_1_is_left_as_it_is():
    op = ConvOperator(torch.randn(3, 2, 3, 3, dtype=torch.float64), (4, 5))
    assert torch.equal(polyphase(op).weight, op.weight)
    x = torch.randn(2, *op.input_shape, dtype=torch.float64)
    assert torch.equal(to_phases(op, x), x)
    assert is_square_grid(op)


def test_the_weight_keeps_its_gradient():
    weight = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    op = ConvOperator(weight, 6, stride=2, padding=1)
    (polyphase(op).weight * polyphase(op).weight.detach()).sum().backward()
    assert torch.equal(weight.grad, weight)


@pytest.mark.parametrize(("size", "padding"), [(7, 1), (6, 0), (6, 2)])
def test_other_sizes_leave_holes_in_the_grid(size, padding):
    assert not is_square_grid(ConvOperator(torch.ones(1, 1, 3), size, stride=2, padding=padding))
