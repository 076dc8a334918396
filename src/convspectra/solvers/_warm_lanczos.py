"""A short run of Lanczos from the singular vectors of a matrix that has changed since.

Beside `improved` of `solvers/_tracking.py`: for the largest value alone, where a matrix moves by
percents between calls. A Krylov space of eight products sees singular vectors that have overtaken
the ones at hand, which one step of LOBPCG does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.solvers._result import LinearMap

LOST = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Part of a unit vector that orthogonalization has to leave, else it is taken for 0: some eps.

A vector that has all but settled leads to the ones that have overtaken it by a small residual: at
1e-3 in single precision it stays where it is, 0.5% below the norm in one layer of a critic. Below
eps directions come in that are rounding, which do no harm.
"""


def warm_lanczos(
    apply: LinearMap, apply_adjoint: LinearMap, vectors: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The largest Ritz values of A and their vectors, in a space around the ones at hand.

    The space is that of the vectors and of ``steps`` more: A'A on the first of them, and so on.

    Parameters
    ----------
    apply, apply_adjoint : callable
        A and A' on rows, (b, n) and (b, m).
    vectors : Tensor
        (k, n), float32 or float64, the largest first; rows may be 0.
    steps : int
        Products with A'A.

    Returns
    -------
    values : Tensor
        (k,), float64, descending: none is above a singular value of A.
    vectors : Tensor
        (k, n), unit rows, or 0 where the space has fewer dimensions.

    Notes
    -----
    A on k rows, then A' and A on one row at every step; ``4 (k + steps)^2 n`` flops to keep the
    basis orthogonal, twice; an eigenproblem of order k + steps in float64. Without a branch on
    numbers. Source: Wu and Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue
    Problems", SIAM J. Matrix Anal. Appl. 22 (2000), doi:10.1137/S0895479898334605.
    """
    basis = vectors[:0]
    for row in vectors.split(1):
        basis = torch.cat([basis, _new_direction(row, basis)])
    images = apply(basis)
    last = images[:1]
    for _ in range(steps):
        direction = _new_direction(apply_adjoint(last), basis)
        last = apply(direction)
        basis, images = torch.cat([basis, direction]), torch.cat([images, last])
    wide = images.double()
    squares, coefficients = torch.linalg.eigh(wide @ wide.mT)
    k = len(vectors)
    squares, coefficients = squares[-k:].flip(0), coefficients[:, -k:].flip(1)
    moved = coefficients.mT.to(basis.dtype) @ basis
    return squares.clamp_min(0).sqrt(), _unit(moved)


def _new_direction(row: Tensor, basis: Tensor) -> Tensor:
    """The direction of a row orthogonal to the basis; 0 where only rounding is left."""
    row = _unit(row)
    for _ in range(2):
        row = row - (row @ basis.mT) @ basis
        norm = torch.linalg.vector_norm(row)
        row = row * torch.where(norm <= LOST[row.dtype], 0.0, 1 / norm)
    return row


def _unit(rows: Tensor) -> Tensor:
    """The directions of rows; 0 stays 0. Squares of entries may be too small for the type."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(tiny)
