"""The smaller Gram matrix of a circulant: its products and its inverse near zero."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import Layer, direct, layers, random
from helpers.tori import BLOCKS_APART, INTERIOR, NEAR_NORM, matrix
from hypothesis import given, settings
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._product import Product
from convspectra.torus._circulant_gram import (
    CirculantGram,
    _largest_eigenvalues,
    gram_cost,
    rounded_up,
)
from convspectra.torus._circulant_gram import smaller_gram as gram_of_symbols
from convspectra.torus._embedding import CirculantEmbedding


def smaller_gram(dense: Tensor) -> Tensor:
    return dense @ dense.T if dense.shape[0] < dense.shape[1] else dense.T @ dense


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


@pytest.mark.parametrize("op", BLOCKS_APART.values(), ids=BLOCKS_APART.keys())
def test_it_is_the_inverse_where_m_is_the_circulant(op, monkeypatch):
    # Without regularization it is the inverse to rounding.
    monkeypatch.setattr("convspectra.torus._circulant_gram.REGULARIZATION", 0.0)
    gram = smaller_gram(op.to_dense())
    product = matrix(CirculantGram(op).inverse_near_zero()[0], len(gram)) @ gram
    condition = float(torch.linalg.cond(gram))
    identity = torch.eye(len(gram), dtype=torch.float64)
    assert (product - identity).norm() <= 1e-10 * condition


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
