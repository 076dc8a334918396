"""Penalties and their gradients against the theorems as they stand, and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.kernels import identity, kernel
from helpers.penalties import check, value_and_gradient
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings

import convspectra as cs
from convspectra import ConvOperator, penalties
from convspectra.penalties import _extremes as extremes
from convspectra.penalties._extremes import CLUSTER_LIMIT

NAMES = ("frobenius", "sigma_min", "conditioning", "stein")
each_penalty = pytest.mark.parametrize("name", NAMES)


# --- the reference: Theorems 2.1-2.3, 3.1 and 3.2 as they stand, entry by entry -------------------


@each_penalty
@given(layer=layers())
@settings(max_examples=60)
def test_gradient_is_the_sum_over_omega(name, layer):
    check(name, layer)


@pytest.mark.parametrize("k", [2, 3])
@given(layer=layers())
@settings(max_examples=30)
def test_gradient_of_the_mean_of_several(k, layer):
    if k <= min(layer.operator().shape):
        check("sigma_min", layer, k=k)


# --- finite differences ---------------------------------------------------------------------------


@each_penalty
@given(layer=layers())
@settings(max_examples=40)
def test_gradient_by_central_differences(name, layer):
    dense = layer.dense().detach()
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    simple = len(s) == 1 or s[-2] - s[-1] > 1e-2 * s[0]
    if name != "frobenius" and (s[-1] <= 1e-2 * s[0] or (name != "stein" and not simple)):
        return
    direction = random(*layer.weight.shape, seed=1)
    direction /= direction.norm()
    step = 1e-5 * float(layer.weight.norm())
    ends = [
        float(getattr(penalties, name)(layer.operator(layer.weight + sign * step * direction)))
        for sign in (1, -1)
    ]
    value, gradient = value_and_gradient(name, layer)
    slope = float((gradient * direction).sum())
    scale = float(gradient.norm()) + abs(value) / step * 1e-11
    assert math.isclose((ends[0] - ends[1]) / (2 * step), slope, abs_tol=1e-4 * scale)


CHECKED = {
    "square": Layer(random(2, 2, 3), (4,)),
    "paper": Layer(random(1, 3, 3, 3), (3, 2)),
    "grouped": Layer(random(4, 1, 3), (4,), {"groups": 2}),
    "strided": Layer(random(3, 1, 3), (6,), {"stride": 2, "padding": 1}),
    "dilated": Layer(random(2, 1, 3), (5,), {"dilation": 2}),
    "transposed": Layer(
        random(1, 2, 3), (4,), {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1}
    ),
    "circular": Layer(random(2, 1, 3), (4,), {"padding_mode": "circular"}),
    "reflect": Layer(random(1, 2, 3), (5,), {"padding_mode": "reflect"}),
    "replicate": Layer(random(2, 1, 3), (4,), {"padding_mode": "replicate"}),
    "linear": Layer(random(3, 2), ()),
    "3 axes": Layer(random(1, 1, 2, 2, 2), (2, 3, 2)),
}


@pytest.mark.parametrize("layer", CHECKED.values(), ids=CHECKED.keys())
@each_penalty
def test_gradcheck(name, layer):
    weight = layer.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: getattr(penalties, name)(layer.operator(w)), (weight,), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("layer", CHECKED.values(), ids=CHECKED.keys())
@each_penalty
def test_every_entry_of_the_gradient(name, layer):
    check(name, layer, indices=list(range(layer.weight.numel())))


@pytest.mark.parametrize("layer", [CHECKED["square"], CHECKED["linear"], CHECKED["reflect"]])
def test_frobenius_is_differentiable_twice(layer):
    weight = layer.weight.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: penalties.frobenius(layer.operator(w)), (weight,))


@pytest.mark.parametrize("name", ["sigma_min", "conditioning", "stein"])
@pytest.mark.parametrize("size", [(3, 3), (9, 9)], ids=["dense", "capacitance"])
def test_second_derivatives_that_would_be_wrong_are_refused(name, size):
    weight = random(4, 4, 3, 3).requires_grad_()
    value = getattr(penalties, name)(ConvOperator(weight, size))
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        torch.autograd.grad(gradient.sum(), weight)


@each_penalty
def test_gradients_are_linear_in_the_incoming_one(name):
    layer = CHECKED["square"]
    _, expected = value_and_gradient(name, layer)
    weight = layer.weight.clone().requires_grad_()
    (-2.5 * getattr(penalties, name)(layer.operator(weight))).backward()
    assert torch.allclose(weight.grad, -2.5 * expected, rtol=1e-13)


@each_penalty
def test_weights_without_gradient_are_taken(name):
    layer = CHECKED["square"]
    value = getattr(penalties, name)(layer.operator())
    assert not value.requires_grad
    assert math.isclose(float(value), value_and_gradient(name, layer)[0], rel_tol=1e-12)


# --- the floors -----------------------------------------------------------------------------------


@given(layers())
@settings(max_examples=60)
def test_floors(layer):
    """conditioning >= -n / 2 and stein >= 0, at any scale."""
    op = layer.operator()
    n = min(op.shape)
    for scale in (1e-3, 1 / math.sqrt(1 + float(layer.weight.square().sum())), 1.0):
        scaled = layer.operator(layer.weight * scale)
        assert float(penalties.conditioning(scaled)) >= -0.5 * n * (1 + 1e-12)
        if cs.logabsdet(scaled) > -math.inf:
            assert float(penalties.stein(scaled)) >= -1e-12 * n


ORTHOGONAL = {
    "identity": Layer(identity(3), (4, 4)),
    "identity, large": Layer(identity(4), (9, 9)),
    "minus identity": Layer(-identity(2), (3, 5)),
    "mixing": Layer(torch.linalg.qr(random(4, 4)).Q[..., None], (5,)),
    "mixing, tall": Layer(torch.linalg.qr(random(5, 3)).Q[..., None, None], (2, 3)),
    "mixing, wide": Layer(torch.linalg.qr(random(5, 3)).Q.T.clone(), ()),
    "circular shift": Layer(kernel(0, 0, 1), (6,), {"padding_mode": "circular"}),
    "space to depth": Layer(
        torch.linalg.qr(random(4, 4)).Q.reshape(4, 1, 2, 2), (4, 6), {"stride": 2, "padding": 0}
    ),
}


@pytest.mark.parametrize("layer", ORTHOGONAL.values(), ids=ORTHOGONAL.keys())
def test_floors_are_reached_at_orthogonal_layers(layer):
    n = min(layer.operator().shape)
    value, gradient = value_and_gradient("conditioning", layer)
    assert math.isclose(value, -n / 2, rel_tol=1e-12)
    if n <= CLUSTER_LIMIT:
        assert gradient.abs().max() <= 1e-10 * n, "the mean over all copies is the minimum's"
    value, gradient = value_and_gradient("stein", layer)
    assert abs(value) <= 1e-11 * n
    assert gradient.abs().max() <= 1e-10 * n


def test_conditioning_is_the_sum_of_its_parts():
    for layer in CHECKED.values():
        op = layer.operator()
        for k in (1, min(3, *op.shape)):
            parts = penalties.frobenius(op) + min(op.shape) * penalties.sigma_min(op, k)
            assert torch.equal(penalties.conditioning(op, k=k), parts)


# --- dtypes and failures --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_penalty
def test_narrow_weights_are_penalized_in_float64(name, dtype):
    weight = random(3, 2, 3).to(dtype)
    narrow = value_and_gradient(name, Layer(weight, (5,)))
    wide = value_and_gradient(name, Layer(weight.double(), (5,)))
    assert narrow[0] == wide[0]
    assert torch.allclose(narrow[1].double(), wide[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    if name in ("frobenius", "sigma_min"):  # one term, rounded once
        assert torch.equal(narrow[1], wide[1].to(dtype))


def test_kernels_of_the_paper_pass_their_gradient_on():
    taps = random(3, 3, 2, 4).requires_grad_()
    penalties.conditioning(ConvOperator(cs.kernel_to_weight(taps), (3, 4))).backward()
    layer = Layer(cs.kernel_to_weight(taps.detach()), (3, 4))
    expected = value_and_gradient("conditioning", layer)[1]
    assert torch.allclose(taps.grad, cs.weight_to_kernel(expected), atol=1e-12)


@pytest.mark.parametrize("k", [0, -1, 9, True, 1.0, "1", None])
def test_counts_that_cannot_be_are_refused(k):
    with pytest.raises(ValueError, match=r"expected k in 1 to 8 = min\(op.shape\), got"):
        penalties.sigma_min(ConvOperator(random(2, 3, 3), 4), k)


def test_all_the_values_can_be_asked_for():
    op = ConvOperator(random(2, 3, 3), 4)
    assert math.isclose(float(penalties.sigma_min(op, 8)), -float(cs.svdvals(op).mean()))


@each_penalty
@pytest.mark.parametrize("value", [random(2, 2, 3), None])
def test_only_operators_are_taken(name, value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got"):
        getattr(penalties, name)(value)


def test_a_value_that_did_not_converge_is_not_penalized(monkeypatch):
    original = extremes.svds

    def too_few_steps(op: ConvOperator, k: int, which: str, **options) -> cs.SVDResult:
        return original(op, k, which, method="capacitance", maxiter=1, **options)

    # Penalties have no option for the steps: too few of them are asked for here.
    monkeypatch.setattr(extremes, "svds", too_few_steps)
    op = ConvOperator(random(4, 4, 3, 3), 9)
    for name in ("sigma_min", "conditioning"):
        with pytest.raises(cs.ConvergenceError, match="the 1 smallest singular values of") as error:
            getattr(penalties, name)(op)
        assert not error.value.result.converged


@each_penalty
def test_global_random_state_is_left_alone(name):
    state = torch.get_rng_state()
    value_and_gradient(name, Layer(random(4, 4, 3, 3), (9, 9)))
    assert torch.equal(torch.get_rng_state(), state)
