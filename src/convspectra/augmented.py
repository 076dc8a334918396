"""Pseudo-inverse and pseudo-determinant of a rectangular zero-padded convolution of stride 1.

For a tall M of full rank, m x n, the augmented matrix

    K = [[a I, M], [M', 0]],    K^{-1} = [[(I - M M^+) / a, M^+'], [M^+, -a (M'M)^{-1}]],

is square, ``log |det K| = (m - n) log a + 2 sum log s`` over the singular values s of M, and the
condition number of K grows with that of M for a good a, not with its square as that of M'M (Bjorck,
BIT 7, 1967). K is a zero-padded convolution itself: it has the channels of both sides, the taps of
M, and those of M' reversed. So the capacitance method inverts it.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convspectra.capacitance import BOUND_VECTORS, CapacitanceFactorization
from convspectra.matrices import check_bytes
from convspectra.operator import ConvOperator
from convspectra.solvers.gaussian import log_smallest_norm

SHIFT = 1e-4
"""a, relative to an upper bound on the norm of M: near the smallest singular value, if that is not
known."""


def augmented_order(op: ConvOperator) -> int:
    """Order of one group's border matrix of K."""
    sizes = op.geometry.output_size
    points = min(
        reach * math.prod(sizes) // n for n, reach in zip(sizes, _reaches(op), strict=True)
    )
    return sum(_channels(op)) * points


def augmented_bytes(op: ConvOperator) -> int:
    """Size of the border matrix of K and of its inverted symbols, in float64."""
    sizes = op.geometry.output_size
    points = math.prod(n + reach for n, reach in zip(sizes, _reaches(op), strict=True))
    return 8 * op.groups * (augmented_order(op) ** 2 + sum(_channels(op)) ** 2 * points)


class AugmentedFactorization:
    """The pseudo-inverse of a layer M, or of M' if M is wide, by factors of K.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, of stride 1, with zero padding and as many output as input points; float64.
        Gradients flow from `logabsdet` to its weight.
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
        self._op, self._wide = op, op.shape[0] < op.shape[1]
        blocks = op.weight.detach().unflatten(0, (op.groups, -1)).flatten(1)
        taps = math.prod(op.weight.shape[2:])
        self._shift = SHIFT * taps**0.5 * float(torch.linalg.vector_norm(blocks, dim=1).amax())
        self._factorization = CapacitanceFactorization(self._augmented(), max_bytes)

    def solve(self, y: Tensor) -> Tensor:
        """M^+ y for a batch of the longer side, with one step of refinement where it helps."""
        return self._part(self._factorization.solve(self._stacked(y, longer=True)), longer=False)

    def solve_adjoint(self, x: Tensor) -> Tensor:
        """M^+' x for a batch of the shorter side: as `solve`."""
        solution = self._factorization.solve_adjoint(self._stacked(x, longer=False))
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
        generator = torch.Generator(device=tall.device).manual_seed(1)
        shape = BOUND_VECTORS, *tall.input_shape
        x = torch.randn(shape, dtype=tall.dtype, device=tall.device, generator=generator)
        errors = (
            self.apply_inverse(tall.apply(x)) - x,
            tall.apply_adjoint(self.apply_inverse_adjoint(x)) - x,
        )
        largest = max(float(torch.linalg.vector_norm(error)) for error in errors)
        return largest / math.exp(log_smallest_norm(BOUND_VECTORS))

    def is_singular(self) -> bool:
        """Whether K is, and so M, to working precision."""
        return self._factorization.is_singular()

    def logabsdet(self) -> Tensor:
        """The sum of log s, a 0-dim tensor with gradient; of no meaning for a rank-deficient M."""
        rows, columns = self._op.shape
        shifts = abs(rows - columns) * math.log(self._shift)
        return 0.5 * (self._factorization.logabsdet() - shifts)

    def _augmented(self) -> ConvOperator:
        op, reaches = self._op, _reaches(self._op)
        sides = zip(reversed(reaches), reversed(op.geometry.padding), strict=True)
        amounts = [reach - side for reach, padding in sides for side in padding]
        taps = F.pad(op.weight.unflatten(0, (op.groups, -1)), amounts)
        adjoint = taps.transpose(1, 2).flip(tuple(range(3, taps.ndim)))
        outputs, inputs = _channels(op)
        above, below = (taps.new_zeros(op.groups, n, n, *taps.shape[3:]) for n in (outputs, inputs))
        weight = torch.cat([torch.cat([above, taps], 2), torch.cat([adjoint, below], 2)], 1)
        taps_last = weight.flatten(3)
        middle = taps_last.shape[3] // 2
        taps_last[..., middle].diagonal(dim1=1, dim2=2)[:, self._channels_of(longer=True)] = (
            self._shift
        )
        return ConvOperator(
            weight.flatten(0, 1), op.geometry.output_size, padding=reaches, groups=op.groups
        )

    def _channels_of(self, *, longer: bool) -> slice:
        """The channels of K, in a group, that are those of one side of M."""
        outputs = _channels(self._op)[0]
        return slice(outputs, None) if longer == self._wide else slice(outputs)

    def _stacked(self, side: Tensor, *, longer: bool) -> Tensor:
        """What K acts on, from one side of M and zeros on the other."""
        blocks = side.unflatten(1, (self._op.groups, -1))
        channels = sum(_channels(self._op))
        stacked = side.new_zeros(len(side), self._op.groups, channels, *side.shape[2:])
        stacked[:, :, self._channels_of(longer=longer)] = blocks
        return stacked.flatten(1, 2)

    def _part(self, stacked: Tensor, *, longer: bool) -> Tensor:
        """One side of M from what K acts on."""
        blocks = stacked.unflatten(1, (self._op.groups, -1))
        return blocks[:, :, self._channels_of(longer=longer)].flatten(1, 2)


def _channels(op: ConvOperator) -> tuple[int, int]:
    """Outputs and inputs of a group."""
    return op.weight.shape[0] // op.groups, op.weight.shape[1]


def _reaches(op: ConvOperator) -> tuple[int, ...]:
    """How many points to either side of an output its taps reach, per axis."""
    return tuple(max(sides) for sides in op.geometry.padding)
