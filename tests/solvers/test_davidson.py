"""Block Davidson against dense eigenpairs of matrices with prescribed spectra."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.checker import toeplitz
from helpers.strategies import random
from helpers.symmetric import (
    LINE,
    SPECTRA,
    check_pairs,
    each_spectrum,
    rounding,
    stop_from,
    truth,
    with_spectrum,
)
from torch import Tensor

from convspectra.solvers import _davidson as davidson
from convspectra.solvers._result import Eigenpairs
from convspectra.solvers._stop import Stop

CLUSTER = [1.0 - 1e-4 * i for i in range(12)] + [0.9 - 0.004 * i for i in range(180)]


def near_inverse(matrix: Tensor, shift: float = 0.02):
    """(t - A)^{-1} for a t above the spectrum, but of an A that is a little wrong."""
    top, norm = truth(matrix)[0], np.abs(truth(matrix)).max() or 1.0
    noise = random(len(matrix), len(matrix), seed=9)
    wrong = matrix.double() - 0.5 * shift * norm * noise @ noise.T / len(matrix)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    inverse = torch.linalg.inv((top + shift * norm) * identity - wrong).to(matrix.dtype)
    return lambda rows: rows @ inverse


each_way = pytest.mark.parametrize("near", [lambda _: None, near_inverse], ids=["plain", "helped"])


def run(matrix: Tensor, k: int = 1, *, seed: int = 0, given=None, **options) -> Eigenpairs:
    """What the product was given is appended to the list `given`."""
    stop = stop_from(options, Stop, maxiter=1000)
    given = [] if given is None else given

    def product(x: Tensor) -> Tensor:
        given.append(x.clone())
        return x @ matrix

    generator = torch.Generator().manual_seed(seed)
    pairs = davidson.davidson(
        product, len(matrix), k, stop=stop, like=matrix, generator=generator, **options
    )
    assert pairs.products == sum(len(rows) for rows in given)
    return pairs


def check(matrix: Tensor, pairs: Eigenpairs, k: int, tol: float = 1e-8) -> None:
    """Converged, and right: what `check_pairs` asks to sqrt(eps) must hold to rounding."""
    check_pairs(matrix, pairs, largest=True, tol=tol)
    true, slack = truth(matrix), rounding(matrix)
    allowed = tol * np.abs(true[:k]) + slack
    assert pairs.converged
    assert (np.abs(pairs.values.numpy() - true[:k]) <= allowed).all()
    assert (pairs.vectors @ pairs.vectors.T - torch.eye(k)).abs().max() <= 1e-12
    measured = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    assert (measured - pairs.residuals).abs().max() <= slack
    assert (measured.numpy() <= allowed).all()
    gap = true[k - 1] - true[k] if k < len(true) else 0.0
    if gap > 1e-3 * np.abs(true).max():
        others = torch.linalg.eigh(matrix).eigenvectors[:, :-k]
        assert (pairs.vectors @ others).norm() <= 2 * math.sqrt(k) * allowed.max() / gap


@each_way
@each_spectrum
def test_pairs_and_what_stopping_early_gives(name, near):
    matrix = with_spectrum(SPECTRA[name])
    precondition = near(matrix)
    for k in {1, min(3, len(matrix)), len(matrix)}:
        for seed in range(2):
            check(matrix, run(matrix, k, seed=seed, precondition=precondition), k)
        for maxiter in (1, 2, 3, 8):
            pairs = run(matrix, k, maxiter=maxiter, precondition=precondition)
            check_pairs(matrix, pairs, largest=True)


SEMIDEFINITE = [name for name, values in SPECTRA.items() if min(values) >= 0]


def near_inverse_of_all(matrix: Tensor):
    """A^{-1} of an A that is a little wrong and shifted away from 0."""
    norm = truth(matrix)[0] or 1.0
    noise = random(len(matrix), len(matrix), seed=9)
    shift = 1e-3 * norm * (noise @ noise.T / len(matrix) + torch.eye(len(matrix)).double())
    inverse = torch.linalg.inv(matrix + shift)
    return lambda rows: rows @ inverse


@pytest.mark.parametrize("near", [lambda _: None, near_inverse_of_all], ids=["plain", "helped"])
@pytest.mark.parametrize("values_only", [False, True])
@pytest.mark.parametrize("name", SEMIDEFINITE)
def test_smallest_pairs(name, values_only, near):
    """Residuals are compared with sqrt(value norm); what rounding hides has not converged."""
    matrix = with_spectrum(SPECTRA[name])
    true, slack = truth(matrix, largest=False), rounding(matrix)
    norm, loosest = true[-1], 10 if values_only else 1
    options = {"largest": False, "values_only": values_only, "precondition": near(matrix)}
    for k in {1, min(3, len(matrix)), len(matrix)}:
        pairs = run(matrix, k, **options)
        values = pairs.values.numpy()
        allowed = loosest * 1e-8 * np.sqrt(np.abs(values) * norm)
        check_pairs(matrix, replace(pairs, converged=False), largest=False)
        assert pairs.bound == -math.inf
        assert (pairs.residuals.numpy() <= np.maximum(allowed, slack)).all()
        if pairs.converged:
            assert (pairs.residuals.numpy() <= allowed).all()
            assert (np.abs(values - true[:k]) <= allowed + slack).all()
        else:
            assert true[0] <= 1e-6 * norm, "all others can be had"
        for maxiter in (1, 2, 3, 8):
            early = run(matrix, k, maxiter=maxiter, **options)
            check_pairs(matrix, replace(early, converged=False), largest=False)


def test_a_preconditioner_saves_products_at_the_bottom_too():
    matrix = with_spectrum([1e-5 * (1 + i) for i in range(20)] + list(np.linspace(1e-3, 1, 180)))
    plain, helped = (
        run(matrix, 1, largest=False, precondition=near)
        for near in (None, near_inverse_of_all(matrix))
    )
    assert helped.converged
    assert helped.products <= 0.5 * plain.products


@pytest.mark.parametrize("most_kept", [1, 20, 60, 200])
def test_room_for_few_vectors(most_kept):
    """Three blocks are the least: Ritz vectors, those of the last step, and what is new."""
    matrix = with_spectrum(LINE)
    for k in (1, 3):
        check(matrix, run(matrix, k, most_kept=most_kept), k)
        assert run(matrix, k, most_kept=most_kept).products >= run(matrix, k).products


@each_way
@pytest.mark.parametrize("size", [*range(1, 16), 60, 200])
def test_sizes(size, near):
    matrix = with_spectrum(list(np.linspace(1.0, 0.0, size)))
    for k in {1, min(3, size), size} if size > 15 else range(1, size + 1):
        given = []
        check(matrix, run(matrix, k, given=given, precondition=near(matrix)), k)
        assert len(given[0]) == (1 if k == 1 else min(size, k + 2)), "the block has two guards"
        assert sum(map(len, given)) <= size or size > 48, "a basis of everything, no restart"


@pytest.mark.parametrize("k", [1, 3])
def test_without_a_restart_and_a_preconditioner_it_is_block_lanczos(k):
    matrix = with_spectrum(list(np.linspace(-2, 1, 80)))
    for steps in (1, 2, 4, 8):
        given = []
        pairs = run(matrix, k, given=given, maxiter=steps)
        space = new = given[0]
        for _ in range(steps - 1):
            new = torch.linalg.qr((new @ matrix).T).Q.T
            space = torch.linalg.qr(torch.cat([space, new]).T).Q.T
        projected = torch.linalg.eigvalsh(space @ matrix @ space.T).flip(0)
        assert torch.allclose(pairs.values, projected[:k], rtol=0, atol=1e-10)


def test_pairs_that_have_converged_take_no_products():
    given = []
    assert run(with_spectrum([100.0, 50.0, *LINE]), 3, given=given).converged
    assert len(given[-1]) <= 3 < len(given[0])


@pytest.mark.parametrize(("k", "fraction"), [(1, 0.2), (3, 0.15)])
def test_a_preconditioner_saves_products_at_a_clustered_top(k, fraction):
    matrix = with_spectrum(CLUSTER)
    helped = run(matrix, k, precondition=near_inverse(matrix, 1e-3))
    check(matrix, helped, k)
    assert helped.products <= fraction * run(matrix, k).products


@each_way
@pytest.mark.parametrize("k", [1, 3])
def test_restarts(monkeypatch, k, near):
    # Small matrices would fit into the basis without a restart.
    monkeypatch.setattr(davidson, "BASIS_LEAST", 1)
    monkeypatch.setattr(davidson, "BASIS_BLOCKS", 4)
    for values in (LINE, [*LINE, *np.linspace(-2, 0, 40)], [2.0] * 3 + LINE, CLUSTER[10:]):
        matrix = with_spectrum(values)
        pairs = run(matrix, k, precondition=near(matrix))
        check(matrix, pairs, k)
        assert pairs.products > 5 if k == 1 else pairs.products > 25, "the basis holds 4 or 20"


@pytest.mark.parametrize("k", [1, 3])
def test_the_last_ritz_vectors_save_products_at_restarts(monkeypatch, k):
    # A small basis is restarted often; the second run restarts without the last Ritz vectors.
    monkeypatch.setattr(davidson, "BASIS_LEAST", 1)
    with_them = run(with_spectrum(LINE), k)
    monkeypatch.setattr(davidson, "KEPT_DIRECTION", math.inf)
    assert with_them.products < 0.8 * run(with_spectrum(LINE), k).products


def test_exact_vectors_to_start_from_take_a_product_each():
    matrix = with_spectrum(LINE)
    exact = torch.linalg.eigh(matrix).eigenvectors.T.flip(0)
    for start, k in ((exact[:1], 1), (exact[:7], 3), (1e3 * random(3, 3) @ exact[:3], 3)):
        pairs = run(matrix, k, start=start)
        check(matrix, pairs, k)
        assert pairs.products == len(start)
    near = run(matrix, 3, start=exact[:5] + 1e-5 * random(5, 200))
    assert 5 < near.products < 0.6 * run(matrix, 3).products


@pytest.mark.parametrize(("k", "at"), [(1, [0]), (2, [0, 1]), (2, [0, 59]), (2, [20, 21, 22])])
def test_unit_vectors_to_start_from_and_a_sparse_matrix(k, at):
    """Residuals may be dependent exactly, and what QR puts in their place in the basis already."""
    matrix = toeplitz(60, {-1: 1.0, 0: 2.0, 1: 1.0})
    check(matrix, run(matrix, k, start=torch.eye(60, dtype=torch.float64)[at]), k)


@each_way
@pytest.mark.parametrize("apart", [0.0, 0.01, 0.5, 0.95, 9.0])
@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8])
def test_values_only(tol, apart, near):
    """Two values count as one if nearer than the tolerance, and may within ten."""
    matrix = with_spectrum([1 + apart * tol, 1.0] + [0.9 - 0.004 * i for i in range(100)])
    options = {"tol": tol, "precondition": near(matrix)}
    for k in (1, 2, 3):
        saved = 0
        for seed in range(3):
            pairs = run(matrix, k, seed=seed, values_only=True, **options)
            assert pairs.converged
            check_pairs(matrix, pairs, largest=True, tol=10 * tol)
            error = np.abs(pairs.values.numpy() - truth(matrix)[:k]).max()
            assert error <= (1.01 if apart < 1 else 10) * tol
            saved += run(matrix, k, seed=seed, **options).products - pairs.products
        assert saved > 0


def test_values_are_right_where_gaps_are_a_few_tolerances():
    matrix = with_spectrum(LINE)
    for seed in range(10):
        pairs = run(matrix, 3, seed=seed, tol=1e-3, values_only=True)
        assert np.abs(pairs.values.numpy() - truth(matrix)[:3]).max() <= 1e-3


@each_way
@pytest.mark.parametrize(("floor", "tol"), [(1, 1e-5), (1, 1e-12), (0, 1e-12)])
def test_single_precision(monkeypatch, floor, tol, near):
    """It may go on far beyond its precision: nothing grows."""
    # A floor of 0 never stops at rounding, as no option can ask for.
    monkeypatch.setattr(davidson, "ROUNDING_UNITS", floor * davidson.ROUNDING_UNITS)
    for values in (LINE, [2.0] * 3 + LINE, [2.0, 1.0] + [0.0] * 198):
        matrix = with_spectrum(values).float()
        true = truth(matrix.double())
        for k in (1, 3):
            pairs = run(matrix, k, tol=tol, maxiter=80, precondition=near(matrix))
            assert pairs.converged or not floor
            assert pairs.values.dtype == pairs.vectors.dtype == torch.float32
            assert (pairs.vectors @ pairs.vectors.T - torch.eye(k)).abs().max() <= 1e-5
            assert np.abs(pairs.values.numpy() - true[:k]).max() <= 1e-5 * true[0]


@each_way
@pytest.mark.parametrize("k", [1, 3])
def test_the_basis_in_single_precision_stays_orthonormal(monkeypatch, k, near):
    """Without restarts the product is given the basis, row by row."""
    # Neither rounding nor a full basis stops the run: 80 steps are taken.
    monkeypatch.setattr(davidson, "ROUNDING_UNITS", 0)
    monkeypatch.setattr(davidson, "BASIS_LEAST", 500)
    matrix = with_spectrum([2.0] * 3 + list(np.linspace(0.1, 1.0, 497))).float()
    given = []
    run(matrix, k, given=given, tol=1e-12, maxiter=80, precondition=near(matrix))
    basis = torch.cat(given).double()
    assert (basis @ basis.T - torch.eye(len(basis))).abs().max() <= 1e-5


@each_way
@pytest.mark.parametrize("values_only", [False, True])
def test_a_small_maxiter_is_not_taken_for_convergence(values_only, near):
    matrix = with_spectrum(LINE)
    options = {"values_only": values_only, "precondition": near(matrix)}
    for k, maxiter, products in ((1, 1, 1), (1, 2, 2), (3, 1, 5), (3, 2, 10)):
        pairs = run(matrix, k, maxiter=maxiter, **options)
        assert (pairs.converged, pairs.products) == (False, products)


def test_the_seed_decides_and_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = (run(with_spectrum(LINE), 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_products_that_are_not_finite_are_refused(k, wrong):
    matrix = with_spectrum(LINE)
    with pytest.raises(ArithmeticError, match="NaN or Inf"):
        run(matrix, k, precondition=lambda rows: wrong * rows)  # only the second product
    matrix[5, 7] = wrong
    with pytest.raises(ArithmeticError, match="NaN or Inf"):
        run(matrix, k)


@each_way
@pytest.mark.parametrize("scale", [2.0**-333, 2.0**333], ids=["1e-100", "1e100"])
def test_answers_scale_with_the_operator(scale, near):
    matrix = with_spectrum(LINE)
    for k, options in ((1, {}), (3, {}), (3, {"values_only": True}), (3, {"maxiter": 4})):
        one = run(matrix, k, precondition=near(matrix), **options)
        other = run(scale * matrix, k, precondition=near(scale * matrix), **options)
        assert (other.products, other.converged) == (one.products, one.converged)
        assert torch.allclose(other.values, scale * one.values, rtol=1e-12, atol=0)
        assert torch.allclose(other.residuals, scale * one.residuals, rtol=1e-3, atol=0)
        assert ((other.vectors @ one.vectors.T).abs() - torch.eye(k)).abs().max() <= 1e-6
