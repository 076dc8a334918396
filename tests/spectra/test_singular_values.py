"""Singular values of every kind of layer by every method, against NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.kernels import dead_channel, kernel
from helpers.strategies import Layer, layers, random
from helpers.svds import BY_FACTORS, LARGE, SINGULAR, cached_truth, check, methods, truth
from hypothesis import given, settings
from hypothesis import strategies as st

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator._structure import is_square_toeplitz
from convspectra.spectra import _auto as auto

# --- every layer, every method --------------------------------------------------------------------


@given(layers())
@settings(max_examples=80)
def test_random_layers(layer):
    op, true = layer.operator(), truth(layer)
    for which, k in itertools.product(("LM", "SM"), range(1, min(3, *op.shape) + 1)):
        for method in methods(op, which):
            try:
                result = cs.svds(op, k, which, method=method)
            except ArithmeticError:
                assert method in BY_FACTORS
                assert true[-1] <= (1e-9 if method == "capacitance" else 1e-6) * true[0]
                continue
            except ValueError:  # sub-lattices of unlike sizes
                assert method in BY_FACTORS
                assert method == "augmented" or true[-1] <= 1e-14 * true[0]
                continue
            check(layer, result, k, which, true)
            assert method == "auto" or result.method in (method, "structure", "zero")
            if method in ("auto", "dense") or (method == "lanczos"):
                assert result.converged


@given(layers())
@settings(max_examples=60)
def test_whole_spectrum_and_norm(layer):
    op, true = layer.operator(), truth(layer)
    values = cs.svdvals(op)
    assert values.dtype == torch.float64
    assert np.allclose(values.numpy(), true, atol=1e-13 * true[0], rtol=0)
    assert math.isclose(cs.frobenius_norm(op), np.linalg.norm(true), rel_tol=1e-12)
    assert math.isclose(cs.sigma_max(op), true[0], rel_tol=1e-12)
    assert math.isclose(cs.sigma_min(op), true[-1], abs_tol=1e-13 * true[0])
    if true[-1] > 1e-10 * true[0]:
        assert math.isclose(cs.cond(op), true[0] / true[-1], rel_tol=1e-4)
    if true[-1] <= 1e-15 * true[0]:
        assert cs.cond(op) == math.inf


@given(layers(), st.sampled_from(["LM", "SM"]))
@settings(max_examples=30)
def test_stopping_early_still_encloses(layer, which):
    op, true = layer.operator(), truth(layer)
    for method, maxiter in itertools.product(methods(op, which), (1, 3)):
        for k in range(1, min(3, *op.shape) + 1):
            try:
                result = cs.svds(op, k, which, method=method, maxiter=maxiter)
            except (ArithmeticError, ValueError):
                assert method in BY_FACTORS
                continue
            check(layer, result, k, which, true)


# --- layers over SMALL_WORK, where auto takes the other ways --------------------------------------


OTHER_WAYS = {
    "grouped": "dense",
    "depthwise": "dense",
    "dilated": "dense",
    "depthwise Laplacian": "dense",
    "kernel 1": "dense",
    "circular": "circulant",
}
"""Where groups, sub-lattices or Fourier symbols leave matrices that are small."""


@pytest.mark.parametrize("name", LARGE)
def test_large_layers(name):
    layer = LARGE[name]
    op, true = layer.operator(), cached_truth(layer)
    small, large = sorted(op.shape)
    assert small**2 * large > auto.SMALL_WORK
    for k in (1, 3):
        top = cs.svds(op, k, "LM")
        assert top.method == OTHER_WAYS.get(name, "gram")
        assert top.converged
        check(layer, top, k, "LM", true)
        bottom = cs.svds(op, k, "SM")
        assert bottom.converged
        way = "capacitance" if is_square_toeplitz(op) else "augmented"
        way = "qr" if name in ("strided", "reflect") else way
        assert bottom.method == OTHER_WAYS.get(name, way)
        check(layer, bottom, k, "SM", true)


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_layers_are_found_singular(name):
    """sigma_min = 0 is a value like any other, with its enclosure; never a wrong one."""
    layer = SINGULAR[name]
    op, true = layer.operator(), cached_truth(layer)
    assert true[-1] < 1e-15 * true[0]
    for k in (1, 2):
        result = cs.svds(op, k, "SM")
        assert result.converged
        check(layer, result, k, "SM", true)
        assert float(result.lower[0]) == 0.0
        assert float(result.upper[0]) <= 1e-12 * true[0]
    assert cs.sigma_min(op) <= 1e-12 * true[0]
    assert cs.cond(op) == math.inf


@pytest.mark.parametrize("layer", [*LARGE.values(), *SINGULAR.values()], ids=[*LARGE, *SINGULAR])
def test_large_layers_by_every_method(layer):
    op, true = layer.operator(), cached_truth(layer)
    for which in ("LM", "SM"):
        for method in methods(op, which)[2:]:
            try:
                result = cs.svds(op, 2, which, method=method)
            except ArithmeticError:
                assert method in BY_FACTORS
                assert true[-1] < 1e-11 * true[0]
                continue
            except ValueError:  # sub-lattices of unlike sizes
                assert method in BY_FACTORS
                assert layer is SINGULAR["dilated, asymmetric"]
                continue
            check(layer, result, 2, which, true)


@pytest.mark.parametrize("smallest", [1e-5, 1e-7, 1e-8, 1e-9, 1e-14])
def test_nearly_singular_layers(smallest):
    """Two output channels that nearly agree: through every stage from easy to hopeless."""
    weight = dead_channel(4, 0, True)
    weight[1] += smallest * random(4, 3, 3, seed=3)
    layer = Layer(weight, (9, 9))
    true = truth(layer)
    for k, method in itertools.product(
        (1, 2), ("auto", "capacitance", "gram", "davidson", "lobpcg")
    ):
        try:
            result = cs.svds(layer.operator(), k, "SM", method=method)
        except ArithmeticError:
            assert method == "capacitance"
            assert true[-1] < 1e-10 * true[0]
            continue
        check(layer, result, k, "SM", true)
        if method == "auto":
            assert result.converged


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-11])
def test_one_value_far_below_the_others(distance):
    """The second smallest is as accurate as where the smallest is not that small."""
    order = 291
    center = -2 * math.cos(100 * math.pi / (order + 1)) + distance
    layer = Layer(kernel(1, center, 1), (order,))
    eigenvalues = [center + 2 * math.cos(j * math.pi / (order + 1)) for j in range(1, order + 1)]
    true = np.sort(np.abs(eigenvalues))
    for k in (1, 2, 3):
        result = cs.svds(layer.operator(), k, "SM")
        assert result.converged
        assert result.method == "capacitance"
        relative = np.abs(result.s.numpy() / true[:k] - 1)
        assert relative[0] <= 1e-9 + 1e-14 / distance * 4
        assert (relative[1:] <= 1e-8).all()
        assert (result.lower.numpy() <= true[:k] * (1 + 1e-9)).all()
        assert (true[:k] <= result.upper.numpy() * (1 + 1e-9)).all()
        assert (result.upper.numpy() <= 1.01 * true[:k]).all()


def test_a_value_that_drowns_beside_a_smaller_one_is_found_apart_from_it():
    """The smallest is 1e-13 of the others: to the inverse these are rounding error."""
    layer = Layer(kernel(0, 1, 5), (18,))
    true = truth(layer)
    both = cs.svds(layer.operator(), 2, "SM", method="capacitance")
    assert both.converged
    assert math.isclose(float(both.s[1]), true[-2], rel_tol=1e-12)
    assert float(both.lower[1]) <= true[-2] <= float(both.upper[1])


# --- known slips of others ------------------------------------------------------------------------


def test_norm_of_a_grouped_layer_is_that_of_its_largest_group():
    weight = random(6, 2, 3, 3)
    parts = [cs.sigma_max(ConvOperator(part, 5)) for part in weight.split(2)]
    assert math.isclose(cs.sigma_max(ConvOperator(weight, 5, groups=3)), max(parts), rel_tol=1e-12)


def test_circular_padding_is_not_taken_for_zero_padding():
    weight = random(4, 4, 3, 3)
    zeros, circular = (
        cs.sigma_min(ConvOperator(weight, 9, padding_mode=mode)) for mode in ("zeros", "circular")
    )
    assert zeros < 0.5 * circular
