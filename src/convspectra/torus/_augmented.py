"""Pseudo-inverse and pseudo-determinant of a rectangular zero-padded convolution.

For a tall M of full rank, m x n, the augmented matrix

    K = [[a I, M], [M', 0]],    K^{-1} = [[(I - M M^+) / a, M^+'], [M^+, -a (M'M)^{-1}]],

is square, ``log |det K| = (m - n) log a + 2 sum log s`` over the singular values s of M, and the
condition number of K grows with that of M for a good a, not with its square as that of M'M (Björck
1967). K is part of a square zero-padded convolution: on the grid of `polyphase`, with the
channels of both sides, the taps of M, and those of M' reversed. So the capacitance method, which
cuts out any points, inverts it.

References
----------
Å. Björck (1967), "Iterative refinement of linear least squares solutions I", BIT 7,
    doi:10.1007/BF01939321.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    check_bytes,
    conv_geometry,
    derived_operator,
    from_grid,
    from_phases,
    grid,
    grid_padding,
    inputs_per_point,
    is_square_grid,
    is_wide,
    phase_lengths,
    polyphase,
    to_grid,
    to_phases,
)
from convspectra.solvers import BOUND_VECTORS, gaussian, norm_bound
from convspectra.torus._capacitance import REFINEMENT_THRESHOLD, CapacitanceFactorization
from convspectra.torus._cut import border_cost

SHIFT = 1e-4
"""a, relative to an upper bound on the norm of M, in place of the smallest singular value that is
not known.

Chosen for layers whose smallest value is small. For four Gaussian 8 x 4 x 3 x 3 weights on 10 x 10
points `error_bound` is 2e-10 to 4e-10 with it and with half of it, 1e-10 to 2e-10 with double.
"""


def augmented_flops(op: ConvOperator) -> float:
    """The cost of the factors of K, about: its border matrices, and the inverses of its symbols."""
    periods, lengths = _periods(op), _lengths(op)
    symbols = 4.0 * lengths.shape[1] ** 3 * math.prod(periods)
    return op.groups * (border_cost(periods, lengths).flops + symbols)


def augmented_bytes(op: ConvOperator) -> int:
    """Size of the inverted symbols of K and of its largest border matrices, in float64."""
    periods, lengths = _periods(op), _lengths(op)
    symbols = 8 * lengths.shape[1] ** 2 * math.prod(periods)
    return op.groups * (border_cost(periods, lengths).bytes + symbols)


class AugmentedFactorization:
    """The pseudo-inverse of a layer M, or of M' if M is wide, by factors of K.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, such that `has_augmented(op)`; float64. Gradients flow from `logabsdet` to
        its weight.
    max_bytes : int
        Limit on `augmented_bytes(op)`.

    Raises
    ------
    ValueError
        If K would take more than `max_bytes`.
    ArithmeticError
        If K is singular or nearly so: M is rank deficient.

    Notes
    -----
    Cost: that of `CapacitanceFactorization` for as many channels as outputs and inputs together.
    """

    def __init__(self, op: ConvOperator, max_bytes: int) -> None:
        check_bytes("the augmented matrix", augmented_bytes(op), max_bytes)
        self._op, self._wide = op, is_wide(op)
        blocks = op.weight.detach().unflatten(0, (op.groups, -1)).flatten(1)
        taps = math.prod(op.weight.shape[2:])
        self._shift = SHIFT * taps**0.5 * float(torch.linalg.vector_norm(blocks, dim=1).amax())
        lengths = None if is_square_grid(op) else _lengths(op)
        self._factorization = CapacitanceFactorization(self._augmented(), max_bytes, lengths)

    def solve(self, y: Tensor, rtol: float = REFINEMENT_THRESHOLD) -> Tensor:
        """M^+ y for a batch of the longer side: as `CapacitanceFactorization.solve` for K."""
        solution = self._factorization.solve(self._stacked(y, longer=True), rtol)
        return self._part(solution, longer=False)

    def solve_adjoint(self, x: Tensor, rtol: float = REFINEMENT_THRESHOLD) -> Tensor:
        """M^+' x for a batch of the shorter side: as `solve`."""
        solution = self._factorization.solve_adjoint(self._stacked(x, longer=False), rtol)
        return self._part(solution, longer=True)

    def apply_inverse(self, y: Tensor) -> Tensor:
        """X y with a fixed X near M^+: see `error_bound`."""
        solution = self._factorization.apply_inverse(self._stacked(y, longer=True))
        return self._part(solution, longer=False)

    def apply_inverse_adjoint(self, x: Tensor) -> Tensor:
        """X' x."""
        solution = self._factorization.apply_inverse_adjoint(self._stacked(x, longer=False))
        return self._part(solution, longer=True)

    @functools.cached_property
    def error_bound(self) -> float:
        """A bound on ||X M - I||, and on ||M' X' - I|| for X' as it is applied.

        Then the i-th largest singular value of M^+ is at most that of X over 1 less the bound. From
        the residuals for Gaussian vectors; it fails with the probability of `log_smallest_norm`.
        Cost: two applications to 4 vectors.
        """
        tall = self._op.T if self._wide else self._op
        x = gaussian(BOUND_VECTORS, tall.input_shape, tall.weight, seed=1)
        return norm_bound(
            self.apply_inverse(tall.apply(x)) - x,
            tall.apply_adjoint(self.apply_inverse_adjoint(x)) - x,
        )

    def is_singular(self) -> bool:
        """Whether K is, and so M, to working precision."""
        return self._factorization.is_singular()

    def logabsdet(self) -> Tensor:
        """The sum of log s, a 0-dim tensor with gradient; of no meaning for a rank-deficient M."""
        rows, columns = self._op.shape
        shifts = abs(rows - columns) * math.log(self._shift)
        return 0.5 * (self._factorization.logabsdet() - shifts)

    def _augmented(self) -> ConvOperator:
        layer = polyphase(self._op)
        reaches, groups = _reaches(self._op), layer.groups
        sides = zip(reversed(reaches), reversed(layer.geometry.padding), strict=True)
        amounts = [reach - side for reach, padding in sides for side in padding]
        taps = F.pad(layer.weight.unflatten(0, (groups, -1)), amounts)
        adjoint = taps.transpose(1, 2).flip(tuple(range(3, taps.ndim)))
        above, below = (taps.new_zeros(groups, n, n, *taps.shape[3:]) for n in taps.shape[1:3])
        weight = torch.cat([torch.cat([above, taps], 2), torch.cat([adjoint, below], 2)], 1)
        taps_last = weight.flatten(3)
        middle = taps_last.shape[3] // 2
        longer = slice(taps.shape[1], None) if self._wide else slice(taps.shape[1])
        taps_last[..., middle].diagonal(dim1=1, dim2=2)[:, longer] = self._shift
        kernel_size = tuple(weight.shape[3:])
        padding = [(reach, reach) for reach in reaches]
        geometry = conv_geometry(grid(self._op), kernel_size, padding=padding)
        return derived_operator(weight.flatten(0, 1), geometry, groups)

    def _stacked(self, side: Tensor, *, longer: bool) -> Tensor:
        """An argument of K: one side of M, and zeros on the other."""
        op, groups = self._op, self._op.groups
        of_inputs = longer == self._wide
        blocks = (to_phases(op, side) if of_inputs else to_grid(op, side)).unflatten(
            1, (groups, -1)
        )
        others = op.weight.shape[0] // groups if of_inputs else inputs_per_point(op)
        zeros = side.new_zeros(len(side), groups, others, *blocks.shape[3:])
        parts = (zeros, blocks) if of_inputs else (blocks, zeros)
        return torch.cat(parts, 2).flatten(1, 2)

    def _part(self, stacked: Tensor, *, longer: bool) -> Tensor:
        """One side of M from what K acts on."""
        op, outputs = self._op, self._op.weight.shape[0] // self._op.groups
        blocks = stacked.unflatten(1, (op.groups, -1))
        if longer == self._wide:
            return from_phases(op, blocks[:, :, outputs:].flatten(1, 2))
        return from_grid(op, blocks[:, :, :outputs].flatten(1, 2))


def _lengths(op: ConvOperator) -> Tensor:
    """How many points, from the first, each channel of K in a group has, (axes, channels)."""
    outputs = torch.tensor(op.geometry.output_size, device="cpu")[:, None]
    return torch.cat([outputs.expand(-1, op.weight.shape[0] // op.groups), phase_lengths(op)], 1)


def _periods(op: ConvOperator) -> list[int]:
    """Points of the smallest torus for K, per axis."""
    return [n + reach for n, reach in zip(grid(op), _reaches(op), strict=True)]


def _reaches(op: ConvOperator) -> tuple[int, ...]:
    """How many points to either side of an output its taps reach, per axis."""
    return tuple(map(max, grid_padding(op)))
