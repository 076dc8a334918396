"""The smaller Gram matrix of a circulant: bounds and preconditioners, against dense matrices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, direct, layers, random
from helpers.strategies import one_thread as one_thread
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_embedding import CIRCULAR, each_circular, embedded
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._product import Product
from convspectra.solvers import _gaussian as gaussian
from convspectra.solvers._leading import COUNT
from convspectra.torus._circulant_gram import (
    LEAST_MARGIN,
    LIKELY,
    OTHERS,
    PROOF_MARGIN,
    WINDOW,
    CirculantGram,
    _largest_eigenvalues,
    gram_cost,
    rounded_up,
)
from convspectra.torus._circulant_gram import smaller_gram as gram_of_symbols
from convspectra.torus._embedding import CirculantEmbedding


def smaller_gram(dense: Tensor) -> Tensor:
    return dense @ dense.T if dense.shape[0] < dense.shape[1] else dense.T @ dense


def matrix(preconditioner: Callable[[Tensor], Tensor], order: int) -> Tensor:
    """B, by its action on the identity."""
    return preconditioner(torch.eye(order, dtype=torch.float64)).T


def norm_bound(op: ConvOperator) -> float:
    return float(CirculantGram(op).upper_bounds(1))


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


def check_bounds(bounds: Tensor, true: Tensor, error: float = 1e-12) -> None:
    """They are the true values, of which missing ones are 0, in squares up to rounding."""
    missing = len(bounds) - len(true)
    true = torch.nn.functional.pad(true, (0, max(missing, 0)))[: len(bounds)]
    top = float(true[0])
    assert bounds.dtype == torch.float64
    assert (bounds >= true - 1e-13 * top).all()
    assert (bounds**2 - true**2).max() <= error * top**2
    assert (bounds.diff() <= 0).all()


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


@pytest.mark.parametrize("output_padding", [0, 1, 2])
def test_products_of_a_layer_with_output_padding_beyond_its_stride(output_padding):
    """More inputs of the direct layer than its outputs' taps reach: M has zero columns."""
    options = {"transposed": True, "dilation": 3, "padding": 1, "output_padding": output_padding}
    layer = Layer(random(2, 3, 3), (7,), options)
    op, dense = direct(layer)
    product = Product(op)
    x, y = random(2, dense.shape[1]), random(2, dense.shape[0], seed=1)
    assert torch.allclose(product.apply(x), x @ dense.T)
    assert torch.allclose(product.apply_adjoint(y), y @ dense)


# --- the preconditioner near zero -----------------------------------------------------------------


@given(layers())
@settings(max_examples=100)
def test_it_is_symmetric_and_positive_definite(layer):
    """For any layer: padding that is not of zeros is taken for zeros."""
    op, dense = direct(layer)
    if not dense.any():
        return
    order = min(dense.shape)
    b = matrix(CirculantGram(op).inverse_near_zero()[0], order)
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
    tall = CirculantGram(op).tall
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
    monkeypatch.setattr("convspectra.torus._circulant_gram.REGULARIZATION", 0.0)
    gram = smaller_gram(op.to_dense())
    product = matrix(CirculantGram(op).inverse_near_zero()[0], len(gram)) @ gram
    condition = float(torch.linalg.cond(gram))
    identity = torch.eye(len(gram), dtype=torch.float64)
    assert (product - identity).norm() <= 1e-10 * condition


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


@pytest.mark.parametrize("op", INTERIOR.values(), ids=INTERIOR.keys())
def test_it_is_close_to_the_inverse_where_the_interior_dominates(op):
    gram = smaller_gram(op.to_dense())
    preconditioned = torch.linalg.eigvals(
        matrix(CirculantGram(op).inverse_near_zero()[0], len(gram)) @ gram
    ).real
    assert preconditioned.min() >= 0.5
    assert preconditioned.max() <= 4.0
    # Most of the spectrum is at 1, where only the interior speaks.
    assert float(preconditioned.median()) == pytest.approx(1.0, abs=0.05)


def test_it_makes_the_condition_better():
    """A smooth kernel: the Gram matrix's condition is that of its symbols, which B knows."""
    taps = torch.tensor([0.3, 1.0, 0.6, 0.1]).double()
    op = ConvOperator(taps[None, None], 40, padding=3)
    gram = smaller_gram(op.to_dense())
    b = matrix(CirculantGram(op).inverse_near_zero()[0], len(gram))
    values = torch.linalg.eigvals(b @ gram).real
    assert float(values.max() / values.min()) <= 0.1 * float(torch.linalg.cond(gram))


def test_a_shift_is_added_and_the_norm_is_given():
    """Where M is the circulant itself: (shift + G)^{-1}."""
    op = ConvOperator(random(3, 2, 4, 4), (6, 8), padding_mode="circular")
    dense = op.to_dense()
    gram = CirculantGram(op)
    squares = torch.linalg.eigvalsh(dense.T @ dense)
    for shift in (0.0, 0.5, 20.0):
        multiply, norm = gram.inverse_near_zero(shift)
        inverse = torch.linalg.inv(shift * torch.eye(96, dtype=torch.float64) + dense.T @ dense)
        torch.testing.assert_close(matrix(multiply, 96), inverse, rtol=1e-5, atol=1e-7)
        largest = 1 / float(squares[0] + shift)
        assert 0.999 * largest <= norm <= 2 * largest


def test_a_linear_map_on_rows_of_any_number():
    op = INTERIOR["tall"]
    preconditioner = CirculantGram(op).inverse_near_zero()[0]
    x = random(5, min(op.shape))
    together = preconditioner(x)
    alone = torch.cat([preconditioner(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-13)
    assert torch.allclose(preconditioner(3 * x), 3 * together, atol=1e-12)


# --- the preconditioner near the norm -------------------------------------------------------------


@given(layers())
@settings(max_examples=100)
def test_near_the_norm_it_is_symmetric_and_positive_definite(layer):
    """For any layer: padding that is not of zeros is taken for zeros."""
    op, dense = direct(layer)
    if not dense.any():
        return
    order = min(dense.shape)
    b = matrix(CirculantGram(op).inverse_near_norm()[0], order)
    assert b.shape == (order, order)
    assert torch.isfinite(b).all()
    values = torch.linalg.eigvalsh(0.5 * (b + b.T))
    assert (b - b.T).norm() <= 1e-5 * float(b.norm())
    assert values[0] > 0
    # Between 1/t and 1/(margin t): the condition is limited, and single precision is enough.
    assert values[-1] <= 1.01 * (1 + 1 / LEAST_MARGIN) * values[0]


@given(embedded())
@settings(max_examples=100)
def test_near_the_norm_its_bound_is_above_the_largest_value(drawn):
    op, dense = drawn
    true = float(torch.linalg.matrix_norm(dense, 2))
    _, bound = CirculantGram(op).inverse_near_norm()
    assert isinstance(bound, float)
    assert bound >= true


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


@pytest.mark.parametrize("op", NEAR_NORM.values(), ids=NEAR_NORM.keys())
def test_near_the_norm_it_is_the_dense_inverse_on_the_layer_s_points(op):
    if op.geometry.ndim == 0:
        torus, around = op.to_dense(), ConvOperator(op.weight[:, :, None], 1)
    else:
        torus, around = torus_matrix(op), op
    wide = op.shape[0] < op.shape[1]
    gram = torus @ torus.T if wide else torus.T @ torus
    margin = max(WINDOW / min(CirculantEmbedding(around).periods) ** 2, LEAST_MARGIN)
    t = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + margin)
    inverse = torch.linalg.inv(t * torch.eye(len(gram), dtype=torch.float64) - gram)
    points = dict(enumerate(op.geometry.output_size if wide else op.geometry.input_size))
    # An identity's rows at the layer's points pick them out of the torus.
    sizes = [op.output_shape[0], *CirculantEmbedding(around).periods]
    if not wide:
        strides = around.geometry.stride
        sizes = [op.input_shape[0], *(p * s for p, s in zip(sizes[1:], strides, strict=True))]
    kept = torch.arange(len(gram)).reshape(sizes)
    for axis, count in points.items():
        kept = kept.narrow(1 + axis, 0, count)
    kept = kept.flatten()
    circulant = CirculantGram(op)
    apply, bound = circulant.inverse_near_norm()
    if circulant.blocks.shape[-1] <= COUNT:
        b = matrix(apply, len(kept))
        reference = inverse[kept][:, kept]
        assert (b - reference).norm() <= 2e-6 / margin * reference.norm()
    norm = float(torch.linalg.matrix_norm(torus, 2))
    assert norm <= bound <= norm * (1 + PROOF_MARGIN)


@pytest.mark.parametrize("size", [(8, 8), (30,)])
def test_near_the_norm_it_has_the_leading_vectors_of_larger_blocks(size):
    """A circular layer is the circulant: its top singular vector is one of the preconditioner."""
    op = ConvOperator(random(20, 20, *[3] * len(size)), size, padding_mode="circular")
    _, s, v = torch.linalg.svd(op.to_dense())
    apply, _ = CirculantGram(op).inverse_near_norm()
    t = float(s[0]) ** 2 * (1 + max(WINDOW / min(size) ** 2, LEAST_MARGIN))
    assert float(v[:1] @ apply(v[:1]).T) == pytest.approx(1 / (t - float(s[0]) ** 2), rel=0.05)
    inner = float(v[-1:] @ apply(v[-1:]).T)
    assert 1 / t <= inner <= 1 / (t - OTHERS * float(s[0]) ** 2)


def test_near_the_norm_rows_keep_their_type():
    op = NEAR_NORM["tall"]
    apply, _ = CirculantGram(op).inverse_near_norm()
    x = random(5, min(op.shape))
    together = apply(x)
    assert together.dtype == torch.float64
    assert apply(x.float()).dtype == torch.float32
    alone = torch.cat([apply(row[None]) for row in x])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


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


# --- parts ----------------------------------------------------------------------------------------


def hermitian(count: int, order: int, seed: int = 0) -> Tensor:
    parts = random(2, count, order, order + 1, seed=seed)
    root = torch.complex(parts[0], parts[1])
    return root @ root.mH


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (4, 4)])
def test_gram_matrices_of_symbols(rows, columns):
    parts = random(2, 6, rows, columns)
    symbols = torch.complex(parts[0], parts[1])
    for wide, count in ((True, rows), (False, columns)):
        gram = gram_of_symbols(symbols, wide)
        assert gram.shape == (6, count, count)
        squares = torch.linalg.svdvals(symbols) ** 2
        values = torch.linalg.eigvalsh(gram).flip(-1)[:, : squares.shape[1]]
        assert torch.allclose(values, squares, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 40, 200])
@pytest.mark.parametrize("informed", [True, False])
def test_the_largest_eigenvalues_of_many_matrices(count, informed):
    """With estimates that are right, and with ones that say the opposite."""
    gram = hermitian(40, 3)
    before = gram.clone()
    copies = 1 + (torch.arange(40) % 2).double()
    every = torch.linalg.eigvalsh(gram)
    true = every.repeat_interleave(copies.long(), dim=0)
    true = true.flatten().sort(descending=True).values[:count]
    estimates = every[:, -1] if informed else -every[:, -1]
    found = _largest_eigenvalues(gram, estimates, copies, count)
    assert found.shape == (count,)
    assert found.dtype == torch.float64
    # Beyond the last eigenvalue there are zeros.
    assert torch.allclose(found[: len(true)], true, rtol=1e-12)
    assert not found[len(true) :].any()
    assert torch.equal(gram, before)


@pytest.mark.parametrize("margin", [1e-3, 0.1])
def test_a_margin_is_what_the_largest_eigenvalue_may_be_missed_by(margin):
    """Ten matrices have the largest one but for a little: eight of them are computed."""
    gram = hermitian(40, 3)
    top = float(torch.linalg.eigvalsh(gram).amax())
    for place, more in enumerate((0.9, 0.5, *([0.0] * 8))):
        gram[place] = torch.eye(3).to(gram) * (2 * top * (1 + more * margin))
    estimates = torch.arange(40).double().roll(10)
    estimates[:10] = torch.arange(40.0, 50.0)  # those of 0.9 and 0.5 come last among the ten
    found = float(_largest_eigenvalues(gram, estimates, torch.ones(40), 1, margin))
    assert found == pytest.approx(2 * top, rel=1e-12)
    gram[0] *= 1 + 0.2 * margin
    found = float(_largest_eigenvalues(gram, estimates, torch.ones(40), 1, margin))
    assert found > 2 * top * (1 + margin)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_rounding_up_is_up_and_small(dtype):
    op = NEAR_NORM["square, 2 axes"]
    blocks = CirculantGram(op).blocks.flatten(0, 1).to(dtype)
    squares = torch.tensor([40.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    roots = rounded_up(squares, blocks, op.weight)
    assert (roots > squares.sqrt()).all()
    assert (roots**2 - squares).max() <= 1000 * torch.finfo(dtype).eps * 40.0
    larger = rounded_up(squares, 100 * blocks, op.weight)
    assert (larger > roots).all()


@pytest.mark.parametrize("op", NEAR_NORM.values(), ids=NEAR_NORM.keys())
def test_the_cost_is_that_of_the_arrays(op):
    """Flops and bytes of the symbols and three arrays of Gram matrices, to a factor of two."""
    around = ConvOperator(op.weight[:, :, None], 1) if op.geometry.ndim == 0 else op
    symbols, blocks = CirculantEmbedding(around).symbols(), CirculantGram(op).blocks
    flops, needed = gram_cost(op)
    arrays = 16 * symbols.numel() + 3 * 16 * blocks.numel()
    assert 0.5 * arrays <= needed <= 2 * arrays
    # A complex multiplication and addition are 8 flops.
    product = 8 * symbols.numel() * blocks.shape[-1]
    assert product <= flops <= 8 * product
