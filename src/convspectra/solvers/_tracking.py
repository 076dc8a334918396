"""One step of LOBPCG towards both ends of a spectrum, for matrices that change between steps.

For the eigenvectors of A'A, without a preconditioner: where A has moved a little since the last
step, the vectors at hand are good starts and one step makes up for it. Source: Knyazev (2001), as
for `lobpcg`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.solvers._result import LinearMap

DEPENDENT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Eigenvalues of the Gram matrix of the directions below this are rounding.

A hundred eps in single precision, some thousand in double. Below, a basis gets directions that are
noise; far above, the last directions of steps that moved little are lost.
"""
COLUMNS_AT_ONCE = 4096
"""Columns in float64 at once: a few hundred kilobytes, which stay in a cache. A choice."""


@dataclass(frozen=True)
class Ends:
    """Approximate right singular vectors at both ends, of several matrices side by side.

    Attributes
    ----------
    vectors : Tensor
        (count, smallest + largest, n), unit rows, or zero where nothing is known yet: ascending
        from the smallest singular value, then descending from the largest.
    directions : Tensor
        The last step, of the same shape; zero rows where there was none.
    change : Tensor
        (count, 1, n), unit rows: what `towards_norm` found of the change of the matrices.
    values, residuals : Tensor
        ``sqrt(rho) = ||A x||`` and ``||A'A x - rho x|| / rho`` of the vectors before the last step,
        (count, smallest + largest).
    """

    vectors: Tensor
    directions: Tensor
    change: Tensor
    values: Tensor
    residuals: Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an operator is followed: its own, or float32 for a narrower one."""
    return torch.promote_types(dtype, torch.float32)


def towards_norm(apply: LinearMap, apply_adjoint: LinearMap, x: Tensor, steps: int) -> Tensor:
    """Steps of the power method towards the largest singular value; rows in its kernel stay.

    Cost: A and A' on x once a step.
    """
    for _ in range(steps):
        y = _unit(apply_adjoint(apply(x)))
        x = torch.where(y.any(2, keepdim=True), y, x)
    return x


def improved(
    apply: LinearMap, apply_adjoint: LinearMap, ends: Ends, smallest: int, with_change: bool = True
) -> tuple[Ends, Tensor]:
    """The Rayleigh-Ritz vectors in a subspace around the ones at hand, and their images.

    The subspace is that of the vectors, their residuals and their last directions, as in LOBPCG,
    and of the direction of change, c, with A'A c. A matrix that has gained a large part ``s u c'``
    since has its new extremes near the span of c and A'u, which the old vectors may know nothing
    of.

    Parameters
    ----------
    apply, apply_adjoint : callable
        A and A' on (count, k, n) and (count, k, m), A of full column rank or at least m >= n.
    ends : Ends
        float32 or float64.
    smallest : int
        How many of the vectors belong to the smallest singular values.
    with_change : bool
        Whether c is in the subspace.

    Returns
    -------
    ends : Ends
        The change is the same.
    images : Tensor
        A on the vectors, (count, smallest + largest, m).

    Notes
    -----
    Cost: A on three blocks of vectors and two more, A' on one block and one more, and dense
    problems of that order in float64.
    """
    x = ends.vectors
    block = x.shape[1]
    tiny = torch.finfo(x.dtype).tiny
    change = ends.change if with_change else ends.change[:, :0]
    known = torch.cat([x, _apart(change, x), _apart(ends.directions, x)], 1)
    images = apply(known)
    # Residuals of the vectors and of the change; A'A c itself may be all but parallel to c.
    wanted = block + change.shape[1]
    rho = images[:, :wanted].square().sum(2, keepdim=True)
    residuals = apply_adjoint(images[:, :wanted]) - rho * known[:, :wanted]
    size = torch.linalg.vector_norm(residuals[:, :block], dim=2, keepdim=True)
    new = _unit(residuals)
    basis, images = torch.cat([known, new], 1), torch.cat([images, apply(new)], 1)
    weights, vectors = torch.linalg.eigh(_gram(basis))
    dependent = weights <= DEPENDENT[x.dtype] * weights[:, -1:]
    scale = torch.where(dependent, 0.0, weights.clamp_min(tiny).rsqrt())
    whitening = vectors * scale[:, None, :]
    projected = whitening.mT @ _gram(images) @ whitening
    lowest = _ritz_vectors(projected, smallest, dependent)
    highest = _ritz_vectors(-projected, block - smallest, dependent)
    coefficients = (whitening @ torch.cat([lowest, highest], 2)).mT.to(x.dtype)
    moved = coefficients.clone()
    moved[:, :, :block] = 0
    vectors = coefficients @ basis
    norms = torch.linalg.vector_norm(vectors, dim=2, keepdim=True).clamp_min(tiny)
    after = Ends(
        vectors=vectors / norms,
        directions=_unit(moved @ basis),
        change=ends.change,
        values=rho[:, :block].squeeze(2).sqrt(),
        residuals=(size / rho[:, :block].clamp_min(tiny)).squeeze(2),
    )
    return after, coefficients / norms @ images


def _gram(rows: Tensor) -> Tensor:
    """Products of all rows with one another in float64, without all of them in float64 at once."""
    gram = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(COLUMNS_AT_ONCE, dim=2):
        part = part.double()
        gram += part @ part.mT
    return gram


def _ritz_vectors(matrix: Tensor, count: int, excluded: Tensor) -> Tensor:
    """Eigenvectors (.., n, count) of the lowest eigenvalues, clear of the excluded coordinates."""
    above = 1 + 2 * torch.linalg.matrix_norm(matrix)
    shifted = matrix + torch.diag_embed(excluded * above[:, None])
    return torch.linalg.eigh(shifted)[1][:, :, :count]


def _unit(rows: Tensor) -> Tensor:
    """The directions of rows; squares of their entries may be too small for the type."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax(dim=2, keepdim=True).clamp_min(tiny)
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    return rows / norms.clamp_min(tiny)


def _apart(rows: Tensor, x: Tensor) -> Tensor:
    """The directions of unit rows less their components along x; 0 where nothing else is left."""
    for nothing in (DEPENDENT[x.dtype], 0.5):
        rows = torch.baddbmm(rows, rows @ x.mT, x, alpha=-1)
        norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        rows = rows * torch.where(norms <= nothing, 0.0, 1 / norms)
    return rows
