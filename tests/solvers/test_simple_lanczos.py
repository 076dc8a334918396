"""Lanczos without reorthogonalisation, against matrices of known spectrum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convspectra.solvers.simple_lanczos import extreme_eigenpair

SPECTRA = {
    "line": np.linspace(0.1, 1.0, 200),
    "one far above": np.append(np.linspace(0.1, 1.0, 100), 50.0),
    "one far below": np.append(np.linspace(0.5, 1.0, 100), 1e-3),
    "repeated ends": np.concatenate([[0.2] * 3, np.linspace(0.5, 1.0, 80), [2.0] * 3]),
    "clustered": np.concatenate([0.3 + 1e-9 * np.arange(4), np.linspace(0.5, 1.0, 60)]),
    "constant": np.full(40, 3.0),
    "two values": np.repeat([1.0, 4.0], 20),
    "one": np.array([2.5]),
}
each_end = pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])


def with_spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    square = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q = torch.linalg.qr(square).Q
    return q @ torch.diag(torch.from_numpy(np.asarray(values, dtype=float))) @ q.T


def run(matrix, largest, seed=0, **options):
    options = {"tol": 1e-8, "maxiter": 500} | options
    return extreme_eigenpair(
        lambda x: x @ matrix,
        len(matrix),
        largest,
        like=matrix,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


@each_end
@pytest.mark.parametrize("name", SPECTRA)
def test_the_end_of_a_spectrum(name, largest):
    matrix = with_spectrum(SPECTRA[name])
    true = SPECTRA[name].max() if largest else SPECTRA[name].min()
    for seed in range(3):
        pair = run(matrix, largest, seed)
        assert pair.converged
        assert math.isclose(pair.value, true, rel_tol=1e-8)
        assert pair.bound >= true if largest else pair.bound <= true
        assert math.isclose(float(pair.vector.norm()), 1.0, rel_tol=1e-12)
        residual = (pair.vector @ matrix - pair.value * pair.vector).norm()
        assert float(residual) <= 2e-8 * abs(pair.value) + 1e-13


@each_end
def test_bounds_hold_after_any_number_of_steps(largest):
    for name, seed in ((name, seed) for name in SPECTRA for seed in range(5)):
        matrix = with_spectrum(SPECTRA[name], seed)
        true = SPECTRA[name].max() if largest else SPECTRA[name].min()
        for steps in (1, 2, 5, 12, 40):
            pair = run(matrix, largest, seed, maxiter=steps, tol=1e-14)
            slack = 1e-13 * SPECTRA[name].max()
            if largest:
                assert pair.value - slack <= true <= pair.bound + slack
            else:
                assert pair.bound - slack <= true <= pair.value + slack


@each_end
def test_it_goes_on_for_a_close_bound(largest):
    matrix = with_spectrum(SPECTRA["line"])
    loose = run(matrix, largest, values_only=True)
    close = run(matrix, largest, values_only=True, enclosure=0.01)
    assert close.products > loose.products
    assert abs(close.bound / close.value - 1) <= 0.01 < abs(loose.bound / loose.value - 1)


@each_end
def test_values_need_fewer_products_than_vectors(largest):
    matrix = with_spectrum(SPECTRA["line"])
    true = SPECTRA["line"].max() if largest else SPECTRA["line"].min()
    values, vectors = run(matrix, largest, values_only=True), run(matrix, largest)
    assert values.products < vectors.products
    assert math.isclose(values.value, true, rel_tol=1e-7)


def test_too_few_steps_are_said():
    pair = run(with_spectrum(SPECTRA["line"]), True, maxiter=3)
    assert not pair.converged
    assert pair.products == 3


def test_a_value_lost_in_rounding_is_not_claimed():
    """1e-20 of the norm is below what products in float64 tell."""
    pair = run(with_spectrum([1e-20, *np.linspace(0.5, 1.0, 50)]), False, values_only=True)
    assert not pair.converged or pair.bound <= 0.0


def test_the_generator_decides():
    matrix = with_spectrum(SPECTRA["line"])
    first, same, other = (run(matrix, True, seed, maxiter=5) for seed in (1, 1, 2))
    assert torch.equal(first.vector, same.vector)
    assert not torch.equal(first.vector, other.vector)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ArithmeticError, match="finite products"):
        run(torch.full((4, 4), math.nan, dtype=torch.float64), True)
