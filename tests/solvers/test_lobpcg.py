"""LOBPCG for the smallest singular values of a tall matrix."""

from __future__ import annotations

import pytest
import torch
from helpers.checker import EPS, MATRICES, check, counts, each_matrix, truth, with_values
from helpers.strategies import random
from torch import Tensor

from convspectra.solvers._lobpcg import lobpcg
from convspectra.solvers._stop import Stop


def run(
    matrix: Tensor,
    k: int = 1,
    *,
    tol: float = 1e-8,
    maxiter: int = 500,
    seed: int = 0,
    precondition=None,
    values_only: bool = False,
):
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    count = 0

    def matvec(x: Tensor) -> Tensor:
        nonlocal count
        count += len(x)
        return x @ tall.T

    def rmatvec(y: Tensor) -> Tensor:
        nonlocal count
        count += len(y)
        return y @ tall

    result = lobpcg(
        matvec,
        rmatvec,
        tuple(tall.shape),
        k,
        stop=Stop(tol, maxiter, values_only),
        like=tall,
        generator=torch.Generator().manual_seed(seed),
        precondition=precondition,
    )
    assert result.matvecs == count
    if tall is matrix:
        return result
    return type(result)(**{**vars(result), "u": result.v, "v": result.u})


def swapped(name: str) -> bool:
    rows, columns = MATRICES[name].shape
    return rows < columns


# Wide matrices are given transposed, so that their u and v change places in the check.
@each_matrix
def test_lobpcg(name):
    small = [value for value in truth(name) if value < 1e-6 * truth(name)[0]]
    for k in counts(name):
        for seed in range(3):
            result = run(MATRICES[name], k, seed=seed)
            if swapped(name) and small:
                result = type(result)(**{**vars(result), "converged": False})
            check(name, result, k, largest=False, tol=1e-7, left_vectors=False)
            if not small:
                assert result.converged


@pytest.mark.parametrize("maxiter", [1, 2, 4])
@each_matrix
def test_stopping_early_is_said_and_still_encloses(name, maxiter):
    for k in counts(name):
        result = run(MATRICES[name], k, maxiter=maxiter)
        result = type(result)(**{**vars(result), "converged": False})
        check(name, result, k, largest=False)


def test_maxiter_is_not_taken_for_convergence():
    matrix = random(60, 40)
    assert not run(matrix, 2, maxiter=3).converged
    assert run(matrix, 2).converged


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([1.0 - 0.01 * i for i in range(30)], 3),
        ([1.0 - 0.01 * i for i in range(27)] + [0.1] * 3, 2),
        ([1.0] * 30, 3),
        ([1.0 - 0.01 * i for i in range(28)] + [1e-3, 1e-4], 2),
    ],
    ids=["apart", "repeated", "all the same", "small"],
)
def test_larger_matrices(values, k):
    matrix = with_values(50, 30, values)
    result = run(matrix, k)
    expected = torch.linalg.svdvals(matrix).flip(0)[:k]
    assert result.converged
    assert torch.allclose(result.s, expected, rtol=1e-9, atol=1e-14)
    assert (result.upper >= expected - 4 * EPS).all()
    assert (result.lower == 0).all()


def test_no_value_is_claimed_that_the_residual_cannot_confirm():
    """Between 1e-8 and 2e-7 of sigma_max the residual is rounding: it says nothing of the value."""
    for smallest in (3e-8, 6e-8, 1e-7):
        matrix = with_values(60, 40, [1.0 - 0.02 * i for i in range(39)] + [smallest])
        for seed in range(3):
            result = run(matrix, seed=seed)
            assert float(result.upper) >= smallest * (1 - 1e-6)
            assert abs(float(result.s) - smallest) <= 1e-3 * smallest
            assert smallest > 3e-8 or not result.converged
    vanishing = with_values(60, 40, [1.0 - 0.02 * i for i in range(39)] + [1e-12])
    assert run(vanishing).converged, "within tol sigma_max of 0, as its upper bound says"
    assert float(run(vanishing).upper) <= 1e-8


def test_the_previous_direction_saves_products():
    """Without it this is steepest descent, which takes ten times as many."""
    matrix = with_values(200, 150, [1.0 - 0.0066 * i for i in range(150)])
    result = run(matrix)
    assert result.converged
    assert result.matvecs <= 6000


def test_values_alone_save_products():
    values = [1.0 - 0.0066 * i for i in range(150)]
    matrix = with_values(200, 150, values)
    vectors, alone = run(matrix, tol=1e-6), run(matrix, tol=1e-6, values_only=True)
    assert vectors.converged
    assert alone.converged
    assert alone.matvecs < 0.95 * vectors.matvecs
    assert float(alone.s[0]) == pytest.approx(values[-1], rel=1e-6)


@pytest.mark.parametrize("columns", range(1, 14))
def test_blocks_as_wide_as_the_space(columns):
    """Up to k + 4 columns the block spans everything; up to three times as many it nearly does."""
    for rows in (columns, columns + 3):
        for seed in range(5):
            matrix = random(rows, columns, seed=seed)
            for k in {1, min(3, columns), columns}:
                result = run(matrix, k, seed=seed)
                expected = torch.linalg.svdvals(matrix).flip(0)[:k]
                assert torch.allclose(result.s, expected, rtol=1e-10, atol=1e-13)
                gram = result.v @ result.v.T
                assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-12)


def test_a_preconditioner_saves_products():
    matrix = with_values(80, 60, [1.0 - 0.016 * i for i in range(59)] + [1e-3])
    inverse = torch.linalg.inv(matrix.T @ matrix)
    plain, faster = run(matrix), run(matrix, precondition=lambda x: x @ inverse)
    assert faster.converged
    assert faster.matvecs < 0.5 * plain.matvecs
    assert torch.allclose(faster.s, plain.s, rtol=1e-9)


def test_the_same_seed_gives_the_same_answer():
    first, again, other = (run(random(20, 15), 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.v, again.v)
    assert not torch.equal(first.v, other.v)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    run(MATRICES["nilpotent"], 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_is_never_an_answer():
    matrix = random(5, 4)
    matrix[1, 2] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        run(matrix)
