"""The smallest singular triplets by LOBPCG on the Gram matrix.

Source: Knyazev (2001), with the basis [X, R, P] orthonormalized before
each Rayleigh-Ritz step, after Hetmaniuk and Lehoucq (2006).

References
----------
A. V. Knyazev (2001), "Toward the optimal preconditioned eigensolver: locally optimal block
    preconditioned conjugate gradient method", SIAM J. Sci. Comput. 23,
    doi:10.1137/S1064827500366124.
U. Hetmaniuk and R. Lehoucq (2006), "Basis selection in LOBPCG", J. Comput. Phys. 218,
    doi:10.1016/j.jcp.2006.02.007.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from convspectra.solvers._orthonormal import inner_products, orthonormal, principal
from convspectra.solvers._result import NO_BOUND_BELOW, PAIRS_COUNT_AS_ONE, SingularTriplets
from convspectra.solvers._stop import Stop

GUARD_VECTORS = 2
"""Vectors beside the k wanted: the last of those converges by its distance to the next beyond.

A choice: every one of them costs two products a step.
"""
FLOOR_UNITS = 64
"""A residual of so many eps, relative to the squared norm, is rounding error.

At less of it steps go on that make nothing less; at more, values near sqrt(eps) of the norm end
early and do not count as converged.
"""
KEPT_DIRECTIONS = 1e-4
"""Directions of the last step that are this much of it or less, beside the others, are dropped:
their images are known by linear combination only.

A choice, about the fourth root of eps.
"""


def lobpcg(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    k: int,
    *,
    stop: Stop,
    like: Tensor,
    generator: torch.Generator | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> SingularTriplets:
    """The k smallest singular triplets, ascending, of a map from R^n.

    Parameters
    ----------
    matvec, rmatvec : callable
        On batches in rows: (b, n) -> (b, m) and back.
    shape : (m, n)
        With m < n the smallest are null vectors.
    k : int
        At most n.
    stop : Stop
        A triplet has converged when ``||A'A v - s^2 v|| <= tol * s * sigma_max``, or when that
        residual is down at the rounding error of A'A and s is at most ``tol * sigma_max``: A'A
        resolves no singular value below about ``sqrt(eps) sigma_max``. With `values_only`, when
        the error of s^2 is estimated to be ``tol * s^2``, residual^2 over the gap to the next one,
        and the residual is at most ten times what vectors need.
    like : Tensor
        Gives the dtype and the device.
    generator : torch.Generator, optional
        Source of the random start vectors, on that device.
    precondition : callable, optional
        On rows, symmetric positive definite: an approximation of (A'A)^{-1}.

    Returns
    -------
    SingularTriplets
        Rayleigh-Ritz values, which are upper bounds for certain. There is no bound below: the
        iteration cannot tell that it missed a value. The second vectors ``A v / s`` of values down
        at rounding error are noise.

    Notes
    -----
    Cost per step: one application each of A and A' to k + 2 vectors, and ``O(m (k + 2)^2)``
    flops.
    """
    m, n = shape
    block = min(n, k + GUARD_VECTORS)
    floor = FLOOR_UNITS * float(torch.finfo(like.dtype).eps)
    x = torch.randn(block, n, dtype=like.dtype, device=like.device, generator=generator)
    x = torch.linalg.qr(x.T).Q.T
    ax = matvec(x)
    p, ap = x.new_zeros(0, n), x.new_zeros(0, m)
    matvecs, converged, norm = block, False, 0.0
    for _ in range(stop.maxiter):
        # Ritz vectors of A'A in the span of x, ascending, and their residuals.
        rotation, s = _left_singular(ax)
        norm = max(norm, float(s.amax()))
        x, ax = rotation.T @ x, rotation.T @ ax
        # Relative to the norm of A, so that no square overflows.
        ratio = s / norm if norm > 0 else torch.zeros_like(s)
        residual = rmatvec(ax / (norm or 1.0)) / (norm or 1.0) - ratio[:, None] ** 2 * x
        matvecs += block
        size = torch.linalg.vector_norm(residual, dim=1)[:k]
        reached = _reached(size, ratio, stop)
        done = reached | (size <= floor)  # rounding error: no step makes it less
        if bool(done.all()):
            converged = bool((reached | (ratio[:k] <= stop.tol)).all())
            break
        # New directions. The guard vectors go on as long as one of the others does.
        active = torch.ones(block, dtype=torch.bool, device=x.device)
        active[:k] = ~done
        search = residual[active]
        search = search if precondition is None else precondition(search)
        search = orthonormal(search, x)
        if len(search) + len(p) == 0:  # x spans the whole space
            converged = True
            break
        images = matvec(search)
        matvecs += len(search)
        # Rayleigh-Ritz in the orthonormal basis [x, search, p]: the extreme left singular vectors
        # of all images are the Ritz vectors of A'A. The next p is the part beside x.
        p, ap = _beside(p, ap, torch.cat([x, search]), torch.cat([ax, images]))
        together, stacked = torch.cat([x, search, p]), torch.cat([ax, images, ap])
        left, s = _left_singular(stacked)
        norm = max(norm, float(s.amax()))
        chosen = left[:, :block].T
        p, ap = chosen[:, block:] @ together[block:], chosen[:, block:] @ stacked[block:]
        x, ax = chosen @ together, chosen @ stacked
    # Images by combination have gathered rounding: those that are given are computed anew.
    triplets = _triplets(x[:k], matvec(x)[:k], norm)
    return replace(triplets, converged=converged, matvecs=matvecs + block)


def _reached(size: Tensor, ratio: Tensor, stop: Stop) -> Tensor:
    """Whether residuals of the first Ritz values, relative to the norm as these are, are enough."""
    k = len(size)
    reached = size <= stop.tol * ratio[:k]
    if stop.values_only and len(ratio) > k:
        gap = (ratio[k] ** 2 - ratio[:k] ** 2).abs()
        near = size <= PAIRS_COUNT_AS_ONE * stop.tol * ratio[:k]
        reached |= near & (size**2 <= stop.tol * ratio[:k] ** 2 * gap)
    return reached


def _triplets(v: Tensor, images: Tensor, norm: float) -> SingularTriplets:
    """Triplets, ascending, from right vectors and their images under a map of this norm."""
    s = torch.linalg.vector_norm(images, dim=1)
    order = torch.argsort(s)
    s = s[order]
    slack = 8 * images.shape[1] ** 0.5 * torch.finfo(s.dtype).eps * norm
    return SingularTriplets(
        u=images[order] / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None],
        s=s,
        v=v[order],
        lower=torch.zeros_like(s),
        others=0.0,
        upper=s + slack,
        converged=False,
        matvecs=0,
        certificate=NO_BOUND_BELOW,
    )


def _left_singular(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors in columns, ascending, and as many values (some may be 0)."""
    factor = torch.linalg.qr(rows.T, mode="r").R.T if rows.shape[0] <= rows.shape[1] else rows
    left, s, _ = torch.linalg.svd(factor, full_matrices=True)
    s = torch.nn.functional.pad(s, (0, left.shape[1] - len(s)))
    return left.flip(1), s.flip(0)


def _beside(p: Tensor, ap: Tensor, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows of the span of p orthogonal to the basis, and their images."""
    for smallest in (KEPT_DIRECTIONS, 0.5):
        length = torch.linalg.vector_norm(p, dim=1, keepdim=True)
        scale = 1 / length.clamp_min(torch.finfo(p.dtype).tiny)
        p, ap = scale * p, scale * ap
        along = inner_products(p, basis)
        p, ap = p - along @ basis, ap - along @ images
        turn = principal(p, smallest)
        p, ap = turn @ p, turn @ ap
    return p, ap
