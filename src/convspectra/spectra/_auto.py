"""The registry of ways, and `auto`: which of them are tried for a block, in which order.

This is the one place that chooses. `svds` goes through the list for triplets; `logabsdet`, `solve`,
the density and the numerical rank take the cheapest direct way; `explain` prints both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from convspectra.operator import ConvOperator, independent_blocks
from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import ZERO, Request
from convspectra.spectra.ways import (
    AUGMENTED,
    CAPACITANCE,
    CIRCULANT,
    DAVIDSON,
    DENSE,
    GRAM,
    LANCZOS,
    LOBPCG,
    QR,
    TRIANGULAR,
    WAYS,
    WELL_CONDITIONED,
    Cost,
    Question,
    Way,
    circulant_fits,
    circulant_helps,
    dense_work,
    glimpsed_least,
    group_shape,
    product_flops,
)

METHODS = {
    which: ("auto", *(name for name, way in WAYS.items() if which in way.answers))
    for which in ("LM", "SM")
}
"""The names that `svds(method=...)` takes for largest and for smallest values."""
SMALL_WORK = 2e7
"""m n min(m, n) under which a dense factorization is taken at once: an SVD takes 2e8 flops, less
than the fixed costs of the iterations. A smaller limit only costs time."""
GRAM_AT_ONCE = {"LM": 1e8, "SM": 2e9}
"""min(m, n)^3 under which a Gram matrix is taken before the iterations; its eigenvalues take nine
times as many flops. Largest values have a fast iteration instead, smallest ones have not."""
DENSE_AT_ONCE = {"square": 1e10, "other": 2e9}
"""m n min(m, n) under which a dense SVD is next for a smallest value that neither factors nor a
Gram matrix have told: an iteration would take all its steps. More if M is square, for then M is
singular and no iteration converges.
"""
GRAM_LIMIT = 4096
"""The largest order of a Gram matrix: 6e11 flops for its eigenvalues, a minute on two cores."""
DENSE_WORK_LIMIT = 1e11
"""m n min(m, n) above which M is never dense: its SVD takes 1e12 flops, minutes on two cores."""
LOOSE = 0.05
"""A largest value whose upper bound is farther off, relatively, is looked for in another way."""
MANY = 12
"""min(m, n) over the number of values from which on all of them are computed: with 1,024 to 1,690
values iterations for 100 take 0.3 to 2 times as long as a dense SVD, for 300 they take 1 to 6."""
QR_AT_ONCE = 2e10
"""Flops of a QR factorization, line by line, that come before iterations: a second. At twice of it
smooth layers of several channels, which iterations do as fast, take longer."""
QR_LIMIT = 4e12
"""The same where hardly anything else serves: a layer in one dimension, of one point, or with
channels of their own. Minutes: beyond it iterations are tried, whatever the layer."""
QR_OVER_FACTORS = 2.0
"""Flops of a QR factorization, over those of other factors, up to which it is first: it works on
smaller matrices, which takes twice as long for each of them, and never fails."""
MUCH_WIDER = 8
"""Longer side over the shorter one of a linear layer from which on its Gram matrix is first for the
smallest value, too: it takes a third of the time of a QR factorization for 768 -> 50257, and as
long for 768 -> 3072, where it fails more often."""
ONE_POINT_GRAM = 2000
"""Flops per entry of a linear layer's Gram matrix up to which it comes before Lanczos, for its
largest value. Products read the whole matrix: for 768 -> 50257 Lanczos takes 2.6 times as long as
the 1,641 flops per entry, for 768 -> 3072 and its 3,264 from a third as long to as long."""
TRIAL_PRODUCTS = 200
"""Products with M that a trial of Lanczos takes, about, if it succeeds: where the factors cost less
they are first."""
LANCZOS_PRODUCTS = 1000
"""The same where it is less likely to succeed and has all its steps: where the factors of a
rectangular layer cost more, the iterations are first."""
WITHIN_REACH = 0.05
"""Least singular value that 24 steps of Lanczos see, over the largest, from which on Lanczos is
enough: it is a few times the smallest, about."""


@dataclass(frozen=True)
class Choice:
    """One line of the list: a way, when it is wanted in words, and whether it is now.

    `trial` says that other ways follow, so that few steps are enough.
    """

    way: Way
    when: str
    wanted: bool
    trial: bool = False


@dataclass(frozen=True)
class _Block:
    """A request, and what the choice depends on, each computed once."""

    request: Request

    @property
    def op(self) -> ConvOperator:
        return self.request.op

    @cached_property
    def work(self) -> float:
        return dense_work(self.op)

    @cached_property
    def small(self) -> int:
        return min(group_shape(self.op))

    @cached_property
    def dense_fits(self) -> bool:
        room = DENSE.cost(self.op, "SM").bytes <= self.request.max_bytes
        return room and self.work <= DENSE_WORK_LIMIT

    @cached_property
    def gram_fits(self) -> bool:
        return self.dense_fits and self.small <= GRAM_LIMIT

    @cached_property
    def gram_is_cheap(self) -> bool:
        limit = GRAM_AT_ONCE["LM" if self.request.largest else "SM"]
        return self.gram_fits and self.op.groups * self.small**3 <= limit

    @cached_property
    def square(self) -> bool:
        return CAPACITANCE.admits(self.op, "SM")

    @cached_property
    def one_point(self) -> bool:
        return math.prod((*self.op.geometry.input_size, *self.op.geometry.output_size)) == 1

    @cached_property
    def one_channel(self) -> bool:
        """Whether the groups are of one input or output channel: factors by a torus often fail."""
        outputs = self.op.weight.shape[0] // self.op.groups
        return min(outputs, self.op.weight.shape[1]) == 1 and self.op.groups > 1

    @cached_property
    def many(self) -> bool:
        """Whether so many values are asked for that all of them take no longer."""
        return self.dense_fits and MANY * self.request.k >= self.op.groups * self.small

    @cached_property
    def factors(self) -> float:
        """The cost of the factors of M or K in products with M; inf if they cannot be had."""
        way = CAPACITANCE if self.square else AUGMENTED
        if not way.admits(self.op, "SM"):
            return math.inf
        cost = way.cost(self.op, "SM")
        fits = cost.bytes <= self.request.max_bytes
        return cost.flops / product_flops(self.op) if fits else math.inf

    @cached_property
    def triangle(self) -> float:
        """The cost of R in products with M; inf if it cannot be had or takes minutes."""
        cost = QR.cost(self.op, "SM")
        apart = self.one_point or self.one_channel or self.op.geometry.ndim == 1
        fits = cost.bytes <= self.request.max_bytes
        fits = fits and cost.flops <= (QR_LIMIT if apart else QR_AT_ONCE)
        return cost.flops / product_flops(self.op) if fits else math.inf

    @cached_property
    def least_seen(self) -> float:
        """The least singular value that a few steps of Lanczos see, over the largest.

        Looked for only where the factors cost more than the iteration that it speaks for.
        """
        factors = self.triangle if self.one_channel else min(self.factors, self.triangle)
        if self.one_point and factors < math.inf:
            return 0.0
        return glimpsed_least(self.request) if factors > TRIAL_PRODUCTS else 0.0


def candidates(request: Request) -> list[Choice]:
    """The ways that are tried for this block, the best first."""
    wanted = [choice for choice in choices(request) if choice.wanted]
    return [choice for choice in wanted if admitted(choice.way, request)]


def choices(request: Request) -> list[Choice]:
    """All lines of the list, wanted or not, in the order of trial."""
    block = _Block(request)
    if CIRCULANT.admits(request.op, "LM"):
        return [Choice(CIRCULANT, "the symbols tell everything", True)]
    if block.work <= SMALL_WORK and block.dense_fits:
        return [Choice(DENSE, "small", True)]
    if block.many:
        near_zero = block.request.k > block.small // 2 or not request.largest
        resolved = block.gram_fits and not (near_zero and block.square)
        return [
            Choice(GRAM, "many values, and a Gram matrix resolves most", resolved),
            Choice(DENSE, "many values", True),
        ]
    return _largest(block) if request.largest else _smallest(block)


def _largest(block: _Block) -> list[Choice]:
    request = block.request
    small, entries = block.small, block.work / max(block.small, 1)
    one_point = block.one_point and 2 * small + 9 * small**3 / entries <= ONE_POINT_GRAM
    at_once = block.gram_is_cheap or (one_point and block.gram_fits)
    dear = not at_once
    helps = DAVIDSON.admits(block.op, "LM") and circulant_helps(
        block.op, request.k, request.max_bytes
    )
    return [
        Choice(GRAM, "the Gram matrix is cheap", at_once),
        Choice(DAVIDSON, "the circulant costs less than the products it saves", helps),
        Choice(LANCZOS, "always", True),
        Choice(GRAM, "the Gram matrix fits", block.gram_fits and dear),
        Choice(DENSE, "M fits", block.dense_fits),
    ]


def _smallest(block: _Block) -> list[Choice]:
    factored = block.factors < math.inf
    # Factors of a rectangular layer that cost more than the iterations come after them.
    late = not block.square and block.factors > LANCZOS_PRODUCTS
    by_qr = block.triangle < math.inf
    first = by_qr and block.triangle <= QR_OVER_FACTORS * block.factors
    direct = by_qr or (factored and not late)
    trial = direct and block.least_seen > WELL_CONDITIONED
    limit = DENSE_AT_ONCE["square" if block.square and factored else "other"]
    dense_is_cheap = block.dense_fits and (block.work <= limit or block.one_point)
    in_reach = block.least_seen > WITHIN_REACH
    room = circulant_fits(block.op, block.request.max_bytes)
    wide = block.one_point and max(block.op.shape) >= MUCH_WIDER * block.small
    gram = block.gram_is_cheap and (wide or not by_qr)
    return [
        Choice(GRAM, "the Gram matrix is cheap", gram and wide),
        Choice(LANCZOS, "well-conditioned, and factors cost more", trial, trial=True),
        Choice(QR, "line by line it costs less than other factors", first),
        Choice(CAPACITANCE, "square, and the factors fit", block.square and factored),
        Choice(QR, "line by line it is affordable", by_qr and not first and block.square),
        Choice(GRAM, "the Gram matrix is cheap", gram and not wide),
        Choice(AUGMENTED, "the factors are cheap", not block.square and not late),
        Choice(QR, "line by line it is affordable", by_qr and not first and not block.square),
        Choice(DENSE, "a dense SVD is cheap", dense_is_cheap),
        Choice(LANCZOS, "no small value seen", not trial and in_reach, trial=trial),
        Choice(DAVIDSON, "the circulant fits", room, trial=late and factored),
        Choice(AUGMENTED, "the factors fit", late and factored),
        Choice(LANCZOS, "small values seen", not in_reach, trial=trial),
        Choice(LOBPCG, "always", True),
        Choice(GRAM, "the Gram matrix fits", block.gram_fits and not gram),
        Choice(DENSE, "M fits", block.dense_fits and not dense_is_cheap),
    ]


def answer(request: Request, method: str) -> tuple[SingularTriplets, str]:
    """The triplets and the way that gave them; "auto" goes on until one is certified."""
    if method != "auto":
        return WAYS[method].run(request), method
    best: tuple[SingularTriplets, str] | None = None
    for choice in candidates(request):
        try:
            triplets = (choice.way.trial if choice.trial else choice.way.run)(request)
        except ArithmeticError:
            continue
        if best is None or triplets.converged or _nearer(triplets, best[0], request.largest):
            best = triplets, choice.way.name
        if _certified(request, triplets):
            break
    if best is None:
        raise ArithmeticError("expected finite singular values, got NaN or Inf in every way")
    return best


def admitted(way: Way, request: Request) -> bool:
    """Whether a way can be forced on this block."""
    question: Question = "LM" if request.largest else "SM"
    fits = question in way.answers and way.admits(request.op, question)
    return fits and (request.separation is None or way.separates(question))


def direct_ways(op: ConvOperator, question: Question, max_bytes: int) -> list[Way]:
    """The ways to a question that no iteration answers: those that fit, the cheapest first.

    The dense matrix is first where it is small. Where it does not fit it is last: what the others
    cannot say is then refused with its size.
    """
    for way in (CIRCULANT, TRIANGULAR):
        if question in way.answers and way.admits(op, question):
            return [way]
    if dense_work(op) <= SMALL_WORK:
        return [DENSE]
    able = [way for way in WAYS.values() if question in way.answers and way.admits(op, question)]
    costs = {way.name: way.cost(op, question) for way in able}
    fitting = [way for way in able if costs[way.name].bytes <= max_bytes]
    fitting.sort(key=lambda way: costs[way.name].flops)
    if not fitting:  # its refusal says what the least is
        return [min(able, key=lambda way: costs[way.name].bytes)]
    return fitting if DENSE in fitting else [*fitting, DENSE]


def direct_cost(op: ConvOperator, question: Question, max_bytes: int) -> tuple[Cost, str]:
    """The cost of all independent blocks by the cheapest direct ways, and their names.

    The flops of one block count once, whatever the number of places it stands at.
    """
    blocks = independent_blocks(op.T if op.transposed else op)
    ways = [direct_ways(block.op, question, max_bytes)[0] for block in blocks]
    costs = [way.cost(block.op, question) for way, block in zip(ways, blocks, strict=True)]
    total = Cost(sum(c.flops for c in costs), max((c.bytes for c in costs), default=0.0))
    return total, "+".join(sorted({way.name for way in ways}))


def _certified(request: Request, triplets: SingularTriplets) -> bool:
    """Whether no further way need be tried."""
    if not triplets.converged:
        return False
    if request.largest:
        return bool((triplets.upper <= (1 + LOOSE) * triplets.s).all())
    scale = float(torch.linalg.vector_norm(request.op.weight))
    return bool(((triplets.lower > 0) | (triplets.upper <= ZERO * scale)).all())


def _nearer(triplets: SingularTriplets, best: SingularTriplets, largest: bool) -> bool:
    """Whether Rayleigh-Ritz values are nearer to the truth than those of a way that gave up."""
    if best.converged:
        return False
    if largest:
        return bool(triplets.s.sum() > best.s.sum())
    return bool(triplets.s.sum() < best.s.sum())
