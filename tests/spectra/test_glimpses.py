"""The largest triplets by Lanczos, in single precision first: never a different answer for that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.closed_forms import Separable, check, dense_values, orthogonal
from helpers.strategies import Layer, layers, random
from hypothesis import assume, given
from hypothesis import strategies as st

import convspectra as cs
from convspectra.solvers._lanczos import lanczos
from convspectra.spectra.ways import _lanczos as krylov

TOL = krylov.SINGLE_VECTOR_TOLERANCE


@pytest.fixture
def runs(monkeypatch):
    """What Lanczos in single precision found, and what became of it in double."""
    found = []

    def spy(*arguments, **options):
        pairs = lanczos(*arguments, **options)
        found.append([options["like"].dtype, None])
        return pairs

    in_single = krylov._largest_in_single

    def outcome(*arguments):
        pairs = in_single(*arguments)
        found[-1][1] = pairs.converged
        return pairs

    monkeypatch.setattr(krylov, "lanczos", spy)
    monkeypatch.setattr(krylov, "_largest_in_single", outcome)
    return found


@given(layers(), st.integers(2, 4))
def test_random_layers(layer, k):
    values = dense_values(layer)
    assume(len(values) >= k and values[k - 1] > 1e-3 * values[0])
    check(layer.operator(), k, "LM", values, method="lanczos", tol=TOL, rtol=TOL)


def test_it_is_single_precision_that_finds_them(runs):
    layer = Layer(random(4, 4, 3, 3), (12, 12))
    result = check(
        layer.operator(), 5, "LM", dense_values(layer), method="lanczos", tol=TOL, rtol=1e-11
    )
    assert runs == [[torch.float32, True]]
    # Residuals of the triplets are those of the Gram matrix over the value, to a factor of 2.
    assert (result.residuals <= 2 * TOL * result.s).all()
    assert (result.upper <= (1 + krylov.LANCZOS_ENCLOSURE) * result.s).all()


@pytest.mark.parametrize("options", [{"tol": TOL / 2}, {"k": 1}, {"separation": 1e-3}], ids=str)
def test_where_it_would_not_do_it_is_not_tried(runs, options):
    layer = Layer(random(4, 4, 3, 3), (12, 12))
    k = options.pop("k", 5)
    cs.svds(layer.operator(), k, "LM", **{"method": "lanczos", "tol": TOL, **options})
    assert runs == []


@pytest.mark.parametrize("channels", [np.eye(4), orthogonal(4)], ids=["identity", "orthogonal"])
def test_all_copies_are_found(channels, runs):
    """Every value is there four times; one Krylov sequence sees each of them once."""
    layer = Separable(channels, ((0.5, 1.0, 0.5), (1.0, 0.3, 1.0)), (11, 9))
    check(layer.operator(), 6, "LM", layer.values(), method="lanczos", tol=TOL, rtol=1e-9)
    assert len(runs) == 1


def test_a_multiple_of_the_identity_on_some_channels():
    """The Krylov space ends after two steps, with fewer vectors than are asked for."""
    layer = Separable(np.diag([3.0, 1.0, 1.0]), ((0.0, 1.0, 0.0),), (20,))
    check(layer.operator(), 6, "LM", layer.values(), method="lanczos", tol=TOL, rtol=1e-9)


def test_values_far_below_the_norm_are_left_to_double_precision(runs):
    """Of the squares single precision loses what is below 1e-7 of the largest."""
    sizes = np.array([1.0, *(1e-4 * np.linspace(1, 0.5, 7))])
    layer = Separable(orthogonal(8) * sizes @ orthogonal(8, 1), ((0.2, 1.0, 0.5),), (20,))
    check(layer.operator(), 22, "LM", layer.values(), method="lanczos", tol=TOL, rtol=1e-6)
    assert runs == [[torch.float32, False]]


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_of_any_size(scale, runs):
    layer = Layer(random(4, 4, 3, 3), (12, 12))
    operator = layer.operator()
    scaled = operator.with_weight(scale * operator.weight.double())
    values = scale * dense_values(layer)
    check(scaled, 4, "LM", values, method="lanczos", tol=TOL, rtol=1e-11)
    assert runs == [[torch.float32, True]]
