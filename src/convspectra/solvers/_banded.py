"""The triangle of a QR factorization of a block-banded matrix, and solves with it.

Block columns are eliminated one after the other. What is left of the rows begun so far has entries
in the next few block columns only: it is the tail, to which the rows that begin at the next column
are added. Orthogonal transformations alone are used, so that the triangle R is that of a matrix
within a few eps of the norm of the one given: its singular values are as near, whatever the
condition (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, theorem
19.4).

Note [Steady tails]. Where the same rows begin at every column, a matrix with many more rows than
columns has tails that converge. One that has changed by a few eps of the norm is taken for the one
before: the factors of all columns that follow with the same rows are then those at hand. The
changes that this amounts to are in different block columns, ``reach`` of which meet at most in one
row: together they are at most ``reach sqrt(columns)`` times as large as one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Hashable)
"""Whatever tells the rows that begin at a block column."""

STEADY = 4
"""Change of a tail, in eps of the norm, from which on it is taken as steady: a choice. It widens
`rounding` by as much, over ``reach sqrt(columns)``; at much less rounding hides that it is."""
LEAST_PIVOT = 0.125
"""Least diagonal entry of R in eps of the norm; one below is rounding error, and becomes this. A
choice: a change of half of it or twice is still within `rounding`."""


class BandedTriangle:
    """R of a matrix with block rows of `reach` blocks, batched over independent matrices.

    Parameters
    ----------
    starts : sequence
        For each block column, what tells the block rows that begin there.
    rows : callable
        These block rows for an entry of `starts`, (groups, any, reach * width).
    width, reach : int
    norm : float
        An upper bound of the right order on the norm of the matrix.
    damping : float
        With it R is that of [M; damping I], which has no singular value below it: solves with the
        triangle of a singular matrix may overflow.

    Raises
    ------
    ArithmeticError
        If the factors are not finite.

    Notes
    -----
    Cost: for a square matrix about ``(6 reach - 5/3) width`` squared times ``width`` flops a block
    column over ``reach``; ``8 groups columns reach width^2`` bytes, less where tails are steady.
    """

    def __init__(
        self,
        starts: Sequence[T],
        rows: Callable[[T], Tensor],
        width: int,
        reach: int,
        norm: float,
        damping: float = 0.0,
    ) -> None:
        self._width, self._reach = width, reach
        self._blocks: list[_Block] = []
        eps = torch.finfo(torch.float64).eps
        tail, changed = rows(starts[0])[:, :0, width:], math.inf
        for j, start in enumerate(starts):
            repeated = j > 0 and start == starts[j - 1]
            beyond = width * min(reach - 1, len(starts) - 1 - j)
            if repeated and changed <= STEADY * eps * norm:
                self._blocks.append(self._blocks[-1].narrowed(beyond))
                continue
            new = rows(start)
            if damping:
                new = torch.cat([new, _multiple_of_identity(damping, width, new)], 1)
            block, after, is_triangle = _eliminated(tail, new, width)
            changed = _change(tail, after) if repeated and is_triangle else math.inf
            tail = after
            _keep_away_from_zero(block.diagonal, LEAST_PIVOT * eps * norm)
            self._blocks.append(block.narrowed(beyond))
        if not bool(self._blocks[-1].diagonal.isfinite().all()):
            raise ArithmeticError("expected finite factors, got NaN or Inf")
        units = reach * width + 32 + (STEADY + 4) * reach * len(starts) ** 0.5
        self.rounding = units * eps * norm + damping
        """How far a singular value of R is from that of the matrix at most: an allowance."""

    def solve(self, y: Tensor) -> Tensor:
        """R^{-1} y for (columns, groups, width, b)."""
        lines = list(y)
        beyond = y[0, :, :0]
        most = self._width * (self._reach - 1)
        for j in reversed(range(len(lines))):
            diagonal, side = self._blocks[j]
            right = lines[j] - side @ beyond if side.shape[2] else lines[j]
            lines[j] = torch.linalg.solve_triangular(diagonal, right, upper=True)
            if most:
                beyond = torch.cat([lines[j], beyond], 1)[:, :most]
        return torch.stack(lines)

    def solve_transposed(self, x: Tensor) -> Tensor:
        """R'^{-1} x for (columns, groups, width, b)."""
        lines, width = list(x), self._width
        known = x.new_zeros(x.shape[1], width * (self._reach - 1), x.shape[3])
        for j, (diagonal, side) in enumerate(self._blocks):
            right = lines[j] - known[:, :width] if j and self._reach > 1 else lines[j]
            lines[j] = torch.linalg.solve_triangular(diagonal.mT, right, upper=False)
            reaches = side.shape[2]
            if reaches:
                # What the lines to come have to give up for those behind them.
                known = torch.nn.functional.pad(known[:, width:], (0, 0, 0, width))
                known = known[:, :reaches] + side.mT @ lines[j]
        return torch.stack(lines)

    def logarithm(self) -> float:
        """The sum of log |R_ii|: that of the logarithms of all singular values."""
        diagonals = torch.stack([_pivots(block.diagonal) for block in self._blocks])
        return float(diagonals.abs().log().sum())


class _Block(NamedTuple):
    """A block row of R: the triangle on the diagonal, and what is beside it."""

    diagonal: Tensor
    side: Tensor

    def narrowed(self, beyond: int) -> _Block:
        """With the columns that there are."""
        if beyond == self.side.shape[2]:
            return self
        return _Block(self.diagonal, self.side[:, :, :beyond].contiguous())


def _multiple_of_identity(factor: float, width: int, like: Tensor) -> Tensor:
    """Factor [I 0] for every matrix, (groups, width, columns)."""
    rows = factor * torch.eye(width, like.shape[2], dtype=like.dtype, device=like.device)
    return rows.expand(len(like), -1, -1)


def _pivots(triangle: Tensor) -> Tensor:
    return triangle.diagonal(dim1=1, dim2=2)


def _eliminated(tail: Tensor, new: Tensor, width: int) -> tuple[_Block, Tensor, bool]:
    """The rows of R for the first columns, the rows left, and whether these are triangular."""
    across = new.shape[2] - width
    missing = max(0, width - tail.shape[1] - new.shape[1])
    # The tail has no entries in the last columns.
    wider = torch.nn.functional.pad(tail, (0, width, 0, missing))
    if tail.shape[1] + new.shape[1] > width + across:
        triangle = torch.linalg.qr(torch.cat([wider, new], 1), mode="r").R
        block = _Block(
            triangle[:, :width, :width].contiguous(), triangle[:, :width, width:].contiguous()
        )
        return block, triangle[:, width:, width:], True
    first = torch.cat([wider[:, :, :width], new[:, :, :width]], 1)
    rest = torch.cat([wider[:, :, width:], new[:, :, width:]], 1)
    factors, tau = torch.geqrf(first)
    if across:
        rest = torch.ormqr(factors, tau, rest, left=True, transpose=True)
    block = _Block(factors[:, :width].triu(), rest[:, :width].contiguous())
    return block, rest[:, width:], False


def _change(before: Tensor, after: Tensor) -> float:
    """How far two triangles are apart, rows taken with a positive diagonal."""
    if before.shape != after.shape:
        return math.inf
    rows = [
        x * torch.where(x.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[..., None]
        for x in (before, after)
    ]
    return float(torch.linalg.vector_norm((rows[0] - rows[1]).flatten(1), dim=1).amax())


def _keep_away_from_zero(triangle: Tensor, least: float) -> None:
    pivots = _pivots(triangle)
    pivots.copy_(torch.where(pivots.abs() < least, torch.full_like(pivots, least), pivots))
