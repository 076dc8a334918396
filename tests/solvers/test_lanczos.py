"""Lanczos from one vector, against the dense eigenvalues of matrices with prescribed spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.checker import toeplitz
from helpers.symmetric import (
    IN_ROUNDING,
    LINE,
    SPECTRA,
    check_pairs,
    counts,
    each_end,
    each_spectrum,
    rounding,
    run_lanczos,
    truth,
    with_spectrum,
)

from convspectra.solvers import _gaussian as gaussian

SIMPLE = {
    "line": LINE,
    "squares": SPECTRA["simple"],
    "both signs": list(np.linspace(-2, 1, 80)),
    "negative": list(-np.linspace(1, 5, 80)),
    "one far above": [*np.linspace(0.1, 1.0, 100), 50.0],
    "one far below": [1e-3, *np.linspace(0.5, 1.0, 100)],
    "gaps": [8.0, 4.0, 2.0, *np.linspace(0.9, 1, 50), 0.5, 0.25, 0.1],
}


# --- one end of a spectrum ------------------------------------------------------------------------


@each_end
@each_spectrum
def test_the_end_of_a_spectrum(name, largest):
    matrix = with_spectrum(SPECTRA[name])
    end = truth(matrix, largest)[0]
    for seed in range(3):
        pair = run_lanczos(matrix, largest=largest, seed=seed)
        check_pairs(matrix, pair, largest=largest)
        if (name, largest) not in IN_ROUNDING:
            assert pair.converged
            assert abs(float(pair.values[0]) - end) <= 2e-8 * abs(end) + rounding(matrix)


@each_end
@pytest.mark.parametrize("name", SIMPLE)
def test_several_pairs_of_a_simple_spectrum(name, largest):
    matrix = with_spectrum(SIMPLE[name])
    true = truth(matrix, largest)
    for k in (2, 3, 6):
        for seed in range(2):
            pairs = run_lanczos(matrix, k, largest=largest, seed=seed)
            assert pairs.converged
            check_pairs(matrix, pairs, largest=largest)
            error = np.abs(pairs.values.numpy() - true[:k])
            assert (error <= 1e-8 * np.abs(true[:k]) + rounding(matrix)).all()


@each_end
def test_no_ghosts_after_many_steps(largest):
    """The first values converge long before the last, and no copy of them appears."""
    matrix = with_spectrum([*np.linspace(0.5, 1.0, 200), 3.0, 2.0, 0.1, 0.2])
    true = truth(matrix, largest)
    for seed in range(3):
        pairs = run_lanczos(matrix, 10, largest=largest, seed=seed, tol=1e-10)
        assert pairs.converged
        assert pairs.products > 80
        check_pairs(matrix, pairs, largest=largest, tol=1e-10)
        assert np.abs(pairs.values.numpy() - true[:10]).max() <= rounding(matrix) + 3e-10
        assert np.abs(np.diff(pairs.values.numpy())).min() > 1e-3


def test_steps_that_tell_no_more_do_no_harm():
    """A tolerance below rounding: it goes on, and nothing grows."""
    matrix = with_spectrum(LINE)
    for k in (1, 4):
        pairs = run_lanczos(matrix, k, tol=0.0, maxiter=600)
        check_pairs(matrix, pairs, largest=True)
        assert np.abs(pairs.values.numpy() - truth(matrix)[:k]).max() <= 1e-12


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("small", [1e-6, 1e-9, 1e-12, 1e-13, 1e-14, 1e-15])
def test_a_nearly_invariant_space(small, k):
    """The fourth step goes on with a direction that is little more than rounding."""
    matrix = with_spectrum([3.0, 2.0] + [1.0 + small * math.sin(i) for i in range(30)])
    for seed in range(5):
        for largest in (True, False):
            pairs = run_lanczos(matrix, k, largest=largest, seed=seed, maxiter=30)
            check_pairs(matrix, pairs, largest=largest)


def test_one_copy_of_each_repeated_value():
    pairs = run_lanczos(with_spectrum(SPECTRA["two values"]), 4)
    assert pairs.converged
    assert pairs.products == 2
    assert (pairs.values - torch.tensor([1.0, 0.25])).abs().max() <= 1e-14
    inside = run_lanczos(with_spectrum([5.0, 4.0, 4.0, 3.0, 2.0, 2.0, 2.0]), 4)
    assert inside.converged
    assert (inside.values - torch.tensor([5.0, 4.0, 3.0, 2.0])).abs().max() <= 1e-13


@pytest.mark.parametrize("copies", [1, 12])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_an_exhausted_space_gives_fewer_pairs(value, copies):
    matrix = with_spectrum([value] * copies)
    for largest in (True, False):
        pairs = run_lanczos(matrix, 5, largest=largest)
        assert pairs.converged
        assert pairs.products == len(pairs.values) == 1
        check_pairs(matrix, pairs, largest=largest)


def test_all_pairs_of_a_small_matrix():
    matrix = with_spectrum([5.0, 4.0, -1.0, -2.0, 0.0])
    for largest in (True, False):
        pairs = run_lanczos(matrix, 5, largest=largest)
        assert pairs.converged
        check_pairs(matrix, pairs, largest=largest)
        assert np.abs(pairs.values.numpy() - truth(matrix, largest)).max() <= 1e-13


def test_each_value_is_accurate_relative_to_itself():
    """A value far above the others must not lend them its tolerance."""
    for ratio in (1e4, 1e8):
        matrix = with_spectrum([ratio] + [1.0 - 0.01 * i for i in range(49)])
        pairs = run_lanczos(matrix, 3)
        assert pairs.converged
        error = np.abs(pairs.values.numpy() - truth(matrix)[:3])
        assert error.max() <= 1e-8 + 1e-14 * ratio


def test_a_value_lost_in_rounding_is_not_claimed():
    """1e-20 of the norm is below what products in float64 tell."""
    matrix = with_spectrum([1e-20, *np.linspace(0.5, 1.0, 50)])
    pair = run_lanczos(matrix, largest=False, values_only=True)
    assert not pair.converged or pair.bound <= 0.0


def test_converging_takes_few_products():
    assert run_lanczos(with_spectrum([10.0] + [1.0] * 149)).products <= 3
    assert run_lanczos(toeplitz(40, {0: 1.0}), 3).products == 1
    assert run_lanczos(with_spectrum([10.0, *np.linspace(0, 1, 199)])).products <= 12


def test_single_precision():
    matrix = with_spectrum(SPECTRA["simple"]).float()
    for largest in (True, False):
        pairs = run_lanczos(matrix, 2, largest=largest, tol=1e-4)
        true = truth(matrix.double(), largest)
        assert pairs.converged
        assert pairs.values.dtype == pairs.vectors.dtype == torch.float32
        assert np.abs(pairs.values.numpy() - true[:2]).max() <= 2e-4 * true[:2].max() + 1e-5
        assert pairs.bound >= true[0] - 1e-5 if largest else pairs.bound <= true[0] + 1e-5


# --- stopping early, and the bound ----------------------------------------------------------------


@each_end
@each_spectrum
def test_stopping_early_is_said_and_still_encloses(name, largest):
    matrix = with_spectrum(SPECTRA[name])
    for k in counts(name):
        for maxiter in (1, 2, 5, 12, 40):
            check_pairs(
                matrix, run_lanczos(matrix, k, largest=largest, maxiter=maxiter), largest=largest
            )


@each_end
@each_spectrum
def test_loose_tolerances_still_enclose(name, largest):
    matrix = with_spectrum(SPECTRA[name])
    for tol in (0.3, 1e-2, 1e-4):
        pairs = run_lanczos(matrix, counts(name)[-1], largest=largest, tol=tol)
        check_pairs(matrix, pairs, largest=largest, tol=tol)


def test_a_small_maxiter_is_not_taken_for_convergence():
    matrix = with_spectrum(LINE)
    pairs = run_lanczos(matrix, 2, maxiter=4)
    assert not pairs.converged
    assert pairs.products == 4
    assert float(pairs.residuals.max()) > 1e-4
    assert run_lanczos(matrix, 2).converged


def test_there_are_as_many_steps_as_pairs():
    pairs = run_lanczos(with_spectrum(SPECTRA["simple"]), 5, maxiter=1)
    assert not pairs.converged
    assert pairs.products == 5
    assert pairs.values.shape == (5,)


RANDOM_STARTS = {
    "spike, 1 step": ([1.0] + [0.5] * 199, 1),
    "spike, 2 steps": ([1.0] + [0.5] * 50 + [0.1] * 50, 2),
    "plane, 1 step": ([1.0, 0.5, 0.0], 1),
    "line, 6 steps": (list(np.linspace(1, 0, 60)), 6),
    "nearly the identity": ([1 + 1e-6] + [1.0] * 49, 1),
}


@pytest.mark.parametrize("probability", [0.5, 0.1])
@pytest.mark.parametrize("name", RANDOM_STARTS)
def test_the_bound_fails_no_more_often_than_it_says(monkeypatch, name, probability):
    """With the probability turned up from 1e-10 the failures can be counted."""
    monkeypatch.setattr(gaussian, "FAILURE_PROBABILITY", probability)
    values, steps = RANDOM_STARTS[name]
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    runs = 150
    failures = sum(
        run_lanczos(matrix, seed=seed, tol=0.0, maxiter=steps).bound < 1 - 1e-14
        for seed in range(runs)
    )
    expected = probability * runs
    assert failures <= expected + 3 * (expected * (1 - probability)) ** 0.5
    if name == "spike, 1 step":
        assert failures >= 0.2 * expected, "nor is it just a large number"


@each_end
def test_a_well_separated_value_is_bounded_tightly(largest):
    sign = 1.0 if largest else -1.0
    matrix = with_spectrum([10.0 * sign, *np.linspace(0, sign, 99)])
    bounds = [
        run_lanczos(matrix, largest=largest, tol=0.0, maxiter=s).bound for s in (2, 6, 10, 16)
    ]
    widths = [sign * bound - 10.0 for bound in bounds]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] <= 1e-3


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_answers_scale_with_the_operator(scale):
    matrix = with_spectrum([2.0, *np.linspace(1, 0, 40)])
    for steps in (4, 12):
        one, other = (run_lanczos(m, 2, maxiter=steps) for m in (matrix, scale * matrix))
        assert math.isclose(other.bound, scale * one.bound, rel_tol=1e-5)
        assert torch.allclose(other.values, scale * one.values, rtol=1e-10, atol=0)
