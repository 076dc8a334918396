"""Rows made orthogonal to others, and orthonormal out of rows that may be dependent."""

from __future__ import annotations

import torch
from torch import Tensor

NEW_DIRECTIONS = 1e-6
"""New directions that are this little beside the others, relatively, are dropped.

Squares of them stand in a Gram matrix, which has lost what is below 1e-8. A smaller one lets
rounding into the basis; a larger one loses directions of ill-conditioned blocks.
"""
LITTLE_LOST = 0.5
"""An orthogonalization that leaves this much of unit vectors has amplified no rounding."""
PARTS = 8
"""Parts of long rows, for as many threads. This and the next two are choices of time alone."""
LONG = 1 << 12
"""Length of rows from which on they are divided."""
FEW = 3
"""Rows on the left up to which BLAS divides the work itself."""


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """``rows @ others.mT`` in the form that is fastest on a CPU.

    BLAS divides the work among threads for a few rows on the left; for more of them it does not
    divide long sums, but a batch of their parts.
    """
    if len(rows) < len(others):
        return inner_products(others, rows).mT
    size = rows.shape[1] // PARTS
    if len(others) <= FEW or size * PARTS < LONG:
        return (others @ rows.mT).mT
    x, y = (part[:, : size * PARTS].unflatten(1, (PARTS, size)) for part in (rows, others))
    total = (x.transpose(0, 1) @ y.permute(1, 2, 0)).sum(0)
    rest = slice(size * PARTS, None)
    return torch.addmm(total, rows[:, rest], others[:, rest].mT)


def less(rows: Tensor, found: Tensor) -> Tensor:
    """Rows less their components along orthonormal ones."""
    return torch.addmm(rows, inner_products(rows, found), found, alpha=-1) if len(found) else rows


def orthonormal(rows: Tensor, against: Tensor) -> Tensor:
    """Orthonormal rows spanning `rows`, orthogonal to the orthonormal rows `against`.

    By the eigenvectors of their Gram matrix (A. Stathopoulos and K. Wu (2002), "A block
    orthogonalization procedure with constant synchronization requirements", SIAM J. Sci. Comput.
    23, doi:10.1137/S1064827500370883); again
    unless hardly anything was taken out, for what is left amplifies rounding.
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
    """The matrix that makes rows orthonormal; principal components up to `smallest` are dropped."""
    squares, vectors = torch.linalg.eigh(inner_products(rows, rows))
    kept = squares > smallest**2
    return (vectors[:, kept] / squares[kept].sqrt()).T
