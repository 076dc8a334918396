"""Block Lanczos against the dense eigenvalues of matrices with prescribed spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checker import EPS, random, toeplitz
from torch import Tensor

from convspectra.solvers import lanczos_bound
from convspectra.solvers.lanczos import exceeds, lanczos

SPECTRA = {
    "one": [3.0],
    "one zero": [0.0],
    "two": [2.0, 1.0],
    "simple": list(np.linspace(0.1, 1, 60) ** 2),
    "repeated at the top": [2.0] * 3 + [1.0 - 0.02 * i for i in range(40)],
    "many copies at the top": [2.0] * 9 + [1.0 - 0.02 * i for i in range(30)],
    "repeated inside": [3.0] + [2.0] * 4 + [1.0 - 0.02 * i for i in range(35)],
    "two values": [1.0] * 10 + [0.25] * 12,
    "identity": [1.0] * 17,
    "clustered": [1 + 1e-9, 1.0, 1 - 1e-9, 1 - 2e-9] + [0.5 - 0.01 * i for i in range(40)],
    "huge spread": [10.0 ** (-i / 2) for i in range(50)],
    "one large": [1e8] + [1.0 - 0.01 * i for i in range(50)],
    "zero": [0.0] * 12,
    "rank two": [2.0, 1.0] + [0.0] * 20,
    "both signs": list(np.linspace(-2, 1, 40)),
    "negative": list(-np.linspace(1, 5, 40)),
    "tiny": [1e-140 * (1 - 0.02 * i) for i in range(30)],
    "huge": [1e140 * (1 - 0.02 * i) for i in range(30)],
}
each_spectrum = pytest.mark.parametrize("name", SPECTRA)


def with_spectrum(values: list[float], seed: int = 3) -> Tensor:
    q = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    matrix = q * torch.tensor(values, dtype=torch.float64) @ q.T
    return 0.5 * (matrix + matrix.T)


def truth(matrix: Tensor) -> np.ndarray:
    return np.linalg.eigvalsh(matrix.numpy())[::-1]


def run(matrix: Tensor, k: int = 1, *, seed: int = 0, **options):
    """The result, with what the product was given checked on the way."""
    options = {"tol": 1e-8, "maxiter": 300, **options}
    count = 0

    def product(x: Tensor) -> Tensor:
        nonlocal count
        assert x.ndim == 2
        assert x.shape[1] == len(matrix)
        count += len(x)
        return x @ matrix

    generator = torch.Generator().manual_seed(seed)
    result = lanczos(product, len(matrix), k, like=matrix, generator=generator, **options)
    assert result.products == count
    return result


def check(matrix: Tensor, result, k: int, *, tol: float = 1e-8, values_only: bool = False) -> None:
    """All that `Eigenpairs` promises, against the truth."""
    true = truth(matrix)
    scale = float(np.abs(true).max())
    rounding = 64 * len(matrix) * EPS * scale
    assert result.values.shape == result.residuals.shape == (k,)
    assert result.vectors.shape == (k, len(matrix))
    assert len(result.bounds) == k + 1
    values = result.values.numpy()
    assert (np.diff(values) <= 0).all()
    gram = result.vectors @ result.vectors.T
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-12
    images = result.vectors @ matrix
    measured = (images - result.values[:, None] * result.vectors).norm(dim=1)
    assert (measured - result.residuals).abs().max() <= rounding
    assert ((result.vectors * images).sum(1) - result.values).abs().max() <= rounding
    # A Ritz value is never above the eigenvalue of its rank, converged or not; a bound never below.
    assert (values <= true[:k] + rounding).all()
    for bound, value in zip(result.bounds, true, strict=False):
        assert bound >= value - rounding
    if result.converged:
        # The guard of `reached`: a residual of rounding size relative to the largest value.
        allowed = tol * np.abs(true[:k]) + rounding
        assert (np.abs(values - true[:k]) <= (2 if values_only else 1) * allowed).all()
        if not values_only:
            assert (measured.numpy() <= allowed).all()


# --- pairs ----------------------------------------------------------------------------------------


@each_spectrum
def test_largest_pairs(name):
    matrix = with_spectrum(SPECTRA[name])
    for k in sorted({1, min(3, len(matrix)), min(6, len(matrix))}):
        for seed in range(2):
            result = run(matrix, k, seed=seed)
            assert result.converged
            check(matrix, result, k)


@each_spectrum
def test_values_only(name):
    matrix = with_spectrum(SPECTRA[name])
    for k in sorted({1, min(3, len(matrix))}):
        result = run(matrix, k, values_only=True)
        assert result.converged
        check(matrix, result, k, values_only=True)


@pytest.mark.parametrize("maxiter", [1, 2, 3, 5])
@each_spectrum
def test_stopping_early_is_said_and_still_encloses(name, maxiter):
    matrix = with_spectrum(SPECTRA[name])
    for k in sorted({1, min(4, len(matrix))}):
        check(matrix, run(matrix, k, maxiter=maxiter), k)


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-4])
@each_spectrum
def test_loose_tolerances_still_enclose(name, tol):
    matrix = with_spectrum(SPECTRA[name])
    result = run(matrix, min(2, len(matrix)), tol=tol)
    check(matrix, result, min(2, len(matrix)), tol=tol)
    assert (result.residuals <= tol * result.values.clamp_min(0) + 1e-12 * matrix.norm()).all()


def test_every_pair_of_a_small_matrix():
    """The basis is the whole space, and no bound is a matter of luck."""
    matrix = with_spectrum([5.0, 4.0, -1.0, -2.0, 0.0])
    result = run(matrix, 5)
    check(matrix, result, 5)
    assert result.converged
    assert result.bounds == [*result.values.tolist(), -math.inf]
    assert (result.values - torch.tensor([5.0, 4.0, 0.0, -1.0, -2.0])).abs().max() <= 1e-13


def test_an_exhausted_space_needs_no_probability():
    matrix = with_spectrum([1.0 - 1e-3 * i for i in range(12)])
    result = run(matrix, 2, tol=0.0, maxiter=100)
    assert result.converged
    assert result.products == 12
    assert np.abs(np.array(result.bounds) - truth(matrix)[:3]).max() <= 100 * EPS


def test_a_small_maxiter_is_not_taken_for_convergence():
    matrix = with_spectrum([1.0 - 0.005 * i for i in range(150)])
    result = run(matrix, 2, maxiter=4)
    assert not result.converged
    assert result.products == 4 * 4
    assert (result.residuals > 1e-4).any()
    again = run(matrix, 2)
    assert again.converged
    assert again.products > 16


def test_a_basis_that_is_full_has_as_many_pairs_as_fit():
    """With one step of k + 2 vectors there are k pairs, none of them good."""
    result = run(with_spectrum(SPECTRA["simple"]), 5, maxiter=1)
    assert not result.converged
    assert result.values.shape == (5,)


@pytest.mark.parametrize("copies", [2, 3, 5, 8])
def test_all_copies_of_a_repeated_value_are_found(copies):
    matrix = with_spectrum([2.0] * copies + [1.0 - 0.01 * i for i in range(35)])
    result = run(matrix, 4)
    expected = torch.tensor([2.0] * min(copies, 4) + [1.0, 0.99][: max(0, 4 - copies)])
    assert result.converged
    assert (result.values - expected.double()).abs().max() <= 1e-8
    if copies > 4:
        assert result.bounds[4] >= 2.0 - 1e-12, "the next one is another copy"


def test_a_block_of_one_cannot_see_copies_and_does_not_exclude_them():
    matrix = with_spectrum([2.0, 2.0] + [1.0 - 0.01 * i for i in range(30)])
    result = run(matrix, 1, block=1)
    check(matrix, result, 1)
    assert result.converged
    assert result.bounds[1] == result.bounds[0], "nothing is known of it but that it is no larger"


def test_values_only_takes_fewer_products_and_is_accurate_to_the_square_of_the_residual():
    matrix = with_spectrum([1.0 - 0.004 * i for i in range(200)])
    pairs, values = run(matrix, 2), run(matrix, 2, values_only=True)
    assert values.converged
    assert values.products < pairs.products
    error = np.abs(values.values.numpy() - truth(matrix)[:2])
    assert error.max() <= 1e-8
    assert float(values.residuals.max()) > 1e-6


def test_each_value_is_accurate_relative_to_itself():
    """A value far above the others must not lend them its tolerance."""
    for ratio in (1e4, 1e8):
        matrix = with_spectrum([ratio] + [1.0 - 0.01 * i for i in range(49)])
        result = run(matrix, 3)
        assert result.converged
        error = np.abs(result.values.numpy() - truth(matrix)[:3])
        assert error.max() <= 1e-8 + 1e-14 * ratio


def test_converging_takes_few_products():
    assert run(with_spectrum([10.0] + [1.0] * 149)).products <= 9
    assert run(toeplitz(40, {0: 1.0}), 3).products <= 10


def test_single_precision():
    matrix = with_spectrum(SPECTRA["simple"]).float()
    result = run(matrix, 2, tol=1e-4)
    assert result.converged
    assert result.values.dtype == result.vectors.dtype == torch.float32
    assert np.abs(result.values.numpy() - truth(matrix.double())[:2]).max() <= 2e-4


# --- options --------------------------------------------------------------------------------------


@each_spectrum
@pytest.mark.parametrize("separation", [1e-7, 1e-3, 0.5])
def test_separation(name, separation):
    """Where the rest is further away than that, the bound says so; and it is never wrong."""
    matrix = with_spectrum(SPECTRA[name])
    true = truth(matrix)
    for k in sorted({1, min(3, len(matrix))}):
        result = run(matrix, k, separation=separation)
        assert result.converged
        check(matrix, result, k)
        further = true[k] if k < len(true) else -math.inf
        if true[k - 1] > 0 and further < (1 - 3 * separation) * true[k - 1] - 1e-6 * true[0]:
            assert result.bounds[k] <= (1 - 0.9 * separation) * true[k - 1]


def test_separation_goes_on_for_more():
    matrix = with_spectrum([10.0, 5.0] + [4.0 - 0.02 * i for i in range(148)])
    plain, told, further = run(matrix), run(matrix, separation=1e-7), run(matrix, separation=0.4)
    assert plain.products <= told.products <= further.products
    assert 5.0 <= further.bounds[1] <= 6.0
    assert 5.0 <= told.bounds[1] < 10.0
    assert torch.allclose(plain.values, told.values, atol=1e-6)


def test_enclosure_goes_on_until_the_bounds_are_near():
    matrix = with_spectrum([1.0 - 0.004 * i for i in range(200)])
    plain = run(matrix, tol=1e-3)
    near = run(matrix, tol=1e-3, enclosure=1e-2)
    assert plain.products < near.products
    width = [float(x.bounds[0] - x.values[0]) for x in (plain, near)]
    assert width[1] <= 1e-2 < width[0]


def test_an_enclosure_out_of_reach_is_given_up():
    """No more than twice the steps that the value took, and two: the value itself has converged."""
    matrix = with_spectrum([1.0 - 0.004 * i for i in range(200)])
    plain, vain = run(matrix, tol=1e-3), run(matrix, tol=1e-3, enclosure=0.0)
    assert vain.converged
    assert plain.products < vain.products
    steps = [x.products // 3 for x in (plain, vain)]
    assert steps[1] <= 2 * steps[0] + 4 + steps[1] // 16


def test_excluded_vectors_leave_the_rest():
    values = [3.0, 2.0, 2.0, 1.0] + [0.9 - 0.02 * i for i in range(30)]
    matrix = with_spectrum(values)
    eigenvectors = torch.linalg.eigh(matrix).eigenvectors.T
    excluded = eigenvectors[[-1, -2]]

    def product(x: Tensor) -> Tensor:
        x = x - x @ excluded.T @ excluded
        x = x @ matrix
        return x - x @ excluded.T @ excluded

    result = lanczos(
        product,
        34,
        2,
        tol=1e-10,
        maxiter=100,
        like=matrix,
        generator=torch.Generator().manual_seed(0),
        excluded=excluded,
    )
    assert result.converged
    assert (result.values - torch.tensor([2.0, 1.0])).abs().max() <= 1e-9
    assert (result.vectors @ excluded.T).abs().max() <= 1e-12
    assert all(b >= t - 1e-12 for b, t in zip(result.bounds, [2.0, 1.0, 0.9], strict=True))


def test_the_same_generator_gives_the_same_answer_and_another_another_start():
    matrix = with_spectrum(SPECTRA["simple"])
    first, again, other = (run(matrix, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert first.bounds == again.bounds
    assert not torch.equal(first.vectors, other.vectors)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    run(with_spectrum(SPECTRA["rank two"]), 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_never_an_answer(bad):
    matrix = random(6, 6)
    matrix = matrix + matrix.T
    matrix[1, 2] = bad
    with pytest.raises(ArithmeticError, match="expected finite products"):
        run(matrix)


# --- exceeds --------------------------------------------------------------------------------------


def pencil(seed: int, size: int = 30) -> tuple[Tensor, Tensor, np.ndarray]:
    """A symmetric, B positive definite, and the eigenvalues of A B, descending."""
    a = random(size, size, seed=seed)
    a = a + a.T
    b = random(size, size, seed=seed + 1000)
    b = b @ b.T / size + 0.05 * torch.eye(size)
    root = np.linalg.cholesky(b.numpy())
    return a, b, np.linalg.eigvalsh(root.T @ a.numpy() @ root)[::-1]


def ask(a: Tensor, b: Tensor, ceiling: float, *, maxiter: int = 100, seed: int = 0):
    # An eigenvector q with q'B q = 1 has |B q|^2 >= the smallest eigenvalue of B.
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(4, len(a), dtype=torch.float64, generator=generator)
    omega = omega / np.linalg.eigvalsh(b.numpy())[0] ** 0.5
    return exceeds(
        lambda x: x @ a,
        ceiling,
        omega,
        maxiter=maxiter,
        metric=lambda x: x @ b,
        generator=generator,
    )


@pytest.mark.parametrize("seed", range(12))
def test_exceeds_tells_which_side_the_ceiling_is_on(seed):
    a, b, true = pencil(seed)
    for gap in (1e-6, 1e-2, 0.5):
        assert ask(a, b, true[0] + gap * abs(true[0]), seed=seed)[0] is False
        assert ask(a, b, true[0] - gap * abs(true[0]), seed=seed)[0] is True


def test_exceeds_is_never_wrongly_reassured():
    """Few steps or many: False is said only where nothing is above the ceiling."""
    said = {True: 0, False: 0}
    for seed in range(40):
        a, b, true = pencil(seed, size=50)
        for maxiter in (1, 2, 4, 8):
            for factor in (0.7, 0.9, 0.999, 1.5, 10.0):
                answer, products = ask(a, b, factor * true[0], maxiter=maxiter, seed=seed)
                assert products <= 4 * maxiter
                said[answer] += 1
                assert answer or factor > 1
    assert min(said.values()) > 50


def test_exceeds_does_not_know_after_too_few_steps():
    a, b, true = pencil(3, size=50)
    assert ask(a, b, 1.001 * true[0], maxiter=1)[0] is True
    assert ask(a, b, 1.001 * true[0], maxiter=100)[0] is False


def test_exceeds_without_a_metric_of_its_own(monkeypatch):
    """B = I; and with a failure probability near 1 the answer comes sooner."""
    a, _, true = pencil(5, size=60)
    identity = torch.eye(60, dtype=torch.float64)
    answer, products = ask(a, identity, 1.2 * true[0])
    assert answer is False
    monkeypatch.setattr(lanczos_bound, "FAILURE_PROBABILITY", 0.5)
    answer, fewer = ask(a, identity, 1.2 * true[0])
    assert answer is False
    assert fewer < products


def test_exceeds_refuses_nan():
    a, b, _ = pencil(1)
    a[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="expected finite products"):
        ask(a, b, 1.0)
