"""Leading eigenpairs of many Hermitian matrices, beside dense eigenvalues."""

import pytest
import torch

from convspectra.solvers._leading import COUNT, leading_eigenpairs


def hermitian(count, order, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, order, order, dtype=torch.complex128, generator=generator)
    return (root @ root.mH / order).to(dtype)


def check(matrices, tol):
    """Ritz pairs of orthonormal vectors, from below; the dense eigenvalues."""
    values, vectors = leading_eigenpairs(matrices)
    kept = min(COUNT, matrices.shape[-1])
    assert values.shape == (len(matrices), kept)
    assert vectors.shape == (*matrices.shape[:2], kept)
    assert not values.is_complex()
    assert (values.diff(dim=1) >= 0).all()
    identity = torch.eye(kept, dtype=vectors.dtype)
    assert (vectors.mH @ vectors - identity).abs().max() <= tol
    projected = vectors.mH @ matrices @ vectors
    largest = float(values.amax())
    assert (projected - torch.diag_embed(values).to(projected)).abs().max() <= tol * largest
    true = torch.linalg.eigvalsh(matrices.to(torch.complex128))[:, -kept:]
    assert (values <= true + tol * largest).all()
    return values, true


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.complex64, 2e-5), (torch.complex128, 1e-12)], ids=["single", "double"]
)
@pytest.mark.parametrize("order", [1, 3, 4, 5, 12, 64])
def test_ritz_pairs_from_below(order, dtype, tol):
    values, true = check(hermitian(30, order, dtype), tol)
    near = true[:, -1] >= 0.8 * true.amax()
    assert torch.allclose(values[near, -1].double(), true[near, -1], rtol=0.02)
    if order <= COUNT:
        assert torch.allclose(values.double(), true, atol=20 * tol)


def test_the_largest_of_all_is_near():
    """Norms from 0.1 to 3: only those near the top need be good."""
    matrices = hermitian(60, 32) * torch.linspace(0.1, 3, 60)[:, None, None]
    values, true = check(matrices, 1e-12)
    near = true[:, -1] >= 0.9 * true.amax()
    assert 0 < int(near.sum()) < 60
    assert torch.allclose(values[near, -1], true[near, -1], rtol=1e-3)


def test_a_filter_is_better_than_as_many_power_steps():
    matrices = hermitian(50, 64)
    values, true = check(matrices, 1e-12)
    rows = torch.randn(50, COUNT, 64, dtype=matrices.dtype)
    for _ in range(8):
        rows = torch.linalg.qr((rows @ matrices).mH).Q.mH
    powers = torch.linalg.eigvalsh(rows @ matrices @ rows.mH)[:, -1]
    assert (true[:, -1] - values[:, -1]).mean() <= 0.3 * (true[:, -1] - powers).mean()


@pytest.mark.parametrize("order", [2, 9])
def test_zero_and_the_identity(order):
    values, _ = check(torch.zeros(3, order, order, dtype=torch.complex128), 1e-12)
    assert not values.any()
    identity = torch.eye(order, dtype=torch.complex128).expand(3, -1, -1)
    values, _ = check(identity, 1e-12)
    assert torch.allclose(values, torch.ones_like(values))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_of_any_size(scale):
    values, _ = check(hermitian(5, 8), 1e-12)
    scaled, _ = check(scale * hermitian(5, 8), 1e-12)
    assert torch.allclose(scaled, scale * values, rtol=1e-9)
