"""The penalties beyond the paper's, against autograd through a dense SVD."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import Layer, layers, random
from hypothesis import assume, given, settings
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator, penalties

BAND = {"lower": 0.7, "upper": 1.5, "k": 2}


def dense_reference(name: str, dense: Tensor, **options: float) -> Tensor:
    s = torch.linalg.svdvals(dense)
    if name == "sigma_max":
        return s[: options.get("k", 1)].mean()
    if name == "cond":
        return s[0].log() - s[-1].log()
    if name == "orthogonality":
        return (s**2 - 1).square().sum()
    assert name == "band"
    k = options["k"]
    below = (options["lower"] - s[-k:]).clamp_min(0)
    above = (s[:k] - options["upper"]).clamp_min(0)
    return 0.5 * (below.square().mean() + above.square().mean())


def dense_with_gradient(layer: Layer, weight: Tensor) -> Tensor:
    """M as the sum of its weights times the 0/1 matrices of their index sets."""
    units = torch.eye(weight.numel(), dtype=weight.dtype).reshape(-1, *weight.shape)
    return torch.tensordot(
        weight.flatten(), torch.stack([layer.dense(unit) for unit in units]), dims=1
    )


def simple_at_the_ends(dense: Tensor, k: int) -> bool:
    s = torch.linalg.svdvals(dense).tolist()
    gaps = [a - b for a, b in itertools.pairwise(s)]
    return s[-1] > 1e-4 * s[0] and min([*gaps[:k], *gaps[-k:], s[0]]) > 1e-4 * s[0]


def assert_like_dense(name: str, layer: Layer, **options: float) -> None:
    weight = layer.weight.clone().requires_grad_()
    value = getattr(penalties, name)(layer.operator(weight), **options)
    assert value.shape == ()
    assert value.dtype == torch.float64
    expected = dense_reference(name, dense_with_gradient(layer, weight), **options)
    scale = float(expected.detach().abs()) + 1
    assert math.isclose(value.item(), expected.item(), rel_tol=1e-9, abs_tol=1e-9)
    (got,) = torch.autograd.grad(value, weight)
    (by_dense,) = torch.autograd.grad(expected, weight)
    tolerance = 1e-6 * max(float(by_dense.abs().max()), scale)
    assert torch.allclose(got, by_dense, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", ["sigma_max", "cond"])
@given(layer=layers())
@settings(max_examples=40)
def test_extremes_of_any_layer(name, layer):
    assume(simple_at_the_ends(layer.dense().detach(), 1))
    assert_like_dense(name, layer)


@given(layer=layers())
@settings(max_examples=40)
def test_band_of_any_layer(layer):
    dense = layer.dense().detach()
    assume(min(dense.shape) >= 3)
    assume(simple_at_the_ends(dense, 3))
    assert_like_dense("band", layer, **BAND)


@given(layer=layers())
@settings(max_examples=100)
def test_orthogonality_of_any_layer(layer):
    """No assumption: it is a polynomial in the weight."""
    assert_like_dense("orthogonality", layer)


def test_the_mean_of_the_largest_with_a_repeated_one():
    """k = 2 of the values 3, 2, 2, 1: the two copies of 2 share one half between them."""
    factors = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    weight = factors[:, None, None].requires_grad_()
    value = penalties.sigma_max(ConvOperator(weight, 1, groups=4), k=2)
    assert math.isclose(value.item(), 2.5)
    value.backward()
    assert torch.allclose(
        weight.grad.flatten(), torch.tensor([0, 0.25, 0.5, 0.25], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", ["sigma_max", "cond", "band", "orthogonality", "circular_stein"])
def test_gradcheck(name):
    layer = Layer(random(3, 2, 3, 3), (4, 5), {"padding": 1})
    assert torch.autograd.gradcheck(
        lambda w: getattr(penalties, name)(layer.operator(w)),
        layer.weight.clone().requires_grad_(),
    )


def test_orthogonality_can_be_differentiated_twice():
    weight = random(2, 2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda w: penalties.orthogonality(ConvOperator(w, 5)), weight
    )


def test_a_hinge_is_zero_inside_its_band():
    weight = torch.tensor([[[1.0, 4.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    value = penalties.band(ConvOperator(weight, 20), lower=2.0, upper=6.0, k=3)
    value.backward()
    assert value.item() == 0.0
    assert not weight.grad.any()


def test_cond_does_not_change_with_scale():
    weight = random(2, 2, 3, 3)
    values = [penalties.cond(ConvOperator(c * weight, (5, 5))).item() for c in (1, 1e-100, 1e100)]
    assert max(values) - min(values) < 1e-9


# --- the circular approximation -------------------------------------------------------------------

CIRCULAR = [
    ((4, 4, 3), (7,), {}),
    ((4, 4, 3, 3), (6, 5), {}),
    ((6, 4, 3, 3), (6, 5), {}),
    ((4, 6, 3, 3), (6, 8), {"stride": 2}),
    ((4, 2, 3, 3), (4, 6), {"groups": 2}),
    ((3, 3, 3, 2), (5, 4), {"dilation": (1, 2), "padding": (1, 1)}),
    ((2, 2, 1, 1, 3), (2, 3, 4), {"padding": (0, 0, 1)}),
]


@pytest.mark.parametrize(("shape", "size", "options"), CIRCULAR)
def test_circular_stein_is_stein_where_the_padding_is_circular(shape, size, options):
    weight = random(*shape).requires_grad_()
    options = {"padding": 1, "padding_mode": "circular"} | options
    op = ConvOperator(weight, size, **options)
    assert all(
        s * n == m
        for s, n, m in zip(
            op.geometry.stride, op.geometry.output_size, op.geometry.input_size, strict=True
        )
    )
    for layer in (op, ConvOperator(weight, size, **(options | {"padding_mode": "zeros"}))):
        got, expected = penalties.circular_stein(layer), penalties.stein(op)
        assert math.isclose(got.item(), expected.item(), rel_tol=1e-10)
        gradients = [torch.autograd.grad(value, weight)[0] for value in (got, expected)]
        assert torch.allclose(*gradients, rtol=1e-8, atol=1e-8 * float(gradients[1].abs().max()))


def test_circular_stein_of_a_transposed_layer_is_that_of_the_layer():
    weight = random(4, 4, 3, 3)
    direct = ConvOperator(weight, (6, 6), padding=1)
    assert penalties.circular_stein(direct.T).item() == penalties.circular_stein(direct).item()


def test_circular_stein_of_a_linear_layer_is_stein():
    op = ConvOperator(random(3, 5), ())
    assert math.isclose(penalties.circular_stein(op).item(), penalties.stein(op).item())


def test_circular_stein_does_not_see_the_border():
    """That is why it says that it is approximate."""
    op = ConvOperator(torch.tensor([[[1.0, 0.2, 0.0]]], dtype=torch.float64), 15)
    assert cs.sigma_min(op) < 1e-9
    assert penalties.circular_stein(op).item() < 0.1 * penalties.stein(op).item()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": -0.1}, r"expected 0 <= lower <= upper, got lower=-0\.1"),
        ({"lower": 3.0}, r"expected 0 <= lower <= upper, got lower=3\.0, upper=2\.0"),
        ({"lower": math.nan}, "expected 0 <= lower <= upper, got lower=nan"),
        ({"upper": "2"}, "expected upper to be a number, got '2'"),
        ({"k": 0}, "expected k in 1 to 20"),
        ({"k": 21}, "expected k in 1 to 20"),
    ],
)
def test_a_band_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        penalties.band(ConvOperator(torch.ones(1, 1, 3), 20), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cond", "the condition number is infinite: ConvOperator"),
        ("stein", "Stein's loss is infinite: ConvOperator"),
        ("circular_stein", "Stein's loss is infinite: ConvOperator"),
    ],
)
def test_rank_deficient_layers_are_refused(name, message):
    with pytest.raises(ArithmeticError, match=message):
        getattr(penalties, name)(ConvOperator(torch.zeros(2, 2, 3), 5))


@pytest.mark.parametrize("name", penalties.__all__)
def test_penalties_take_operators_only(name):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got Tensor"):
        getattr(penalties, name)(torch.zeros(2, 2, 3))


@pytest.mark.parametrize("name", ["sigma_max", "cond", "band"])
def test_second_derivatives_are_refused(name):
    weight = random(2, 2, 3).requires_grad_()
    value = getattr(penalties, name)(ConvOperator(weight, 5))
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative, got a second"):
        torch.autograd.grad(gradient.sum(), weight)
