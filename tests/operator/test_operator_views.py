"""What ConvOperator shows of its matrix: sparse, SciPy, transposed, the paper's kernels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers.operators import LAYERS, each_layer
from helpers.strategies import random

from convspectra import ConvOperator, kernel_to_weight, weight_to_kernel
from convspectra.testing import assert_matches_dense

# --- views ----------------------------------------------------------------------------------------


@each_layer
def test_sparse_stores_no_zeros_and_no_duplicates(layer):
    op = layer.operator()
    sparse = op.to_sparse()
    assert isinstance(sparse, scipy.sparse.csr_array)
    assert sparse.shape == op.shape
    assert sparse.nnz == np.count_nonzero(sparse.toarray()) == op.to_dense().count_nonzero()
    pairs = set(zip(*(i.tolist() for i in sparse.tocoo().coords), strict=True))
    assert len(pairs) == sparse.nnz


def test_sparse_leaves_out_zeros_of_the_weight():
    weight = random(2, 2, 3)
    weight[0, 1] = 0
    op = ConvOperator(weight, 5)
    assert op.to_sparse().nnz == op.to_dense().count_nonzero() == 3 * 13


def test_views_for_scipy_are_detached():
    weight = random(2, 2, 3).requires_grad_()
    op = ConvOperator(weight, 5)
    assert op.to_sparse().shape == (10, 10)
    assert (op.to_scipy() @ np.ones(10)).shape == (10,)
    assert op.to_dense().requires_grad
    assert op.matvec(torch.ones(2, 5, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize("name", ["strided", "grouped", "transposed", "linear"])
def test_scipy_operator_in_all_calling_forms(name):
    layer = LAYERS[name]
    operator, dense = layer.operator().to_scipy(), layer.dense().detach().numpy()
    rows, columns = operator.shape
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(columns), rng.standard_normal(rows)
    X, Y = rng.standard_normal((columns, 4)), rng.standard_normal((rows, 4))
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(operator @ x, dense @ x, **close)
    np.testing.assert_allclose(operator @ x[:, None], dense @ x[:, None], **close)
    np.testing.assert_allclose(operator @ X, dense @ X, **close)
    np.testing.assert_allclose(operator @ np.asfortranarray(X), dense @ X, **close)
    np.testing.assert_allclose(operator.T @ y, dense.T @ y, **close)
    np.testing.assert_allclose(operator.H @ Y, dense.T @ Y, **close)
    np.testing.assert_allclose(operator.rmatmat(Y), dense.T @ Y, **close)
    np.testing.assert_allclose((operator.H @ operator) @ X, dense.T @ dense @ X, **close)


def test_scipy_operator_refuses_complex_arrays():
    operator = ConvOperator(random(2, 2, 3), 5).to_scipy()
    with pytest.raises(ValueError, match="complex"):
        operator @ (1j * np.ones(10))


@each_layer
def test_transpose(layer):
    op = layer.operator()
    assert op.T.shape == op.shape[::-1]
    assert op.T.input_shape == op.output_shape
    assert op.T.output_shape == op.input_shape
    assert op.T.weight is op.weight
    assert op.T.transposed is not op.transposed
    assert torch.equal(op.T.to_dense(), op.to_dense().T)
    assert torch.equal(op.T.T.to_dense(), op.to_dense())
    assert repr(op.T.T) == repr(op)
    y = random(2, *op.output_shape)
    assert torch.equal(op.T.matvec(y), op.rmatvec(y))
    rows, columns = op.index_set((0,) * op.weight.ndim)
    assert [i.tolist() for i in op.T.index_set((0,) * op.weight.ndim)] == [
        columns.tolist(),
        rows.tolist(),
    ]


def test_repr_says_all_that_matters():
    op = ConvOperator(
        torch.ones(4, 1, 3, 2), (6, 5), stride=2, padding=((1, 2), (0, 1)), groups=2, dilation=2
    )
    assert repr(op) == (
        "ConvOperator((2, 6, 5) -> (4, 3, 2), kernel=(3, 2), stride=(2, 2), "
        "padding=((1, 2), (0, 1)), dilation=(2, 2), groups=2, padding_mode='zeros', "
        "dtype=torch.float32, device=cpu)"
    )
    assert "(4, 3, 2) -> (2, 6, 5), transposed, kernel" in repr(op.T)


def test_with_weight():
    layer = LAYERS["strided"]
    op = layer.operator()
    other = random(*op.weight.shape, seed=5)
    assert_matches_dense(op.with_weight(other), layer.dense(other))
    assert_matches_dense(op, layer.dense())
    assert op.with_weight(other.float()).dtype == torch.float32
    assert op.T.with_weight(other).transposed is not op.transposed
    with pytest.raises(ValueError, match=r"weight of shape \(2, 3, 3, 2\), got \(2, 3, 2, 3\)"):
        op.with_weight(random(2, 3, 2, 3))
    with pytest.raises(ValueError, match="finite weight"):
        op.with_weight(other * math.nan)


def test_defaults_are_the_papers_layer():
    weight = random(3, 2, 4, 4)
    explicit = ConvOperator(
        weight,
        (5, 5),
        stride=(1, 1),
        padding=((1, 2), (1, 2)),
        dilation=(1, 1),
        groups=1,
        padding_mode="zeros",
        transposed=False,
        output_padding=(0, 0),
    )
    assert repr(ConvOperator(weight, 5)) == repr(explicit)
    assert torch.equal(ConvOperator(weight, [5, 5]).to_dense(), explicit.to_dense())
    assert ConvOperator(weight, torch.Size((5, 5))).shape == explicit.shape
    assert explicit.groups == 1
    assert explicit.weight is weight


def test_operator_follows_its_weight():
    weight = random(1, 1, 3)
    op = ConvOperator(weight, 4)
    before = op.to_dense()
    weight.mul_(2)
    assert torch.equal(op.to_dense(), 2 * before)


# --- the paper's layer ----------------------------------------------------------------------------


def paper_layer(K: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Y[r,s,c] = sum_{d,p,q} X[r-m+p, s-m+q, d] K[p,q,d,c] in loops, indices from 1."""
    *taps, g, h = K.shape
    sizes = X.shape[:-1]
    m = [math.ceil(k / 2) for k in taps]
    Y = np.zeros((*sizes, h))
    for r in itertools.product(*(range(1, n + 1) for n in sizes)):
        for p in itertools.product(*(range(1, k + 1) for k in taps)):
            source = [ri - mi + pi for ri, mi, pi in zip(r, m, p, strict=True)]
            if all(1 <= s <= n for s, n in zip(source, sizes, strict=True)):
                for d in range(g):
                    for c in range(h):
                        Y[(*(i - 1 for i in r), c)] += (
                            X[(*(i - 1 for i in source), d)] * K[(*(i - 1 for i in p), d, c)]
                        )
    return Y


@pytest.mark.parametrize(
    ("taps", "sizes"),
    [
        ((1, 1), (3, 2)),
        ((2, 2), (3, 4)),
        ((3, 3), (4, 3)),
        ((4, 4), (3, 5)),
        ((5, 5), (4, 4)),
        ((2, 3), (4, 3)),
        ((6, 6), (2, 3)),
        ((3,), (6,)),
        ((4,), (6,)),
        ((2, 3, 2), (3, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("g", "h"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_the_papers_formula(taps, sizes, g, h):
    K, X = random(*taps, g, h).numpy(), random(*sizes, g, seed=1).numpy()
    op = ConvOperator(kernel_to_weight(torch.from_numpy(K)), sizes)
    y = op.matvec(torch.from_numpy(X).movedim(-1, 0))
    np.testing.assert_allclose(y.movedim(0, -1).numpy(), paper_layer(K, X), atol=1e-12)


def test_kernel_and_weight_are_views_of_each_other():
    K = random(3, 4, 2, 5).requires_grad_()
    weight = kernel_to_weight(K)
    assert weight.shape == (5, 2, 3, 4)
    assert torch.equal(weight, K.permute(3, 2, 0, 1))
    assert torch.equal(weight_to_kernel(weight), K)
    assert weight.data_ptr() == weight_to_kernel(weight).data_ptr() == K.data_ptr()
    (gradient,) = torch.autograd.grad(weight[1, 0, 2, 3], K)
    assert gradient[2, 3, 0, 1] == gradient.abs().sum() == 1


@pytest.mark.parametrize("function", [kernel_to_weight, weight_to_kernel])
@pytest.mark.parametrize("shape", [(), (3,), (3, 3), (1, 1, 1, 1, 1, 1)])
def test_kernels_of_the_wrong_number_of_axes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"1 to 3 axes of taps, got \("):
        function(torch.zeros(shape))
