"""One step of LOBPCG towards both ends, on dense matrices side by side, against NumPy's SVD."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.strategies import random
from torch import Tensor

from convspectra.solvers._tracking import DEPENDENT, Ends, improved, towards_norm

BLOCKS = [(1, 0), (0, 1), (1, 1), (2, 2), (3, 2)]
"""Vectors at the lower and at the upper end."""
each_block = pytest.mark.parametrize(("smallest", "largest"), BLOCKS)

SPECTRA = {
    "simple": list(np.linspace(0.1, 1, 30)),
    "repeated": [1.0] * 5 + [0.5] * 5 + [0.1] * 4,
    "rank deficient": [1.0] * 3 + [0.5] * 5 + [0.0] * 4,
    "identity": [1.0] * 9,
    "one small": [1e-6, *np.linspace(0.1, 1, 25)],
    "five": [5.0, 4.0, 3.0, 2.0, 1.0],
}
each_spectrum = pytest.mark.parametrize("name", SPECTRA)


def with_values(*spectra: list[float], extra: int = 4, dtype: torch.dtype = torch.float64):
    """Matrices of the same shape (count, n + extra, n), with these singular values."""
    matrices = []
    for seed, values in enumerate(spectra):
        n = len(values)
        u = torch.linalg.qr(random(n + extra, n, seed=2 * seed + 1)).Q
        v = torch.linalg.qr(random(n, n, seed=2 * seed + 2)).Q
        matrices.append((u * torch.tensor(values, dtype=torch.float64)) @ v.T)
    return torch.stack(matrices).to(dtype)


def start(matrices: Tensor, block: int, seed: int = 50) -> Ends:
    count, _, n = matrices.shape
    x = random(count, block, n, seed=seed).to(matrices.dtype)
    x = x / x.norm(dim=2, keepdim=True)
    change = random(count, 1, n, seed=seed + 1).to(matrices.dtype)
    change = change / change.norm(dim=2, keepdim=True)
    unknown = torch.full_like(x[:, :, 0], math.inf)
    return Ends(x, torch.zeros_like(x), change, unknown, unknown)


def step(matrices: Tensor, ends: Ends, smallest: int) -> Ends:
    return improved(*products(matrices), ends, smallest)[0]


def products(matrices: Tensor):
    return (lambda x: x @ matrices.mT), (lambda y: y @ matrices)


def values(matrices: Tensor, ends: Ends) -> np.ndarray:
    """||A x|| of every vector, in NumPy and in double precision."""
    x, a = ends.vectors.double().numpy(), matrices.double().numpy()
    return np.linalg.norm(np.einsum("cmn,ckn->ckm", a, x), axis=2)


def truth(matrices: Tensor, smallest: int, largest: int) -> np.ndarray:
    s = np.linalg.svd(matrices.double().numpy(), compute_uv=False)
    return np.concatenate([s[:, ::-1][:, :smallest], s[:, :largest]], axis=1)


def converge(matrices: Tensor, smallest: int, largest: int, steps: int = 300) -> Ends:
    ends = start(matrices, smallest + largest)
    for _ in range(steps):
        ends = step(matrices, ends, smallest)
    return ends


# --- what one step promises -----------------------------------------------------------------------


@each_block
@each_spectrum
def test_values_only_improve_and_never_pass_the_true_ones(name, smallest, largest):
    """By Courant and Fischer, but for what is left out as dependent."""
    slack = 2 * DEPENDENT[torch.float64] ** 0.5 * max(SPECTRA[name])
    matrices = with_values(SPECTRA[name], SPECTRA[name][::-1])
    true = truth(matrices, smallest, largest)
    ends = step(matrices, start(matrices, smallest + largest), smallest)
    before = values(matrices, ends)
    for _ in range(60):
        ends = step(matrices, ends, smallest)
        now = values(matrices, ends)
        assert (now[:, :smallest] <= before[:, :smallest] + slack).all()
        assert (now[:, smallest:] >= before[:, smallest:] - slack).all()
        assert (now[:, :smallest] >= true[:, :smallest] - slack).all()
        assert (now[:, smallest:] <= true[:, smallest:] + slack).all()
        before = now


@each_block
@each_spectrum
def test_a_step_is_rayleigh_ritz_on_what_is_known_and_new(name, smallest, largest):
    """The same subspace, orthonormalized by NumPy's SVD, and its Ritz values."""
    matrices = with_values(SPECTRA[name])
    ends = start(matrices, smallest + largest)
    for _ in range(2):
        a, x = matrices[0].numpy(), ends.vectors[0].numpy()
        images = x @ a.T
        gradient = images @ a - np.square(images).sum(1)[:, None] * x
        change = ends.change[0].numpy()
        span = np.concatenate([x, ends.directions[0].numpy(), gradient, change, change @ a.T @ a])
        span = span / np.linalg.norm(span, axis=1, keepdims=True).clip(1e-300)
        _, size, basis = np.linalg.svd(span, full_matrices=False)
        ritz = np.linalg.svd(basis[size > 1e-6] @ a.T, compute_uv=False)
        expected = np.concatenate([ritz[::-1][:smallest], ritz[:largest]])
        ends = step(matrices, ends, smallest)
        np.testing.assert_allclose(values(matrices, ends)[0], expected, rtol=1e-7, atol=1e-8)


@each_block
def test_vectors_are_orthonormal_at_either_end(smallest, largest):
    matrices = with_values(SPECTRA["repeated"], SPECTRA["repeated"])
    ends = converge(matrices, smallest, largest, steps=20)
    for part in (ends.vectors[:, :smallest], ends.vectors[:, smallest:]):
        gram = part @ part.mT
        torch.testing.assert_close(gram, torch.eye(part.shape[1]).to(gram).expand_as(gram))


def test_residuals_are_those_of_the_vectors_before():
    matrices = with_values(SPECTRA["simple"], SPECTRA["simple"])
    ends = step(matrices, start(matrices, 4), 2)
    after = step(matrices, ends, 2)
    for a, x, residuals in zip(
        matrices.numpy(), ends.vectors.numpy(), after.residuals, strict=True
    ):
        for row, residual in zip(x, residuals.tolist(), strict=True):
            rho = row @ a.T @ a @ row
            assert residual == pytest.approx(np.linalg.norm(a.T @ a @ row - rho * row) / rho)


def test_directions_are_unit_steps_within_the_subspace():
    """The part of a new vector that is not made of the old ones."""
    matrices = with_values(SPECTRA["simple"])
    first = start(matrices, 2)
    after, images = improved(*products(matrices), first, 1)
    torch.testing.assert_close(images, after.vectors @ matrices.mT)
    torch.testing.assert_close(after.directions.norm(dim=2), torch.ones(1, 2).double())
    for vector, direction in zip(after.vectors[0], after.directions[0], strict=True):
        span = torch.stack([*first.vectors[0], direction]).numpy()
        rest = vector.numpy() - np.linalg.lstsq(span.T, vector.numpy(), rcond=None)[0] @ span
        assert np.linalg.norm(rest) <= 1e-12


def test_matrices_side_by_side_do_not_see_each_other():
    matrices = with_values(SPECTRA["simple"], SPECTRA["simple"][:1] * 30, [1e-3] * 29 + [7.0])
    together, smallest = start(matrices, 3), 2
    alone = [Ends(*(value[i : i + 1] for value in vars(together).values())) for i in range(3)]
    for _ in range(3):
        together = step(matrices, together, smallest)
        alone = [step(matrices[i : i + 1], ends, smallest) for i, ends in enumerate(alone)]
        apart = np.concatenate([values(matrices[i : i + 1], e) for i, e in enumerate(alone)])
        np.testing.assert_allclose(values(matrices, together), apart, rtol=1e-9)


def test_products():
    """A on three blocks and A' on one, and on what the change adds."""
    matrices, rows = with_values(SPECTRA["simple"]), [0, 0]

    def apply(x: Tensor) -> Tensor:
        rows[0] += x.shape[1]
        return x @ matrices.mT

    def apply_adjoint(y: Tensor) -> Tensor:
        rows[1] += y.shape[1]
        return y @ matrices

    improved(apply, apply_adjoint, start(matrices, 4), 2)
    assert rows == [14, 5]


# --- where the steps lead -------------------------------------------------------------------------


@each_block
@each_spectrum
def test_the_ends_of_a_fixed_matrix_are_found(name, smallest, largest):
    matrices = with_values(SPECTRA[name], SPECTRA[name])
    found = values(matrices, converge(matrices, smallest, largest))
    expected = truth(matrices, smallest, largest)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_a_matrix_that_moves_a_little_is_followed():
    """From converged vectors one step a move keeps both ends; no step at all would not."""
    matrices = with_values(SPECTRA["simple"])
    drift = 2e-4 * random(*matrices.shape, seed=9)
    ends = converge(matrices, 1, 1)
    frozen = ends
    for _ in range(20):
        matrices = matrices + drift
        ends = step(matrices, ends, 1)
    expected = truth(matrices, 1, 1)
    errors = [np.abs(values(matrices, e) / expected - 1).max() for e in (ends, frozen)]
    assert errors[0] <= 1e-2
    assert errors[1] >= 10 * errors[0]


def test_a_large_change_of_rank_1_is_seen_at_once():
    """Its direction is what `towards_norm` finds; a random one leaves the old vectors in place."""
    matrices = with_values(*[list(np.linspace(0.5, 1.0, 400))] * 2)
    u, v = (random(2, n, 1, seed=n) for n in (404, 400))
    change = 2 * u / u.norm(dim=1, keepdim=True) @ (v / v.norm(dim=1, keepdim=True)).mT
    ends = start(matrices, 2)
    ends = replace(ends, change=towards_norm(*products(change), ends.change, 1))
    torch.testing.assert_close(ends.change.abs(), v.mT.abs() / v.norm(dim=1, keepdim=True))
    largest = truth(matrices + change, 0, 1)[:, 0]
    seen = values(matrices + change, step(matrices + change, ends, 1))[:, 1]
    np.testing.assert_allclose(seen, largest, rtol=1e-3)
    blind = values(matrices + change, step(matrices + change, start(matrices, 2), 1))[:, 1]
    assert (blind < 0.95 * largest).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12])
def test_a_change_whose_squares_are_too_small_for_the_type(scale):
    change = scale * with_values(SPECTRA["simple"], dtype=torch.float32)
    x = start(change, 1).change
    found = towards_norm(*products(change), x, 1)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(1, 1))


@pytest.mark.parametrize("end", [0, 1])
def test_a_change_along_a_vector_does_not_disturb_it(end):
    """Nor does the rounding of what is left of it beside the vector."""
    matrices = with_values([1e-4, *np.linspace(0.1, 1, 39)], dtype=torch.float32)
    ends = converge(matrices, 1, 1)
    before = values(matrices, ends)
    for _ in range(5):
        change = ends.vectors[:, end : end + 1] + 1e-4 * random(1, 1, 40).float()
        change = change / change.norm(dim=2, keepdim=True)
        ends = replace(ends, change=change)
        ends = step(matrices, ends, 1)
    np.testing.assert_allclose(values(matrices, ends), before, rtol=1e-2)


def test_no_change_leaves_its_direction():
    x = start(with_values(SPECTRA["simple"]), 1).change
    zero = torch.zeros(1, 34, 30, dtype=torch.float64)
    assert torch.equal(towards_norm(*products(zero), x, 3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("smallest", "largest"), [(1, 0), (1, 1), (3, 3)])
def test_one_column(smallest, largest, dtype):
    """Vectors beyond the order of the matrix are zero, the first of each end are right."""
    matrices = with_values([2.0], [3.0], dtype=dtype)
    ends = converge(matrices, smallest, largest, steps=4)
    found = values(matrices, ends)
    assert ends.vectors.isfinite().all()
    assert ends.residuals.isfinite().all()
    np.testing.assert_allclose(found[:, 0], [2.0, 3.0], rtol=1e-6)
    if largest:
        np.testing.assert_allclose(found[:, smallest], [2.0, 3.0], rtol=1e-6)
    assert not found[:, 1:smallest].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_that_starts_as_copies_of_one_vector(dtype):
    """A basis of rank 2 for 3 vectors an end: what is missing is zero, and grows in later steps."""
    matrices = with_values(SPECTRA["five"], dtype=dtype)
    ends = start(matrices, 1)
    x = ends.vectors.expand(1, 6, 5)
    unknown = torch.full((1, 6), math.inf)
    ends = Ends(x, torch.zeros_like(x), ends.vectors, unknown, unknown)
    ends = step(matrices, ends, 3)
    norms = ends.vectors.norm(dim=2)[0]
    assert norms.isfinite().all()
    np.testing.assert_allclose(norms, [1, 1, 0, 1, 1, 0], atol=1e-5)
    for _ in range(30):
        ends = step(matrices, ends, 3)
    np.testing.assert_allclose(values(matrices, ends)[0], [1, 2, 3, 5, 4, 3], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [6, 9])
def test_zero_matrices(dtype, rows):
    matrices = torch.zeros(2, rows, 6, dtype=dtype)
    ends = converge(matrices, 2, 2, steps=4)
    assert ends.vectors.dtype == ends.directions.dtype == ends.residuals.dtype == dtype
    torch.testing.assert_close(ends.vectors.norm(dim=2), torch.ones(2, 4, dtype=dtype))
    assert not ends.residuals.any()
    assert not ends.directions.isnan().any()


def test_a_zero_matrix_beside_another():
    matrices = with_values(SPECTRA["simple"], [0.0] * 30)
    found = values(matrices, converge(matrices, 1, 1))
    np.testing.assert_allclose(found, [[0.1, 1.0], [0.0, 0.0]], atol=1e-7)


# --- single precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(("smallest", "largest"), [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_graded_spectra_in_single_precision(smallest, largest, seed):
    """From 1 to 1e-5: no step loses more than what a dependent direction may carry away."""
    matrices = with_values(list(np.logspace(-5, 0, 40)), dtype=torch.float32)
    true = truth(matrices, smallest, largest)[0]
    ends = start(matrices, smallest + largest, seed=seed)
    best = math.inf
    for _ in range(200):
        ends = step(matrices, ends, smallest)
        found = values(matrices, ends)[0]
        assert np.isfinite(found).all()
        assert found[0] <= best + DEPENDENT[torch.float32] ** 0.5
        best = min(best, found[0])
        assert found[0] >= true[0] - 1e-6
        assert found[smallest] <= true[smallest] * (1 + 1e-5)
    assert best <= 300 * true[0]
    assert found[smallest] >= true[smallest] * (1 - 1e-5)


@pytest.mark.parametrize(("smallest", "largest"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_one_value_of_1e_5_in_single_precision(smallest, largest):
    matrices = with_values([1e-5, *np.linspace(0.1, 1, 39)], dtype=torch.float32)
    found = values(matrices, converge(matrices, smallest, largest))
    assert found[0, 0] == pytest.approx(1e-5, rel=0.1)
    if largest:
        assert found[0, smallest] == pytest.approx(1.0, rel=1e-5)


def test_single_precision_is_kept():
    matrices = with_values(SPECTRA["simple"], dtype=torch.float32)
    ends = step(matrices, start(matrices, 2), 1)
    assert ends.vectors.dtype == ends.directions.dtype == ends.residuals.dtype == torch.float32


def test_without_the_change_nothing_of_it_is_multiplied_or_known():
    matrices = with_values(SPECTRA["five"])
    ends = start(matrices, 2)
    asked = []

    def counted(function):
        def apply(x):
            asked.append(x.shape[1])
            return function(x)

        return apply

    apply, apply_adjoint = map(counted, products(matrices))
    after, images = improved(apply, apply_adjoint, ends, 1, with_change=False)
    assert asked == [4, 2, 2]
    assert torch.equal(after.change, ends.change)
    other, _ = improved(*products(matrices), replace(ends, change=-ends.directions), 1)
    assert torch.allclose((matrices @ other.vectors.mT).norm(dim=1), images.norm(dim=2), rtol=1e-6)


def test_values_are_those_before_the_step():
    matrices = with_values(SPECTRA["five"])
    ends = start(matrices, 2)
    after = step(matrices, ends, 1)
    expected = (matrices @ ends.vectors.mT).norm(dim=1)
    torch.testing.assert_close(after.values, expected)
