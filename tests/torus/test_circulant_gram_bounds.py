"""Bounds on singular values from the Gram matrix of a circulant, against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, direct, layers, random
from helpers.tori import (
    BLOCKS_APART,
    CIRCULAR,
    INTERIOR,
    NEAR_NORM,
    each_circular,
    embedded,
    restricted,
    torus_matrix,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.solvers import _gaussian as gaussian
from convspectra.torus._circulant_gram import (
    LIKELY,
    CirculantGram,
)
from convspectra.torus._embedding import CirculantEmbedding


def norm_bound(op: ConvOperator) -> float:
    return float(CirculantGram(op).upper_bounds(1))


def check_bounds(bounds: Tensor, true: Tensor, error: float = 1e-12) -> None:
    """They are the true values, of which missing ones are 0, in squares up to rounding."""
    missing = len(bounds) - len(true)
    true = torch.nn.functional.pad(true, (0, max(missing, 0)))[: len(bounds)]
    top = float(true[0])
    assert bounds.dtype == torch.float64
    assert (bounds >= true - 1e-13 * top).all()
    assert (bounds**2 - true**2).max() <= error * top**2
    assert (bounds.diff() <= 0).all()


# --- the bound from below -------------------------------------------------------------------------


SHAPES = {
    "tall": ConvOperator(random(5, 2, 3, 3), (5, 4)),
    "very tall": ConvOperator(random(9, 1, 3), 20),
    "wide": ConvOperator(random(2, 5, 3, 3), (5, 4)),
    "strided": ConvOperator(random(3, 2, 3, 3), (6, 6), stride=2, padding=1),
    "strided, tall": ConvOperator(random(10, 2, 3, 3), (6, 6), stride=2, padding=1),
    "strided, dilated": ConvOperator(random(3, 2, 3), 21, stride=2, dilation=3, padding=3),
    "padded more": ConvOperator(random(1, 1, 4), 30, padding=3),
    "valid, tall": ConvOperator(random(3, 1, 3, 3), (7, 8), padding=0),
    "groups": ConvOperator(random(6, 1, 3, 3), (5, 5), groups=2),
    "dominated": INTERIOR["square"],
    "circular": BLOCKS_APART["circular"],
    "reflect": ConvOperator(random(6, 2, 3), 15, padding_mode="reflect"),
    "replicate": ConvOperator(random(6, 2, 3), 15, padding_mode="replicate"),
    "3 axes": ConvOperator(random(4, 1, 3, 2, 3), (3, 4, 3)),
}
each_shape = pytest.mark.parametrize("op", SHAPES.values(), ids=SHAPES.keys())


def ask(op: ConvOperator, square: float, maxiter: int = 80, seed: int = 0) -> tuple[bool, int]:
    generator = torch.Generator().manual_seed(seed)
    return CirculantGram(op).is_above(square, maxiter, generator)


@each_shape
def test_is_above_tells_which_side_the_smallest_value_is_on(op):
    smallest = float(torch.linalg.svdvals(op.to_dense())[-1])
    for seed in range(3):
        for fraction in (0.3, 0.9):
            holds, products = ask(op, (fraction * smallest) ** 2, seed=seed)
            assert holds is True
            assert 0 < products <= 2 * 80
            assert products % 2 == 0
        for fraction in (1.0 + 1e-6, 1.1, 3.0):
            assert ask(op, (fraction * smallest) ** 2, seed=seed)[0] is False


@given(layers(kinds=("conv", "transposed")), st.sampled_from([1, 3, 10, 80]), st.integers(0, 99))
@settings(max_examples=60)
def test_is_above_is_never_wrongly_said(layer, maxiter, seed):
    op, dense = direct(layer)
    smallest = float(torch.linalg.svdvals(dense)[-1])
    if smallest <= 1e-3 * float(op.weight.norm()):
        return
    for fraction in (1.0 + 1e-6, 1.5):
        assert ask(op, (fraction * smallest) ** 2, maxiter, seed)[0] is False


def test_one_step_is_too_few_to_say():
    op = SHAPES["padded more"]
    smallest = float(torch.linalg.svdvals(op.to_dense())[-1])
    holds, products = ask(op, (0.9 * smallest) ** 2, maxiter=1)
    assert holds is False
    assert products == 2


def test_a_singular_layer_is_above_nothing():
    """Copied outputs: sigma_min is 0, and no positive bound can be told."""
    weight = random(3, 4, 3)
    weight[2] = weight[1]
    op = ConvOperator(weight, 12)
    assert float(torch.linalg.svdvals(op.to_dense())[-1]) < 1e-14
    for square in (1e-8, 1e-2):
        assert ask(op, square)[0] is False


def test_a_larger_failure_probability_is_content_with_less(monkeypatch):
    op = SHAPES["padded more"]
    smallest = float(torch.linalg.svdvals(op.to_dense())[-1])
    _, careful = ask(op, (0.9 * smallest) ** 2)
    # The probability is a constant, no option.
    monkeypatch.setattr(gaussian, "FAILURE_PROBABILITY", 0.1)
    holds, careless = ask(op, (0.9 * smallest) ** 2)
    assert holds is True
    assert careless <= careful


def test_the_answer_scales_with_the_weight():
    op = SHAPES["tall"]
    smallest = float(torch.linalg.svdvals(op.to_dense())[-1])
    for scale in (1e-6, 1e6):
        scaled = op.with_weight(scale * op.weight)
        assert ask(scaled, (0.9 * scale * smallest) ** 2)[0] is True
        assert ask(scaled, (1.1 * scale * smallest) ** 2)[0] is False
    assert math.isfinite(smallest)


# --- the bounds from above ------------------------------------------------------------------------


ROUNDING = 1e-13


@given(embedded())
@settings(max_examples=120)
def test_the_norm_is_below_that_of_the_circulant(drawn):
    op, dense = drawn
    true = float(torch.linalg.matrix_norm(dense, 2))
    assert norm_bound(op) >= (1 - ROUNDING) * true


@each_circular
def test_the_norm_of_a_circulant_is_exact(layer):
    true = float(torch.linalg.matrix_norm(layer.dense().detach(), 2))
    assert (1 - ROUNDING) * true <= norm_bound(layer.operator()) <= (1 + 1e-10) * true


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_bound_scales_with_the_weight(scale):
    op = ConvOperator(random(3, 2, 3, 3), (5, 4))
    bound = norm_bound(op)
    scaled = norm_bound(op.with_weight(scale * op.weight))
    assert math.isclose(scaled, scale * bound, rel_tol=1e-12)


def test_a_twisted_torus_can_bound_better():
    """The plain torus has the frequency 0, where the symbol is 3; the twisted one has not."""
    weight = torch.tensor([[[1.0, 1.0, 1.0]]], dtype=torch.float64)
    bound = norm_bound(ConvOperator(weight, 5))
    assert 1 + 2 * math.cos(math.pi / 6) <= bound <= 2.99
    large = norm_bound(ConvOperator(weight, 40))
    assert math.isclose(large, 3.0, rel_tol=1e-12)


def test_nearly_repeated_norms_of_symbols_are_bounded():
    """An orthogonal layer: every symbol has the same norm, and none may be left out."""
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    weight[..., 1, 1] = torch.linalg.qr(random(4, 4)).Q
    weight[..., 0, 1] = 1e-9 * random(4, 4, seed=1)
    layer = Layer(weight, (4, 4), {"padding_mode": "circular"})
    true = float(torch.linalg.matrix_norm(layer.dense().detach(), 2))
    assert abs(norm_bound(layer.operator()) - true) <= 1e-12


def test_a_large_norm_among_many_symbols():
    """Norms that power steps tell badly: the largest value is at a frequency with a large gap."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        weight = torch.from_numpy(generator.standard_normal((6, 6, 5)))
        layer = Layer(weight, (64,), {"padding_mode": "circular"})
        true = float(torch.linalg.matrix_norm(layer.dense().detach(), 2))
        assert math.isclose(norm_bound(layer.operator()), true, rel_tol=1e-12)


def test_the_bound_is_the_norm_of_the_better_torus():
    """The symbols of both phases written out with NumPy."""
    op = ConvOperator(random(3, 2, 3), 9)
    weight = op.weight.numpy()
    values = []
    for phase in (0.0, 0.5):
        theta = 2 * np.pi * (np.arange(10) + phase) / 10
        symbols = sum(weight[..., p] * np.exp(1j * p * theta)[:, None, None] for p in range(3))
        values.append(np.linalg.svd(symbols, compute_uv=False).max())
    assert math.isclose(norm_bound(op), min(values), rel_tol=1e-12)
    assert not math.isclose(*values, rel_tol=1e-3)


# --- several bounds from above --------------------------------------------------------------------


@each_circular
def test_bounds_of_a_circulant_are_its_values(layer):
    true = torch.linalg.svdvals(layer.dense().detach())
    for count in sorted({1, 2, 3, 7, LIKELY + 1, len(true)}):
        bounds = CirculantGram(layer.operator()).upper_bounds(count)
        assert len(bounds) == count
        check_bounds(bounds, true)


MANY = {
    # As many symbols as make the shortlist of likely ones matter.
    "1 axis": Layer(random(2, 2, 3), (60,)),
    "1 axis, odd": Layer(random(3, 2, 4), (41,)),
    "2 axes": Layer(random(2, 2, 3, 3), (9, 8)),
    "wide": Layer(random(1, 3, 3, 3), (8, 7)),
    "strided groups": Layer(random(4, 2, 3), (48,), {"stride": 2, "groups": 2, "padding": 1}),
    "3 axes": Layer(random(1, 1, 3, 3, 3), (4, 5, 5)),
    "8 frequencies share a value": Layer(
        torch.tensor([[0.5, 1, 0.5], [1, 3.0, 1], [0.5, 1, 0.5]]).double()[None, None], (9, 9)
    ),
    "all values are one": Layer(torch.eye(2, dtype=torch.float64)[:, :, None], (30,)),
    "equal groups": Layer(random(1, 2, 3).repeat(3, 1, 1), (21,), {"groups": 3}),
}
for many in MANY.values():
    many.options["padding_mode"] = "circular"


@pytest.mark.parametrize("layer", MANY.values(), ids=MANY.keys())
def test_bounds_of_a_circulant_with_many_symbols(layer):
    true = torch.linalg.svdvals(layer.dense().detach())
    for count in (1, 2, 4, 8, 9, 20, 30):
        check_bounds(CirculantGram(layer.operator()).upper_bounds(count), true)


@given(embedded(), st.integers(1, 12))
@settings(max_examples=120)
def test_every_bound_is_above_its_value(drawn, count):
    op, dense = drawn
    true = torch.linalg.svdvals(dense)
    bounds = CirculantGram(op).upper_bounds(count)
    assert bounds.dtype == torch.float64
    assert bounds.shape == (count,)
    assert (bounds.diff() <= 0).all()
    common = min(count, len(true))
    assert (bounds[:common] >= true[:common] - 1e-14 * float(true[0])).all()


@given(embedded(), st.integers(1, 12))
@settings(max_examples=80)
def test_bounds_are_the_values_of_the_better_torus(drawn, count):
    """Of the plain and, where it has at most 16 points on every axis, the twisted one."""
    op, dense = drawn
    embedding = CirculantEmbedding(op)
    assume(math.prod(embedding.periods) * max(op.input_shape[0], op.output_shape[0]) <= 300)
    torus = torus_matrix(op)
    if embedding.is_exact:
        assert (torus - dense).abs().max() <= 1e-13 * (1 + dense.abs().max())
    else:
        inside = restricted(
            op,
            torus,
            rows=dict(enumerate(op.geometry.output_size)),
            columns=dict(enumerate(op.geometry.input_size)),
        )
        assert torch.allclose(inside, dense, atol=1e-13)
    values = torch.linalg.svdvals(torus)
    if not embedding.is_exact and max(embedding.periods) <= 16:
        values = torch.minimum(values, torch.linalg.svdvals(torus_matrix(op, twisted=True)))
    assume(float(values[0]) > 0)
    check_bounds(CirculantGram(op).upper_bounds(count), values)


def test_bounds_of_a_linear_layer_are_its_values():
    for shape in ((4, 6), (6, 4), (5, 5)):
        op = ConvOperator(random(*shape), ())
        check_bounds(CirculantGram(op).upper_bounds(4), torch.linalg.svdvals(op.weight))


# --- single precision -----------------------------------------------------------------------------


SINGLE = {name: op.with_weight(op.weight.float()) for name, op in NEAR_NORM.items()} | {
    name: layer.operator(layer.weight.float()) for name, layer in CIRCULAR.items()
}


@pytest.mark.parametrize("op", SINGLE.values(), ids=SINGLE.keys())
def test_single_precision_bounds_the_exact_layer(op):
    exact = op.with_weight(op.weight.double())
    true = torch.linalg.svdvals(exact.to_dense())
    count = min(len(true), 10)
    gram = CirculantGram(op)
    assert gram.blocks.dtype == torch.complex64
    bounds = gram.upper_bounds(count)
    assert bounds.dtype == torch.float64
    assert (bounds >= true[:count]).all()
    better = CirculantGram(exact).upper_bounds(count)
    assert (bounds >= better * (1 - 1e-12)).all()
    assert (bounds**2 - better**2).max() <= 1e-4 * float(better[0]) ** 2
    assert gram.inverse_near_norm()[1] >= float(true[0])


@given(embedded())
@settings(max_examples=60)
def test_single_precision_bounds_any_layer(drawn):
    op, _ = drawn
    single = op.with_weight(op.weight.float())
    true = torch.linalg.svdvals(op.with_weight(single.weight.double()).to_dense())
    count = min(len(true), 6)
    gram = CirculantGram(single)
    assert (gram.upper_bounds(count) >= true[:count]).all()
    assert gram.inverse_near_norm()[1] >= float(true[0])
