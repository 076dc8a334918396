"""Scaling, narrow dtypes, the ends of the floating-point range, and zero."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import Layer, random
from helpers.svds import check, methods, truth

import convspectra as cs
from convspectra import ConvOperator
from convspectra.spectra import _singular_values as spectra

# --- scale, dtypes, zero --------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-498, -100, 1, 100, 498])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(random(2, 3, 3, 3), (4, 5)),
        Layer(random(4, 4, 3, 3), (9, 9)),
        Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "circular"}),
    ],
    ids=["dense", "capacitance", "gram"],
)
def test_scaling_by_a_power_of_two_changes_no_digit(layer, power):
    scaled = Layer(layer.weight * 2.0**power, layer.input_size, layer.options)
    for which in ("LM", "SM"):
        one, other = (cs.svds(x.operator(), 2, which) for x in (layer, scaled))
        assert one.method == other.method
        assert torch.equal(one.u, other.u)
        assert torch.equal(one.v, other.v)
        for name in ("s", "residuals", "lower", "upper"):
            assert torch.equal(getattr(one, name) * 2.0**power, getattr(other, name))
    assert torch.equal(cs.svdvals(layer.operator()) * 2.0**power, cs.svdvals(scaled.operator()))
    norms = [cs.frobenius_norm(x.operator()) for x in (layer, scaled)]
    assert norms[0] * 2.0**power == norms[1]
    assert cs.cond(layer.operator()) == cs.cond(scaled.operator())


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_scales_that_are_no_power_of_two(scale):
    layer = Layer(random(2, 2, 3, 3), (3, 4))
    true = truth(layer)
    op = layer.operator(layer.weight * scale)
    assert math.isclose(cs.sigma_max(op) / scale, true[0], rel_tol=1e-12)
    assert math.isclose(cs.sigma_min(op) / scale, true[-1], rel_tol=1e-10)


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e-308, 1.5e308])
def test_the_ends_of_the_floating_point_range(value):
    op = ConvOperator(torch.tensor([[[value]]], dtype=torch.float64), 3)
    assert cs.sigma_max(op) == cs.sigma_min(op) == value
    assert cs.cond(op) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(3, 4), (9, 9)], ids=["dense", "capacitance"])
def test_narrow_weights_are_widened_exactly(dtype, size):
    weight = random(4, 4, 3, 3).to(dtype)
    narrow, wide = ConvOperator(weight, size), ConvOperator(weight.double(), size)
    for which in ("LM", "SM"):
        one, other = cs.svds(narrow, 2, which), cs.svds(wide, 2, which)
        for name in ("u", "s", "v", "residuals", "lower", "upper"):
            assert getattr(one, name).dtype == torch.float64
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(cs.svdvals(narrow), cs.svdvals(wide))
    assert cs.frobenius_norm(narrow) == cs.frobenius_norm(wide)
    assert cs.cond(narrow) == cs.cond(wide)


@pytest.mark.parametrize("size", [(3, 4), (12, 12)])
@pytest.mark.parametrize("which", ["LM", "SM"])
def test_zero_weight(size, which):
    op = ConvOperator(torch.zeros(3, 2, 3, 3), size)
    for k in (1, 3):
        result = cs.svds(op, k, which)
        assert result.method == "zero"
        assert result.converged
        for name in ("s", "residuals", "lower", "upper"):
            assert torch.equal(getattr(result, name), torch.zeros(k, dtype=torch.float64))
        for vectors in (result.u.flatten(1), result.v.flatten(1)):
            assert torch.equal(vectors @ vectors.T, torch.eye(k, dtype=torch.float64))
    assert cs.sigma_max(op) == cs.sigma_min(op) == cs.frobenius_norm(op) == 0.0
    assert cs.cond(op) == math.inf
    assert torch.equal(cs.svdvals(op), torch.zeros(min(op.shape), dtype=torch.float64))


def test_a_layer_whose_windows_all_miss_the_input():
    layer = Layer(random(1, 1, 1), (1,), {"padding": 2, "stride": 4})
    true = truth(layer)
    assert true[0] == 0.0
    for which in ("LM", "SM"):
        for method in methods(layer.operator(), which):
            result = cs.svds(layer.operator(), 1, which, method=method)
            check(layer, result, 1, which, true)


# --- bad input ------------------------------------------------------------------------------------


def test_normalized_weights_are_near_one():
    for scale in (1e-150, 0.3, 1.0, 7.0, 1e150):
        op = ConvOperator(random(2, 2, 3) * scale, 5)
        scaled, exponent = spectra.normalized(op)
        assert 0.5 <= float(scaled.weight.abs().amax()) < 1
        assert torch.equal(spectra.ldexp(scaled.weight, exponent), op.weight)
