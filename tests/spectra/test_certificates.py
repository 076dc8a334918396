"""Certificates, statuses, what `auto` tries, memory, and randomness."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import Layer, random
from helpers.svds import BY_FACTORS, LARGE, SINGULAR, cached_truth, check

import convspectra as cs
from convspectra import ConvOperator
from convspectra.spectra import _auto as auto
from convspectra.spectra.ways import _preconditioned as shared_by_iterations

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
        # As for a layer whose dense matrix is dear: then the iterations come before it.
        monkeypatch.setitem(auto.DENSE_AT_ONCE, "square", 0.0)
    iterations = [] if dense_is_cheap else ["davidson", "lanczos", "lobpcg"]
    monkeypatch.setattr(auto, "QR_LIMIT", 0.0)  # as for a layer of too many lines
    monkeypatch.setattr(auto, "QR_AT_ONCE", 0.0)
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
    # As if `max_bytes` had room for the vectors and none for the circulant.
    monkeypatch.setattr(shared_by_iterations, "circulant_fits", lambda op, max_bytes: False)
    alone = cs.svds(layer.operator(), **options)
    check(layer, alone, 1, "SM", cached_truth(layer))
    assert alone.converged
    assert alone.lower[0] == 0
    assert "no bound below" in alone.certificate
    assert not torch.equal(alone.v, helped.v)


@pytest.mark.parametrize(
    "method", ["auto", "dense", "gram", "qr", *BY_FACTORS, "davidson", "lobpcg"]
)
def test_methods_name_their_certificate(method):
    result = cs.svds(LARGE["random"].operator(), 1, "SM", method=method, maxiter=2000)
    expected = {
        "auto": "the Lanczos bound for the inverse",
        "dense": "backward error of a dense SVD",
        "gram": "backward error of the Gram matrix",
        "qr": "backward error of a QR factorization",
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


def test_one_largest_value_needs_no_memory_for_all_vectors():
    op = ConvOperator(random(4, 4, 3, 3), (60, 60))
    expected = cs.svds(op, 1, "LM", method="lanczos", tol=1e-6)
    found = cs.svds(op, 1, "LM", tol=1e-6, max_bytes=8 * 14400 * 12)
    assert (found.method, found.converged) == ("lanczos", True)
    assert found.matvecs > expected.matvecs
    torch.testing.assert_close(found.s, expected.s, rtol=1e-9, atol=0)
    assert float(found.residuals[0]) < 1e-6 * float(found.s[0])
