"""Strided layers as stride-1 ones, against their own products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convspectra.operator import ConvOperator
from convspectra.polyphase import from_phases, has_polyphase, polyphase


@st.composite
def same_layers(draw):
    ndim = draw(st.integers(1, 3))
    points, strides, kernels, dilations, padding = [], [], [], [], []
    for _ in range(ndim):
        m, stride, dilation = (draw(st.integers(1, n)) for n in (4, 3, 2))
        k = draw(st.integers(1, 4))
        # As many outputs as there are strides of inputs.
        total = dilation * (k - 1) + 1 - stride + draw(st.integers(0, stride - 1))
        if total < 0:
            k, dilation, total = stride, 1, 0
        before = draw(st.integers(0, total))
        points.append(m), strides.append(stride), kernels.append(k), dilations.append(dilation)
        padding.append((before, total - before))
    groups, h, g = (draw(st.integers(1, n)) for n in (2, 3, 2))
    weight = torch.randn(groups * h, g, *kernels, dtype=torch.float64)
    sizes = [m * s for m, s in zip(points, strides, strict=True)]
    return ConvOperator(
        weight, sizes, stride=strides, padding=padding, dilation=dilations, groups=groups
    )


@given(same_layers())
@settings(max_examples=150)
def test_a_permutation_of_the_inputs_makes_the_stride_1(op):
    assert has_polyphase(op)
    layer = polyphase(op)
    assert layer.shape == op.shape
    assert set(layer.geometry.stride) == {1}
    assert layer.geometry.output_size == layer.geometry.input_size == op.geometry.output_size
    x = torch.randn(3, *layer.input_shape, dtype=torch.float64)
    inputs = from_phases(op, x)
    assert torch.allclose(layer.apply(x), op.apply(inputs), rtol=0, atol=1e-13)
    assert torch.equal(inputs.flatten().sort().values, x.flatten().sort().values)


def test_stride_1_is_left_as_it_is():
    op = ConvOperator(torch.randn(3, 2, 3, 3, dtype=torch.float64), (4, 5))
    assert torch.equal(polyphase(op).weight, op.weight)
    x = torch.randn(2, *op.input_shape, dtype=torch.float64)
    assert torch.equal(from_phases(op, x), x)


def test_the_weight_keeps_its_gradient():
    weight = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    op = ConvOperator(weight, 6, stride=2, padding=1)
    (polyphase(op).weight * polyphase(op).weight.detach()).sum().backward()
    assert torch.equal(weight.grad, weight)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (7, {"stride": 2, "padding": 1}),
        (6, {"padding": 0}),
        (6, {"padding": 2}),
        (6, {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_others_have_none(size, options):
    assert not has_polyphase(ConvOperator(torch.ones(1, 1, 3), size, **options))
    assert not has_polyphase(ConvOperator(torch.ones(2, 1), ()))
