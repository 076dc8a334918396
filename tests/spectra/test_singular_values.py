"""Singular values of layers against NumPy's SVD of the naive matrix."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from helpers.strategies import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator._structure import has_augmented, is_square_toeplitz
from convspectra.spectra import _auto as auto
from convspectra.spectra import _singular_values as spectra
from convspectra.spectra.ways import _preconditioned as shared_by_iterations

EPS = 2.0**-52


def kernel(*taps: float) -> Tensor:
    return torch.tensor(taps, dtype=torch.float64)[None, None]


def identity(channels: int) -> Tensor:
    weight = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    weight[range(channels), range(channels), 1, 1] = 1
    return weight


def dead_channel(channels: int, axis: int, copy: bool) -> Tensor:
    weight = random(channels, channels, 3, 3)
    rows = weight.movedim(axis, 0)
    rows[1] = rows[2] if copy else 0
    return weight


LAPLACIAN = kernel([0, 1, 0], [1, -4, 1], [0, 1, 0])
SOBEL = kernel([1, 2, 1], [0, 0, 0], [-1, -2, -1])


BY_FACTORS = ("capacitance", "augmented")


def methods(op: ConvOperator, which: str) -> list[str]:
    if which == "LM":
        return ["auto", "dense", "gram", "lanczos"]
    same = has_augmented(op.T if op.transposed else op)
    by_factors = ["capacitance"] * is_square_toeplitz(op) + ["augmented"] * same
    return ["auto", "dense", "gram", "davidson", "lobpcg", *by_factors]


TRUTHS: dict[int, tuple[Layer, np.ndarray]] = {}


def cached_truth(layer: Layer) -> np.ndarray:
    if id(layer) not in TRUTHS:
        TRUTHS[id(layer)] = layer, truth(layer)
    return TRUTHS[id(layer)][1]


def truth(layer: Layer) -> np.ndarray:
    """Descending."""
    return np.linalg.svd(layer.dense().detach().double().numpy(), compute_uv=False)


def check(layer: Layer, result: cs.SVDResult, k: int, which: str, true: np.ndarray) -> None:
    """Shapes, order, residuals and the enclosure always; values and vectors where converged."""
    op = layer.operator()
    wanted = true[:k] if which == "LM" else true[::-1][:k]
    scale = true[0]
    assert result.u.shape == (k, *op.output_shape)
    assert result.v.shape == (k, *op.input_shape)
    s, lower, upper, residuals = (
        x.numpy() for x in (result.s, result.lower, result.upper, result.residuals)
    )
    assert s.shape == lower.shape == upper.shape == residuals.shape == (k,)
    assert all(not np.isnan(x).any() for x in (s, lower, upper, residuals))
    assert (np.diff(s) <= 0).all() if which == "LM" else (np.diff(s) >= 0).all()
    assert (lower >= 0).all()
    assert (lower <= s).all()
    assert (s <= upper).all()
    # Of NumPy's SVD (25 eps have been seen), and of the bias of the naive layer.
    rounding = 32 * EPS * scale + 2 * EPS
    assert (lower <= wanted + rounding).all(), (result.method, lower - wanted)
    assert (wanted <= upper + rounding).all(), (result.method, wanted - upper)
    if k < len(true):
        next_one = true[k] if which == "LM" else true[-1 - k]
        assert (
            next_one <= result.others + rounding
            if which == "LM"
            else (result.others <= next_one + rounding)
        )

    dense = layer.dense().detach().double()
    u, v = result.u.flatten(1), result.v.flatten(1)
    forward = v @ dense.T - result.s[:, None] * u
    adjoint = u @ dense - result.s[:, None] * v
    measured = (forward.square().sum(1) + adjoint.square().sum(1)).sqrt().numpy()
    assert np.allclose(residuals, measured, rtol=1e-6, atol=1e-12 * scale)
    if not result.converged:
        return
    if result.method == "lobpcg":
        # It knows no lower bound, and nothing of the left vectors of vanishing values.
        assert (np.abs(s - wanted) <= 1e-6 * wanted + 1e-8 * scale).all()
        if s.min() <= 1e-6 * scale:
            return
    else:
        resolved = wanted >= 1e-7 * scale
        error = 1e-8 * wanted + 1e-13 * scale
        # The inverse is rounded relative to 1 / true[-1]; zeros of the structure are apart.
        if result.method in BY_FACTORS and true[-1] > 0:
            error += 8 * EPS * wanted**2 / true[-1]
        assert (np.abs(s - wanted) <= error)[resolved].all()
    assert measured.max() <= 1e-6 * scale
    for vectors in (u, v):
        gram = vectors @ vectors.T
        assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-7)


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

LARGE = {
    "random": Layer(random(4, 4, 3, 3), (9, 9)),
    "long and thin": Layer(random(1, 1, 5), (290,)),
    "grouped": Layer(random(6, 2, 3, 3), (7, 7), {"groups": 3}),
    "depthwise": Layer(random(6, 1, 3, 3), (7, 7), {"groups": 6}),
    "transposed": Layer(random(4, 4, 3, 3), (9, 9), {"transposed": True, "padding": 1}),
    "dilated": Layer(random(3, 3, 3, 3) + 5 * identity(3), (10, 10), {"dilation": 2}),
    "asymmetric": Layer(
        random(1, 1, 4, 2) + 4 * kernel([0, 0], [1, 0], [0, 0], [0, 0]),
        (16, 18),
        {"padding": [(1, 2), (0, 1)]},
    ),
    "3 axes": Layer(random(2, 2, 3, 2, 3), (5, 5, 6)),
    "identity": Layer(identity(4), (9, 9)),
    "separable": Layer(kernel([1, 2, 1], [2, 4, 2], [1, 2, 1]), (17, 17)),
    "Laplacian": Layer(LAPLACIAN, (17, 17)),
    "depthwise Laplacian": Layer(LAPLACIAN.repeat(5, 1, 1, 1), (8, 8), {"groups": 5}),
    "symmetric": Layer(random(1, 1, 3, 3) + random(1, 1, 3, 3).flip(2, 3), (17, 18)),
    "kernel 1": Layer(random(12, 12, 1, 1), (5, 5)),
    "graded channels": Layer(
        random(4, 4, 3, 3) * 10.0 ** -torch.arange(4.0)[:, None, None, None].double(), (9, 9)
    ),
    "rectangular": Layer(random(4, 3, 3, 3), (9, 10)),
    "wide": Layer(random(3, 4, 3, 3), (10, 9)),
    "strided": Layer(random(4, 1, 3, 3), (17, 17), {"stride": 2, "padding": 1}),
    "circular": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "circular"}),
    "reflect": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "reflect"}),
}
OTHER_WAYS = {
    "grouped": "dense",
    "depthwise": "dense",
    "dilated": "dense",
    "depthwise Laplacian": "dense",
    "kernel 1": "dense",
    "circular": "circulant",
}
"""Where groups, sub-lattices or Fourier symbols leave matrices that are small."""
SINGULAR = {
    "copied output": Layer(dead_channel(4, 0, True), (9, 9)),
    "copied input": Layer(dead_channel(4, 1, True), (9, 9)),
    "dead output": Layer(dead_channel(4, 0, False), (9, 9)),
    "dead input": Layer(dead_channel(4, 1, False), (9, 9)),
    "1 0 1": Layer(kernel(1, 0, 1), (291,)),
    "Sobel": Layer(SOBEL, (17, 17)),
    "shift": Layer(identity(4).roll(1, 3), (9, 9)),
    "dilated, asymmetric": Layer(
        random(3, 3, 3, 2), (11, 10), {"dilation": (2, 3), "padding": [(3, 1), (0, 3)]}
    ),
    "shift and a little": Layer(identity(4).roll(1, 3) + 1e-3 * identity(4), (9, 9)),
    "kernel 1": Layer((random(12, 6) @ random(6, 12, seed=1))[..., None, None], (5, 5)),
    "rectangular": Layer(random(4, 3, 3, 3)[:, [0, 1, 1]], (9, 10)),
    "strided": Layer(random(4, 1, 3, 3)[[0, 1, 1, 3]], (16, 17), {"stride": 2, "padding": 1}),
    "circular difference": Layer(kernel(1, -2, 1), (280,), {"padding_mode": "circular"}),
}


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
        way = "capacitance" if is_square_toeplitz(op) else "gram"
        ways = (OTHER_WAYS.get(name, way),)
        # Too ill-conditioned for the Gram matrix; a single value Lanczos still finds.
        ways = ("lanczos", "dense") if name == "reflect" else ways
        assert bottom.method in ways
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


# --- certificates and statuses --------------------------------------------------------------------


def test_the_nearest_of_several_ways_that_stop_early_is_given():
    op = cs.ConvOperator(random(4, 3, 3, 3), (21, 21), stride=2, padding=1)
    options = {"maxiter": 4, "max_bytes": 200_000}
    lanczos, auto = (cs.svds(op, 1, "SM", method=m, **options) for m in ("lanczos", "auto"))
    assert not lanczos.converged
    assert not auto.converged
    assert auto.method == "lobpcg"
    assert torch.linalg.svdvals(op.to_dense())[-1] <= auto.s[0] < 0.9 * lanczos.s[0]


def test_too_few_steps_are_said():
    op = LARGE["random"].operator()
    for which in ("LM", "SM"):
        method = "lanczos" if which == "LM" else "capacitance"
        options = {"method": method, "maxiter": 2, "tol": 1e-6}
        result = cs.svds(op, 1, which, return_singular_vectors=False, **options)
        assert not result.converged
        assert float(result.lower[0]) <= float(result.s[0]) <= float(result.upper[0])
        function, word = (cs.sigma_max, "largest") if which == "LM" else (cs.sigma_min, "smallest")
        with pytest.raises(
            cs.ConvergenceError, match=rf"the {word} singular value did .* best estimate [\d.]+e"
        ) as caught:
            function(op, **options)
        assert isinstance(caught.value, RuntimeError)
        assert torch.equal(caught.value.result.s, result.s)
        assert not caught.value.result.converged
    with pytest.raises(cs.ConvergenceError):
        cs.cond(op, maxiter=2, method="auto", max_bytes=1000)


@pytest.mark.parametrize("dense_is_cheap", [True, False])
def test_auto_goes_on_until_a_way_is_certified(dense_is_cheap, monkeypatch):
    """A capacitance method and a Gram matrix that cannot, iterations that may not: dense."""
    op = SINGULAR["1 0 1"].operator()
    tried = []
    if not dense_is_cheap:
        monkeypatch.setitem(auto.DENSE_AT_ONCE, "square", 0.0)
    iterations = [] if dense_is_cheap else ["davidson", "lanczos", "lobpcg"]
    ways = ["capacitance", "gram", *iterations, "dense"]
    for name in ways:
        way = type(auto.WAYS[name])

        def spy(self, request, run=way.run):
            tried.append(self.name)
            return run(self, request)

        monkeypatch.setattr(way, "run", spy)
    assert cs.svds(op, 1, "SM").method == "dense"
    assert tried == ways


@pytest.mark.parametrize("method", ["davidson", "lobpcg"])
def test_iterations_are_bounded_from_below(method):
    op = LARGE["rectangular"].operator()
    result = cs.svds(op, 1, "SM", method=method)
    assert math.isclose(float(result.s[0]), cs.sigma_min(op), rel_tol=1e-9)
    assert 0.9 * float(result.s[0]) <= float(result.lower[0])
    assert "Lanczos on the shifted Gram matrix" in result.certificate


def test_without_room_for_a_matrix_there_are_other_ways():
    zeros = LARGE["rectangular"]
    reflect = Layer(zeros.weight, zeros.input_size, {"padding": 1, "padding_mode": "reflect"})
    for k, (layer, method) in itertools.product(
        (1, 3), ((zeros, "augmented"), (reflect, "lanczos"))
    ):
        result = cs.svds(layer.operator(), k, "SM", max_bytes=500_000)
        assert result.method == method
        check(layer, result, k, "SM", cached_truth(layer))


@pytest.mark.parametrize("method", ["davidson", "lobpcg"])
def test_without_room_for_a_circulant_the_iterations_have_no_preconditioner(method, monkeypatch):
    layer = LARGE["rectangular"]
    options = {"which": "SM", "method": method, "maxiter": 3000}
    helped = cs.svds(layer.operator(), **options)
    monkeypatch.setattr(shared_by_iterations, "circulant_fits", lambda op, max_bytes: False)
    alone = cs.svds(layer.operator(), **options)
    check(layer, alone, 1, "SM", cached_truth(layer))
    assert alone.converged
    assert alone.lower[0] == 0
    assert "no bound below" in alone.certificate
    assert not torch.equal(alone.v, helped.v)


@pytest.mark.parametrize("method", ["auto", "dense", "gram", *BY_FACTORS, "davidson", "lobpcg"])
def test_methods_name_their_certificate(method):
    result = cs.svds(LARGE["random"].operator(), 1, "SM", method=method, maxiter=2000)
    expected = {
        "auto": "the Lanczos bound for the inverse",
        "dense": "backward error of a dense SVD",
        "gram": "backward error of the Gram matrix",
        "capacitance": "bound on the error of its solves",
        "augmented": "bound on the error of its solves",
        "davidson": "no bound below",
        "lobpcg": "no bound below",
    }
    assert expected[method] in result.certificate
    assert result.method == ("capacitance" if method == "auto" else method)


def test_vectors_can_be_left_out():
    op = ConvOperator(random(2, 2, 3), 5)
    for which, weight in itertools.product(("LM", "SM"), (op.weight, 0 * op.weight)):
        with_vectors = cs.svds(op.with_weight(weight), 2, which)
        result = cs.svds(op.with_weight(weight), 2, which, return_singular_vectors=False)
        assert result.u is None
        assert result.v is None
        assert torch.equal(result.s, with_vectors.s)
        assert torch.equal(result.residuals, with_vectors.residuals)


def test_results_are_detached():
    op = ConvOperator(random(2, 2, 3).requires_grad_(), 5)
    for which in ("LM", "SM"):
        result = cs.svds(op, 1, which)
        for name in ("u", "s", "v", "residuals", "lower", "upper"):
            assert not getattr(result, name).requires_grad
    assert not cs.svdvals(op).requires_grad
    assert cs.frobenius_norm(op) > 0
    assert cs.cond(op) > 1


# --- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lanczos", "lobpcg", "capacitance"])
def test_randomness_comes_from_the_generator_or_a_fixed_seed(method):
    op = LARGE["random"].operator()
    which = "LM" if method == "lanczos" else "SM"
    state = torch.get_rng_state()
    first, again = (cs.svds(op, 1, which, method=method, maxiter=5) for _ in range(2))
    assert torch.equal(first.v, again.v)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    other = cs.svds(op, 1, which, method=method, maxiter=5, generator=generator)
    assert not torch.equal(generator.get_state(), before)
    assert not torch.equal(first.v, other.v)
    generator = torch.Generator().manual_seed(5)
    same = cs.svds(op, 1, which, method=method, maxiter=5, generator=generator)
    assert torch.equal(other.v, same.v)
    assert torch.equal(torch.get_rng_state(), state)


# --- bad input ------------------------------------------------------------------------------------

OP = ConvOperator(random(2, 3, 3), 4)
BAD_OPTIONS = [
    ({"k": 0}, r"k in 1 to 8 = min\(op.shape\), got 0"),
    ({"k": 9}, "k in 1 to 8 .* got 9"),
    ({"k": -1}, "got -1"),
    ({"k": True}, "got True"),
    ({"k": 1.0}, r"got 1\.0"),
    ({"k": None}, "got None"),
    ({"which": "SA"}, r"which to be one of \('LM', 'SM'\), got 'SA'"),
    ({"which": None}, "which to be one of .* got None"),
    ({"method": "svd"}, "method for which='LM' to be one of .* got 'svd'"),
    ({"method": "capacitance"}, "method for which='LM' .* got 'capacitance'"),
    ({"method": "lobpcg"}, "method for which='LM' .* got 'lobpcg'"),
    ({"which": "SM", "method": "capacitance"}, "a square layer with zero padding and N ="),
    ({"tol": 0}, "tol between 0 and 1, got 0"),
    ({"tol": -1e-8}, "tol between 0 and 1"),
    ({"tol": 1.0}, "tol between 0 and 1"),
    ({"tol": math.nan}, "tol between 0 and 1, got nan"),
    ({"tol": "1e-8"}, "tol between 0 and 1, got '1e-8'"),
    ({"tol": True}, "tol between 0 and 1, got True"),
    ({"maxiter": 0}, "maxiter to be a positive integer or None, got 0"),
    ({"maxiter": 2.5}, r"maxiter to be a positive integer or None, got 2\.5"),
    ({"maxiter": True}, "maxiter to be a positive integer or None, got True"),
    ({"max_bytes": 100, "method": "dense"}, "the dense matrix to take at most max_bytes=100 bytes"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cs.svds(OP, **options)


def test_matrices_over_the_limit_are_refused():
    op = LARGE["random"].operator()
    with pytest.raises(ValueError, match="the border matrix to take at most max_bytes=1,000"):
        cs.svds(op, 1, "SM", method="capacitance", max_bytes=1000)
    for which in ("LM", "SM"):
        with pytest.raises(ValueError, match="the dense matrix to take at most"):
            cs.svds(op, 1, which, method="dense", max_bytes=1000)
    with pytest.raises(ValueError, match="the dense matrix to take at most max_bytes=1,000"):
        cs.svdvals(op, max_bytes=1000)


@pytest.mark.parametrize(
    "function", [cs.svds, cs.sigma_max, cs.sigma_min, cs.cond, cs.svdvals, cs.frobenius_norm]
)
@pytest.mark.parametrize("value", [random(2, 2, 3), None, torch.nn.Conv1d(1, 1, 1)])
def test_only_operators_are_taken(function, value):
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, got"):
        function(value)


def test_normalized_weights_are_near_one():
    for scale in (1e-150, 0.3, 1.0, 7.0, 1e150):
        op = ConvOperator(random(2, 2, 3) * scale, 5)
        scaled, exponent = spectra.normalized(op)
        assert 0.5 <= float(scaled.weight.abs().amax()) < 1
        assert torch.equal(spectra.ldexp(scaled.weight, exponent), op.weight)


def test_one_largest_value_needs_no_memory_for_all_vectors():
    op = ConvOperator(random(4, 4, 3, 3), (60, 60))
    expected = cs.svds(op, 1, "LM", method="lanczos", tol=1e-6)
    found = cs.svds(op, 1, "LM", tol=1e-6, max_bytes=8 * 14400 * 12)
    assert (found.method, found.converged) == ("lanczos", True)
    assert found.matvecs > expected.matvecs
    torch.testing.assert_close(found.s, expected.s, rtol=1e-9, atol=0)
    assert float(found.residuals[0]) < 1e-6 * float(found.s[0])
