"""The preconditioner of the smaller Gram matrix, and the bound from below, against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import direct, layers, random
from strategies import one_thread as one_thread
from torch import Tensor

from convspectra import ConvOperator
from convspectra.gram import GramPreconditioner
from convspectra.request import Product
from convspectra.solvers import gaussian


def smaller_gram(dense: Tensor) -> Tensor:
    return dense @ dense.T if dense.shape[0] < dense.shape[1] else dense.T @ dense


def matrix(preconditioner: GramPreconditioner, order: int) -> Tensor:
    """B, by its action on the identity."""
    return preconditioner.apply(torch.eye(order, dtype=torch.float64)).T


# --- products -------------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=60)
def test_products_are_those_of_the_dense_matrix(layer):
    dense = layer.dense().detach()
    product = Product(layer.operator())
    x, y = random(2, dense.shape[1]), random(2, dense.shape[0], seed=1)
    limit = 1e-12 * (1 + float(dense.norm()) ** 2)
    assert (product.apply(x) - x @ dense.T).abs().max() <= limit
    assert (product.apply_adjoint(y) - y @ dense).abs().max() <= limit
    assert (product.gram(x) - x @ dense.T @ dense).abs().max() <= limit * x.norm()


# --- the preconditioner ---------------------------------------------------------------------------


@given(layers())
@settings(max_examples=100)
def test_it_is_symmetric_and_positive_definite(layer):
    """For any layer: padding that is not of zeros is taken for zeros."""
    op, dense = direct(layer)
    if not dense.any():
        return
    order = min(dense.shape)
    b = matrix(GramPreconditioner(op), order)
    assert b.shape == (order, order)
    assert torch.isfinite(b).all()
    scale = float(b.norm())
    assert (b - b.T).norm() <= 1e-12 * scale
    # Symbols of the circulant may be singular: the inverse reaches to 1e12.
    assert torch.linalg.eigvalsh(0.5 * (b + b.T))[0] > -1e-15 * scale


@given(layers(kinds=("conv", "transposed")))
@settings(max_examples=60)
def test_the_tall_side_is_the_one_iterated_on(layer):
    op, dense = direct(layer)
    tall = GramPreconditioner(op).tall
    rows, columns = tall.op.shape
    assert rows >= columns
    gram = tall.gram(torch.eye(columns, dtype=torch.float64))
    assert torch.allclose(gram, smaller_gram(dense), atol=1e-12 * (1 + float(dense.norm()) ** 2))


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


@pytest.mark.parametrize("op", BLOCKS_APART.values(), ids=BLOCKS_APART.keys())
def test_it_is_the_inverse_where_m_is_the_circulant(op, monkeypatch):
    monkeypatch.setattr("convspectra.gram.REGULARISATION", 0.0)
    gram = smaller_gram(op.to_dense())
    product = matrix(GramPreconditioner(op), len(gram)) @ gram
    condition = float(torch.linalg.cond(gram))
    identity = torch.eye(len(gram), dtype=torch.float64)
    assert (product - identity).norm() <= 1e-10 * condition


def dominated(h: int, g: int, size: tuple[int, ...], **options) -> ConvOperator:
    """An orthogonal centre tap and small other ones: the border changes little."""
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


@pytest.mark.parametrize("op", INTERIOR.values(), ids=INTERIOR.keys())
def test_it_is_close_to_the_inverse_where_the_interior_dominates(op):
    gram = smaller_gram(op.to_dense())
    preconditioned = torch.linalg.eigvals(matrix(GramPreconditioner(op), len(gram)) @ gram).real
    assert preconditioned.min() >= 0.5
    assert preconditioned.max() <= 4.0
    # Most of the spectrum is at 1, where only the interior speaks.
    assert float(preconditioned.median()) == pytest.approx(1.0, abs=0.05)


def test_it_makes_the_condition_better():
    """A smooth kernel: the Gram matrix's condition is that of its symbols, which B knows."""
    taps = torch.tensor([0.3, 1.0, 0.6, 0.1]).double()
    op = ConvOperator(taps[None, None], 40, padding=3)
    gram = smaller_gram(op.to_dense())
    b = matrix(GramPreconditioner(op), len(gram))
    values = torch.linalg.eigvals(b @ gram).real
    assert float(values.max() / values.min()) <= 0.1 * float(torch.linalg.cond(gram))


def test_a_linear_map_on_rows_of_any_number():
    op = INTERIOR["tall"]
    preconditioner = GramPreconditioner(op)
    x = random(5, min(op.shape))
    together = preconditioner.apply(x)
    alone = torch.cat([preconditioner.apply(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-13)
    assert torch.allclose(preconditioner.apply(3 * x), 3 * together, atol=1e-12)


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
    return GramPreconditioner(op).is_above(square, maxiter, generator)


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
