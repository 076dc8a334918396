"""Least squares with rectangular layers, and error bounds, against mpmath and dense matrices."""

from __future__ import annotations

import mpmath
import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings
from torch import Tensor

import convspectra as cs
from convspectra.spectra import _least_squares as least_squares

RECTANGULAR = {
    "tall": Layer(random(3, 2, 3, 3), (4, 3)),
    "wide": Layer(random(2, 3, 3), (6,)),
    "strided": Layer(random(4, 3, 3, 2), (5, 4), {"stride": 2, "padding": 1}),
    "no padding": Layer(random(2, 2, 3), (7,), {"padding": 0}),
    "full padding": Layer(random(2, 2, 3), (7,), {"padding": 2}),
    "grouped": Layer(random(6, 2, 3), (5,), {"groups": 2}),
    "transposed": Layer(random(2, 3, 3), (5,), {"transposed": True, "padding": 1}),
    "reflect": Layer(random(3, 2, 3), (5,), {"padding_mode": "reflect"}),
    "linear": Layer(random(5, 3), ()),
}
each_rectangular = pytest.mark.parametrize("layer", RECTANGULAR.values(), ids=RECTANGULAR.keys())
each_way = pytest.mark.parametrize("formed", [True, False], ids=["formed", "not formed"])


@each_rectangular
@each_way
@pytest.mark.parametrize("adjoint", [False, True])
def test_rectangular_layers_are_solved_by_the_pseudo_inverse(
    layer: Layer, formed: bool, adjoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not formed:
        monkeypatch.setattr(least_squares, "DENSE_NUMBERS", 0)
    op, dense = layer.operator(), layer.dense().detach()
    matrix, shape = (dense.T, op.input_shape) if adjoint else (dense, op.output_shape)
    y = random(3, *shape, seed=1)
    x, bound = cs.solve(op, y, adjoint, return_bound=True)
    expected = y.flatten(1) @ torch.linalg.pinv(matrix).T
    error = torch.linalg.vector_norm(x.flatten(1) - expected, dim=1)
    torch.testing.assert_close(x.flatten(1), expected, rtol=1e-8, atol=1e-8)
    slack = 1e-12 * torch.linalg.vector_norm(expected, dim=1)
    assert bool((error <= bound.error + slack).all())
    assert bool((bound.error < 1e-5 * torch.linalg.vector_norm(expected, dim=1)).all())
    one = cs.solve(op, y[1], adjoint)
    torch.testing.assert_close(one, x[1], rtol=1e-9, atol=1e-9)


def exact_error(matrix: Tensor, y: Tensor, x: Tensor) -> float:
    """||x - M^{-1} y|| with 40 digits."""
    with mpmath.workdps(40):
        exact = mpmath.lu_solve(mpmath.matrix(matrix.tolist()), mpmath.matrix(y.tolist()))
        return float(mpmath.norm(mpmath.matrix(x.double().tolist()) - exact))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("taps", [[1.0, 4.0, 1.0], [1.0, 2.0, 1.0], [1.0, -2.0, 1.1]])
def test_the_error_is_within_its_bound(taps: list[float], dtype: torch.dtype) -> None:
    op = cs.ConvOperator(torch.tensor([[taps]], dtype=dtype), 24)
    y = random(2, 1, 24, dtype=dtype)
    x, bound = cs.solve(op, y, return_bound=True)
    matrix = op.to_dense().double()
    for i in range(2):
        assert exact_error(matrix, y[i].flatten().double(), x[i].flatten()) <= float(bound.error[i])
    least = float(torch.linalg.svdvals(matrix)[-1])
    assert 0.5 * least < bound.sigma_min <= least
    assert bool((bound.error < 1e-4 * torch.linalg.vector_norm(x.flatten(1), dim=1)).all())


@given(layers())
@settings(max_examples=60)
def test_bounds_of_random_layers(layer: Layer) -> None:
    op, dense = layer.operator(), layer.dense().detach()
    s = torch.linalg.svdvals(dense)
    if float(s[-1]) < 1e-6 * float(s[0]) or float(s[0]) == 0:
        return
    truth = random(*op.input_shape, seed=3)
    y = op.matvec(truth)
    x, bound = cs.solve(op, y, return_bound=True)
    expected = torch.linalg.pinv(dense) @ y.flatten()
    error = float((x.flatten() - expected).norm())
    assert error <= float(bound.error) + 1e-9 * float(expected.norm())
    assert bound.error.shape == bound.residual.shape == ()


def test_noise_of_a_known_size_is_bounded_and_the_bound_is_reached() -> None:
    op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]], dtype=torch.float64), 20)
    truth = random(1, 20)
    worst = cs.svds(op, 1, "SM").u[0]
    y = op.matvec(truth) + 0.01 * worst
    x, bound = cs.solve(op, y, return_bound=True)
    error = float((x - truth).norm())
    assert error <= float(bound.with_noise(0.01))
    assert error == pytest.approx(float(bound.with_noise(0.01)), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_bounds_scale_with_weight_and_data(scale: float) -> None:
    op = cs.ConvOperator(random(2, 2, 3), 5)
    y = random(2, 5)
    _, bound = cs.solve(op, y, return_bound=True)
    _, of_weight = cs.solve(op.with_weight(op.weight * scale), y, return_bound=True)
    _, of_data = cs.solve(op, y * scale, return_bound=True)
    assert of_weight.sigma_min == pytest.approx(bound.sigma_min * scale, rel=1e-6)
    assert float(of_weight.error) * scale == pytest.approx(float(bound.error), rel=1.0)
    assert float(of_data.error) / scale == pytest.approx(float(bound.error), rel=1.0)


def test_rectangular_layers_without_full_rank_are_refused() -> None:
    weight = random(3, 2, 3)
    weight[:, 1] = weight[:, 0]
    op = cs.ConvOperator(weight, 6)
    for adjoint, shape in ((False, op.output_shape), (True, op.input_shape)):
        with pytest.raises(ArithmeticError, match="singular to working precision"):
            cs.solve(op, random(*shape), adjoint)
