"""Which algorithm suits which layer: the one place that knows both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from convspectra.operator import (
    group_matrices,
    has_augmented,
    has_embedding,
    is_circulant,
    is_square_grid,
    polyphase,
)
from convspectra.solvers import SingularTriplets, dense_svd, gram_eigh
from convspectra.spectra._request import ZERO, Request
from convspectra.spectra.ways._augmented import augmented
from convspectra.spectra.ways._capacitance import capacitance
from convspectra.spectra.ways._circulant import circulant_triplets
from convspectra.spectra.ways._davidson import davidson_largest, davidson_smallest, davidson_trial
from convspectra.spectra.ways._lanczos import (
    WELL_CONDITIONED,
    glimpsed_least,
    lanczos_trial,
    lanczos_triplets,
)
from convspectra.spectra.ways._lobpcg import lobpcg_smallest
from convspectra.spectra.ways._preconditioned import circulant_fits, circulant_helps
from convspectra.torus import augmented_bytes, augmented_flops, border_bytes, factor_flops

METHODS = {
    "LM": ("auto", "dense", "gram", "circulant", "lanczos", "davidson"),
    "SM": (
        *("auto", "dense", "gram", "circulant", "capacitance", "augmented", "lanczos"),
        *("davidson", "lobpcg"),
    ),
}
SMALL_WORK = 2e7
"""Flops, m n min(m, n), under which a dense SVD is taken at once."""
GRAM_AT_ONCE = {"LM": 1e8, "SM": 2e9}
"""Flops, min(m, n)^3, under which a Gram matrix is taken before the iterative ways."""
DENSE_AT_ONCE = {"square": 1e10, "other": 2e9}
"""Flops, m n min(m, n), under which for a smallest value that neither factors nor a Gram matrix
have told a dense SVD is next: an iteration would take all its steps. More if it is square, for then
M is singular.
"""
GRAM_LIMIT = 4096
LOOSE = 0.05
"""A largest value whose upper bound is farther off, relatively, is looked for in another way."""
DENSE_WORK_LIMIT = 1e11
TRIAL_PRODUCTS = 200
"""Products with M that a trial of Lanczos takes, about, if it succeeds."""
LANCZOS_PRODUCTS = 1000
"""The same where it is less likely to, and has all its steps."""
WITHIN_REACH = 0.05
"""Least singular value that a few steps see, over the largest, from which on those are enough: it
is a few times the smallest, about."""

Way: TypeAlias = Callable[[Request], SingularTriplets]


def answer(request: Request, method: str) -> tuple[SingularTriplets, str]:
    """The triplets and the way that gave them; "auto" goes on until one is certified."""
    if method != "auto":
        return WAYS[method](request), method
    best: tuple[SingularTriplets, str] | None = None
    for name, way in _candidates(request):
        try:
            triplets = way(request)
        except ArithmeticError:
            continue
        if best is None or triplets.converged or _nearer(triplets, best[0], request.largest):
            best = triplets, name
        if _certified(request, triplets):
            break
    if best is None:
        raise ArithmeticError("expected finite singular values, got NaN or Inf in every way")
    return best


def admits(request: Request, method: str) -> bool:
    """Whether a method can be forced on this block."""
    op = request.op
    return {
        "capacitance": has_augmented(op) and is_square_grid(op) and op.shape[0] == op.shape[1],
        "augmented": has_augmented(op),
        "circulant": is_circulant(op),
        "davidson": not request.largest or (has_embedding(op) and request.separation is None),
    }.get(method, True)


def _candidates(request: Request) -> list[tuple[str, Way]]:
    """Ways that this block admits, the best first; some of them give an answer in any case."""
    op, groups = request.op, request.op.groups
    small, large = sorted(n // groups for n in op.shape)
    work = groups * small * small * large
    fits = 8 * groups * small * large <= request.max_bytes and work <= DENSE_WORK_LIMIT
    gram = fits and small <= GRAM_LIMIT
    limit = GRAM_AT_ONCE["LM" if request.largest else "SM"]
    at_once = gram and groups * small**3 <= limit
    if is_circulant(op):
        return [("circulant", _circulant)]
    if work <= SMALL_WORK and fits:
        return [("dense", _dense)]
    instead: dict[str, Way] = {}
    if request.largest:
        order = [
            ("gram", at_once),
            ("davidson", circulant_helps(op, request.k, request.max_bytes)),
            ("lanczos", True),
            ("gram", gram and not at_once),
            ("dense", fits),
        ]
    else:
        square, factors = admits(request, "capacitance"), _products_for_factors(request)
        late = not square and factors > LANCZOS_PRODUCTS
        dense = DENSE_AT_ONCE["square" if square and factors < math.inf else "other"]
        glimpsed = glimpsed_least(request) if factors > TRIAL_PRODUCTS else 0.0
        trial = factors < math.inf and not late and glimpsed > WELL_CONDITIONED
        if trial:
            instead["lanczos"] = lanczos_trial
        if late and factors < math.inf:
            instead["davidson"] = davidson_trial
        order = [
            ("lanczos", trial),
            ("capacitance", square and factors < math.inf),
            ("gram", at_once),
            ("augmented", not square and not late),
            ("dense", fits and work <= dense),
            ("lanczos", not trial and glimpsed > WITHIN_REACH),
            ("davidson", circulant_fits(op, request.max_bytes)),
            ("augmented", late and factors < math.inf),
            ("lanczos", glimpsed <= WITHIN_REACH),
            ("lobpcg", True),
            ("gram", gram and not at_once),
            ("dense", fits and work > dense),
        ]
    return [
        (name, instead.get(name, WAYS[name]))
        for name, wanted in order
        if wanted and admits(request, name)
    ]


def _products_for_factors(request: Request) -> float:
    """As many products with M as the factors of M or K cost; inf if they cannot be had."""
    op = request.op
    if admits(request, "capacitance"):
        layer = polyphase(op)
        needed, flops = border_bytes(layer), factor_flops(layer)
    elif has_augmented(op):
        needed, flops = augmented_bytes(op), augmented_flops(op)
    else:
        return math.inf
    product = 2 * op.weight.numel() * math.prod(op.geometry.output_size)
    return math.inf if needed > request.max_bytes else flops / product


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


def _circulant(request: Request) -> SingularTriplets:
    return circulant_triplets(request.op, request.k, request.largest)


def _dense(request: Request) -> SingularTriplets:
    return dense_svd(group_matrices(request.op, request.max_bytes), request.k, request.largest)


def _gram(request: Request) -> SingularTriplets:
    blocks = group_matrices(request.op, request.max_bytes)
    if blocks.shape[1] <= blocks.shape[2]:
        return gram_eigh(blocks, request.k, request.largest)
    return gram_eigh(blocks.mT, request.k, request.largest).transposed()


def _davidson(request: Request) -> SingularTriplets:
    return davidson_largest(request) if request.largest else davidson_smallest(request)


WAYS: dict[str, Way] = {
    "dense": _dense,
    "gram": _gram,
    "circulant": _circulant,
    "capacitance": capacitance,
    "augmented": augmented,
    "lanczos": lanczos_triplets,
    "davidson": _davidson,
    "lobpcg": lobpcg_smallest,
}
