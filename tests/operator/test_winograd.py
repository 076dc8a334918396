"""Winograd's minimal filtering against PyTorch's convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import convspectra as cs
from convspectra.operator import _winograd as winograd
from convspectra.operator._product import Product, rounding_of
from convspectra.operator._winograd import WinogradConvolution, faster_convolution


@st.composite
def layers(draw):
    """A layer that can be convolved so, with numbers of products by axis."""
    ndim = draw(st.integers(1, 3))
    most = draw(st.sampled_from([4, 6]))
    taps = [draw(st.integers(1, most - 1)) for _ in range(ndim)]
    sizes = [draw(st.integers(r, 9)) for r in taps]
    padding = [(draw(st.integers(0, r)), draw(st.integers(0, r))) for r in taps]
    h, g = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(h, g, *taps, dtype=torch.float64, generator=generator)
    products = tuple(1 if r == 1 else most for r in taps)
    return cs.ConvOperator(weight, sizes, padding=padding), products, generator


@given(layers(), st.integers(0, 5), st.sampled_from([1 << 24, 1 << 11, 1]))
def test_it_is_the_convolution(layer, batch, tile_bytes):
    op, products, generator = layer
    x = torch.randn(batch, *op.input_shape, dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "TILE_BYTES", tile_bytes)
        y = WinogradConvolution(op.weight, op.geometry, products).apply(x)
    size = float(op.weight.abs().sum() * x.abs().max()) if batch else 0.0
    torch.testing.assert_close(y, op.apply(x), rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((64, 64, 3, 3), 32), ((48, 96, 3, 3), 40), ((512, 512, 3, 3), 7), ((64, 64, 5, 5), 16)],
)
def test_its_rounding_is_that_of_a_product(shape, size):
    torch.manual_seed(0)
    op = cs.ConvOperator(torch.randn(shape, dtype=torch.float64), (size, size))
    fast, plain = Product(op, fast=True), Product(op)
    assert isinstance(fast._forward, WinogradConvolution)
    assert isinstance(fast._backward, WinogradConvolution)
    x = torch.randn(2, op.shape[1], dtype=torch.float64)
    y = torch.randn(2, op.shape[0], dtype=torch.float64)
    for found, expected in (
        (fast.apply(x), plain.apply(x)),
        (fast.apply_adjoint(y), plain.apply_adjoint(y)),
        (fast.gram(x), plain.gram(x)),
    ):
        error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        assert float(error) < rounding_of(op) / 10


def test_transposed_layers_exchange_the_two():
    torch.manual_seed(0)
    op = cs.ConvOperator(torch.randn(64, 80, 3, 3, dtype=torch.float64), (20, 20))
    x = torch.randn(1, op.shape[1], dtype=torch.float64)
    transposed = Product(op.T, fast=True)
    assert isinstance(transposed._backward, WinogradConvolution)
    torch.testing.assert_close(transposed.apply_adjoint(x), Product(op).apply(x))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "circular"},
    ],
)
def test_other_layers_have_none(options):
    weight = torch.randn(64, 64 // options.get("groups", 1), 3, 3, dtype=torch.float64)
    op = cs.ConvOperator(weight, (32, 32), **options)
    assert faster_convolution(op.weight, op.geometry, op.groups) is None


def test_where_there_is_nothing_to_win_there_is_none():
    def found(weight, size):
        return faster_convolution(weight, cs.ConvOperator(weight, size).geometry, 1)

    weight = torch.randn(64, 64, 3, 3, dtype=torch.float64)
    assert found(weight, (32, 32)) is not None
    assert found(weight.float(), (32, 32)) is None
    assert found(weight[:4, :4], (32, 32)) is None
    assert found(weight[..., :1, :1], (32, 32)) is None
    assert found(torch.randn(64, 64, 7, 7, dtype=torch.float64), (32, 32)) is None
    assert found(torch.randn(64, 64, dtype=torch.float64), ()) is None


def test_a_transformed_weight_that_is_too_large_is_not_made(monkeypatch):
    weight = torch.randn(256, 256, 3, 3, dtype=torch.float64)
    geometry = cs.ConvOperator(weight, (28, 28)).geometry
    assert faster_convolution(weight, geometry, 1)._products == (6, 6)
    # A weight beyond the limit as it is would take GiB.
    monkeypatch.setattr(winograd, "WEIGHT_BYTES", 8 * weight[..., 0, 0].numel() * 4**2)
    assert faster_convolution(weight, geometry, 1)._products == (4, 4)
    monkeypatch.setattr(winograd, "WEIGHT_BYTES", 8 * weight[..., 0, 0].numel() * 4**2 - 1)
    assert faster_convolution(weight, geometry, 1) is None
