"""Limits on memory and steps that are said, and the enclosures of random layers.

The truth is NumPy's SVD of the naive matrix, or ARPACK on torch.nn.functional.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.closed_forms import check_enclosure, dense_values
from helpers.kernels import kernel
from helpers.strategies import Layer, layers, random
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import svds as arpack
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator

# --- memory and honest failure --------------------------------------------------------------------

REFUSED = r"would take {}\b.*; .*(max_bytes|method=)"


@pytest.mark.parametrize(("which", "method"), [("LM", "dense"), ("SM", "dense")])
def test_a_dense_matrix_over_the_default_limit_is_refused(which, method):
    op = ConvOperator(kernel(1, 3, 1), 20_000)
    with pytest.raises(ValueError, match=REFUSED.format("3,200,000,000")):
        cs.svds(op, 1, which, method=method)
    with pytest.raises(ValueError, match=REFUSED.format("3,200,000,000")):
        cs.svdvals(op)


@functools.cache
def random_layer() -> tuple[Layer, np.ndarray]:
    layer = Layer(random(4, 4, 3, 3), (16, 16))
    return layer, dense_values(layer)


@pytest.mark.parametrize(
    ("which", "method"),
    [("LM", "dense"), ("LM", "gram"), ("SM", "dense"), ("SM", "gram"), ("SM", "capacitance")],
)
def test_matrices_over_max_bytes_are_refused(which, method):
    """1,024 rows take 8,388,608 bytes, dense or Gram; the border matrix has 64 rows."""
    needed = "8,388,608" if method != "capacitance" else "32,768"
    op = random_layer()[0].operator()
    with pytest.raises(ValueError, match=REFUSED.format(needed)):
        cs.svds(op, 1, which, method=method, max_bytes=30_000)


OVER = {
    "random": lambda: random_layer()[0],
    "strided": lambda: Layer(random(4, 2, 3, 3), (32, 32), {"stride": 2, "padding": 1}),
    "circular": lambda: Layer(random(4, 4, 3, 3), (16, 16), {"padding_mode": "circular"}),
    "tall": lambda: Layer(random(5, 4, 3, 3), (16, 16)),
}


@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize("name", OVER)
def test_auto_answers_where_no_matrix_fits(name, which):
    layer = OVER[name]()
    result = cs.svds(layer.operator(), 2, which, max_bytes=100_000)
    values = dense_values(layer)
    check_enclosure(result, which, values)
    assert float(result.upper.max()) <= 2 * cs.frobenius_norm(layer.operator())
    if result.converged:
        wanted = (values if which == "LM" else values[::-1])[:2]
        assert np.allclose(result.s.numpy(), wanted, rtol=1e-6, atol=1e-9 * values[0])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("which", "method"), [("LM", "lanczos"), ("SM", "lobpcg"), ("SM", "capacitance")]
)
def test_two_steps_are_too_few_and_it_is_said(which, method, k):
    layer, values = random_layer()
    result = cs.svds(layer.operator(), k, which, method=method, maxiter=2)
    assert not result.converged
    check_enclosure(result, which, values)
    function = cs.sigma_max if which == "LM" else cs.sigma_min
    with pytest.raises(cs.ConvergenceError, match="did not converge: best estimate") as caught:
        function(layer.operator(), method=method, maxiter=2)
    check_enclosure(caught.value.result, which, values)


@pytest.mark.parametrize("name", OVER)
def test_auto_in_two_steps_is_right_or_says_that_it_is_not(name):
    layer = OVER[name]()
    values = dense_values(layer)
    for which in ("LM", "SM"):
        result = cs.svds(layer.operator(), 1, which, maxiter=2)
        check_enclosure(result, which, values)
        wanted = values[0] if which == "LM" else values[-1]
        close = math.isclose(float(result.s[0]), wanted, rel_tol=1e-6)
        assert close or not result.converged, f"{which}: {result.s}, expected {wanted}"


# --- certificates ---------------------------------------------------------------------------------

FAMILIES = {
    "stride 1, zeros": lambda o: o.get("padding_mode", "zeros") == "zeros" and "stride" not in o,
    "strided": lambda o: "stride" in o and np.max(o["stride"]) > 1,
    "dilated": lambda o: "dilation" in o and np.max(o["dilation"]) > 1,
    "grouped": lambda o: o.get("groups", 1) > 1,
    "circular": lambda o: o.get("padding_mode") == "circular",
    "reflect or replicate": lambda o: o.get("padding_mode") in ("reflect", "replicate"),
    "transposed": lambda o: True,
    "linear": lambda o: True,
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_enclosures_hold_for_random_layers(family, data):
    kinds = (family,) if family in ("transposed", "linear") else ("conv",)
    layer = data.draw(layers(kinds=kinds).filter(lambda x: FAMILIES[family](x.options)))
    values = dense_values(layer)
    assume(len(values) > 0)
    for which, k in itertools.product(("LM", "SM"), {1, min(3, len(values))}):
        result = cs.svds(layer.operator(), k, which)
        check_enclosure(result, which, values)
        assert len(result.certificate) > 10


def naive_operator(weight: Tensor, size: tuple[int, int]) -> LinearOperator:
    """SciPy's operator of a 'same' layer, by torch.nn.functional alone."""
    h, g = weight.shape[:2]

    def forward(x: np.ndarray) -> np.ndarray:
        return F.conv2d(torch.from_numpy(x).reshape(1, g, *size), weight, padding=1).numpy().ravel()

    def adjoint(y: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(y).reshape(1, h, *size)
        return F.conv_transpose2d(y, weight, padding=1).numpy().ravel()

    shape = (h * math.prod(size), g * math.prod(size))
    return LinearOperator(shape, matvec=forward, rmatvec=adjoint, dtype=np.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_upper_bound_of_the_norm_is_within_one_percent(seed):
    """A bound is of use only if near: 1 % is what a Lipschitz constant or a step size can bear."""
    weight = random(8, 8, 3, 3, seed=seed)
    start = np.ones(8 * 24 * 24)
    (true,) = arpack(naive_operator(weight, (24, 24)), 1, v0=start, return_singular_vectors=False)
    result = cs.svds(ConvOperator(weight, (24, 24)), 1, "LM")
    lower, upper = float(result.lower[0]), float(result.upper[0])
    assert lower <= true * (1 + 1e-10)
    assert true * (1 - 1e-10) <= upper <= 1.01 * true
    assert math.isclose(float(result.s[0]), true, rel_tol=1e-8)
