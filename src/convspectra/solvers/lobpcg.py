"""Smallest singular triplets by LOBPCG on the smaller Gram matrix.

Source: Knyazev (SIAM J. Sci. Comput. 23, 2001), with the basis [X, R, P] orthonormalised by QR
before each Rayleigh-Ritz step, after Hetmaniuk and Lehoucq (J. Comput. Phys. 218, 2006).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convspectra.solvers.result import SingularTriplets

GUARD_VECTORS = 4


def lobpcg(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    k: int,
    *,
    tol: float,
    maxiter: int,
    like: Tensor,
    generator: torch.Generator | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> SingularTriplets:
    """The k smallest of the n singular triplets of a tall A (m >= n), ascending.

    Parameters
    ----------
    matvec, rmatvec : callable
        On batches in rows: (b, n) -> (b, m) and back.
    shape : (m, n)
    k : int
    tol : float
        A triplet has converged when ``||A'A v - s^2 v|| <= tol * s * sigma_max``, or when that
        residual is down at the rounding error of A'A and s is at most ``tol * sigma_max``: A'A
        resolves no singular value below about ``sqrt(eps) sigma_max``.
    maxiter : int
    like : Tensor
        Gives the dtype and the device.
    generator : torch.Generator, optional
        Of the random start vectors, on that device.
    precondition : callable, optional
        An approximation of (A'A)^{-1} on rows, symmetric positive definite.

    Returns
    -------
    SingularTriplets
        Upper bounds are Rayleigh-Ritz values and hold for certain. There is no lower bound but 0:
        the iteration cannot tell that it missed a smaller value. The left vectors ``A v / s`` of
        values down at rounding error are noise.

    Notes
    -----
    Cost per step: one application each of A and A' to k + 4 vectors, and ``O(m (k + 4)^2)`` flops.
    """
    m, n = shape
    block = min(n, k + GUARD_VECTORS)
    eps = torch.finfo(like.dtype).eps
    x = torch.randn(block, n, dtype=like.dtype, device=like.device, generator=generator)
    x = torch.linalg.qr(x.T).Q.T
    ax = matvec(x)
    largest = float(torch.linalg.matrix_norm(ax, 2))
    p = x.new_zeros(0, n)
    matvecs, converged = block, False
    for _ in range(maxiter):
        rotation, s, _ = torch.linalg.svd(ax, full_matrices=False)
        rotation, s = rotation.flip(1), s.flip(0)
        x, ax = rotation.T @ x, rotation.T @ ax
        residual = rmatvec(ax) - s[:, None] ** 2 * x
        matvecs += block
        size = torch.linalg.vector_norm(residual, dim=1)[:k]
        floor = 8 * eps * largest**2
        reached = size <= tol * s[:k] * largest
        if bool((reached | (size <= floor)).all()):
            converged = bool((reached | (s[:k] <= tol * largest)).all())
            break
        search = residual if precondition is None else precondition(residual)
        basis = _orthonormal(torch.cat([search, p]), x)
        if len(basis) == 0:  # x spans the whole space
            converged = True
            break
        images = matvec(basis)
        matvecs += len(basis)
        # The smallest left singular vectors of all images are the Ritz vectors of A'A.
        together, stacked = torch.cat([x, basis]), torch.cat([ax, images])
        left, _, _ = torch.linalg.svd(stacked, full_matrices=False)
        largest = max(largest, float(torch.linalg.matrix_norm(stacked, 2)))
        chosen = left.flip(1)[:, :block].T
        p = chosen[:, block:] @ basis
        x, ax = chosen @ together, chosen @ stacked
    s = torch.linalg.vector_norm(ax, dim=1)[:k]
    order = torch.argsort(s)
    s = s[order]
    return SingularTriplets(
        u=ax[:k][order] / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None],
        s=s,
        v=x[:k][order],
        lower=torch.zeros_like(s),
        others=0.0,
        upper=s + 8 * m**0.5 * eps * largest,
        converged=converged,
        matvecs=matvecs,
        certificate="Rayleigh-Ritz values above; no bound below",
    )


def _orthonormal(rows: Tensor, against: Tensor) -> Tensor:
    """Orthonormal rows spanning `rows`, orthogonal to the orthonormal rows `against`."""
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(
        torch.finfo(rows.dtype).tiny
    )
    for smallest in (1e-10, 0.5):
        rows = rows - (rows @ against.T) @ against
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
        rows = directions[sizes > smallest]
    return rows
