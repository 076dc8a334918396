"""Symbols and tori against circulants written out tap by tap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Layer, layers
from strategies import one_thread as one_thread
from torch import Tensor

from convspectra.symbol import Torus, smallest_periods, symbols, weight_blocks

CPU = torch.device("cpu")
PERIODS = [(1,), (2,), (5,), (6,), (1, 4), (4, 5), (3, 1), (2, 3, 4), (3, 2, 1)]
each_torus = pytest.mark.parametrize(
    "torus", [Torus(periods, twisted) for periods in PERIODS for twisted in (False, True)], ids=str
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def dense_circulant(layer: Layer, torus: Torus, group: int = 0) -> Tensor:
    """C of one group, (h * points, g * points): every tap of every point, wrapped by hand."""
    op = layer.operator()
    g = op.geometry
    block = op.weight.reshape(op.groups, -1, *op.weight.shape[1:])[group]
    points = list(itertools.product(*map(range, torus.periods)))
    position = {point: i for i, point in enumerate(points)}
    h, channels = block.shape[:2]
    matrix = torch.zeros(h, len(points), channels, len(points), dtype=torch.float64)
    for tap in itertools.product(*map(range, g.kernel_size)):
        for point in points:
            source = [
                r - g.padding[axis][0] + g.dilation[axis] * p
                for axis, (r, p) in enumerate(zip(point, tap, strict=True))
            ]
            turns = sum(s // n for s, n in zip(source, torus.periods, strict=True))
            sign = -1.0 if torus.twisted and turns % 2 else 1.0
            wrapped = tuple(s % n for s, n in zip(source, torus.periods, strict=True))
            matrix[:, position[point], :, position[wrapped]] += sign * block[(..., *tap)]
    return matrix.flatten(2, 3).flatten(0, 1)


LAYERS = {
    "3 taps": Layer(random(2, 3, 3), (4,)),
    "even, asymmetric": Layer(random(2, 2, 4), (5,), {"padding": [(0, 3)]}),
    "dilated": Layer(random(1, 2, 3), (6,), {"dilation": 2}),
    "2 axes": Layer(random(2, 2, 3, 2), (3, 4)),
    "grouped": Layer(random(4, 1, 3, 3), (2, 3), {"groups": 2}),
    "3 axes": Layer(random(1, 2, 2, 3, 1), (2, 2, 3), {"padding": (1, 1, 0)}),
    "reach beyond the input": Layer(random(2, 2, 5), (1,)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
each_twist = pytest.mark.parametrize("twisted", [False, True], ids=["plain", "twisted"])


# --- the torus ------------------------------------------------------------------------------------


@each_torus
def test_transform_goes_there_and_back(torus):
    x = random(3, 2, *torus.periods)
    coefficients = torus.transform(x)
    assert coefficients.shape == (3, 2, len(torus.multiplicity(CPU)))
    assert torch.allclose(torus.inverse_transform(coefficients), x, atol=1e-14)


@each_torus
def test_multiplicity_counts_every_point_once(torus):
    assert torus.multiplicity(CPU).sum() == torus.points == math.prod(torus.periods)


@each_torus
def test_multiplicity_is_that_of_parseval(torus):
    x = random(*torus.periods)
    energy = (torus.transform(x).abs().square() * torus.multiplicity(CPU)).sum()
    assert torch.isclose(energy / torus.points, x.square().sum(), rtol=1e-13)


def test_twisted_torus_has_no_frequency_zero():
    for axis, period in enumerate((3, 4)):
        angles = Torus((3, 4), twisted=True).angles(axis, CPU)
        assert len(angles) == period
        assert torch.polar(torch.ones_like(angles), angles).sub(1).abs().min() > 0.5


# --- symbols --------------------------------------------------------------------------------------


@each_twist
@each_layer
def test_symbols_diagonalise_the_circulant(layer, twisted):
    op = layer.operator()
    periods = smallest_periods(op.geometry)
    for extra in (0, 1):
        torus = Torus(tuple(p + extra for p in periods), twisted)
        symbol = symbols(weight_blocks(op), op.geometry, torus)
        for group in range(op.groups):
            circulant = dense_circulant(layer, torus, group)
            x = random(symbol.shape[-1], *torus.periods, seed=1)
            product = (symbol[group] @ torus.transform(x).T[:, :, None])[..., 0].T
            expected = circulant @ x.flatten()
            assert torch.allclose(
                torus.inverse_transform(product).flatten(), expected, atol=1e-13 * expected.norm()
            )


@each_twist
def test_determinant_and_spectrum_of_the_circulant_are_those_of_the_symbols(twisted):
    for layer in (
        Layer(random(2, 2, 3), (4,)),
        Layer(random(2, 2, 3, 2), (3, 4)),
        Layer(random(2, 2, 1, 2, 3), (2, 2, 3)),
    ):
        op = layer.operator()
        torus = Torus(smallest_periods(op.geometry), twisted)
        symbol = symbols(weight_blocks(op), op.geometry, torus)[0]
        circulant = dense_circulant(layer, torus)
        log_det = torch.linalg.slogdet(symbol).logabsdet @ torus.multiplicity(CPU)
        assert torch.isclose(log_det, torch.linalg.slogdet(circulant).logabsdet, rtol=1e-12)
        count = torus.multiplicity(CPU).long()
        values = torch.linalg.svdvals(symbol).repeat_interleave(count, 0).flatten().sort().values
        expected = torch.linalg.svdvals(circulant).flip(0)
        assert torch.allclose(values, expected, atol=1e-13 * expected[-1])


def test_symbol_at_frequency_zero_is_the_sum_of_the_taps():
    op = LAYERS["2 axes"].operator()
    symbol = symbols(weight_blocks(op), op.geometry, Torus((5, 6)))
    assert torch.allclose(symbol[0, 0].real, op.weight.sum((2, 3)), atol=1e-14)
    assert torch.allclose(symbol[0, 0].imag, torch.zeros(2, 2).double(), atol=1e-14)


@each_twist
def test_symbols_are_differentiable(twisted):
    op = Layer(random(2, 2, 3, 2), (3, 4), {"dilation": (2, 1)}).operator()
    torus = Torus(smallest_periods(op.geometry), twisted)

    def energy(weight: Tensor) -> Tensor:
        blocks = weight_blocks(op.with_weight(weight))
        symbol = symbols(blocks, op.geometry, torus)
        return (symbol.real * 0.3 + symbol.imag).square().sum((-1, -2)) @ torus.multiplicity(CPU)

    assert torch.autograd.gradcheck(energy, (op.weight.clone().requires_grad_(),))


# --- the embedding --------------------------------------------------------------------------------


@st.composite
def zero_padded(draw: st.DrawFn) -> Layer:
    """Stride-1, zero-padded layers; any padding, dilation, groups and number of axes."""
    layer = draw(layers(kinds=("conv", "transposed")))
    op = layer.operator()
    assume(op.geometry.padding_mode == "zeros" and set(op.geometry.stride) == {1})
    assume(math.prod(smallest_periods(op.geometry)) <= 150)
    return layer


def interior(size: tuple[int, ...], periods: tuple[int, ...]) -> Tensor:
    inside = torch.ones((), dtype=torch.bool)
    for n, period in zip(size, periods, strict=True):
        inside = inside[..., None] & (torch.arange(period) < n)
    return inside.flatten()


@given(zero_padded(), st.integers(0, 2), st.booleans())
@settings(max_examples=60)
def test_layer_is_the_interior_of_its_circulant(layer, extra, twisted):
    op = layer.operator()
    g = op.geometry
    torus = Torus(tuple(p + extra for p in smallest_periods(g)), twisted)
    dense = layer.dense().T if op.transposed else layer.dense()
    h, channels = op.weight.shape[0] // op.groups, op.weight.shape[1]
    rows = interior(g.output_size, torus.periods).repeat(h)
    columns = interior(g.input_size, torus.periods).repeat(channels)
    blocks = dense.reshape(op.groups, int(rows.sum()), op.groups, int(columns.sum()))
    for group in range(op.groups):
        circulant = dense_circulant(layer, torus, group)
        assert torch.allclose(circulant[rows][:, columns], blocks[group, :, group], atol=1e-15)


@given(zero_padded(), st.booleans())
@settings(max_examples=60)
def test_largest_symbol_bounds_the_layer(layer, twisted):
    op = layer.operator()
    torus = Torus(smallest_periods(op.geometry), twisted)
    symbol = symbols(weight_blocks(op), op.geometry, torus)
    bound = torch.linalg.matrix_norm(symbol, 2).amax()
    assert torch.linalg.matrix_norm(layer.dense(), 2) <= bound * (1 + 1e-13)


@pytest.mark.parametrize(
    ("layer", "periods"),
    [
        (Layer(random(1, 1, 3), (4,)), (5,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(2, 0)]}), (6,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(0, 2)]}), (6,)),
        (Layer(random(1, 1, 3), (4,), {"padding": 0}), (4,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(2, 3)]}), (7,)),
        (Layer(random(1, 1, 2), (4,), {"padding": 3}), (9,)),
        (Layer(random(1, 1, 7), (1,)), (7,)),
        (Layer(random(1, 1, 3, 2), (4, 5), {"dilation": (2, 1)}), (6, 6)),
    ],
)
def test_smallest_periods_are_what_the_taps_need(layer, periods):
    g = layer.operator().geometry
    assert smallest_periods(g) == periods
    if max(g.reach) == 3 and g.padding != ((0, 0),):  # one point less, and a tap wraps around
        fewer = Torus((max(periods[0] - 1, *g.output_size),))
        if fewer.periods != periods:
            circulant = dense_circulant(layer, fewer)
            wrapped = circulant[: g.output_size[0], : g.input_size[0]]
            assert not torch.allclose(wrapped, layer.dense())
