"""What Lanczos is told to look for: bounds, values, ceilings, complements, metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import random
from helpers.symmetric import (
    LINE,
    SPECTRA,
    check_pairs,
    each_end,
    run_lanczos,
    truth,
    with_spectrum,
)
from torch import Tensor

from convspectra.solvers import _gaussian as gaussian
from convspectra.solvers._lanczos import Eigenpairs, Metric, lanczos
from convspectra.solvers._stop import LanczosStop

# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1e-3, 3e-3])
@pytest.mark.parametrize("bulk", [0.74, 0.9])
def test_of_two_values_near_each_other_the_first_is_given(bulk, gap):
    spectrum = torch.linspace(bulk, 2, 3000, dtype=torch.float64)
    spectrum[:2] = torch.tensor([0.7, 0.7 * (1 + gap)])
    for seed in range(25):
        found = lanczos(
            lambda x: x * spectrum,
            len(spectrum),
            1,
            largest=False,
            stop=LanczosStop(tol=1e-4, maxiter=500, values_only=True),
            like=spectrum,
            generator=torch.Generator().manual_seed(seed),
        )
        assert found.converged
        assert float(found.values[0]) == pytest.approx(0.7, rel=1e-4)


@each_end
def test_values_need_fewer_products_than_vectors(largest):
    """They are accurate to the square of the residual."""
    matrix = with_spectrum(LINE)
    for k in (1, 3):
        values = run_lanczos(matrix, k, largest=largest, values_only=True, tol=1e-6)
        vectors = run_lanczos(matrix, k, largest=largest, tol=1e-6)
        assert values.converged
        assert values.products < vectors.products
        assert float(values.residuals.max()) > float(vectors.residuals.max())
        error = np.abs(values.values.numpy() - truth(matrix, largest)[:k])
        assert error.max() <= 2e-8


@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8])
@each_end
def test_pairs_rarely_cost_more_than_ten_tolerances(largest, tol):
    """One Krylov sequence sees one value for a while where there are two near each other.

    To take the wrong one it must hardly see the other: less often than once in 15, ten times on.
    """
    for gap in (30 * tol, 100 * tol, 1000 * tol):
        wrong = 0
        spectrum = list(LINE)
        ends = (-1, -2) if largest else (0, 1)
        spectrum[ends[1]] = spectrum[ends[0]] * (1 - gap if largest else 1 + gap)
        matrix = with_spectrum(spectrum)
        for seed in range(40):
            found = run_lanczos(matrix, largest=largest, seed=seed, tol=tol, values_only=True)
            error = abs(float(found.values[0]) / truth(matrix, largest)[0] - 1)
            assert found.converged
            wrong += error > 10 * tol
        assert wrong <= 3


@each_end
def test_enclosure_goes_on_until_the_bound_is_near(largest):
    matrix = with_spectrum(LINE)
    plain = run_lanczos(matrix, largest=largest, values_only=True)
    near = run_lanczos(matrix, largest=largest, values_only=True, enclosure=0.01)
    assert plain.products < near.products <= 2 * plain.products + plain.products // 8 + 1
    widths = [abs(pair.bound / float(pair.values[0]) - 1) for pair in (plain, near)]
    assert widths[1] <= 0.01 < widths[0]
    check_pairs(matrix, near, largest=largest, tol=1e-3)


def test_an_enclosure_out_of_reach_is_given_up():
    matrix = with_spectrum(LINE)
    plain, vain = run_lanczos(matrix, tol=1e-3), run_lanczos(matrix, tol=1e-3, enclosure=0.0)
    assert vain.converged
    assert plain.products < vain.products <= 2 * plain.products + plain.products // 8 + 1


@each_end
def test_beyond_stops_as_soon_as_nothing_is_to_be_expected_there(largest):
    sign = 1.0 if largest else -1.0
    matrix = with_spectrum([sign * x for x in LINE])
    for beyond, enclosure in ((1.5, 0.0), (1.2, 0.1), (3.0, 0.5)):
        pair = run_lanczos(matrix, largest=largest, beyond=sign * beyond, enclosure=enclosure)
        assert pair.products < 0.7 * run_lanczos(matrix, largest=largest).products
        assert pair.converged
        assert 1.0 - 1e-12 <= sign * pair.bound <= beyond * (1 + enclosure)


@each_end
def test_beyond_finds_what_is_there(largest):
    sign = 1.0 if largest else -1.0
    matrix = with_spectrum([sign * x for x in LINE])
    for beyond in (0.99, 0.9, 0.5):
        for seed in range(5):
            options = {"seed": seed, "beyond": sign * beyond, "enclosure": 0.0}
            pair = run_lanczos(matrix, largest=largest, tol=1e-3, **options)
            assert pair.converged
            assert sign * float(pair.values[0]) > beyond
            check_pairs(matrix, pair, largest=largest, tol=1e-3)


def test_beyond_is_never_wrongly_reassuring():
    said = {True: 0, False: 0}
    for seed in range(15):
        matrix = with_spectrum(list(np.random.default_rng(seed).standard_normal(50)), seed)
        end = truth(matrix)[0]
        for maxiter in (1, 3, 9, 27, 81):
            for fraction in (0.7, 0.999, 1.1, 2.0):
                beyond = fraction * end
                pair = run_lanczos(matrix, seed=seed, maxiter=maxiter, beyond=beyond, enclosure=0.0)
                said[pair.bound <= beyond] += 1
                assert pair.bound > beyond or fraction > 1
    assert min(said.values()) > 30


@each_end
def test_excluded_vectors_leave_the_rest(largest):
    sign = 1.0 if largest else -1.0
    values = [3.0, 2.0, 2.0, 1.0] + [0.9 - 0.02 * i for i in range(30)]
    matrix = with_spectrum([sign * x for x in values])
    eigenvectors = torch.linalg.eigh(sign * matrix).eigenvectors.T
    excluded = eigenvectors[[-1, -2]]
    outside = torch.eye(34, dtype=torch.float64) - excluded.T @ excluded
    pairs = run_lanczos(
        outside @ matrix @ outside, 2, largest=largest, tol=1e-10, excluded=excluded
    )
    assert pairs.converged
    assert (sign * pairs.values - torch.tensor([2.0, 1.0])).abs().max() <= 1e-9
    assert (pairs.vectors @ excluded.T).abs().max() <= 1e-12
    assert sign * pairs.bound >= 2.0 - 1e-12


def test_the_generator_decides():
    matrix = with_spectrum(LINE)
    first, again, other = (run_lanczos(matrix, 2, seed=seed, maxiter=5) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert first.bound == again.bound
    assert not torch.equal(first.vectors, other.vectors)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    run_lanczos(with_spectrum(SPECTRA["rank two"]), 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_are_refused(bad):
    matrix = random(6, 6)
    matrix = matrix + matrix.T
    matrix[1, 2] = bad
    with pytest.raises(ArithmeticError, match="expected finite products"):
        run_lanczos(matrix)


# --- a metric -------------------------------------------------------------------------------------


def pencil(seed: int, size: int = 30) -> tuple[Tensor, Tensor, np.ndarray]:
    """A symmetric, B positive definite, and the eigenvalues of A B, descending."""
    a = random(size, size, seed=seed)
    a = a + a.T
    b = random(size, size, seed=seed + 1000)
    b = b @ b.T / size + 0.05 * torch.eye(size)
    root = np.linalg.cholesky(b.numpy())
    return a, b, np.linalg.eigvalsh(root.T @ a.numpy() @ root)[::-1]


def run_pencil(a: Tensor, b: Tensor, k: int = 1, *, seed: int = 0, **options) -> Eigenpairs:
    return run_lanczos(
        a,
        k,
        seed=seed,
        metric=Metric(lambda x: x @ b, float(np.linalg.eigvalsh(b.numpy())[0])),
        **options,
    )


@each_end
def test_an_eigenpair_in_a_metric(largest):
    for seed in range(6):
        a, b, true = pencil(seed)
        true = true if largest else true[::-1]
        pairs = run_pencil(a, b, 1, largest=largest, seed=seed)
        slack = 1e-12 * float(np.abs(true).max())
        assert pairs.converged
        assert np.abs(pairs.values.numpy() - true[:1]).max() <= 1e-8 * abs(true[0])
        assert pairs.bound >= true[0] - slack if largest else pairs.bound <= true[0] + slack
        gram = pairs.vectors @ b @ pairs.vectors.T
        assert abs(float(gram) - 1) <= 1e-8
        residual = pairs.vectors @ b @ a - pairs.values[:, None] * pairs.vectors
        length = (residual @ b * residual).sum(1).sqrt()
        assert length.max() <= 1e-7 * abs(true[0])


@each_end
def test_a_metric_that_is_the_identity_changes_nothing(largest):
    matrix = with_spectrum(LINE)
    plain = run_lanczos(matrix, largest=largest, maxiter=20)
    same = run_lanczos(matrix, largest=largest, maxiter=20, metric=Metric(lambda x: x, 1.0))
    assert torch.allclose(plain.values, same.values, rtol=1e-12)
    assert math.isclose(plain.bound, same.bound, rel_tol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_side_of_a_ceiling_is_told_in_a_metric(seed):
    a, b, true = pencil(seed)
    for gap in (1e-6, 1e-2, 0.5):
        for sign in (1, -1):
            ceiling = true[0] + sign * gap * abs(true[0])
            pair = run_pencil(a, b, seed=seed, beyond=ceiling, enclosure=0.0, tol=1e-7)
            assert bool(pair.bound <= ceiling) is (sign == 1)


def test_a_metric_is_never_wrongly_reassuring():
    said = {True: 0, False: 0}
    for seed in range(20):
        a, b, true = pencil(seed, size=50)
        for maxiter in (1, 4, 16, 64):
            for factor in (0.7, 0.999, 1.5, 10.0):
                ceiling = factor * true[0]
                options = {"beyond": ceiling, "enclosure": 0.0, "tol": 0.5}
                pair = run_pencil(a, b, seed=seed, maxiter=maxiter, **options)
                said[pair.bound <= ceiling] += 1
                assert pair.bound > ceiling or factor > 1
    assert min(said.values()) > 20


def test_a_small_metric_widens_the_bound():
    """B = c I with a lower bound of c on it is A scaled; with less, less is known."""
    a = with_spectrum(LINE)
    plain = run_lanczos(a, maxiter=6)
    exact = run_lanczos(a, maxiter=6, metric=Metric(lambda x: 4 * x, 4.0))
    less = run_lanczos(a, maxiter=6, metric=Metric(lambda x: 4 * x, 1e-6))
    assert math.isclose(exact.bound, 4 * plain.bound, rel_tol=1e-6)
    assert less.bound > 1.2 * exact.bound


def test_a_larger_failure_probability_is_content_with_less(monkeypatch):
    a, b, true = pencil(5, size=60)
    careful = run_pencil(a, b, beyond=1.2 * true[0], enclosure=0.0)
    # The probability is a constant, no option.
    monkeypatch.setattr(gaussian, "FAILURE_PROBABILITY", 0.5)
    careless = run_pencil(a, b, beyond=1.2 * true[0], enclosure=0.0)
    assert max(careful.bound, careless.bound) <= 1.2 * true[0]
    assert careless.products < careful.products


def test_a_metric_that_is_not_finite_is_refused():
    a, b, _ = pencil(1)
    with pytest.raises(ArithmeticError, match="expected finite products"):
        run_lanczos(a, metric=Metric(lambda x: x @ b * math.nan, 1.0))


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("seed", range(4))
def test_a_value_alone_beside_a_multiple_of_the_identity(tol, seed):
    """All residuals are small there from the first step on; that says nothing of the outlier."""
    matrix = torch.diag(torch.tensor([*np.linspace(0.98, 1.0, 1500), 1.03], dtype=torch.float64))
    pair = run_lanczos(matrix, seed=seed, tol=tol, values_only=True)
    assert pair.converged
    assert float(pair.values[0]) == pytest.approx(1.03, rel=2 * min(tol, 1e-4))


@pytest.mark.parametrize("most_kept", [1, 5, 32, 33, 70])
@each_end
def test_vectors_that_are_not_kept_are_computed_once_more(largest, most_kept):
    matrix = with_spectrum(list(np.linspace(0.1, 1.0, 400)))
    kept = run_lanczos(matrix, largest=largest, tol=1e-6)
    found = run_lanczos(matrix, largest=largest, tol=1e-6, most_kept=most_kept)
    check_pairs(matrix, found, largest=largest, tol=1e-6)
    assert found.converged
    assert found.products > kept.products


def test_several_pairs_end_where_no_more_vectors_are_kept():
    found = run_lanczos(with_spectrum(LINE), 3, most_kept=20)
    assert (found.products, found.converged) == (20, False)
