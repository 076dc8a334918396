"""The norm of a circulant cut open along one axis: a tight upper bound on sigma_max.

Note [Cut norm]. On the torus around a layer a function may be anything at the points beyond the
layer's, where for M it must be 0; the circulant's norm is above that of M for this reason, by the
square of the frequency step along each axis. Cut one axis open: keep the functions that are 0 at
its last points. With the other axes in Fourier space that is, for each of their frequencies, a
block Toeplitz matrix T, and G = T'T is the first points' part of a circulant with symbols G_j.
Whether all eigenvalues of G are below t is read off matrices of a few channels: by Haynsworth
(1968), with A = t - circulant and R the border part of A^{-1},

    (negative eigenvalues of t - G) = (those of A) - (those of R),

and A^{-1} is diagonal in Fourier space. Half of what is lost on a square layer is won back.

References
----------
E. V. Haynsworth (1968), "Determination of the inertia of a partitioned Hermitian matrix", Linear
    Algebra Appl. 1, doi:10.1016/0024-3795(68)90050-5.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, is_wide
from convspectra.solvers import inverse_and_logabsdet, leading_eigenpairs
from convspectra.torus._circulant_gram import CirculantGram, rounded_up
from convspectra.torus._cut import block_toeplitz
from convspectra.torus._symbols import half_count, smallest_periods

LOWEST = 8.0
"""The cut norm is looked for down to so much over the square of the points below the circulant's,
relatively.

At a quarter of it two of three bounds (8 channels, 16 x 16 points) are 0.4 % to 0.5 % above the
norm, not 0.2 % to 0.3 %; at half or double of it no bound changes by 0.03 %.
"""
BISECTIONS = 6
"""Halvings of that interval: the bounds are 0.1 % farther from the norm with 3, and 0.02 % nearer
with 12.
"""
ROUNDING_UNITS = 64
"""Allowance for the rounding of eigenvalues and inverses, in n eps of the norm.

A choice: LAPACK's errors are a few n eps. With too little of it a bound may lie below the norm by
rounding; with more the bounds are wider.
"""


def circulant_norm_bound(op: ConvOperator) -> float:
    """An upper bound on sigma_max from circulants, whole and cut open along one axis.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64, such that `has_embedding(op)`.

    Notes
    -----
    Cost: the symbols, their Gram matrices, a Cholesky factorization of each; then eigenvalues and
    inverses of a few.
    """
    gram = CirculantGram(op)
    blocks = gram.blocks.flatten(0, 1)
    shortest = min(smallest_periods(op.geometry))
    low = float(leading_eigenpairs(blocks)[0].amax()) * (1 - min(LOWEST / shortest**2, 0.5))
    below = blocks.neg()
    below.diagonal(dim1=-2, dim2=-1).add_(low)
    _, info = torch.linalg.cholesky_ex(below)
    # Eigenvalues of all blocks that have some above `low`.
    large = {int(i): torch.linalg.eigvalsh(blocks[i]) for i in torch.nonzero(info).flatten()}
    best = max((float(values[-1]) for values in large.values()), default=low)
    for axis in range(op.geometry.ndim) if op.geometry.padding_mode == "zeros" else ():
        cut = _Cut(op, axis, blocks, large)
        if cut.is_possible and low < best:
            best = cut.squared_norm(low, best)
    bound = float(rounded_up(blocks.new_tensor(best).real.double(), blocks, op.weight))
    return min(bound, float(gram.upper_bounds(1))) if gram.is_small else bound


class _Cut:
    """The circulant cut open along one axis, a block Toeplitz matrix for every frequency else.

    `blocks` are the Gram matrices of half of the frequencies of each group, and `large` the
    eigenvalues of those that have large ones.
    """

    def __init__(
        self, op: ConvOperator, axis: int, blocks: Tensor, large: dict[int, Tensor]
    ) -> None:
        geometry, periods = op.geometry, smallest_periods(op.geometry)
        outputs = is_wide(op)
        points = geometry.output_size[axis] if outputs else geometry.input_size[axis]
        self._blocks, self._large = blocks, large
        self._border = periods[axis] - points
        # With a stride the channels behind a point beyond the inputs are not all beyond them.
        self.is_possible = self._border > 0 and (outputs or geometry.stride[axis] == 1)
        half = half_count(periods[-1], 0.0)
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(p, device="cpu") for p in periods), indexing="ij"), dim=-1
        )
        mirrored = grid[..., -1] >= half
        sizes = torch.tensor(periods, device="cpu")
        grid = torch.where(mirrored[..., None], (sizes - grid) % sizes, grid)
        index = torch.zeros_like(grid[..., 0])
        for i, period in enumerate((*periods[:-1], half)):
            index = index * period + grid[..., i]
        self._index = index.movedim(axis, -1).reshape(-1, periods[axis])
        self._mirrored = mirrored.movedim(axis, -1).reshape(-1, periods[axis])
        self._frequencies = half * math.prod(periods[:-1])

    def squared_norm(self, low: float, high: float) -> float:
        """An upper bound on the squared norm between these, of which `high` is one."""
        if self.is_below(low):
            return low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.is_below(middle) else (middle, high)
        return high

    def is_below(self, t: float) -> bool:
        """Whether the squared norm of the cut circulant is below t, beyond doubt."""
        eps = float(torch.finfo(self._blocks.dtype).eps)
        uncertain = ROUNDING_UNITS * self._blocks.shape[-1] * eps * t
        negative = Counter(
            {i: int((values > t - uncertain).sum()) for i, values in self._large.items()}
        )
        seen = set()
        for place in (i for i, count in negative.items() if count):
            group, frequency = divmod(place, self._frequencies)
            for column in torch.nonzero((self._index == frequency).any(1)).flatten().tolist():
                members = (self._index[column] + group * self._frequencies).tolist()
                key = tuple(sorted(members))  # a column and its mirror image have the same norm
                if key in seen:
                    continue
                seen.add(key)
                if self._border_negative(column, members, t) < sum(negative[i] for i in members):
                    return False
        return True

    def _border_negative(self, column: int, members: list[int], t: float) -> int:
        """How many eigenvalues of the border part R of (t - circulant)^{-1} are surely negative."""
        shifted = self._blocks[members].neg()
        shifted.diagonal(dim1=-2, dim2=-1).add_(t)
        inverse, _ = inverse_and_logabsdet(shifted)
        norm = float(torch.linalg.matrix_norm(inverse).amax())
        if not math.isfinite(norm):
            return 0
        mirrored = self._mirrored[column].to(inverse.device)
        inverse = torch.where(mirrored[:, None, None], inverse.conj(), inverse)
        border = range(self._border)
        part = block_toeplitz(torch.fft.ifft(inverse, dim=0), border, border)
        eps = float(torch.finfo(self._blocks.dtype).eps)
        error = ROUNDING_UNITS * inverse.shape[-1] * eps * t * norm**2 * self._border
        return int((torch.linalg.eigvalsh((part + part.mH) / 2) < -error).sum())
