"""The border matrix that makes a circulant solve the layer, against dense matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers.index_sets import one_hot_matrices
from helpers.strategies import Layer, layers, random
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._structure import is_square_toeplitz
from convspectra.torus._capacitance import CapacitanceFactorization, border_bytes


@st.composite
def square_layers(draw: st.DrawFn) -> Layer:
    """All that the method inverts: any axes, kernels, dilations, asymmetric pads and groups."""
    ndim = draw(st.integers(1, 3))
    most = {1: 6, 2: 4, 3: 3}[ndim]
    size = tuple(draw(st.integers(1, {1: 12, 2: 5, 3: 3}[ndim])) for _ in range(ndim))
    taps = tuple(draw(st.integers(1, most)) for _ in range(ndim))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
    pads = []
    for k, d in zip(taps, dilation, strict=True):
        before = draw(st.integers(0, d * (k - 1)))
        pads.append((before, d * (k - 1) - before))
    groups, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options = {"padding": pads, "dilation": dilation, "groups": groups}
    if draw(st.booleans()):
        options["transposed"] = True
    weight = random(groups * channels, channels, *taps, seed=draw(st.integers(0, 2**16)))
    # The center tap keeps the spread of singular values within what a test can check closely.
    center = tuple(min(p[0] // d, k - 1) for p, d, k in zip(pads, dilation, taps, strict=True))
    diagonal = draw(st.sampled_from([0.0, 3.0]))
    for i in range(groups * channels):
        weight[(i, i % channels, *center)] += diagonal
    return Layer(weight, size, options)


# --- which layers ---------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=150)
def test_admitted_layers_are_square_and_toeplitz_by_channels(layer):
    op = layer.operator()
    if not is_square_toeplitz(op):
        return
    dense = layer.dense().detach()
    assert dense.shape[0] == dense.shape[1]
    h, g = op.output_shape[0], op.input_shape[0]
    assert h == g
    assert op.output_shape == op.input_shape
    entries: dict[tuple[int, ...], float] = {}
    points = list(itertools.product(*map(range, op.input_shape)))
    for i, row in enumerate(points):
        for j, column in enumerate(points):
            step = tuple(c - r for r, c in zip(row[1:], column[1:], strict=True))
            value = float(dense[i, j])
            assert math.isclose(entries.setdefault((row[0], column[0], *step), value), value)


@given(square_layers())
@settings(max_examples=30)
def test_square_zero_padded_layers_are_admitted(layer):
    assert is_square_toeplitz(layer.operator())
    assert is_square_toeplitz(layer.operator().T)


W = random(2, 2, 3, 3)
REFUSED = {
    "stride": ConvOperator(W, 5, stride=2, padding=1),
    "stride that keeps the size": ConvOperator(random(2, 2, 1), 5, stride=2, padding=[(4, 0)]),
    "circular": ConvOperator(W, 5, padding_mode="circular"),
    "reflect": ConvOperator(W, 5, padding_mode="reflect"),
    "replicate": ConvOperator(W, 5, padding_mode="replicate"),
    "more outputs": ConvOperator(random(3, 2, 3, 3), 5),
    "valid": ConvOperator(W, 5, padding=0),
    "wide": ConvOperator(W, 5, padding=2),
    "linear": ConvOperator(random(3, 3), ()),
    "grouped, more outputs": ConvOperator(random(4, 1, 3), 5, groups=2),
}


@pytest.mark.parametrize("op", REFUSED.values(), ids=REFUSED.keys())
def test_other_layers_are_not_admitted(op):
    assert not is_square_toeplitz(op)


# --- solves ---------------------------------------------------------------------------------------


@given(square_layers())
@settings(max_examples=60)
def test_solves_are_those_of_the_dense_matrix(layer):
    dense = layer.dense().detach()
    values = torch.linalg.svdvals(dense)
    condition = float(values[0] / values[-1])
    assume(condition < 1e6)
    op = layer.operator()
    factorization = CapacitanceFactorization(op)
    y = random(2, *op.output_shape, seed=1)
    for solve, matrix in ((factorization.solve, dense), (factorization.solve_adjoint, dense.T)):
        x = solve(y)
        assert x.shape == (2, *op.input_shape)
        expected = torch.linalg.solve(matrix, y.flatten(1).T).T
        error = (x.flatten(1) - expected).norm() / expected.norm()
        assert error <= 1e-13 * condition
        residual = (x.flatten(1) @ matrix.T - y.flatten(1)).norm() / y.norm()
        assert residual <= 1e-13 * condition
    assert factorization.error_bound <= 1e-9 * condition


@given(square_layers())
@settings(max_examples=60)
def test_logabsdet_is_that_of_the_dense_matrix(layer):
    dense = layer.dense().detach()
    values = torch.linalg.svdvals(dense)
    assume(values[-1] > 1e-6 * values[0])
    factorization = CapacitanceFactorization(layer.operator())
    expected = float(torch.linalg.slogdet(dense).logabsdet)
    assert math.isclose(float(factorization.logabsdet()), expected, rel_tol=1e-9, abs_tol=1e-8)
    assert not factorization.is_singular()


@given(square_layers())
@settings(max_examples=25)
def test_gradient_of_logabsdet_is_the_inverse_summed_over_omega(layer):
    assume(layer.weight.numel() <= 80)
    dense = layer.dense().detach()
    values = torch.linalg.svdvals(dense)
    assume(values[-1] > 1e-4 * values[0])
    weight = layer.weight.clone().requires_grad_()
    CapacitanceFactorization(layer.operator(weight)).logabsdet().backward()
    inverse = torch.linalg.inv(dense)
    expected = torch.einsum("kij,ji->k", one_hot_matrices(layer), inverse).reshape(weight.shape)
    assert (weight.grad - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_solves_do_not_follow_the_weight():
    weight = random(2, 2, 3).requires_grad_()
    x = CapacitanceFactorization(ConvOperator(weight, 5)).solve(random(1, 2, 5))
    assert not x.requires_grad


def test_kernel_of_one_tap_has_no_border():
    weight = random(3, 3, 1, 1).requires_grad_()
    factorization = CapacitanceFactorization(ConvOperator(weight, (2, 4)))
    y = random(2, 3, 2, 4, seed=1)
    expected = torch.einsum("hg,bgij->bhij", torch.linalg.inv(weight.detach()[..., 0, 0]), y)
    assert torch.allclose(factorization.solve(y), expected, atol=1e-13)
    log_det = factorization.logabsdet()
    assert torch.isclose(log_det, 8 * torch.linalg.slogdet(weight[..., 0, 0]).logabsdet)
    log_det.backward()
    assert torch.allclose(weight.grad[..., 0, 0], 8 * torch.linalg.inv(weight[..., 0, 0]).T)


# --- what else is promised ------------------------------------------------------------------------


def exact_errors(op: ConvOperator, dense: Tensor, factorization: CapacitanceFactorization):
    """||M X - I|| and ||M' Y - I||, from X and Y applied to the identity."""
    identity = torch.eye(len(dense), dtype=torch.float64)
    x, y = (
        inverse(identity.reshape(-1, *op.output_shape)).flatten(1).T
        for inverse in (factorization.apply_inverse, factorization.apply_inverse_adjoint)
    )
    return [
        float(torch.linalg.matrix_norm(error, 2))
        for error in (dense @ x - identity, dense.T @ y - identity)
    ]


@given(square_layers())
@settings(max_examples=40)
def test_error_bound_bounds_the_error_of_the_inverse(layer):
    dense = layer.dense().detach()
    assume(float(torch.linalg.cond(dense)) < 1e10)
    op = layer.operator()
    factorization = CapacitanceFactorization(op)
    assert max(exact_errors(op, dense, factorization)) <= factorization.error_bound + 1e-15


@pytest.mark.parametrize("spoiled", [1e-9, 1e-7, 1e-5])
@pytest.mark.parametrize("size", [(8,), (4, 3)])
def test_error_bound_follows_an_error_that_is_put_in(size, spoiled):
    """It is not idle: within a factor of a thousand of the Frobenius norm of the error."""
    layer = Layer(random(2, 2, *[3] * len(size)), size)
    op, dense = layer.operator(), layer.dense().detach()
    factorization = CapacitanceFactorization(op)
    lu, pivots = factorization._torus._factors
    factorization._torus._factors = (lu * (1 + spoiled * random(*lu.shape)), pivots)
    exact = max(exact_errors(op, dense, factorization))
    assert exact > 0.1 * spoiled
    assert exact <= factorization.error_bound <= 1000 * len(dense) ** 0.5 * exact


def test_refinement_is_made_only_where_it_is_asked_for():
    """With the factors spoiled a little, one step of refinement squares the error."""
    op = ConvOperator(random(2, 2, 3, 3), 5)
    factorization = CapacitanceFactorization(op)
    lu, pivots = factorization._torus._factors
    factorization._torus._factors = (lu * (1 + 1e-7 * random(*lu.shape)), pivots)
    y = random(1, 2, 5, 5)

    def left(solve: Callable[..., Tensor], product: Callable[[Tensor], Tensor], **options: float):
        return float((product(solve(y, **options)) - y).norm() / y.norm())

    for solve, product in (
        (factorization.solve, op.matvec),
        (factorization.solve_adjoint, op.rmatvec),
    ):
        plain = left(solve, product, rtol=1e-3)
        assert 1e-8 < plain < 1e-3
        assert left(solve, product) < 1e-3 * plain
        assert left(solve, product, rtol=0.9 * plain) < 1e-3 * plain
        assert left(solve, product, rtol=1.1 * plain) == plain


def test_overflow_is_not_an_answer():
    factorization = CapacitanceFactorization(ConvOperator(random(2, 2, 3), 5))
    with pytest.raises(ArithmeticError, match="overflowed"):
        factorization.solve(torch.full((1, 2, 5), 1e308, dtype=torch.float64))


@pytest.mark.parametrize(
    ("taps", "points"), [((3, 3), 5), ((3, 1), 6), ((5, 5), 10), ((2, 3), 5), ((3, 3, 3), 10)]
)
def test_the_border_is_that_of_the_longest_axis(taps, points):
    """So many block rows has W: border lines times points of a line."""
    size = (5, 6, 2)[: len(taps)]
    op = ConvOperator(random(2, 1, *taps), size, groups=2)
    assert border_bytes(op) == 8 * 2 * points**2
    assert CapacitanceFactorization(op)._torus._factors[0].shape == (2, points, points)


def test_the_border_matrix_has_a_limit():
    op = ConvOperator(random(4, 2, 3, 3), (5, 6), groups=2)
    order = 2 * 5
    needed = 2 * order**2 * 8
    CapacitanceFactorization(op, max_bytes=needed)
    with pytest.raises(ValueError, match=rf"the border matrix .*={needed - 1:,} .* {needed:,};"):
        CapacitanceFactorization(op, max_bytes=needed - 1)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    factorization = CapacitanceFactorization(ConvOperator(random(2, 2, 3), 5))
    factorization.solve(random(1, 2, 5))
    factorization.is_singular()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(3))
def test_dead_inputs_do_not_spoil_the_bound_on_the_inverse(seed):
    """Training leaves channels that are next to nothing: the columns of M are then badly scaled."""
    weight = random(4, 4, 3, 3, seed=seed)
    weight[:, 0] *= 1e-9
    factorization = CapacitanceFactorization(ConvOperator(weight, (12, 12)))
    assert factorization.error_bound < 1e-6
