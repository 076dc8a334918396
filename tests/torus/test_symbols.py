"""Symbols and tori against circulants written out tap by tap."""

from __future__ import annotations

import cmath
import itertools
import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.torus._symbols import (
    angles,
    half_count,
    half_multiplicity,
    smallest_periods,
    symbols,
)

PHASES = (0.0, 0.5)
each_phase = pytest.mark.parametrize("phase", PHASES)
each_period = pytest.mark.parametrize("period", [1, 2, 3, 4, 5, 6, 9, 10])


def dense_circulant(
    op: ConvOperator, periods: tuple[int, ...], phase: float = 0.0, group: int = 0
) -> np.ndarray:
    """C of one group, (h, points, g * phases, points): every tap of every point, wrapped by hand.

    Point r of the output reads place ``stride r + dilation p`` of the padded input, which is
    channel ``place mod stride`` of point ``place // stride``.
    """
    g = op.geometry
    block = op.weight.detach().reshape(op.groups, -1, *op.weight.shape[1:])[group].numpy()
    h, channels = block.shape[:2]
    points = list(itertools.product(*map(range, periods)))
    residues = list(itertools.product(*map(range, g.stride)))
    matrix = np.zeros((h, len(points), channels, len(residues), len(points)), dtype=complex)
    for tap in itertools.product(*map(range, g.kernel_size)):
        for row, point in enumerate(points):
            places = np.multiply(g.stride, point) + np.multiply(g.dilation, tap)
            reached, residue = np.divmod(places, g.stride)
            turns, column = np.divmod(reached, periods)
            sign = cmath.exp(2j * math.pi * phase * int(turns.sum()))
            i, j = residues.index(tuple(residue)), points.index(tuple(column))
            matrix[:, row, :, i, j] += sign * block[(..., *tap)]
    return matrix.reshape(h, len(points), channels * len(residues), len(points))


def submatrix(op: ConvOperator, circulant: np.ndarray, periods: tuple[int, ...]) -> np.ndarray:
    """The rows of the outputs and columns of the inputs of one group: (h, outputs, g, inputs)."""
    g = op.geometry
    h = len(circulant)
    rows = np.ravel_multi_index(np.ix_(*map(range, g.output_size)), periods).ravel()
    whole = circulant.reshape(h, math.prod(periods), -1, math.prod(g.stride), math.prod(periods))
    columns = []
    for inputs in itertools.product(*map(range, g.input_size)):
        places = np.array(inputs) + [before for before, _ in g.padding]
        point, residue = np.divmod(places, g.stride)
        i, j = np.ravel_multi_index(residue, g.stride), np.ravel_multi_index(point, periods)
        columns.append(whole[:, rows][:, :, :, i, j])
    return np.stack(columns, -1)


def naive_blocks(layer: Layer, op: ConvOperator) -> np.ndarray:
    """M of a layer or of its transpose, (groups, h, outputs, g, inputs), from torch.nn."""
    dense = layer.dense().detach()
    dense = dense.T if layer.options.get("transposed") else dense
    outputs, inputs = math.prod(op.geometry.output_size), math.prod(op.geometry.input_size)
    whole = dense.reshape(op.groups, -1, outputs, op.groups, op.weight.shape[1], inputs)
    return np.stack([whole[i, :, :, i].numpy() for i in range(op.groups)])


# --- frequencies ----------------------------------------------------------------------------------


@each_phase
@each_period
def test_waves_turn_by_the_phase_as_they_go_around(period, phase):
    theta = angles(period, phase)
    assert theta.dtype == torch.float64
    assert len(theta) == period
    around = torch.polar(torch.ones_like(theta), theta * period)
    expected = torch.full_like(around, cmath.exp(2j * math.pi * phase))
    assert torch.allclose(around, expected, atol=1e-12)
    assert len(np.unique(np.round(np.exp(1j * theta.numpy()), 9))) == period
    assert torch.equal(angles(period, phase, 1), theta[:1])


@each_phase
@each_period
def test_half_of_the_frequencies_stand_for_all(period, phase):
    """The others are their mirror images: theta and -theta, each counted once."""
    waves = np.exp(1j * angles(period, phase).numpy())
    count = half_count(period, phase)
    multiplicity = half_multiplicity(period, phase).numpy()
    assert len(multiplicity) == count
    together = []
    for wave, copies in zip(waves[:count], multiplicity, strict=True):
        assert copies in (1, 2)
        together += [wave] if copies == 1 else [wave, wave.conj()]
    assert np.allclose(sorted(np.angle(together) % 6.28318), sorted(np.angle(waves) % 6.28318))


@each_phase
@each_period
def test_half_multiplicity_is_that_of_parseval(period, phase):
    x = random(period)
    waves = torch.polar(torch.ones(()).double(), -angles(period, phase, half_count(period, phase)))
    powers = waves[:, None] ** torch.arange(period)
    energy = (powers @ x.to(powers.dtype)).abs().square() @ half_multiplicity(period, phase)
    assert torch.isclose(energy / period, x.square().sum(), rtol=1e-12)


def test_frequency_zero_is_missing_where_functions_change_sign():
    for period in (3, 4):
        theta = angles(period, 0.5)
        assert torch.polar(torch.ones_like(theta), theta).sub(1).abs().min() > 0.5


# --- symbols --------------------------------------------------------------------------------------

LAYERS = {
    "3 taps": Layer(random(2, 3, 3), (4,)),
    "even, asymmetric": Layer(random(2, 2, 4), (5,), {"padding": [(0, 3)]}),
    "dilated": Layer(random(1, 2, 3), (6,), {"dilation": 2}),
    "2 axes": Layer(random(2, 2, 3, 2), (3, 4)),
    "grouped": Layer(random(4, 1, 3, 3), (2, 3), {"groups": 2}),
    "3 axes": Layer(random(1, 2, 2, 3, 1), (2, 2, 3), {"padding": (1, 1, 0)}),
    "reach beyond the input": Layer(random(2, 2, 5), (1,)),
    "stride 2": Layer(random(2, 3, 3), (6,), {"stride": 2, "padding": 1}),
    "stride 3, dilation 2": Layer(
        random(2, 1, 4), (7,), {"stride": 3, "dilation": 2, "padding": 3}
    ),
    "strides, 2 axes": Layer(random(2, 2, 3, 2), (5, 6), {"stride": (2, 3), "padding": (1, 0)}),
    "strided groups": Layer(
        random(4, 2, 2, 3), (4, 3), {"stride": (1, 2), "groups": 2, "padding": (0, 1)}
    ),
    "stride beyond the kernel": Layer(random(1, 2, 2), (7,), {"stride": 4, "padding": 0}),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@each_phase
@each_layer
def test_symbols_diagonalise_the_circulant(layer, phase):
    """C maps amplitude times wave to symbol times amplitude times wave, at every frequency."""
    op = layer.operator()
    for extra in (0, 1):
        periods = tuple(p + extra for p in smallest_periods(op.geometry))
        grid = [angles(period, phase) for period in periods]
        symbol = symbols(op, grid).numpy()
        columns = op.weight.shape[1] * math.prod(op.geometry.stride)
        assert symbol.shape == (op.groups, *periods, len(op.weight) // op.groups, columns)
        points = np.array(list(itertools.product(*map(range, periods))))
        for group in range(op.groups):
            circulant = dense_circulant(op, periods, phase, group)
            for frequency in itertools.product(*map(range, periods)):
                theta = np.array([grid[axis][i] for axis, i in enumerate(frequency)])
                wave = np.exp(1j * points @ theta)
                image = circulant @ wave
                expected = symbol[group][frequency][:, None] * wave[:, None]
                assert np.allclose(image, expected, atol=1e-12)


@each_phase
def test_determinant_and_spectrum_of_the_circulant_are_those_of_the_symbols(phase):
    for layer in (
        Layer(random(2, 2, 3), (4,)),
        Layer(random(2, 2, 3, 2), (3, 4)),
        Layer(random(4, 1, 2), (6,), {"stride": 4, "padding": 0}),
    ):
        op = layer.operator()
        periods = smallest_periods(op.geometry)
        last = half_count(periods[-1], phase)
        grid = [angles(p, phase) for p in periods[:-1]] + [angles(periods[-1], phase, last)]
        symbol = symbols(op, grid)[0]
        copies = half_multiplicity(periods[-1], phase).expand(symbol.shape[:-2])
        circulant = dense_circulant(op, periods, phase)
        circulant = circulant.reshape(circulant.shape[0] * circulant.shape[1], -1)
        assert np.abs(circulant.imag).max() <= 1e-14, "real for both phases"
        if symbol.shape[-1] == symbol.shape[-2]:
            log_det = (torch.linalg.slogdet(symbol).logabsdet * copies).sum()
            assert math.isclose(log_det, np.linalg.slogdet(circulant)[1], rel_tol=1e-12)
        values = torch.linalg.svdvals(symbol).flatten(0, -2)
        values = values.repeat_interleave(copies.flatten().long(), 0).flatten().sort().values
        expected = np.linalg.svd(circulant, compute_uv=False)[::-1]
        assert np.allclose(values, expected, atol=1e-12 * expected[-1])


def test_symbol_at_frequency_zero_is_the_sum_of_the_taps():
    op = LAYERS["2 axes"].operator()
    symbol = symbols(op, [angles(5), angles(6)])[0, 0, 0]
    assert torch.allclose(symbol.real, op.weight.sum((2, 3)), atol=1e-14)
    assert torch.allclose(symbol.imag, torch.zeros(2, 2).double(), atol=1e-14)


def test_strided_symbols_are_those_of_the_phases_of_the_kernel():
    """Taps 0 2 4 and 1 3 of five: two stride-1 kernels, side by side."""
    weight = random(2, 3, 5)
    theta = angles(7)
    whole = symbols(ConvOperator(weight, 9, stride=2, padding=0), [theta])
    parts = [
        symbols(ConvOperator(weight[..., i::2].contiguous(), 9, padding=0), [theta])
        for i in range(2)
    ]
    # Column (channel, phase), the phase running faster.
    assert torch.allclose(whole, torch.stack(parts, -1).flatten(-2), atol=1e-13)


@each_phase
@pytest.mark.parametrize("stride", [1, 2])
def test_symbols_are_differentiable(phase, stride):
    op = ConvOperator(random(2, 2, 3, 2), (4, 4), stride=(stride, 1), padding=1)
    grid = [angles(period, phase) for period in smallest_periods(op.geometry)]

    def energy(weight: Tensor) -> Tensor:
        symbol = symbols(op.with_weight(weight), grid)
        return (symbol.real * 0.3 + symbol.imag).square().sum()

    assert torch.autograd.gradcheck(energy, (op.weight.clone().requires_grad_(),))


# --- the torus ------------------------------------------------------------------------------------


@st.composite
def zero_padded(draw: st.DrawFn) -> tuple[Layer, ConvOperator]:
    """A zero-padded layer, and the convolution that it is or that it transposes."""
    layer = draw(layers(kinds=("conv", "transposed")))
    op = layer.operator()
    assume(op.geometry.padding_mode == "zeros")
    op = op.T if op.transposed else op
    size = math.prod(smallest_periods(op.geometry))
    assume(size <= 60 and size * math.prod(op.geometry.stride) <= 200)
    return layer, op


@given(zero_padded(), st.integers(0, 2), st.sampled_from(PHASES))
@settings(max_examples=60)
def test_layer_is_a_submatrix_of_its_circulant(drawn, extra, phase):
    layer, op = drawn
    periods = tuple(p + extra for p in smallest_periods(op.geometry))
    expected = naive_blocks(layer, op)
    for group in range(op.groups):
        part = submatrix(op, dense_circulant(op, periods, phase, group), periods)
        assert np.allclose(part, expected[group], atol=1e-14)


@given(zero_padded())
@settings(max_examples=60)
def test_one_point_less_is_too_few(drawn):
    """There is no room for the outputs or inputs, or a tap wraps around to an input."""
    layer, op = drawn
    g = op.geometry
    assume(g.ndim == 1)  # what wraps around on one axis may meet nothing but zeros on another
    fewer = (smallest_periods(g)[0] - 1,)
    last = (g.input_size[0] - 1 + g.padding[0][0]) // g.stride[0]
    if fewer[0] >= g.output_size[0] and fewer[0] > last:
        part = submatrix(op, dense_circulant(op, fewer), fewer)
        assert not np.allclose(part, naive_blocks(layer, op)[0], atol=1e-14)


@pytest.mark.parametrize(
    ("layer", "periods"),
    [
        (Layer(random(1, 1, 3), (4,)), (5,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(2, 0)]}), (6,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(0, 2)]}), (6,)),
        (Layer(random(1, 1, 3), (4,), {"padding": 0}), (4,)),
        (Layer(random(1, 1, 3), (4,), {"padding": [(2, 3)]}), (7,)),
        (Layer(random(1, 1, 2), (4,), {"padding": 3}), (9,)),
        (Layer(random(1, 1, 3, 2), (4, 5), {"dilation": (2, 1)}), (6, 6)),
        (Layer(random(1, 1, 2), (8,), {"stride": 2, "padding": 0}), (4,)),
        (Layer(random(1, 1, 3), (8,), {"stride": 2, "padding": 1}), (5,)),
    ],
)
def test_smallest_periods_of_known_layers(layer, periods):
    assert smallest_periods(layer.operator().geometry) == periods
