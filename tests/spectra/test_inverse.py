"""Linear systems and log-determinants against the dense matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.index_sets import one_hot_matrices, some_indices
from helpers.kernels import dead_channel, kernel
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator._structure import is_square_toeplitz
from convspectra.spectra._auto import SMALL_WORK

CENTER = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
CENTER[range(4), range(4), 1, 1] = 1
LARGE = Layer(random(4, 4, 3, 3) + 3 * CENTER, (9, 9))  # takes the capacitance method
# Layers on either side of SMALL_WORK, and one that is square but not Toeplitz.
SQUARE = {
    "small": Layer(random(2, 2, 3, 3), (4, 3)),
    "capacitance": LARGE,
    "capacitance, grouped": Layer(random(6, 2, 3, 3), (7, 7), {"groups": 3}),
    "capacitance, transposed": Layer(LARGE.weight, (9, 9), {"transposed": True, "padding": 1}),
    "asymmetric": Layer(
        random(1, 1, 4, 2) + 4 * kernel([0, 0], [1, 0], [0, 0], [0, 0]),
        (16, 18),
        {"padding": [(1, 2), (0, 1)]},
    ),
    "circular": Layer(random(2, 2, 3), (6,), {"padding_mode": "circular"}),
    "space to depth": Layer(random(4, 1, 2, 2), (6, 4), {"stride": 2, "padding": 0}),
    "linear": Layer(random(5, 5), ()),
}
each_square = pytest.mark.parametrize("layer", SQUARE.values(), ids=SQUARE.keys())
SINGULAR = {
    "copied output": Layer(dead_channel(4, 0, copy=True), (9, 9)),
    "copied input": Layer(dead_channel(4, 1, copy=True), (9, 9)),
    "copied output, small": Layer(dead_channel(3, 0, copy=True), (3, 3)),
    "1 0 1": Layer(kernel(1, 0, 1), (291,)),
    "1 0 1, small": Layer(kernel(1, 0, 1), (9,)),
    "shift": Layer(CENTER.roll(1, 3), (9, 9)),
    "circular difference": Layer(kernel(1, -2, 1), (8,), {"padding_mode": "circular"}),
    "kernel 1": Layer((random(12, 6) @ random(6, 12, seed=1))[..., None, None], (5, 5)),
    "zero": Layer(torch.zeros(2, 2, 3).double(), (5,)),
}
each_singular = pytest.mark.parametrize("layer", SINGULAR.values(), ids=SINGULAR.keys())


# --- the log-determinant --------------------------------------------------------------------------


def check_logabsdet(layer: Layer) -> None:
    dense = layer.dense().detach()
    u, values, vh = torch.linalg.svd(dense, full_matrices=False)
    weight = layer.weight.clone().requires_grad_()
    result = cs.logabsdet(layer.operator(weight))
    assert result.shape == ()
    assert result.dtype == torch.float64
    if values[-1] <= 1e-15 * values[0]:
        assert float(result.detach()) == -math.inf
        return
    if values[-1] <= 1e-9 * values[0]:  # of a layer that reads nothing both are 0
        return  # Either answer may be right.
    condition = float(values[0] / values[-1])
    expected = float(values.log().sum())
    tolerance = 1e-14 * condition * len(values)
    assert math.isclose(float(result.detach()), expected, rel_tol=1e-12, abs_tol=tolerance)
    if dense.shape[0] == dense.shape[1]:
        sign_and_log = torch.linalg.slogdet(dense)
        assert math.isclose(float(sign_and_log.logabsdet), expected, abs_tol=10 * tolerance)
    result.backward()
    indices = some_indices(layer, 12)
    by_matrix = (u / values) @ vh
    gradient = (one_hot_matrices(layer, indices) * by_matrix).sum((1, 2))
    assert weight.grad.shape == weight.shape
    error = (weight.grad.flatten()[indices] - gradient).abs().max()
    assert error <= 1e-13 * condition * by_matrix.abs().sum()
    again = cs.logabsdet(layer.operator())
    assert math.isclose(float(again), float(result.detach()), rel_tol=1e-12, abs_tol=tolerance)


@given(layers())
@settings(max_examples=100)
def test_logabsdet_of_random_layers(layer):
    check_logabsdet(layer)


@each_square
def test_the_square_layers_here_are_well_conditioned(layer):
    values = torch.linalg.svdvals(layer.dense().detach())
    assert values[-1] > 1e-6 * values[0]


@each_square
def test_logabsdet_of_square_layers(layer):
    check_logabsdet(layer)


@pytest.mark.parametrize("name", ["small", "asymmetric", "circular", "linear"])
def test_gradient_of_logabsdet_by_finite_differences(name):
    layer = SQUARE[name]
    assert torch.autograd.gradcheck(
        lambda weight: cs.logabsdet(layer.operator(weight)),
        (layer.weight.clone().requires_grad_(),),
        fast_mode=layer.weight.numel() > 10,
    )


def test_gradient_of_logabsdet_of_a_rectangular_layer_by_finite_differences():
    for layer in (Layer(random(3, 1, 3), (4,)), Layer(random(2, 3, 2, 2), (4, 3), {"padding": 0})):
        assert torch.autograd.gradcheck(
            lambda weight, layer=layer: cs.logabsdet(layer.operator(weight)),
            (layer.weight.clone().requires_grad_(),),
        )


def test_gradient_is_finite_where_singular_values_are_repeated():
    for layer in (
        Layer(CENTER * 2, (9, 9)),
        Layer(random(3, 3, 1, 1), (2, 2)),
        Layer(CENTER * 2, (3, 3), {"padding_mode": "circular"}),
    ):
        weight = layer.weight.clone().requires_grad_()
        cs.logabsdet(layer.operator(weight)).backward()
        indices = some_indices(layer, 12)
        by_matrix = torch.linalg.pinv(layer.dense().detach()).T
        expected = (one_hot_matrices(layer, indices) * by_matrix).sum((1, 2))
        assert torch.allclose(weight.grad.flatten()[indices], expected, atol=1e-11)


@each_singular
def test_logabsdet_of_a_singular_layer_is_minus_infinity(layer):
    weight = layer.weight.clone().requires_grad_()
    result = cs.logabsdet(layer.operator(weight))
    assert float(result.detach()) == -math.inf
    assert result.dtype == torch.float64


def test_logabsdet_near_singularity():
    """A capacitance method that gives up leaves it to the dense matrix."""
    for smallest in (1e-6, 1e-9, 1e-10):
        weight = dead_channel(4, 0, copy=True)
        weight[1] += smallest * random(4, 3, 3, seed=3)
        layer = Layer(weight, (9, 9))
        values = torch.linalg.svdvals(layer.dense().detach())
        result = float(cs.logabsdet(layer.operator()))
        if values[-1] > 2 * 324 * 2**-52 * values[0]:
            assert math.isclose(result, float(values.log().sum()), abs_tol=0.5)
        elif values[-1] < 0.5 * 324 * 2**-52 * values[0]:
            assert result == -math.inf


@pytest.mark.parametrize("layer", [SQUARE["small"], LARGE, Layer(random(3, 1, 3), (4,))])
@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e150])
def test_logabsdet_of_scaled_layers(layer, scale):
    weight = (layer.weight * scale).requires_grad_()
    op = layer.operator(weight)
    result = cs.logabsdet(op)
    plain = layer.weight.clone().requires_grad_()
    expected = cs.logabsdet(layer.operator(plain))
    shift = min(op.shape) * math.log(scale)
    assert math.isclose(float(result.detach()), float(expected.detach()) + shift, rel_tol=1e-12)
    result.backward()
    expected.backward()
    assert torch.allclose(weight.grad * scale, plain.grad, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(3, 4), (9, 9)])
def test_logabsdet_of_narrow_weights_is_computed_in_float64(dtype, size):
    narrow = LARGE.weight.to(dtype).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    one, other = (cs.logabsdet(ConvOperator(w, size)) for w in (narrow, wide))
    assert torch.equal(one.detach(), other.detach())
    one.backward()
    other.backward()
    assert narrow.grad.dtype == dtype
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("layer", [SQUARE["small"], LARGE])
def test_second_derivative_of_logabsdet_is_refused(layer):
    weight = layer.weight.clone().requires_grad_()
    total = cs.logabsdet(layer.operator(weight)) + weight.square().sum()
    (gradient,) = torch.autograd.grad(total, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        torch.autograd.grad(gradient.sum(), weight)


def test_logabsdet_over_the_limit_is_refused():
    with pytest.raises(ValueError, match="the border matrix to take at most max_bytes=1,000"):
        cs.logabsdet(LARGE.operator(), max_bytes=1000)
    reflecting = cs.ConvOperator(LARGE.weight, LARGE.input_size, padding_mode="reflect")
    with pytest.raises(ValueError, match="the dense matrix to take at most max_bytes=1,000"):
        cs.logabsdet(reflecting, max_bytes=1000)
    op = SINGULAR["copied output"].operator()
    with pytest.raises(ValueError, match=r"of a layer close to singular .* it would take 839,808"):
        cs.logabsdet(op, max_bytes=100_000)


# --- linear systems -------------------------------------------------------------------------------


def check_solve(layer: Layer) -> None:
    dense = layer.dense().detach()
    values = torch.linalg.svdvals(dense)
    if values[-1] <= 1e-9 * values[0]:  # of a layer that reads nothing both are 0
        return
    condition = float(values[0] / values[-1])
    op = layer.operator()
    for adjoint, matrix in ((False, dense), (True, dense.T)):
        shape, other = (
            (op.input_shape, op.output_shape)
            if adjoint
            else (
                op.output_shape,
                op.input_shape,
            )
        )
        y = random(3, *shape, seed=1)
        x = cs.solve(op, y, adjoint)
        assert x.shape == (3, *other)
        expected = torch.linalg.solve(matrix, y.flatten(1).T).T
        assert (x.flatten(1) - expected).norm() <= 1e-13 * condition * expected.norm()
        one = cs.solve(op, y[1], adjoint)
        assert one.shape == other
        assert (one - x[1]).norm() <= 1e-13 * condition * x[1].norm()


@given(layers())
@settings(max_examples=150)
def test_solve_with_random_layers(layer):
    op = layer.operator()
    if op.shape[0] == op.shape[1]:
        check_solve(layer)


@each_square
def test_solve_with_square_layers(layer):
    check_solve(layer)


@each_singular
@pytest.mark.parametrize("adjoint", [False, True])
def test_solving_with_a_singular_layer_is_refused(layer, adjoint):
    op = layer.operator()
    with pytest.raises(ArithmeticError, match=r"singular|weight of 0"):
        cs.solve(op, random(*op.output_shape), adjoint)


def test_one_bad_right_hand_side_of_a_batch_is_enough():
    """The second one is in the range of M, the first one is not."""
    op = SINGULAR["1 0 1, small"].operator()
    y = torch.stack([random(1, 9), op.matvec(random(1, 9, seed=1))])
    with pytest.raises(ArithmeticError, match="singular to working precision"):
        cs.solve(op, y)


@pytest.mark.parametrize("layer", [SQUARE["small"], LARGE, SQUARE["circular"]])
@pytest.mark.parametrize("scale", [1e-200, 1e-150, 1e150, 1e200])
def test_solve_with_scaled_layers_and_data(layer, scale):
    y = random(2, *layer.operator().output_shape)
    x = cs.solve(layer.operator(), y)
    of_weight = cs.solve(layer.operator(layer.weight * scale), y)
    assert torch.allclose(of_weight * scale, x, rtol=1e-9)
    of_data = cs.solve(layer.operator(), y * scale)
    assert torch.allclose(of_data / scale, x, rtol=1e-9)


def test_solving_for_zero_gives_zero():
    for layer in (SQUARE["small"], LARGE):
        y = torch.zeros(layer.operator().output_shape, dtype=torch.float64)
        assert torch.equal(cs.solve(layer.operator(), y), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_solve_keeps_the_dtype_and_computes_in_float64(dtype):
    op = ConvOperator(LARGE.weight.to(dtype), (9, 9))
    y = random(2, 4, 9, 9).to(dtype)
    x = cs.solve(op, y)
    assert x.dtype == dtype
    expected = cs.solve(ConvOperator(op.weight.double(), (9, 9)), y.double())
    assert torch.equal(x, expected.to(dtype))


def test_solutions_are_detached():
    op = LARGE.operator(LARGE.weight.clone().requires_grad_())
    assert not cs.solve(op, random(4, 9, 9).requires_grad_()).requires_grad


OP = SQUARE["small"].operator()
BAD_RIGHT_HAND_SIDES = [
    (random(2, 3, 4), r"expected y of shape \(2, 4, 3\) or .* got \(2, 3, 4\)"),
    (random(2, 4, 3).float(), "expected y of torch.float64 on cpu .* got torch.float32"),
    (random(2, 4, 3) * math.nan, "expected finite y, got NaN or Inf"),
    (random(0, 2, 4, 3), "expected y of shape"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize(("y", "message"), BAD_RIGHT_HAND_SIDES)
def test_bad_right_hand_sides_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        cs.solve(OP, y)


@pytest.mark.parametrize("value", [random(2, 2, 3), None])
def test_only_operators_are_taken(value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got"):
        cs.logabsdet(value)
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got"):
        cs.solve(value, random(2, 4, 3))


def test_solve_over_the_limit_is_refused():
    y = random(4, 9, 9)
    with pytest.raises(ValueError, match="the border matrix to take at most max_bytes=1,000"):
        cs.solve(LARGE.operator(), y, max_bytes=1000)
    with pytest.raises(ValueError, match="the dense matrix to take at most max_bytes=100"):
        cs.solve(OP, random(2, 4, 3), max_bytes=100)


def test_large_square_layers_take_the_capacitance_method(monkeypatch):
    """Both functions, and both directions: a dense matrix is not even allowed here."""

    def refuse(*args: object) -> None:
        raise AssertionError("a dense matrix was formed")

    monkeypatch.setattr(ConvOperator, "to_dense", refuse)
    op = LARGE.operator()
    assert is_square_toeplitz(op)
    assert op.shape[0] ** 3 > SMALL_WORK
    assert math.isfinite(float(cs.logabsdet(op)))
    for adjoint in (False, True):
        assert cs.solve(op, random(4, 9, 9), adjoint).isfinite().all()


def test_every_right_hand_side_has_its_own_scale() -> None:
    op = ConvOperator(torch.tensor([[[1.0, 4.0, 1.0]]]).double(), 8)
    y = torch.tensor([[[1e-250] * 8], [[1e250] * 8]], dtype=torch.float64)
    x = cs.solve(op, y)
    expected = torch.linalg.solve(op.to_dense(), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(x[0, 0] / 1e-250, expected)
    torch.testing.assert_close(x[1, 0] / 1e250, expected)


def test_a_solution_that_overflows_is_an_error() -> None:
    op = ConvOperator(torch.tensor([[[5e-324]]], dtype=torch.float64), 4, padding=0)
    with pytest.raises(ArithmeticError, match="overflows"):
        cs.solve(op, torch.ones(1, 4).double())


def test_taps_that_no_pixel_reads_do_not_count() -> None:
    """Rows of the kernel that fall on the padding only, 1e8 and 1e15 times larger."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 12, 3, 3, dtype=torch.float64, generator=generator)
    plain = weight * torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1).double()
    x = torch.randn(12, 1, 40, dtype=torch.float64, generator=generator)
    for size in (1e8, 1e15):
        outer = torch.tensor([size, 1.0, size]).reshape(3, 1).double()
        op, alone = (ConvOperator(w, (1, 40)) for w in (weight * outer, plain))
        torch.testing.assert_close(cs.solve(op, alone.matvec(x)), x, rtol=1e-9, atol=1e-9)
        assert cs.sigma_min(op) == pytest.approx(cs.sigma_min(alone), rel=1e-9)
        torch.testing.assert_close(cs.logabsdet(op), cs.logabsdet(alone))
