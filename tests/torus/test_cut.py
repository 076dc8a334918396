"""A torus cut open, axis by axis, against dense inverses and determinants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, random
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.torus._cut import CutTorus, all_lengths, border_cost
from convspectra.torus._symbols import smallest_periods

PHASES = (0.0, 0.5)
each_phase = pytest.mark.parametrize("phase", PHASES, ids=["plain", "twisted"])
each_extra = pytest.mark.parametrize("extra", [0, 1, 2])


def regular(layer: Layer, diagonal: float = 4.0) -> Layer:
    """The same with more on the diagonal of M: then M and C are far from singular."""
    weight = layer.weight.clone()
    geometry = layer.operator().geometry
    center = [
        before // d for (before, _), d in zip(geometry.padding, geometry.dilation, strict=True)
    ]
    for i in range(len(weight)):
        weight[(i, i % weight.shape[1], *center)] += diagonal
    return Layer(weight, layer.input_size, layer.options)


LAYERS = {
    "3 taps": Layer(random(2, 2, 3), (6,)),
    "one tap": Layer(random(3, 3, 1), (4,)),
    "2 taps": Layer(random(2, 2, 2), (5,)),
    "7 taps": Layer(random(2, 2, 7), (9,)),
    "7 taps on 3 points": Layer(random(1, 1, 7), (3,)),
    "asymmetric": Layer(random(1, 1, 4), (5,), {"padding": [(2, 1)]}),
    "one-sided": Layer(random(1, 1, 3), (6,), {"padding": [(0, 2)]}),
    "dilated": Layer(random(2, 2, 3), (7,), {"dilation": 2}),
    "groups": Layer(random(6, 2, 3), (5,), {"groups": 3}),
    "2 axes": Layer(random(2, 2, 3, 3), (4, 4)),
    "unequal axes": Layer(random(2, 2, 3, 3), (3, 6)),
    "unequal axes, the other way": Layer(random(2, 2, 3, 3), (6, 3)),
    "even kernel": Layer(random(2, 2, 2, 4), (4, 5)),
    "5 x 5": Layer(random(1, 1, 5, 5), (4, 6)),
    "5 x 2": Layer(random(2, 2, 5, 2), (5, 4)),
    "1 x 3": Layer(random(2, 2, 1, 3), (3, 4)),
    "3 x 1": Layer(random(2, 2, 3, 1), (3, 4)),
    "1 x 1": Layer(random(3, 3, 1, 1), (2, 3)),
    "dilated, 2 axes": Layer(
        random(1, 1, 3, 2), (5, 4), {"dilation": (2, 3), "padding": [(2, 2), (0, 3)]}
    ),
    "depthwise": Layer(random(3, 1, 3, 3), (4, 3), {"groups": 3}),
    "3 axes": Layer(random(1, 1, 3, 3, 3), (3, 4, 3)),
    "3 axes, channels": Layer(random(2, 2, 2, 3, 1), (2, 3, 4)),
    "3 axes, groups": Layer(random(2, 1, 3, 1, 2), (4, 2, 3), {"groups": 2}),
    "3 axes, large": Layer(random(1, 1, 3, 5, 2), (2, 5, 3)),
    "3 axes, dilated": Layer(random(1, 1, 2, 3, 3), (3, 3, 5), {"dilation": (1, 1, 2)}),
}
LAYERS = {name: regular(layer) for name, layer in LAYERS.items()}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def cut(layer: Layer, extra: int, phase: float, weight: Tensor | None = None) -> CutTorus:
    torus = CutTorus(layer.operator(weight), extra, phase)
    torus.factorize()
    return torus


def naive_symbols(layer: Layer, extra: int, phase: float) -> np.ndarray:
    """All symbols of all groups, (groups, frequencies, channels, channels), tap by tap."""
    op = layer.operator()
    g = op.geometry
    periods = [p + extra for p in smallest_periods(g)]
    blocks = op.weight.detach().numpy().reshape(op.groups, -1, *op.weight.shape[1:])
    result = []
    for frequency in itertools.product(*map(range, periods)):
        theta = [2 * math.pi * (i + phase) / n for i, n in zip(frequency, periods, strict=True)]
        total = 0
        for tap in itertools.product(*map(range, g.kernel_size)):
            angle = sum(
                t * (d * p - before)
                for t, d, p, (before, _) in zip(theta, g.dilation, tap, g.padding, strict=True)
            )
            total = total + blocks[(..., *tap)] * np.exp(1j * angle)
        result.append(total)
    return np.stack(result, 1)


def check(layer: Layer, extra: int, phase: float, limit: float = 1e-12) -> None:
    """Inverse, adjoint, determinant and gradient, all against dense ones."""
    weight = layer.weight.clone().requires_grad_()
    op = layer.operator()
    dense = naive_with_gradient(layer, weight)
    inverse = torch.linalg.inv(dense.detach())
    torus = cut(layer, extra, phase, weight)
    scale = float(inverse.norm())
    identity = torch.eye(len(dense), dtype=torch.float64).reshape(-1, *op.output_shape)
    for adjoint, expected in ((False, inverse.T), (True, inverse)):
        got = torus.apply_inverse(identity, adjoint)
        assert got.shape == identity.shape
        assert not got.requires_grad
        assert (got.flatten(1) - expected).norm() <= limit * scale
    log_det = torus.logabsdet()
    expected = torch.linalg.slogdet(dense).logabsdet
    assert log_det.shape == ()
    assert abs(float((log_det - expected).detach())) <= limit * len(dense)
    (gradient,) = torch.autograd.grad(log_det, weight)
    (naive,) = torch.autograd.grad(expected, weight)
    assert (gradient - naive).norm() <= 10 * limit * naive.norm()


def naive_with_gradient(layer: Layer, weight: Tensor) -> Tensor:
    """M with a gradient: the sum of the naive matrices of one-hot weights."""
    one_hot = torch.eye(weight.numel(), dtype=torch.float64).reshape(-1, *weight.shape)
    matrices = torch.stack([layer.dense(w).detach() for w in one_hot])
    return torch.tensordot(weight.flatten(), matrices, dims=1)


@each_phase
@each_extra
@each_layer
def test_inverse_determinant_and_gradient(layer, extra, phase):
    check(layer, extra, phase)


@st.composite
def square_layers(draw: st.DrawFn) -> Layer:
    ndim = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, {1: 10, 2: 5, 3: 3}[ndim])) for _ in range(ndim))
    taps = tuple(draw(st.integers(1, {1: 6, 2: 4, 3: 3}[ndim])) for _ in range(ndim))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
    pads = []
    for k, d in zip(taps, dilation, strict=True):
        before = d * draw(st.integers(0, k - 1))
        pads.append((before, d * (k - 1) - before))
    groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    weight = random(groups * channels, channels, *taps, seed=draw(st.integers(0, 2**16)))
    assume(weight.numel() <= 60)
    options = {"padding": pads, "dilation": dilation, "groups": groups}
    return regular(Layer(weight, size, options), draw(st.sampled_from([0.0, 5.0])))


@given(square_layers(), st.integers(0, 2), st.sampled_from(PHASES))
@settings(max_examples=80)
def test_any_square_layer(layer, extra, phase):
    condition = float(torch.linalg.cond(layer.dense().detach()))
    embedding = CutTorus(layer.operator(), extra, phase).condition
    assume(condition * embedding < 1e6)
    check(layer, extra, phase, 1e-13 * max(10.0, condition * embedding))


@each_phase
@each_extra
@pytest.mark.parametrize("name", ["3 taps", "groups", "even kernel", "dilated, 2 axes", "3 axes"])
def test_norm_and_condition_are_those_of_the_symbols(name, extra, phase):
    """In Frobenius norms, so that they are at least those of the circulant itself."""
    layer = LAYERS[name]
    torus = CutTorus(layer.operator(), extra, phase)
    symbols = naive_symbols(layer, extra, phase)
    norms = np.linalg.norm(symbols, axis=(-2, -1)).max(1)
    inverse_norms = np.linalg.norm(np.linalg.inv(symbols), axis=(-2, -1)).max(1)
    assert math.isclose(torus.norm, norms.max(), rel_tol=1e-12)
    assert math.isclose(torus.condition, (norms * inverse_norms).max(), rel_tol=1e-10)
    values = np.linalg.svd(symbols, compute_uv=False)
    assert torus.norm >= float(torch.linalg.matrix_norm(layer.dense().detach(), 2)) * (1 - 1e-12)
    assert torus.condition >= (values.max((1, 2)) / values.min((1, 2))).max() * (1 - 1e-10)


def test_a_singular_circulant_has_no_finite_condition_to_trust():
    """1 -2 1 vanishes at the frequency 0, which the twisted torus has not."""
    layer = Layer(torch.tensor([[[1.0, -2.0, 1.0]]]).double(), (6,))
    assert CutTorus(layer.operator(), 0, 0.0).condition > 1e14
    assert CutTorus(layer.operator(), 0, 0.5).condition < 100
    check(layer, 0, 0.5)
    zero = Layer(torch.zeros(1, 1, 3).double(), (6,))
    assert CutTorus(zero.operator(), 0, 0.0).condition == math.inf


@each_phase
def test_factorizing_again_gives_the_same(phase):
    """What the first time left behind plays no part in the second."""
    layer = LAYERS["2 axes"]
    torus = CutTorus(layer.operator(), 1, phase)
    torus.factorize()
    y = random(2, 2, 4, 4)
    first = torus.apply_inverse(y, adjoint=False)
    again = cut(layer, 1, phase).apply_inverse(y, adjoint=False)
    assert torch.equal(first, again)


def test_a_batch_is_solved_as_its_members_are():
    layer = LAYERS["3 axes, groups"]
    torus = cut(layer, 0, 0.5)
    y = random(3, *layer.operator().output_shape)
    for adjoint in (False, True):
        together = torus.apply_inverse(y, adjoint)
        alone = torch.cat([torus.apply_inverse(x[None], adjoint) for x in y])
        assert torch.allclose(together, alone, atol=1e-13)


@each_phase
def test_logabsdet_by_finite_differences(phase):
    for name in ("2 taps", "unequal axes", "3 axes, groups"):
        layer = LAYERS[name]
        weight = layer.weight.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda w, layer=layer: cut(layer, 0, phase, w).logabsdet(), (weight,)
        )


def test_without_a_gradient_the_determinant_has_none():
    assert not cut(LAYERS["2 axes"], 0, 0.0).logabsdet().requires_grad


def test_second_derivative_is_refused():
    weight = LAYERS["2 axes"].weight.clone().requires_grad_()
    value = cut(LAYERS["2 axes"], 0, 0.0, weight).logabsdet()
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        torch.autograd.grad(gradient.sum(), weight)


def held(torus: CutTorus) -> list[Tensor]:
    """The matrices of all cuts, that of the last first."""
    return [torus._factors[0], *torus._borders]


@given(square_layers())
def test_the_cost_of_the_borders_is_that_of_the_matrices_that_are_held(layer):
    op = layer.operator()
    torus = CutTorus(op, 0, 0.5)
    torus.factorize()
    cost = border_cost(smallest_periods(op.geometry), all_lengths(op))
    sizes = [m.element_size() * m.numel() for m in held(torus)]
    # A twisted torus of an even length has one frequency less in its half.
    assert max(sizes) / op.groups <= cost.bytes
    untwisted = CutTorus(op, 0, 0.0)
    untwisted.factorize()
    sizes = [m.element_size() * m.numel() for m in held(untwisted)]
    assert max(sizes) == op.groups * cost.bytes
    flops = sum(
        8 / 3 * (4 if m.is_complex() else 1) * m.numel() * m.shape[-1] for m in held(untwisted)
    )
    assert math.isclose(flops, op.groups * cost.flops, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("size", [(20, 1), (1, 20)])
def test_an_axis_that_needs_no_cut_is_not_the_last_that_is_cut(size):
    """A long kernel on a line of points: the one border is that of the line, and real."""
    taps = tuple(9 if n > 1 else 1 for n in size)
    op = ConvOperator(random(3, 3, *taps), size)
    torus = CutTorus(op, 0, 0.0)
    torus.factorize()
    assert [m.shape[-1] for m in held(torus)] == [3 * 4, 0]
    assert border_cost(smallest_periods(op.geometry), all_lengths(op)).bytes == 8 * 12**2
