"""How many singular values of a zero-padded convolution lie above a number: by inertia.

For s > 0 and a matrix M, ``K = [[-s I, M], [M', -s I]]`` has the eigenvalues sigma - s and
-sigma - s over the singular values sigma of M, and -s: as many positive ones as M has singular
values above s. On a torus M is part of a block circulant C, and K is part of
``A = [[-s I, C], [C', -s I]]``. By Haynsworth's inertia formula (E. V. Haynsworth, "Determination
of the inertia of a partitioned Hermitian matrix", Linear Algebra and its Applications 1, 1968)

    positive(K) = positive(A) - positive(W),        W the border part of A^{-1}.

positive(A) is read off the symbols. As in `_capacitance`, one axis is cut open at a time, and the
formula holds for every cut.

Note [Rounding of a count]. Every W is computed with errors. Changing the border part of A^{-1} by E
changes A by about A E A, so an inertia found with an error E is that of a K + F with
``||F|| <= ||A||^2 ||E||``: the count is right for some number within ||F|| of s (Weyl). The
estimate of ||E|| is a sum of the sizes of the rounded numbers, times `ROUNDING`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, phase_lengths, polyphase
from convspectra.torus._cut import block_toeplitz, order_of_cuts
from convspectra.torus._symbols import (
    angles,
    half_count,
    half_multiplicity,
    smallest_periods,
    symbols,
)

ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Errors of what is computed, over the sizes of what was rounded.

Measured as the difference between W in single and in double precision for 12 kinds of random layers
and 25 numbers s each: 0.1 to 3.5 times eps times the sizes at the median. At 360 singular values of
nine of them no count was wrong at any distance above the error of a dense SVD, far inside what this
allows for: half or twice of it moves only where a count is said to be open.
"""
STRIP = 512
"""Columns of a symmetric product that are computed at once, from the diagonal down: a choice; with
twice as many a few percent more is computed in vain at order 4096."""

BATCH_BYTES = 2**28
"""Border matrices of several groups are made at once up to this size: a choice; only memory grows
with it, as a batch saves nothing once its matrices are large."""


class Inertia(NamedTuple):
    """A count of singular values, right for some number within `rounding` of the one asked for.

    A `rounding` of inf says that nothing is known: another torus may tell.
    """

    above: int
    rounding: float


class InertiaTorus:
    """Counts of the singular values of a zero-padded layer on one torus.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, with zero padding and one axis or more; float64, the weight near 1.
    extra : int
        Points more than the smallest torus has, along every axis.
    phase : float
        0, or 1/2 for a torus on which functions change sign as they go around an axis.

    Attributes
    ----------
    norm : float
        That of the circulant, an upper bound on that of M.

    Notes
    -----
    Cost: an SVD of every second symbol. They are kept: ``16 (h + g) min(h, g)`` bytes each, for
    h x g symbols.
    """

    def __init__(self, op: ConvOperator, extra: int = 0, phase: float = 0.0) -> None:
        layer, ndim = polyphase(op), op.geometry.ndim
        lengths = channel_lengths(op)
        periods = [period + extra for period in smallest_periods(op.geometry)]
        order = order_of_cuts(periods, lengths)
        self._phase = phase
        self._lengths = lengths[order].to(op.device)
        self._periods = [periods[i] for i in order]
        frequencies = [
            angles(period, phase, None if cut else half_count(period, phase))
            for cut, period in enumerate(self._periods)
        ]
        self._theta = frequencies[0].to(op.device)
        self._copies = half_multiplicity(self._periods[0], phase).to(op.device)
        symbol = symbols(layer, [frequencies[order.index(i)] for i in range(ndim)])
        symbol = symbol.permute(0, *(1 + i for i in order), -2, -1)
        # Outputs and inputs both begin at point 0 of the torus.
        shift = torch.zeros((), dtype=torch.float64, device="cpu")
        for place, theta in zip(order, frequencies, strict=True):
            shift = shift[..., None] - layer.geometry.padding[place][0] * theta
        shift = torch.polar(torch.ones_like(shift), shift).to(symbol.device)
        symbol = symbol * shift[..., None, None]
        self._u, self._values, right = torch.linalg.svd(symbol, full_matrices=False)
        self._v = right.mH
        self._at_once = _groups_at_once(inertia_cost(op))
        self._is_square = symbol.shape[-1] == symbol.shape[-2]
        self.norm = float(self._values.amax())

    def rounding(self, s: float) -> float:
        """The least that `count` leaves open: the rounding of the symbols, which are at hand."""
        sizes = self._inverse_norms(s)
        sizes = sizes.reshape(*sizes.shape[:2], -1).amax(-1)
        return self._rounding(s, sizes, 0.0) if self._are_certain(s, sizes) else math.inf

    def is_between(self, s: float) -> bool:
        """Whether a symbol value is nearer to s than 0 is, so that another torus may do better."""
        return float((self._values - s).abs().amin()) < s

    def count(self, s: float) -> Inertia:
        """The singular values of M above s > 0; its cost is `inertia_cost`."""
        above, sizes = self._counted(self._values > s), self._inverse_norms(s)
        if not self._are_certain(s, sizes):
            return Inertia(above, math.inf)
        rounding = 0.0
        for first in range(0, len(sizes), self._at_once):
            some = slice(first, first + self._at_once)
            on_border, rounding_there = self._count_on_borders(s, some, sizes[some])
            above, rounding = above - on_border, max(rounding, rounding_there)
        return Inertia(above, rounding)

    def _count_on_borders(self, s: float, groups: slice, sizes: Tensor) -> Inertia:
        """positive(W) of all cuts, and what rounding leaves open of s."""
        inverse: Callable[[], Tensor] = partial(self._inverse, s, groups)
        cut: _Cut | None = None
        channels = torch.arange(self._lengths.shape[1], device=self._lengths.device)
        positive, inner = 0, 0.0
        for axis in reversed(range(1, len(self._periods))):
            cut = self._cut(inverse, axis, channels)
            inverse = cut.explicit
            positive += self._counted(cut.border_values > 0)
            inner = max(inner, float(sizes.amax()))
            sizes = cut.sizes(sizes.amax(-1))
            if not self._are_certain(s, sizes):
                return Inertia(positive, math.inf)
            channels = cut.inside.of(channels)
        border = self._last_border(inverse() if cut is None else cut, channels)
        del inverse, cut  # They hold memory, and a factorization is to come.
        positive += _positive(border)
        return Inertia(positive, self._rounding(s, sizes, inner))

    def _rounding(self, s: float, sizes: Tensor, inner: float) -> float:
        """See Note [Rounding of a count].

        From the sizes of what was rounded, (groups, half of the frequencies), whose mean W is, and
        the largest of the border matrices of inner cuts.
        """
        scale, mean = self.norm + s, sizes @ (self._copies / self._periods[0])
        return ROUNDING * scale * (1 + scale * (inner + float(mean.amax())))

    def _are_certain(self, s: float, sizes: Tensor) -> bool:
        """Whether rounding of these sizes leaves the inertia of an inverse as it is.

        The least eigenvalue of the inverse of a part of A is 1 / ||A|| or more.
        """
        return bool((ROUNDING * (self.norm + s) * sizes < 0.5).all())

    def _counted(self, positive: Tensor) -> int:
        """How many are true of (groups, half of the frequencies, ...), with the other half."""
        return int((positive.flatten(2).sum(2).double() @ self._copies).sum())

    def _inverse_norms(self, s: float) -> Tensor:
        """The norm of A^{-1} at every frequency; inf where A is singular."""
        nearest = (self._values - s).abs().amin(-1)
        return 1 / (nearest if self._is_square else nearest.clamp(max=s))

    def _inverse(self, s: float, groups: slice) -> Tensor:
        """The symbols of A^{-1}."""
        u, values, v = self._u[groups], self._values[groups], self._v[groups]
        between = (values - s) * (values + s)
        sides = []
        for vectors in (u, v):
            is_longer = vectors.shape[-2] > vectors.shape[-1]
            weights = values.square() / s if is_longer else torch.full_like(between, s)
            side = (vectors * (weights / between)[..., None, :]) @ vectors.mH
            if is_longer:
                side.diagonal(dim1=-2, dim2=-1).sub_(1 / s)
            sides.append(side)
        corner = (u * (values / between)[..., None, :]) @ v.mH
        above = torch.cat([sides[0], corner], -1)
        return torch.cat([above, torch.cat([corner.mH, sides[1]], -1)], -2)

    def _cut(self, inverse: Callable[[], Tensor], axis: int, channels: Tensor) -> _Cut:
        """One axis cut open, from the inverse with the axes before it in Fourier space."""
        period = self._periods[axis]
        kernel = torch.fft.ifft(inverse(), dim=1 + axis)
        if self._phase:
            points = torch.arange(period, dtype=torch.float64, device=kernel.device)
            angle = points * (2 * math.pi * self._phase / period)
            kernel *= torch.polar(torch.ones_like(angle), angle)[:, None, None]
        inside, outside = _sides(self._lengths[axis][channels], period)
        changes_sign = self._phase != 0
        values, vectors = torch.linalg.eigh(_part(kernel, outside, outside, changes_sign))
        to_border = _part(kernel, inside, outside, changes_sign)
        norms = torch.linalg.vector_norm(to_border, dim=(-2, -1))
        halves = to_border @ (vectors * values.abs().rsqrt()[..., None, :])
        return _Cut(kernel, changes_sign, inside, values, norms, halves)

    def _last_border(self, inverse: Tensor | _Cut, channels: Tensor) -> Tensor:
        """W of the first axis, (groups, order, order), real: its lower triangle."""
        lengths, period = self._lengths[0][channels], self._periods[0]
        used = torch.nonzero(lengths < period).flatten()
        used_or_all = None if len(used) == len(lengths) else used
        width = period - int(lengths.min())
        points = range(period - width, period)
        members = [torch.nonzero(lengths[used] <= point).flatten() for point in points]
        ends = [0, *itertools.accumulate(map(len, members))]
        waves = [torch.polar(self._copies / period, step * self._theta) for step in range(width)]
        blocks = _differences(inverse, waves, used_or_all)
        if width == 0:
            return self._values.new_zeros(1, 0, 0)
        if width == 1:
            return next(blocks)
        border = self._values.new_zeros(0)
        for step, block in enumerate(blocks):
            if step == 0:
                border = block.new_zeros(len(block), ends[-1], ends[-1])
            for i in range(step, width):
                rows, columns = members[i], members[i - step]
                border[:, ends[i] : ends[i + 1], ends[i - step] : ends[i - step + 1]] = block[
                    :, rows[:, None], columns
                ]
        return border


class _Side(NamedTuple):
    """Points of an axis, and of the pairs of a point and a channel those taken; None for all."""

    points: range
    kept: Tensor | None

    def of(self, channels: Tensor) -> Tensor:
        """The channels of the pairs."""
        repeated = channels.repeat(len(self.points))
        return repeated if self.kept is None else repeated[self.kept]


def _sides(lengths: Tensor, period: int) -> tuple[_Side, _Side]:
    """Inside and border of an axis of which every channel has the first points."""
    sides: list[_Side] = []
    for points in (range(int(lengths.max())), range(int(lengths.min()), period)):
        is_inside = torch.tensor(points, device=lengths.device)[:, None] < lengths
        kept = is_inside if points.start == 0 and not sides else ~is_inside
        sides.append(_Side(points, None if kept.all() else torch.nonzero(kept.flatten()).flatten()))
    return sides[0], sides[1]


def _part(kernel: Tensor, rows: _Side, columns: _Side, changes_sign: bool) -> Tensor:
    """These rows and columns of the circulants of a kernel (..., points, channels, channels)."""
    matrix = block_toeplitz(kernel, rows.points, columns.points, changes_sign)
    if rows.kept is not None:
        matrix = matrix.index_select(-2, rows.kept)
    return matrix if columns.kept is None else matrix.index_select(-1, columns.kept)


@dataclass(frozen=True)
class _Cut:
    """The inverse of what a cut leaves: the inner part of `kernel`'s circulants less H S H*.

    H has a column for every eigenvalue of the border matrix W, S has their signs.
    """

    kernel: Tensor
    changes_sign: bool
    inside: _Side
    border_values: Tensor
    norms_to_border: Tensor
    halves: Tensor

    def explicit(self) -> Tensor:
        inside = _part(self.kernel, self.inside, self.inside, self.changes_sign)
        signs = self.border_values.sign()[..., None, :]
        return inside - (self.halves * signs) @ self.halves.mH

    def sizes(self, before: Tensor) -> Tensor:
        """The size of what was rounded, at most, at every frequency left."""
        to_border = torch.minimum(before, self.norms_to_border)
        halves = torch.linalg.vector_norm(self.halves, dim=(-2, -1))
        if self.border_values.shape[-1] == 0:
            return before
        of_inverse_border = self.border_values.abs().amin(-1).rsqrt()
        return before + to_border * of_inverse_border * halves


def _differences(
    inverse: Tensor | _Cut, waves: Sequence[Tensor], used: Tensor | None
) -> Iterator[Tensor]:
    """Re sum_f waves[f] inverse[:, f] for each of the waves, the rows and columns used.

    The first is symmetric, and only its lower triangle is right.
    """
    if isinstance(inverse, Tensor):
        for wave in waves:
            yield _square(_real_sum(wave, inverse), used)
        return
    halves = inverse.halves if used is None else inverse.halves.index_select(2, used)
    factor = halves.transpose(1, 2).contiguous()
    factor *= waves[0].abs().sqrt()[:, None]
    right = torch.view_as_real(factor).flatten(2)
    signs = inverse.border_values.sign().flatten(1).repeat_interleave(2, dim=1)[:, None]
    for step, wave in enumerate(waves):
        kernel = _real_sum(wave, inverse.kernel)
        part = _part(kernel, inverse.inside, inverse.inside, inverse.changes_sign)
        matrix, left = _square(part, used), right
        if step:
            left = torch.view_as_real(factor * (wave / wave.abs())[:, None]).flatten(2)
        for start in range(0, matrix.shape[-1], STRIP):
            columns = slice(start, start + STRIP)
            rows = slice(start if step == 0 else 0, None)
            matrix[:, rows, columns] -= left[:, rows] @ (right[:, columns] * signs).mT
        yield matrix


def _square(matrix: Tensor, used: Tensor | None) -> Tensor:
    return matrix if used is None else matrix[..., used[:, None], used]


def _real_sum(wave: Tensor, blocks: Tensor) -> Tensor:
    """Re sum_f wave[f] blocks[:, f]."""
    return (wave @ blocks.flatten(2)).real.reshape(len(blocks), *blocks.shape[2:])


def _positive(symmetric: Tensor) -> int:
    """How many eigenvalues are positive, from the lower triangles, by an LDL' factorization."""
    if symmetric.shape[-1] == 0:
        return 0
    factors, pivots, _ = torch.linalg.ldl_factor_ex(symmetric)
    alone = pivots > 0
    # A block of two rows is one that has an eigenvalue of either sign.
    positive = (factors.diagonal(dim1=-2, dim2=-1) > 0) & alone
    return int(positive.sum()) + int((~alone).sum()) // 2


class InertiaCost(NamedTuple):
    """The cost of `InertiaTorus` and of one `count`: flops of both, and bytes.

    The symbols of all groups are kept; the border matrices are those of few groups at once.
    """

    symbol_flops: float
    count_flops: float
    symbol_bytes: int
    group_bytes: int
    groups: int

    @property
    def bytes(self) -> int:
        """The most that is held at once."""
        at_once = min(self.groups, _groups_at_once(self))
        return self.symbol_bytes + at_once * self.group_bytes


def _groups_at_once(cost: InertiaCost) -> int:
    return max(1, BATCH_BYTES // max(cost.group_bytes, 1))


def inertia_cost(op: ConvOperator) -> InertiaCost:
    """About what a count takes on the smallest torus, from integers alone.

    Of an h -> g layer of N x N points and b border lines each way: ``((2 b - 1) b + b^3 / 3) n^3``
    flops for n = (h + g) N, half of that product where b = 1.
    """
    lengths, periods = channel_lengths(op), smallest_periods(op.geometry)
    order = order_of_cuts(periods, lengths)
    closed = [periods[i] for i in order]
    closed[0] = closed[0] // 2 + 1
    rows, symbols_at_all = len(lengths[0]), math.prod(closed)
    outputs = op.weight.shape[0] // op.groups
    shorter = min(outputs, rows - outputs)
    kept = 16 * symbols_at_all * rows * shorter
    symbol_flops = 100.0 * symbols_at_all * rows * shorter**2
    flops, now = 8.0 * symbols_at_all * rows**2 * shorter, 16 * symbols_at_all * rows**2
    most, of_rows = 3 * now, torch.ones_like(lengths[0])
    count, halves = closed[0], 0
    for cut in reversed(range(1, len(closed))):
        along, count = lengths[order[cut]], math.prod(closed[:cut])
        inside = int((of_rows * along).sum())
        outside = int((of_rows * (periods[order[cut]] - along)).sum())
        halves = 16 * count * inside * outside
        flops += 8.0 * count * (inside * outside**2 + 30 * outside**3)
        most = max(most, now + 3 * halves)
        of_rows = of_rows * along
        if cut > 1:
            flops += 8.0 * count * inside**2 * outside
            now = 16 * count * inside**2
            most = max(most, 3 * now + halves)
    last = periods[order[0]] - lengths[order[0]]
    lines, used = int(last.max()), int(of_rows[last > 0].sum())
    border = int((of_rows * last).sum())
    if len(closed) > 1:
        products = lines - 0.5 if lines else 0
        flops += products * halves / 4 / max(inside, 1) * float(used) ** 2
        most = max(most, now + 2 * halves + max(now, (8 * used + 24 * STRIP) * used))
    flops += float(border) ** 3 / 3
    most = max(most, 16 * border**2 + (8 * used**2 if lines > 1 else 0))
    groups = op.groups
    return InertiaCost(groups * symbol_flops, groups * flops, groups * kept, most, groups)


def channel_lengths(op: ConvOperator) -> Tensor:
    """How many points, from the first, each channel of K in a group has, (axes, channels)."""
    outputs = torch.tensor(op.geometry.output_size, device="cpu")[:, None]
    return torch.cat([outputs.expand(-1, op.weight.shape[0] // op.groups), phase_lengths(op)], 1)
