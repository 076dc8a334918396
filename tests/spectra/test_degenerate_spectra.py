"""Spectra that are singular, repeated, clustered, tiny or huge, with known singular values.

Each case at a size for a dense SVD, and at one of 1000 rows or more, with a closed form.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.closed_forms import (
    EPS,
    Separable,
    check,
    check_enclosure,
    check_ends,
    check_singular,
    check_triplets,
    dense_values,
    descending,
    orthogonal,
    tridiagonal,
)
from helpers.kernels import kernel
from helpers.strategies import Layer, random
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator

ONE = np.ones((1, 1))
EXACT = 16 * EPS
"""Relative rounding of a closed form."""

# --- the references themselves --------------------------------------------------------------------

OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": 3, "padding": 4},
    {"dilation": 2},
    *({"padding": 2, "padding_mode": mode} for mode in ("circular", "reflect", "replicate")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kronecker_products_are_the_naive_matrix(options):
    layer = Separable(random(3, 2).numpy(), ((1.0, 3.0, -2.0), (2.0, 1.0)), (5, 4), options)
    dense = Layer(layer.weight, layer.size, options).dense().detach()
    truth = np.linalg.svd(dense.numpy(), compute_uv=False)
    assert np.allclose(layer.values(), truth, atol=1e-13 * truth[0], rtol=0)
    if "padding_mode" not in options:
        assert layer.transposed().shape == dense.T.shape


@pytest.mark.parametrize(("center", "beside"), [(2, 1), (-2, 1), (0, 1), (1, 1), (3, -0.5)])
def test_the_formula_is_that_of_the_tridiagonal_matrix(center, beside):
    for order in (6, 7):
        truth = dense_values(Layer(kernel(beside, center, beside), (order,)))
        assert np.allclose(tridiagonal(center, beside, order), truth, atol=1e-14, rtol=0)


# --- zero and rank deficient ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 4), (40, 41)], ids=str)
def test_zero_weight(size, dtype):
    op = ConvOperator(torch.zeros(2, 3, 3, 3, dtype=dtype), size)
    for which, k in itertools.product(("LM", "SM"), (1, 3)):
        result = cs.svds(op, k, which)
        assert result.converged
        check_enclosure(result, which, np.zeros(min(op.shape)))
        check_triplets(op, result)
        assert float(result.upper.max()) == 0.0
    assert cs.sigma_max(op) == cs.sigma_min(op) == 0.0
    assert cs.cond(op) == math.inf
    assert float(cs.logabsdet(op)) == -math.inf


def spoiled(channels: int, axis: int, copied: bool) -> Tensor:
    """A random kernel with one output (axis 0) or input channel zero, or a copy of another."""
    weight = random(channels, channels, 3, 3)
    rows = weight.movedim(axis, 0)
    rows[1] = rows[2] if copied else 0
    return weight


DEFICIENT = {
    "zero output": lambda n: spoiled(n, 0, False),
    "copied output": lambda n: spoiled(n, 0, True),
    "zero input": lambda n: spoiled(n, 1, False),
    "copied input": lambda n: spoiled(n, 1, True),
    "copied input, fewer outputs than rank": lambda n: spoiled(n, 1, True)[:-1],
    "wide, copied output": lambda n: spoiled(n + 1, 0, True)[:-1],
}
FULL_RANK = {"copied input, fewer outputs than rank"}


@pytest.mark.parametrize("size", [(5, 4), (16, 17)], ids=str)
@pytest.mark.parametrize("name", DEFICIENT)
def test_rank_deficient_channels(name, size):
    op = ConvOperator(DEFICIENT[name](4), size)
    if name in FULL_RANK:
        # min(rows, columns) leaves out the zeros of the copied input: sigma_min is not zero.
        values = dense_values(Layer(op.weight, size))
        assert values[-1] > 1e-9 * values[0]
        check(op, 1, "SM", values, atol=1e-11)
        return
    check_singular(op, cs.sigma_max(op), 1e-12 if min(op.shape) < 100 else 1e-7)


@pytest.mark.parametrize("name", sorted(set(DEFICIENT) - FULL_RANK))
def test_rank_deficient_channels_where_no_dense_matrix_fits(name):
    """9,216 rows or so: more than a dense SVD can do in a test, and the truth is 0 all the same."""
    op = ConvOperator(DEFICIENT[name](4), (48, 48))
    check_singular(op, cs.sigma_max(op), 1e-7)


@pytest.mark.parametrize("size", [(4, 5), (16, 17)], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (5, 4), (4, 5)], ids=str)
def test_rank_deficient_channels_of_a_separable_kernel(shape, size):
    channels = random(*shape).numpy()
    channels[1], channels[:, 2] = 0, channels[:, 1]
    layer = Separable(channels, ((1.0, 4.0, 1.0), (2.0, 5.0, 1.0)), size)
    values = layer.values()
    assert values[-1] == 0
    check_singular(layer.operator(), values[0], 1e-7)
    check(layer.operator(), 3, "LM", values)
    assert float(cs.logabsdet(ConvOperator(layer.weight, (3, 3)))) == -math.inf


# --- repeated and clustered -----------------------------------------------------------------------

TWO = ((1.0, 2.0, 1.0),) * 2
MILD = ((1.0, 3.0, 1.0),) * 2
DELTA = ((0.0, 1.0, 0.0),) * 2
REPEATED = {
    "identity": lambda n: Separable(np.eye(4), DELTA, (n, n)),
    "orthogonal delta": lambda n: Separable(orthogonal(4), DELTA, (n, n)),
    "two levels": lambda n: Separable(np.diag([1.0, 1.0, 0.5, 0.5]), DELTA, (n, n)),
    "equal factors": lambda n: Separable(2 * ONE, TWO, (2 * n, 2 * n)),
    "each value four times": lambda n: Separable(orthogonal(4), MILD, (n, n)),
    "each value six times": lambda n: Separable(orthogonal(6), MILD, (n, n)),
    "tall": lambda n: Separable(orthogonal(6)[:, :4], MILD, (n, n)),
    "wide": lambda n: Separable(orthogonal(6)[:4], MILD, (n, n)),
    "circular": lambda n: Separable(orthogonal(4), MILD, (n, n), {"padding_mode": "circular"}),
    "strided": lambda n: Separable(orthogonal(4), DELTA, (2 * n, n), {"stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("size", [4, 17], ids=["small", "large"])
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_values_are_all_found(name, size, k):
    layer = REPEATED[name](size)
    op, values = layer.operator(), layer.values()
    for which in ("LM", "SM"):
        result = check(op, k, which, values)
        # The next one's estimate bounds a repeated value, which no gap separates: some percents.
        assert float((result.upper - result.lower).max()) <= 0.1 * values[0]


@pytest.mark.parametrize("k", [1, 6])
def test_identity_of_many_rows(k):
    """36,864 rows: no dense matrix; Lanczos sees one vector of an eigenspace of all."""
    layer = Separable(np.eye(4), DELTA, (96, 96))
    for which in ("LM", "SM"):
        check(layer.operator(), k, which, np.ones(36864))


@pytest.mark.parametrize("groups", [3, 70])
def test_equal_groups_repeat_their_values(groups):
    """Depthwise with one kernel for all channels: each value as often as there are groups."""
    one = Separable(ONE, MILD, (4, 5))
    op = ConvOperator(one.weight.repeat(groups, 1, 1, 1), (4, 5), groups=groups)
    values = descending(np.repeat(one.values(), groups))
    for k, which in itertools.product((1, 3, 6), ("LM", "SM")):
        check(op, k, which, values)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("order", [50, 1500])
def test_clustered_values(order, k):
    """Identity + 1e-9: all values within 4e-9, with a closed form."""
    op, values = ConvOperator(kernel(1e-9, 1, 1e-9), order), tridiagonal(1, 1e-9, order)
    for which in ("LM", "SM"):
        check(op, k, which, values, rounding=EXACT, rtol=3e-8, atol=0)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("size", [(5, 4), (16, 16)], ids=str)
def test_identity_with_a_random_perturbation(size, k):
    delta = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    delta[range(4), range(4), 1, 1] = 1
    layer = Layer(delta + 1e-9 * random(4, 4, 3, 3), size)
    values = dense_values(layer)
    for which in ("LM", "SM"):
        check(layer.operator(), k, which, values, rtol=3e-8, atol=0)


# --- circulants that are singular where M is not --------------------------------------------------


def log_sum(values: np.ndarray) -> float:
    return float(np.log(values).sum())


def check_inverse(op: ConvOperator, values: np.ndarray) -> None:
    """logabsdet by the closed form; solves by their own residual and error."""
    condition = values[0] / values[-1]
    got = float(cs.logabsdet(op))
    assert math.isclose(got, log_sum(values), rel_tol=1e-9, abs_tol=1e-12 * condition)
    for adjoint in (False, True):
        x = random(*(op.output_shape if adjoint else op.input_shape), seed=1)
        y = op.rmatvec(x) if adjoint else op.matvec(x)
        error = float((cs.solve(op, y, adjoint) - x).norm() / x.norm())
        assert error <= 1e-13 * condition, f"adjoint={adjoint}: error {error:.1e}"


VANISHING = {  # (center, beside): the symbol vanishes at frequency 0, at pi, or inside
    "second difference": (-2.0, 1.0),
    "sum, at pi": (2.0, 1.0),
    "1 1 1": (1.0, 1.0),
    "1 0 1, even": (0.0, 1.0),
}


@pytest.mark.parametrize("order", [10, 300, 1000])
@pytest.mark.parametrize("name", VANISHING)
def test_symbols_that_vanish(name, order):
    center, beside = VANISHING[name]
    op = ConvOperator(kernel(beside, center, beside), order)
    values = tridiagonal(center, beside, order)
    check(op, 2, "SM", values, rounding=1e-9 if center == 1 else EXACT, rtol=1e-7, atol=0)
    check_inverse(op, values)
    if abs(center) == 2:
        assert math.isclose(float(cs.logabsdet(op)), math.log(order + 1), rel_tol=1e-8)
    dense = Layer(op.weight, (order,)).dense().detach()
    y = random(1, order, seed=2)
    expected = torch.linalg.solve(dense, y.flatten())
    error = (cs.solve(op, y).flatten() - expected).norm() / expected.norm()
    assert float(error) <= 1e-13 * values[0] / values[-1]


@pytest.mark.parametrize("order", [10, 1000])
def test_central_difference(order):
    """[-1, 0, 1] at even N: regular, every value twice; at odd N exactly singular."""
    taps = kernel(-1, 0, 1)
    values = tridiagonal(0, 1, order)
    check(ConvOperator(taps, order), 2, "SM", values, rounding=EXACT, atol=0)
    check_inverse(ConvOperator(taps, order), values)
    odd = ConvOperator(taps, order + 1)
    check_singular(odd, 2.0, 1e-12 if order < 100 else 1e-7)
    assert float(cs.logabsdet(odd)) == -math.inf
    with pytest.raises(ArithmeticError, match="singular"):
        cs.solve(odd, random(1, order + 1))


@pytest.mark.parametrize("size", [(5, 6), (32, 33)], ids=str)
def test_discrete_laplacian(size):
    op = ConvOperator(kernel([0, 1, 0], [1, -4, 1], [0, 1, 0]), size)
    rows, columns = (tridiagonal(-2, 1, n) for n in size)
    values = descending(np.add.outer(rows, columns))
    check_ends(op, values, rounding=EXACT)
    check_inverse(op, values)


@pytest.mark.parametrize("size", [(6, 4), (30, 34)], ids=str)
@pytest.mark.parametrize("taps", [(-1.0, 0.0, 1.0), (1.0, -2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_separable_kernels_whose_symbol_vanishes(taps, size):
    """Sobel and its kind; 1 1 1 needs N + 1 not a multiple of 3, which 5, 7, 31 and 35 are not."""
    layer = Separable(np.array([[2.0, 1.0], [0.5, 1.0]]), (taps, (1.0, 2.0, 1.0)), size)
    check_ends(layer.operator(), layer.values(), k=3)
    check_inverse(layer.operator(), layer.values())


# --- scales and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[4]], ids=str)
@pytest.mark.parametrize("size", [(5, 4), (16, 18)], ids=str)
def test_scales(size, options, scale):
    layer = Separable(random(4, 4).numpy(), ((1.0, 3.0, -1.0), (2.0, 5.0, 1.0)), size, options)
    op = layer.operator(scale)
    values = layer.values() * scale
    check_ends(op, values)
    condition = values[0] / values[-1]
    assert math.isclose(cs.cond(op), condition, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [40, 1000])
def test_narrow_weights_have_the_values_of_their_exact_widening(dtype, order):
    """0.1 and 0.3 are rounded once, by the dtype; the truth is that of the rounded numbers."""
    weight = kernel(0.1, 0.3, 0.1).to(dtype)
    beside, center, _ = weight.double().flatten().tolist()
    assert center != 0.3
    values = tridiagonal(center, beside, order)
    for op in (ConvOperator(weight, order), ConvOperator(weight.double(), order)):
        check(op, 2, "SM", values, rounding=EXACT, atol=1e-14)
        if order < 100:
            check(op, 2, "LM", values, rounding=EXACT, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}, {"stride": 2, "padding": 1}])
def test_narrow_random_weights(dtype, options):
    weight = random(3, 3, 3, 3).to(dtype)
    values = dense_values(Layer(weight.double(), (5, 6), options))
    check_ends(ConvOperator(weight, (5, 6), **options), values)
    narrow = cs.svdvals(ConvOperator(weight, (5, 6), **options))
    assert np.allclose(narrow.numpy(), values, atol=1e-13 * values[0], rtol=0)
