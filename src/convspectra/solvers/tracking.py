"""One step of LOBPCG towards both ends of a spectrum, for matrices that change between steps.

For the eigenvectors of A'A, without a preconditioner: where A has moved a little since the last
step, the vectors at hand are good starts and one step makes up for it. Knyazev, "Toward the optimal
preconditioned eigensolver" (SIAM J. Sci. Comput. 23, 2001).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEPENDENT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Eigenvalues of the Gram matrix of the directions below this are rounding."""


@dataclass(frozen=True)
class Ends:
    """Approximate right singular vectors at both ends, of several matrices side by side.

    Attributes
    ----------
    vectors : Tensor
        (count, smallest + largest, n), unit rows, or zero where nothing is known yet: ascending
        from the smallest singular value, then descending from the largest.
    directions : Tensor
        Of the last step, of the same shape; zero rows where there was none.
    residuals : Tensor
        ``||A'A x - rho x|| / rho`` of the vectors before the last step, (count, smallest +
        largest); inf where there was none.
    """

    vectors: Tensor
    directions: Tensor
    residuals: Tensor


def improved(
    apply: Callable[[Tensor], Tensor],
    apply_adjoint: Callable[[Tensor], Tensor],
    ends: Ends,
    smallest: int,
) -> Ends:
    """The Rayleigh-Ritz vectors among the vectors, their residuals and their last directions.

    Parameters
    ----------
    apply, apply_adjoint : callable
        A and A' on (count, k, n) and (count, k, m), A of full column rank or at least m >= n.
    ends : Ends
        float32 or float64.
    smallest : int
        How many of the vectors belong to the smallest singular values.

    Notes
    -----
    Cost: A on three blocks of vectors and A' on one, and dense problems of three times the number
    of vectors, in float64.
    """
    x = ends.vectors
    block = x.shape[1]
    basis = torch.cat([x, ends.directions], 1)
    images = apply(basis)
    rho = images[:, :block].square().sum(2, keepdim=True)
    gradient = apply_adjoint(images[:, :block]) - rho * x
    size = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    gradient = gradient / size.clamp_min(tiny)
    basis = torch.cat([basis, gradient], 1)
    images = torch.cat([images, apply(gradient)], 1)
    weights, vectors = torch.linalg.eigh(basis.double() @ basis.double().mT)
    dependent = weights <= DEPENDENT[x.dtype] * weights[:, -1:]
    scale = torch.where(dependent, 0.0, weights.clamp_min(tiny).rsqrt())
    whitening = vectors * scale[:, None, :]
    projected = whitening.mT @ (images.double() @ images.double().mT) @ whitening
    lowest = _ritz_vectors(projected, smallest, dependent)
    highest = _ritz_vectors(-projected, block - smallest, dependent)
    coefficients = (whitening @ torch.cat([lowest, highest], 2)).mT.to(x.dtype)
    moved = coefficients.clone()
    moved[:, :, :block] = 0
    return Ends(
        vectors=_unit(coefficients @ basis),
        directions=_unit(moved @ basis),
        residuals=(size / rho.clamp_min(tiny)).squeeze(2),
    )


def _ritz_vectors(matrix: Tensor, count: int, excluded: Tensor) -> Tensor:
    """Eigenvectors (.., n, count) of the lowest eigenvalues, clear of the excluded coordinates."""
    above = 1 + 2 * torch.linalg.matrix_norm(matrix)
    shifted = matrix + torch.diag_embed(excluded * above[:, None])
    return torch.linalg.eigh(shifted)[1][:, :, :count]


def _unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
