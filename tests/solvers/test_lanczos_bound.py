"""The bound from above, against known spectra and block Krylov spaces made by NumPy alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from convspectra.solvers import lanczos_bound as module
from convspectra.solvers.lanczos_bound import (
    KrylovBlock,
    log_smallest_squared_singular_value,
)

EPS = float(np.finfo(float).eps)


def krylov_block(
    values: np.ndarray, block: int, steps: int, rng: np.random.Generator
) -> KrylovBlock:
    """Block Krylov space of diag(values), a basis vector at a time, and what is known of it."""
    omega = rng.standard_normal((len(values), block))
    scale = float(np.abs(values).max()) or 1.0
    q, start = np.linalg.qr(omega)
    basis, tail, log_tail = q, start, 0.0
    for _ in range(steps):
        image = values[:, None] * q
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        # Keep only what rounding has left: the space may be exhausted.
        left, sizes, _ = np.linalg.svd(image, full_matrices=False)
        found = sizes > 64 * EPS * scale
        rows = min(int(found.sum()), len(values) - basis.shape[1])
        q = left[:, :rows]
        q = np.linalg.qr(q - basis @ (basis.T @ q))[0]
        tail = (q.T @ image) @ tail
        size = max(float(np.linalg.norm(tail)), 1e-300)
        tail, log_tail = tail / size, log_tail + math.log(size)
        space, basis = basis, np.concatenate([basis, q], axis=1)
        if rows == 0:
            break
    projected = space.T @ (values[:, None] * space)
    ritz, vectors = np.linalg.eigh(0.5 * (projected + projected.T))
    components = (vectors.T @ (space.T @ omega))[::-1]
    taken = -(-space.shape[1] // block)
    return KrylovBlock(ritz[::-1], components, tail, log_tail, taken)


def spectrum(rng: np.random.Generator) -> np.ndarray:
    """Descending eigenvalues of many kinds: even, graded, clustered, repeated, of both signs."""
    size = int(rng.integers(12, 60))
    kind = rng.integers(7)
    if kind == 0:
        values = rng.random(size)
    elif kind == 1:
        values = 10.0 ** -np.linspace(0, rng.integers(1, 14), size)
    elif kind == 2:
        values = 1 + 10.0 ** -rng.integers(2, 10) * rng.standard_normal(size)
    elif kind == 3:
        values = rng.integers(0, 5, size).astype(float)
    elif kind == 4:
        values = rng.standard_normal(size)
    elif kind == 5:
        values = np.linspace(0, 1, size) ** rng.integers(1, 6)
        values[: rng.integers(1, 4)] = 10.0 ** rng.integers(1, 8)
    else:
        values = np.zeros(size)
        values[: rng.integers(1, 5)] = rng.random()
    return np.sort(values)[::-1] * 10.0 ** rng.integers(-20, 20)


# --- it holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_bound_holds(seed):
    """Never below the truth, after few steps or many; never below the Ritz value either."""
    rng = np.random.default_rng(seed)
    for _ in range(15):
        values = spectrum(rng)
        block, steps = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        known = krylov_block(values, block, steps, rng)
        slack = 64 * len(values) * EPS * np.abs(values).max()
        for i in range(1, min(block, len(known.ritz)) + 1):
            bound = known.upper_bound(i)
            assert bound >= values[i - 1] - slack, (values, block, steps, i)
            assert bound >= known.ritz[i - 1]


RANDOM_STARTS = {
    "spike, 1 step": (np.array([1.0] + [0.5] * 199), 1, 1, 1),
    "spike, 2 steps, 3 vectors": (np.array([1.0] + [0.5] * 50 + [0.1] * 50), 3, 2, 1),
    "plane, 1 step": (np.array([1.0, 0.5, 0.0]), 1, 1, 1),
    "line, 6 steps": (np.linspace(1, 0, 60), 1, 6, 1),
    "line, 3 steps, 4 vectors": (np.linspace(1, 0, 60), 4, 3, 2),
    "nearly the identity": (np.array([1 + 1e-6] + [1.0] * 49), 1, 1, 1),
    "second of two": (np.array([2.0, 1.0] + [0.9] * 48), 3, 2, 2),
    "second copy": (np.array([1.0] * 2 + [0.9] * 58), 2, 1, 2),
    "third copy": (np.array([1.0] * 3 + [0.9] * 57), 3, 1, 3),
    "second, far below": (np.array([100.0, 1.0] + [0.9] * 48), 3, 2, 2),
}


@pytest.mark.parametrize("probability", [0.5, 0.1])
@pytest.mark.parametrize("name", RANDOM_STARTS)
def test_bound_fails_no_more_often_than_it_says(monkeypatch, name, probability):
    """With the probability turned up from 1e-10 the failures can be counted."""
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", probability)
    values, block, steps, i = RANDOM_STARTS[name]
    runs, failures = 150, 0
    for seed in range(runs):
        known = krylov_block(values, block, steps, np.random.default_rng(seed))
        failures += known.upper_bound(i) < values[i - 1] * (1 - 1e-14)
    expected = probability * runs
    assert failures <= expected + 3 * (expected * (1 - probability)) ** 0.5


@pytest.mark.parametrize("block", [1, 3])
def test_bound_is_not_idle(monkeypatch, block):
    """It does fail where it says that it may: the bound is not just a large number."""
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", 0.5)
    values = np.array([1.0] + [0.5] * 80)
    failures = sum(
        krylov_block(values, block, 1, np.random.default_rng(seed)).upper_bound(1) < 1 - 1e-14
        for seed in range(150)
    )
    assert 20 <= failures <= 95


# --- it is tight ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_well_separated_top_value_is_bounded_tightly(block):
    values = np.concatenate([[10.0], np.linspace(1, 0, 99)])
    rng = np.random.default_rng(block)
    widths = [krylov_block(values, block, s, rng).upper_bound(1) - 10.0 for s in (2, 6, 14)]
    assert widths[0] > widths[1] > widths[2]
    # A block has no direction that is as unlucky as 1e-10 allows one vector to be.
    assert widths[1] <= {1: 100.0, 2: 1.0, 4: 0.01}[block]
    assert -1e-12 <= widths[2] <= 1e-4


def test_each_of_several_separated_values_is_bounded_tightly():
    """Also those far below the first, which drowns the polynomials of Note [Block bound]."""
    values = np.concatenate([[1e6, 1e3, 10.0], np.linspace(1, 0, 97)])
    known = krylov_block(values, 5, 12, np.random.default_rng(0))
    for i in range(1, 4):
        assert values[i - 1] * (1 - 1e-12) <= known.upper_bound(i) <= values[i - 1] * (1 + 1e-6)


def test_more_steps_and_larger_blocks_tell_more():
    values = np.linspace(1, 0, 200)
    by_steps = [
        krylov_block(values, 3, steps, np.random.default_rng(1)).upper_bound(1) - 1
        for steps in (2, 5, 10, 20)
    ]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_steps[-1] <= 0.1
    by_block = [
        np.mean(
            [
                krylov_block(values, block, 6, np.random.default_rng(seed)).upper_bound(1) - 1
                for seed in range(5)
            ]
        )
        for block in (1, 2, 4)
    ]
    assert by_block == sorted(by_block, reverse=True)


def test_copies_of_the_top_value_are_bounded_alike():
    values = np.concatenate([[2.0] * 3, np.linspace(1, 0, 57)])
    known = krylov_block(values, 5, 10, np.random.default_rng(2))
    for i in (1, 2, 3):
        assert 2 - 1e-12 <= known.upper_bound(i) <= 2.1
    assert 1 - 1e-12 <= known.upper_bound(4) <= 1.9, "and the next one is known to be another"


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_bounds_scale_with_the_operator(scale):
    values = np.concatenate([[2.0], np.linspace(1, 0, 40)])
    one, other = (krylov_block(v, 3, 5, np.random.default_rng(3)) for v in (values, scale * values))
    for i in (1, 2):
        expected = scale * one.upper_bound(i)
        assert math.isclose(other.upper_bound(i), expected, rel_tol=1e-6)


def test_shifted_spectra_are_bounded_too():
    """Nothing rests on the signs of the eigenvalues."""
    for shift in (-5.0, -0.5):
        values = np.linspace(1, 0, 80) + shift
        known = krylov_block(values, 3, 10, np.random.default_rng(4))
        assert values[0] - 1e-12 <= known.upper_bound(1) <= values[0] + 0.5


# --- where nothing is known -----------------------------------------------------------------------


def test_nothing_is_known_beyond_the_block():
    known = krylov_block(np.linspace(1, 0, 50), 3, 4, np.random.default_rng(0))
    assert [math.isinf(known.upper_bound(i)) for i in range(1, 6)] == [False] * 3 + [True] * 2
    few = KrylovBlock(np.array([1.0]), np.ones((1, 3)), np.ones((1, 3)), 0.0, 1)
    assert few.upper_bound(2) == math.inf, "nor beyond the Ritz values"


def test_the_zero_operator():
    known = krylov_block(np.zeros(10), 2, 1, np.random.default_rng(0))
    assert 0 <= known.upper_bound(1) <= 1e-290


def test_what_lies_outside_the_space_widens_the_bound():
    known = krylov_block(np.linspace(1, 0, 50), 3, 4, np.random.default_rng(0))
    wider = KrylovBlock(
        known.ritz, known.components, known.coupling, known.log_coupling + 3, known.steps
    )
    assert wider.upper_bound(1) - 1 > 1.1 * (known.upper_bound(1) - 1)


# --- the smallest singular value of a Gaussian matrix ---------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("probability", [1e-10, 1e-3])
def test_a_gaussian_vector_is_chi_squared(monkeypatch, columns, probability):
    """One row: the quantile of chi^2, from the density without its exponential, which is 1 at 0."""
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", probability)
    quantile = scipy.stats.chi2.ppf(probability, columns)
    ours = math.exp(log_smallest_squared_singular_value(1, columns))
    assert ours <= quantile * (1 + 1e-9)
    # exp(-t/2) between 0 and the quantile is all that is left out.
    assert ours >= quantile * math.exp(-quantile / 2)


def test_the_default_probability_is_the_one_stated():
    assert module.FAILURE_PROBABILITY == 1e-10
    ours = math.exp(log_smallest_squared_singular_value(1, 1))
    assert math.isclose(ours, scipy.stats.chi2.ppf(1e-10, 1), rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 3), (2, 5), (3, 3), (3, 4), (4, 6), (6, 6)])
def test_gaussian_matrices_are_below_it_no_more_often_than_it_says(monkeypatch, shape):
    probability, count = 0.01, 6000
    monkeypatch.setattr(module, "FAILURE_PROBABILITY", probability)
    rng = np.random.default_rng(sum(shape))
    smallest = np.linalg.svd(rng.standard_normal((count, *shape)), compute_uv=False)[:, -1] ** 2
    below = int((np.log(smallest) < log_smallest_squared_singular_value(*shape)).sum())
    expected = probability * count
    assert below <= expected + 4 * expected**0.5
    # Nor is it far below the quantile: at 100 times the probability it is above.
    assert below >= expected / 100, "the threshold is hardly ever met"
    quantile = math.log(np.quantile(smallest, probability))
    assert log_smallest_squared_singular_value(*shape) >= quantile - 2.0


def test_more_columns_make_small_values_unlikely():
    logs = [log_smallest_squared_singular_value(2, columns) for columns in range(2, 12)]
    assert logs == sorted(logs)
    assert log_smallest_squared_singular_value(3, 3) < log_smallest_squared_singular_value(1, 3)
