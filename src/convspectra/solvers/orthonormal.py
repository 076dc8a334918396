"""Rows made orthogonal to others, and orthonormal out of rows that may be dependent."""

from __future__ import annotations

import torch
from torch import Tensor

NEW_DIRECTIONS = 1e-6
"""New directions that are this little beside the others, relatively, are dropped."""
LITTLE_LOST = 0.5
"""An orthogonalisation that leaves this much of unit vectors has amplified no rounding."""


def less(rows: Tensor, found: Tensor) -> Tensor:
    """Rows less their components along orthonormal ones."""
    return torch.addmm(rows, rows @ found.mT, found, alpha=-1) if len(found) else rows


def orthonormal(rows: Tensor, against: Tensor) -> Tensor:
    """Orthonormal rows spanning `rows`, orthogonal to the orthonormal rows `against`.

    By the eigenvectors of their Gram matrix (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002);
    again unless hardly anything was taken out, for what is left amplifies rounding.
    """
    for smallest in (NEW_DIRECTIONS, LITTLE_LOST, LITTLE_LOST):
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / length.clamp_min(torch.finfo(rows.dtype).tiny)
        rows = less(rows, against)
        turn = principal(rows, smallest)
        rows = turn @ rows
        # A row of the turn is one over the size of its component.
        if len(turn) and float(torch.linalg.vector_norm(turn, dim=1).amax()) <= 1 / LITTLE_LOST:
            break
    return rows


def principal(rows: Tensor, smallest: float) -> Tensor:
    """What makes rows orthonormal, without their principal components of `smallest` or less."""
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = squares > smallest**2
    return (vectors[:, kept] / squares[kept].sqrt()).T
