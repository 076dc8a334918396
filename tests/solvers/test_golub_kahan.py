"""Golub-Kahan-Lanczos bidiagonalisation and its probabilistic bound."""

from __future__ import annotations

import pytest
import torch
from checker import (
    EPS,
    MATRICES,
    check,
    counts,
    each_matrix,
    random,
    toeplitz,
    truth,
    with_values,
)
from torch import Tensor

from convspectra.solvers import golub_kahan as module
from convspectra.solvers.golub_kahan import FAILURE_PROBABILITY, golub_kahan


class Counting:
    """Products with a matrix and with its transpose, counted."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.count = 0

    def matvec(self, x: Tensor) -> Tensor:
        assert x.shape == (self.matrix.shape[1],)
        self.count += 1
        return self.matrix @ x

    def rmatvec(self, y: Tensor) -> Tensor:
        assert y.shape == (self.matrix.shape[0],)
        self.count += 1
        return self.matrix.T @ y


def run(
    matrix: Tensor,
    k: int = 1,
    *,
    tol: float = 1e-8,
    maxiter: int = 300,
    seed: int = 0,
    separation: float | None = None,
):
    counting = Counting(matrix)
    result = golub_kahan(
        counting.matvec,
        counting.rmatvec,
        tuple(matrix.shape),
        k,
        tol=tol,
        maxiter=maxiter,
        like=matrix,
        generator=torch.Generator().manual_seed(seed),
        separation=separation,
    )
    assert result.matvecs == counting.count
    return result


@each_matrix
def test_golub_kahan(name):
    for k in counts(name):
        for seed in range(3):
            result = run(MATRICES[name], k, seed=seed)
            assert result.converged
            check(name, result, k, largest=True)


@pytest.mark.parametrize("maxiter", [1, 2, 3, 5])
@each_matrix
def test_stopping_early_is_said_and_still_encloses(name, maxiter):
    for k in counts(name):
        check(name, run(MATRICES[name], k, maxiter=maxiter), k, largest=True)


@pytest.mark.parametrize("separation", [1e-7, 1e-3, 0.5])
@each_matrix
def test_separation(name, separation):
    """Where the rest is further away than that, `others` says so; and it is never wrong."""
    values = [float(value) for value in truth(name)]
    for k in counts(name):
        result = run(MATRICES[name], k, separation=separation)
        assert result.converged
        check(name, result, k, largest=True)
        further = values[k] if k < len(values) else 0.0
        if values[k - 1] > 0 and further < (1 - 3 * separation) * values[k - 1] - 1e-6 * values[0]:
            assert result.others <= (1 - 0.9 * separation) * values[k - 1]


def test_separation_costs_less_than_another_value():
    matrix = with_values(200, 150, [10.0, 5.0] + [4.0 - 0.02 * i for i in range(148)])
    plain, told, two = run(matrix), run(matrix, separation=1e-7), run(matrix, 2)
    assert 5.0 <= told.others < 10.0
    assert plain.matvecs < told.matvecs < two.matvecs
    assert run(matrix, separation=0.3).others <= 7.0 < told.others, "and it goes on for more"
    assert torch.equal(told.s, plain.s)


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-4])
@each_matrix
def test_loose_tolerances_still_enclose(name, tol):
    for k in counts(name):
        check(name, run(MATRICES[name], k, tol=tol), k, largest=True, tol=tol)


def test_maxiter_limits_the_work_and_is_not_taken_for_convergence():
    matrix = random(60, 50)
    result = run(matrix, 2, maxiter=4)
    assert not result.converged
    assert result.matvecs <= 8
    assert result.s.shape == (2,)
    assert run(matrix, 2).converged


def test_more_values_than_maxiter_allows_are_all_there():
    result = run(random(20, 12), 5, maxiter=1)
    assert not result.converged
    assert result.u.shape == (5, 20)
    assert result.v.shape == (5, 12)


def test_values_are_accurate_to_the_square_of_the_residual():
    values = torch.linspace(0.1, 1, 80, dtype=torch.float64) ** 2
    matrix = with_values(90, 80, values.flip(0).tolist())
    result = run(matrix, 3, tol=1e-6)
    error = (result.s - torch.linalg.svdvals(matrix)[:3]).abs()
    assert error.max() < 1e-9
    assert (result.upper - result.lower >= 0).all()


def test_each_value_is_accurate_relative_to_itself():
    """A value far above the others must not lend them its tolerance."""
    for ratio in (1e4, 1e8, 1e10):
        matrix = with_values(60, 50, [ratio] + [1.0 - 0.01 * i for i in range(49)])
        result = run(matrix, 3)
        true = torch.linalg.svdvals(matrix)[:3]
        assert result.converged
        assert (result.s - true).abs().max() <= 1e-10 + 1e-15 * ratio
        assert result.upper[1] - result.s[1] <= 0.1 + 1e-13 * ratio


def test_converging_takes_few_products():
    """One large value stands out: Lanczos needs a handful of steps, not a whole sweep of space."""
    matrix = with_values(200, 150, [10.0] + [1.0] * 149)
    assert run(matrix).matvecs <= 12
    assert run(random(200, 150)).matvecs <= 150


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_all_copies_of_a_repeated_value_are_found(copies):
    matrix = with_values(40, 30, [2.0] * copies + [1.0 - 0.01 * i for i in range(25)])
    result = run(matrix, 4)
    expected = torch.tensor([2.0] * min(copies, 4) + [1.0, 0.99, 0.98][: max(0, 4 - copies)])
    assert torch.allclose(result.s, expected.double(), atol=1e-12)
    assert result.converged


def test_the_same_seed_gives_the_same_answer_and_another_seed_another_start():
    first, again, other = (run(random(9, 8), 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.v, again.v)
    assert torch.equal(first.upper, again.upper)
    assert not torch.equal(first.v, other.v)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    run(MATRICES["nilpotent"], 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_is_never_an_answer():
    matrix = random(5, 4)
    matrix[1, 2] = torch.nan
    with pytest.raises(ArithmeticError, match="finite products"):
        run(matrix)


def test_certificate_names_its_probability():
    assert f"{FAILURE_PROBABILITY:.0e}" in run(random(4, 4)).certificate


def test_enclosure_of_a_zero_value_is_small():
    """Five values, two of them not 0: what was taken for rounding enters at its own size."""
    result = run(with_values(9, 5, [2.0, 1.0]), 4)
    assert result.s[2:].max() <= 1e-14
    assert result.upper[2:].max() <= 1e-8
    assert (result.lower[2:] == 0).all()


def test_exhausted_space_needs_no_probability():
    result = run(random(30, 5), 5)
    assert (result.upper - result.lower).max() <= 100 * EPS * result.s[0]
    one_of_two = run(random(30, 2))
    assert one_of_two.upper - one_of_two.s <= 100 * EPS * one_of_two.s


# --- the probability ------------------------------------------------------------------------------

SPIKE = with_values(400, 400, [1.0] + [0.5] * 399)
RANDOM_STARTS = {
    "spike, 1 step": (SPIKE[:, :], 1, 1),
    "plane, 1 step": (with_values(2, 2, [1.0, 0.5]), 1, 1),
    "three values, 1 step": (with_values(6, 3, [1.0, 0.5, 0.2]), 1, 1),
    "three values, 2 steps": (with_values(6, 3, [1.0, 0.8, 0.2]), 1, 2),
    "random, 2 steps": (random(8, 5), 1, 2),
    "random, 8 steps": (random(60, 50), 1, 8),
    "second difference": (toeplitz(40, {-1: 1.0, 0: -2.0, 1: 1.0}), 1, 6),
    "nearly the identity": (with_values(60, 60, [1 + 1e-6] + [1.0] * 59), 1, 300),
    "second of two": (with_values(30, 30, [2.0, 1.0] + [0.9] * 28), 2, 2),
    "copies": (with_values(30, 30, [1.0] * 3 + [0.99 - 0.02 * i for i in range(27)]), 3, 300),
    "deflated": (with_values(30, 30, [1.0] * 4 + [0.5] * 26), 4, 300),
}


@pytest.mark.parametrize("name", RANDOM_STARTS)
@pytest.mark.parametrize("probability", [0.5, 0.1])
def test_bound_fails_no_more_often_than_it_says(monkeypatch, name, probability):
    """With the probability turned up from 1e-10 the failures can be counted."""
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", probability)
    matrix, k, maxiter = RANDOM_STARTS[name]
    true = torch.linalg.svdvals(matrix)[:k]
    runs = 150 if len(matrix) < 100 else 60
    failures = 0
    for seed in range(runs):
        result = run(matrix, k, maxiter=maxiter, seed=seed, tol=1e-3 if maxiter > 50 else 1e-8)
        assert (result.lower <= true * (1 + 1e-14)).all(), "the lower bounds rest on no chance"
        failures += bool((result.upper < true * (1 - 1e-14)).any())
    # k + 1 sweeps at most take part; three standard deviations of the count are allowed for.
    expected = min(1.0, probability) * runs
    assert failures <= expected + 3 * expected**0.5


def test_bound_is_not_idle(monkeypatch):
    """It does fail where it says that it may: the bound is not just a large number."""
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", 0.5)
    matrix = with_values(50, 50, [1.0] + [0.5] * 49)
    failures = sum(bool(run(matrix, maxiter=1, seed=seed).upper < 1 - 1e-14) for seed in range(150))
    assert 30 <= failures <= 90
