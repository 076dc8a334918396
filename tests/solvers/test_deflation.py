"""Extreme eigenpairs with all their copies, against the dense eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import random
from helpers.symmetric import (
    IN_ROUNDING,
    LINE,
    SPECTRA,
    counts,
    each_end,
    each_spectrum,
    rounding,
    stop_from,
    truth,
    with_spectrum,
)
from torch import Tensor

from convspectra.solvers._deflation import ExtremeEigenpairs, extreme_eigenpairs
from convspectra.solvers._orthonormal import less
from convspectra.solvers._stop import DeflationStop

ENCLOSE = {"as it comes": {}, "enclosed": {"enclosure": 0.02}, "separated": {"separation": 1e-7}}


def run(
    matrix: Tensor, k: int = 1, *, largest: bool = True, seed: int = 0, **options
) -> ExtremeEigenpairs:
    """The result, with what is asked of the caller's operator checked on the way."""
    stop = stop_from(options, DeflationStop, maxiter=500)
    size, count = len(matrix), 0
    scale = float(matrix.norm()) or 1.0

    def deflated(found: Tensor):
        far = found @ found.T - torch.eye(len(found), dtype=torch.float64)
        assert found.shape[1] == size
        assert float(far.norm()) <= 1e-10

        def product(x: Tensor) -> Tensor:
            nonlocal count
            assert x.shape == (1, size)
            assert float((x @ found.T).norm()) <= 1e-8
            count += 1
            return less(less(x, found) @ matrix, found)

        return product

    result = extreme_eigenpairs(
        deflated,
        size,
        k,
        largest=largest,
        stop=stop,
        like=matrix,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    assert result.products == count
    assert result.norm <= 4 * scale
    return result


def check(
    matrix: Tensor,
    result: ExtremeEigenpairs,
    k: int,
    *,
    largest: bool,
    tol: float = 1e-8,
    values_only: bool = False,
) -> None:
    """All that `ExtremeEigenpairs` promises, converged or not."""
    true, slack = truth(matrix, largest), rounding(matrix)
    sign = 1.0 if largest else -1.0
    values = result.values.numpy()
    assert values.shape == (k,)
    assert result.vectors.shape == (k, len(matrix))
    assert len(result.bounds) == k + 1
    assert (sign * np.diff(values) <= 0).all()
    gram = result.vectors @ result.vectors.T
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-10
    images = result.vectors @ matrix
    assert sign * values[0] <= sign * true[0] + slack, "a Ritz value is never beyond the end"
    for bound, value in zip(result.bounds, true, strict=False):
        assert sign * bound >= sign * value - slack
    if k == len(matrix):
        assert sign * result.bounds[k] == -math.inf
    if result.converged:
        allowed = tol * np.abs(true[:k]) + 2 * slack
        assert (np.abs(values - true[:k]) <= (2 if values_only else 1) * allowed).all()
        if not values_only:
            blur = slack if k == 1 else 1e-8 * float(np.abs(true).max())
            measured = (images - result.values[:, None] * result.vectors).norm(dim=1).numpy()
            assert (measured <= tol * np.abs(values) + blur).all()


# --- all copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ENCLOSE)
@each_end
@each_spectrum
def test_extreme_eigenpairs(name, largest, how):
    matrix = with_spectrum(SPECTRA[name])
    for k in counts(name):
        result = run(matrix, k, largest=largest, seed=k, **ENCLOSE[how])
        check(matrix, result, k, largest=largest)
        assert result.converged or (name, largest) in IN_ROUNDING


@pytest.mark.parametrize("how", ["as it comes", "enclosed"])
@each_end
@each_spectrum
def test_values_only(name, largest, how):
    matrix = with_spectrum(SPECTRA[name])
    for k in counts(name):
        result = run(matrix, k, largest=largest, values_only=True, **ENCLOSE[how])
        check(matrix, result, k, largest=largest, values_only=True)
        assert result.converged or (name, largest) in IN_ROUNDING


@pytest.mark.parametrize("how", ENCLOSE)
@pytest.mark.parametrize("copies", [2, 3, 5, 8])
@each_end
def test_all_copies_of_a_repeated_value_are_found(copies, largest, how):
    """The values that are wanted beside it take many more steps than it does."""
    sign = 1.0 if largest else -1.0
    rest = [1.0 - 0.01 * i for i in range(60)]
    matrix = with_spectrum([sign * x for x in [2.0] * copies + rest])
    expected = sign * torch.tensor(([2.0] * copies + rest)[:6], dtype=torch.float64)
    for k in (2, 6):
        for seed in range(2):
            result = run(matrix, k, largest=largest, seed=seed, **ENCLOSE[how])
            assert result.converged
            assert (result.values - expected[:k]).abs().max() <= 2e-8
            check(matrix, result, k, largest=largest)
            if copies > k:
                assert sign * result.bounds[k] >= 2.0 - 1e-12, "the next one is another copy"


def test_every_pair_of_a_small_matrix():
    matrix = with_spectrum([5.0, 4.0, 4.0, -1.0, -2.0, 0.0])
    for largest in (True, False):
        result = run(matrix, 6, largest=largest)
        assert result.converged
        check(matrix, result, 6, largest=largest)
        assert np.abs(result.values.numpy() - truth(matrix, largest)).max() <= 1e-13


@pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5, 1e-6])
def test_two_close_values_are_bounded_although_the_vectors_mix_them(apart):
    """The residual of each reaches into the other, where it is no second-order matter."""
    matrix = with_spectrum([2.0, 2.0 - apart] + [1.0 - 0.02 * i for i in range(40)])
    for seed in range(6):
        for options in ({"enclosure": 0.02}, {"separation": 1e-7}, {"separation": 0.3}):
            for k in (1, 2):
                result = run(matrix, k, seed=seed, values_only=True, **options)
                true = truth(matrix)
                for bound, value in zip(result.bounds, true, strict=False):
                    assert bound >= value - rounding(matrix)


def test_pairs_far_apart_in_size():
    """What is lost in the rounding of the first value is looked for in its complement."""
    values = 10.0 ** -torch.arange(0, 40, 0.5, dtype=torch.float64)
    options = {"stop": DeflationStop(1e-8, 500), "largest": True, "like": values}

    def solve(**more) -> ExtremeEigenpairs:
        return extreme_eigenpairs(
            lambda found: lambda x: less(less(x, found) * values, found),
            len(values),
            20,
            generator=torch.Generator().manual_seed(0),
            **options,
            **more,
        )

    resolved, lost = solve(resolution=1e-6), solve()
    error = [float((x.values / values[:20] - 1).abs().max()) for x in (resolved, lost)]
    assert resolved.converged
    assert error[0] <= 1e-7
    assert error[1] > 10 * error[0]
    assert all(b >= v * (1 - 1e-7) for b, v in zip(resolved.bounds, values.tolist(), strict=False))


def test_global_random_state_is_left_alone_and_the_generator_decides():
    matrix = with_spectrum(SPECTRA["repeated inside"])
    state = torch.get_rng_state()
    first, again, other = (run(matrix, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vectors, again.vectors)
    assert first.bounds == again.bounds
    assert not torch.equal(first.vectors, other.vectors)


# --- stopping early -------------------------------------------------------------------------------


@each_end
@each_spectrum
def test_stopping_early_is_said_and_still_encloses(name, largest):
    matrix = with_spectrum(SPECTRA[name])
    for k in counts(name):
        for maxiter in (1, 2, 5, 12):
            result = run(matrix, k, largest=largest, maxiter=maxiter, enclosure=0.02)
            check(matrix, result, k, largest=largest)


@pytest.mark.parametrize("tol", [0.3, 1e-3])
@each_end
@each_spectrum
def test_loose_tolerances_still_enclose(name, largest, tol):
    matrix = with_spectrum(SPECTRA[name])
    true, sign = truth(matrix, largest), 1.0 if largest else -1.0
    k = counts(name)[-1]
    result = run(matrix, k, largest=largest, tol=tol, enclosure=0.02)
    assert len(result.bounds) == k + 1
    for bound, value in zip(result.bounds, true, strict=False):
        assert sign * bound >= sign * value - rounding(matrix)


def test_a_small_maxiter_is_not_taken_for_convergence():
    matrix = with_spectrum([1.0 - 0.005 * i for i in range(150)])
    result = run(matrix, 2, maxiter=4)
    assert not result.converged
    assert result.products == 4
    assert run(matrix, 2).converged


def test_a_value_beyond_that_has_not_converged_is_not_passed_over():
    """The first run finds an inner value; the next one sees a larger one, and has no more steps."""
    values = torch.linspace(0, 1, 32, dtype=torch.float64)
    wrong = 0
    for seed in [*range(100), 5716]:
        result = run(torch.diag(values), seed=seed, tol=0.03, maxiter=7, enclosure=0.0)
        wrong += result.converged and float(result.values[0]) < 1.0 - 2 * 0.03
    assert wrong == 0


# --- options --------------------------------------------------------------------------------------


@each_end
@each_spectrum
@pytest.mark.parametrize("separation", [1e-3, 0.5])
def test_separation(name, largest, separation):
    """Where the rest is further away than that, the bound says so; and it is never wrong."""
    matrix = with_spectrum(SPECTRA[name])
    if (name, largest) in IN_ROUNDING:
        return
    true, sign = truth(matrix, largest), 1.0 if largest else -1.0
    for k in counts(name)[-2:]:
        result = run(matrix, k, largest=largest, separation=separation)
        check(matrix, result, k, largest=largest)
        assert result.converged
        kth = sign * true[k - 1]
        limit = kth - separation * abs(kth)
        further = sign * true[k] if k < len(true) else -math.inf
        if further < limit - 2 * separation * abs(kth) - 1e-6 * np.abs(true).max():
            assert sign * result.bounds[k] <= limit + 0.1 * separation * abs(kth)


def test_a_wider_separation_takes_more_products():
    matrix = with_spectrum([10.0, 5.0] + [4.0 - 0.02 * i for i in range(148)])
    alone, told, further = (
        run(matrix, **options)
        for options in ({"alone": True}, {"separation": 1e-7}, {"separation": 0.4})
    )
    assert alone.products < told.products <= further.products
    assert 5.0 <= further.bounds[1] <= 6.0
    assert 5.0 <= told.bounds[1] < 10.0
    assert torch.allclose(alone.values, told.values, atol=1e-6)


@each_end
def test_enclosure_goes_on_until_the_rest_is_known_to_be_near(largest):
    matrix = with_spectrum(LINE)
    true, sign = truth(matrix, largest), 1.0 if largest else -1.0
    for k in (1, 3):
        result = run(matrix, k, largest=largest, enclosure=0.02)
        width = 0.025 * abs(true[k - 1])
        for bound, value in zip(result.bounds[:k], true, strict=False):
            assert -1e-12 <= sign * (bound - value) <= width
        assert sign * true[k] <= sign * result.bounds[k] <= sign * true[k - 1] + width


@each_end
def test_alone_looks_at_nothing_else(largest):
    for name in ("simple", "both signs", "repeated at both ends", "identity"):
        matrix = with_spectrum(SPECTRA[name])
        alone = run(matrix, largest=largest, alone=True)
        check(matrix, alone, 1, largest=largest)
        assert alone.converged
        assert alone.products < run(matrix, largest=largest, enclosure=0.02).products
        assert alone.bounds[0] == alone.bounds[1], (
            "nothing is known of it but that it is not beyond"
        )


@each_end
def test_alone_with_an_enclosure(largest):
    matrix = with_spectrum(LINE)
    options = {"largest": largest, "alone": True, "values_only": True}
    plain, near = run(matrix, **options), run(matrix, enclosure=0.01, **options)
    widths = [abs(x.bounds[0] / float(x.values[0]) - 1) for x in (plain, near)]
    assert widths[1] <= 0.011 < widths[0]
    assert plain.products < near.products


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_are_refused(bad):
    matrix = random(6, 6)
    matrix = matrix + matrix.T
    matrix[1, 2] = bad
    with pytest.raises(ArithmeticError, match="expected finite products"):
        extreme_eigenpairs(
            lambda found: lambda x: less(less(x, found) @ matrix, found),
            6,
            1,
            largest=True,
            stop=DeflationStop(tol=1e-8, maxiter=20),
            like=matrix,
        )


# --- less -----------------------------------------------------------------------------------------


def test_less_takes_away_what_is_along_the_vectors():
    found = torch.linalg.qr(random(9, 3)).Q.T
    rows = random(4, 9, seed=1)
    rest = less(rows, found)
    assert (rest @ found.T).abs().max() <= 1e-14
    assert torch.allclose(rest + rows @ found.T @ found, rows, atol=1e-14)
    assert less(rows, found[:0]) is rows
