"""How many singular values of a convolution lie in an interval: exact, and nothing left to chance.

Zero-padded layers are counted by inertia (`torus/_inertia.py`), circularly padded ones by their
symbols, small ones by a dense SVD.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    check_band,
    check_bytes,
    check_type,
    is_circulant,
    normalized,
    not_compiled,
)
from convspectra.solvers import SingularTriplets
from convspectra.spectra._parts import Part, parts
from convspectra.torus import Inertia, InertiaTorus, inertia_cost

STEP = 1e-9
"""How far to either side of a number the values are counted, relative to the circulant's norm: a
choice. Where a value lies between, or rounding reaches further, other steps follow."""
ATTEMPTS = 6
"""Pairs of steps that are tried where a value lies near: a choice."""
TORI = tuple(itertools.product(range(3), (0.0, 0.5)))
"""Further points and phases of the tori that are tried, in turn."""
STEP_OVER_ROUNDING = 1000
"""The same over what the symbols leave open: with 16 to 64 channels on 16 x 16 to 32 x 32 points
border matrices left 30 to 600 times that. At half of it more counts take two factorizations more;
at twice of it values lie within the step more often, which takes two more as well."""
LONGEST_STEP = 0.25
"""The first step over the number: a choice."""
MOST_TORI = 3
"""Tori that are factored for one number, where on the first ones a matrix between the cuts is
nearly singular: a choice, for other steps follow."""
LONGER = 64
"""The most by which a step that was too short grows: a choice."""
FAR_END_ATTEMPTS = 5
"""Counts for the far end of an enclosure, each 16 times as far from the value as the last: a
choice."""
DENSE_WORK = 1e9
"""Layers whose singular values take fewer flops than this are not counted but computed."""


@dataclass(frozen=True)
class CountResult:
    """The number of singular values in an interval.

    Attributes
    ----------
    least, most : int
        Bounds on it, equal unless a singular value lies within rounding of an end.
    factorizations : int
        LDL' factorizations of border matrices, or groups of them, that were made.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> result = cs.count(cs.ConvOperator(torch.eye(2)[:, :, None], 3), lower=1.0)
    >>> result.least, result.most, result.exact
    (0, 6, False)
    """

    least: int
    most: int
    factorizations: int

    @property
    def exact(self) -> bool:
        """Whether the two bounds agree."""
        return self.least == self.most

    def __int__(self) -> int:
        if not self.exact:
            raise ValueError(
                f"expected an exact count, got one of {self.least} to {self.most}: a singular "
                "value lies within rounding of an end of the interval; move the end a little"
            )
        return self.least


@not_compiled
def count(
    op: ConvOperator,
    lower: float = 0.0,
    upper: float = math.inf,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> CountResult:
    """The number of singular values s of a convolution with ``lower <= s < upper``.

    Of the min(rows, columns) singular values, repeated ones as often as they are. Nothing of it
    rests on chance: signs of eigenvalues are counted, no vector is looked for.

    Parameters
    ----------
    op : ConvOperator
        Any layer; a float32, float16 or bfloat16 weight is widened to float64, exactly.
    lower, upper : float
        With ``0 <= lower <= upper``. An end of 0 or inf costs nothing.
    max_bytes : int
        Limit on the dense matrix, or on the symbols and border matrices.

    Returns
    -------
    CountResult
        ``int(result)`` is the number where it is exact. It is not where a singular value lies
        within rounding of an end: about 1e-13 of the norm for small layers, and 1e-7 for 64
        channels on 32 x 32 points. Small values of a layer of more outputs than inputs, or the
        other way about, are told from 0 down to about 1e-7 of the norm.

    Raises
    ------
    ValueError
        For ends that are no interval, or where more than `max_bytes` would be needed; the message
        says how much.

    Notes
    -----
    Two factorizations for an end, on either side of it. Each takes, for h -> g channels with 3 x 3
    taps on N x N points, about ``4/3 n^3`` flops for n = (h + g) N, two LU factorizations of that
    order, and all hold about ``32 n^2`` bytes: 0.6 GiB for 64 -> 64 on 32 x 32 points. Padding
    other than by zeros or circular all around takes a dense SVD. Source: Haynsworth's inertia
    formula ("Determination of the inertia of a partitioned Hermitian matrix", Linear Algebra and
    its Applications 1, 1968); docs/mathematics.md, "Counting".

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    >>> int(cs.count(op)), int(cs.count(op, upper=0.01)), int(cs.count(op, 1.1, 3.1))
    (50, 1, 17)
    """
    check_type("op", op, ConvOperator)
    check_band(lower, upper)
    scaled, exponent = normalized(op)
    if exponent is None:
        zeros = min(op.shape) if lower == 0 < upper else 0
        return CountResult(zeros, zeros, 0)
    counter = Counter(scaled, max_bytes)
    ends = [counter.at_least(math.ldexp(end, -exponent)) for end in (lower, upper)]
    least = max(ends[0].least - ends[1].most, 0)
    return CountResult(least, ends[0].most - ends[1].least, counter.factorizations)


class Bounds(NamedTuple):
    """The knowledge of a number of singular values."""

    least: int
    most: int


class Counter:
    """Counts for one layer: what they have in common is computed once.

    Parameters
    ----------
    op : ConvOperator
        float64, with a weight near 1.
    max_bytes : int

    Raises
    ------
    ValueError
        If more than `max_bytes` would be needed.
    """

    def __init__(self, op: ConvOperator, max_bytes: int) -> None:
        found, zeros = parts(op)
        self._total = min(op.shape)
        self._counters = [counter_of(part, max_bytes) for part in found]
        self._zeros = zeros

    @property
    def factorizations(self) -> int:
        return sum(counter.factorizations for counter in self._counters)

    def at_least(self, s: float) -> Bounds:
        """How many singular values are s or larger."""
        if s <= 0:
            return Bounds(self._total, self._total)
        if math.isinf(s):
            return Bounds(0, 0)
        each = [counter.at_least(s) for counter in self._counters]
        return Bounds(sum(one.least for one in each), sum(one.most for one in each))

    def inertia(self, s: float) -> Inertia:
        """The singular values above some number within the rounding of s > 0: one factorization."""
        each = [counter.inertia(s, math.inf) for counter in self._counters]
        return Inertia(
            sum(one.above for one in each), max((one.rounding for one in each), default=0.0)
        )


def proven_by_counts(
    op: ConvOperator, triplets: SingularTriplets, k: int, largest: bool, tol: float, max_bytes: int
) -> SingularTriplets:
    """The first k of some extreme triplets; the far ends of their enclosures come from counts.

    Where one more than k was given its far end bounds the others. The result has not converged
    where a count does not bear the values out: one was missed, or rounding hides it.

    Parameters
    ----------
    op : ConvOperator
        float64, with a weight near 1.
    triplets : SingularTriplets
        k of the layer, or k + 1.
    k : int
    largest : bool
    tol : float
        Relative accuracy of the values.
    max_bytes : int
        As for `count`.
    """
    counter, sign = Counter(op, max_bytes), 1.0 if largest else -1.0
    nothing = math.inf if largest else 0.0
    far: list[float] = []
    for place, s in enumerate(triplets.s.tolist()):
        step = 4 * tol * s
        if place and abs(s - triplets.s[place - 1]) <= step:
            far.append(far[-1])
            continue
        far.append(nothing)
        for _ in range(FAR_END_ATTEMPTS):
            above, rounding = counter.inertia(s + sign * step)
            beyond = above if largest else min(op.shape) - above
            if beyond <= place and rounding < math.inf:
                far[-1] = max(s + sign * (step + rounding), 0.0)
                break
            step = min(16 * step, 0.5 * s)
    ends = triplets.s.new_tensor(far)
    everything = k == min(op.shape)
    sides = ("below", "above") if largest else ("above", "below")
    return replace(
        triplets,
        u=triplets.u[:k],
        s=triplets.s[:k],
        v=triplets.v[:k],
        lower=(triplets.lower if largest else ends)[:k],
        upper=(ends if largest else triplets.upper)[:k],
        others=far[k] if len(far) > k else (triplets.others if everything else nothing),
        converged=triplets.converged and nothing not in far,
        certificate=(
            f"Rayleigh-Ritz values of M {sides[0]}; {sides[1]}, counts of all singular values "
            f"without chance, {counter.factorizations} factorizations"
        ),
        residuals=None if triplets.residuals is None else triplets.residuals[:k],
    )


def counter_of(part: Part, max_bytes: int) -> ByInertia | ByValues:
    """Counts of a block in the cheaper way."""
    return ByInertia(part, max_bytes) if _is_counted(part) else ByValues(part, max_bytes)


def _is_counted(part: Part) -> bool:
    """Whether a block is counted by inertia, rather than by all its singular values."""
    g = part.op.geometry
    if is_circulant(part.op) or g.ndim == 0 or g.padding_mode != "zeros":
        return False
    if part.flops <= DENSE_WORK or any(s > n for s, n in zip(g.stride, g.input_size, strict=True)):
        return False
    cost = inertia_cost(part.op)
    return cost.symbol_flops + 2 * cost.count_flops < part.flops


class ByValues:
    """Counts of a block from all its singular values."""

    def __init__(self, part: Part, max_bytes: int) -> None:
        matrices, copies = part.matrices(max_bytes)
        self.factorizations = 0
        self._values = torch.linalg.svdvals(matrices).flatten()
        self._copies = copies.repeat_interleave(min(matrices.shape[1:]))
        order = max(matrices.shape[1:])
        self._error = order * torch.finfo(matrices.dtype).eps * float(self._values.amax())

    @property
    def norm(self) -> float:
        """An upper bound on the singular values."""
        return float(self._values.amax()) + self._error

    def at_least(self, s: float) -> Bounds:
        least, most = (
            round(float(self._copies[self._values >= s + error].sum()))
            for error in (self._error, -self._error)
        )
        return Bounds(least, most)

    def inertia(self, s: float, allowed: float) -> Inertia:
        """The values above s; they do not depend on what is `allowed`."""
        return Inertia(round(float(self._copies[self._values > s].sum())), self._error)


class ByInertia:
    """Counts of a zero-padded block by inertia."""

    def __init__(self, part: Part, max_bytes: int) -> None:
        check_bytes("the symbols and border matrices", inertia_cost(part.op).bytes, max_bytes)
        self.factorizations = 0
        self._op, self._places, self._count = part.op, part.places, min(part.op.shape)
        self._kind, self._torus = TORI[0], InertiaTorus(part.op, *TORI[0])

    @property
    def norm(self) -> float:
        """An upper bound on the singular values."""
        return self._torus.norm

    def at_least(self, s: float) -> Bounds:
        """From counts at a step to either side, longer than what rounding leaves open of them."""
        least, most = 0, self._count
        step = max(STEP * self._torus.norm, STEP_OVER_ROUNDING * self._torus.rounding(s))
        step, too_short, long_enough = min(step, LONGEST_STEP * s), 0.0, math.inf
        for _ in range(ATTEMPTS):
            reached = 0.0
            for x in (s - step, s + step):
                if x <= 0:
                    continue
                above, rounding = self._in_one_place(x, step)
                reached = max(reached, rounding)
                if rounding < step and x < s:
                    most = min(most, above)
                elif rounding < step:
                    least = max(least, above)
            if reached < step:
                long_enough = step
            else:
                too_short = step
            if least == most:
                break
            if long_enough == math.inf or too_short < 2 * reached < step:
                step = min(2 * reached, LONGER * step)
            else:
                step = math.sqrt(too_short * long_enough)
            if not too_short < step < min(long_enough / 4, self.norm):
                break
        return Bounds(self._places * least, self._places * most)

    def inertia(self, s: float, allowed: float) -> Inertia:
        """The values above s at all places, by a torus that leaves less open than allowed."""
        above, rounding = self._in_one_place(s, allowed)
        return Inertia(self._places * above, rounding)

    def _in_one_place(self, s: float, allowed: float) -> Inertia:
        """By the first torus that leaves less open than allowed, else by the best of all."""
        if s > self._torus.norm:
            return Inertia(0, 0.0)
        best = Inertia(self._count, math.inf)
        promising = self._promising_tori(s, allowed)
        others = [kind for kind in TORI if kind not in promising]
        for kind in (promising + others)[:MOST_TORI]:
            if kind != self._kind:
                del self._torus  # It holds memory, and the next is to come.
                self._kind, self._torus = kind, InertiaTorus(self._op, *kind)
            best = min(best, self._torus.count(s), key=lambda inertia: inertia.rounding)
            self.factorizations += 1
            if best.rounding < LONGER * allowed:
                break
        return best

    def _promising_tori(self, s: float, allowed: float) -> list[tuple[int, float]]:
        """The present torus if its symbols leave less open than allowed; else all, best first."""
        if self._torus.rounding(s) < allowed or not self._torus.is_between(s):
            return [self._kind]
        roundings = {}
        for kind in TORI:
            del self._torus
            self._kind, self._torus = kind, InertiaTorus(self._op, *kind)
            roundings[kind] = self._torus.rounding(s)
            if roundings[kind] < allowed:
                return [kind]
        return sorted(TORI, key=roundings.__getitem__)
