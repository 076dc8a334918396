"""The common part of Davidson and LOBPCG: the circulant's Gram matrices, and the bound below."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from convspectra.operator import ConvOperator, Product, has_embedding
from convspectra.solvers import FAILURE_PROBABILITY, SingularTriplets
from convspectra.spectra._request import Request
from convspectra.torus import CirculantGram, gram_cost

STEPS_FOR_SMALLEST = 600
"""Most block steps for smallest values: the smooth 64 -> 128 layer of stride 2 at 28 x 28 points
takes 1,091 products, some 540 steps (docs/benchmarks/spectra.md). Half of it is not enough."""
TYPICAL_PRODUCTS = {"LM": 50, "SM": 400}
"""Products with M and M' that a value takes, about: 51 to 53 for the largest of 64 -> 64, 3 x 3 at
32 x 32 and 56 x 56 points (docs/benchmarks/spectra.md). Only `explain` shows them."""
PRODUCTS_SAVED = 400
"""Products with M that the circulant's Gram matrices may cost as much as, over the number of
vectors, four or more: Lanczos needs a few more products for each vector more, Davidson as many.
"""
LOWER_FRACTIONS = (0.95, 0.7)
"""Lower bounds tried on the smallest singular value, relative to it: a choice. The second is for
layers where 800 steps do not prove the first."""
BOUND_STEPS = 800
"""Most Lanczos steps for that proof: 548 prove 0.95 of the smallest value of the first layer of a
thin ResNet-50 at 224 x 224 points, 455 prove half of it. With 400 it has no bound below."""
NOISE = 1e-7
"""The left vector ``M v / s`` of a singular value this small beside the norm is noise: its error is
eps over that part, 2e-9 here; at half of it twice as much."""


def circulant_helps(op: ConvOperator, k: int, max_bytes: int) -> bool:
    """Whether the circulant's Gram matrices save more than they cost, for k largest triplets."""
    if not has_embedding(op):
        return False
    product = 2.0 * op.weight.numel() * math.prod(op.geometry.output_size)
    saved = max(k, 4) * gram_cost(op)[0] <= PRODUCTS_SAVED * product
    return saved and circulant_fits(op, max_bytes)


def circulant_fits(op: ConvOperator, max_bytes: int) -> bool:
    """Whether there is room for the circulant's Gram matrices."""
    return gram_cost(op)[1] <= max_bytes


def layer_and_circulant(request: Request) -> tuple[Product, CirculantGram | None]:
    """The layer, M or M', and the circulant's Gram matrices if there is room for them."""
    if not circulant_fits(request.op, request.max_bytes):
        return Product.tall(request.op, fast=True)[0], None
    gram = CirculantGram(request.op, fast=True)
    return gram.tall, gram


def bounded_below(
    request: Request, triplets: SingularTriplets, gram: CirculantGram | None
) -> SingularTriplets:
    """With a bound below, if they have converged and one is to be had."""
    if request.op.shape[0] < request.op.shape[1]:
        triplets = triplets.transposed()
    smallest, matvecs = float(triplets.s[0]), triplets.matvecs
    resolved = float(triplets.upper[0]) < smallest * (1 + 1e-6)
    if gram is None or not triplets.converged or not resolved:
        return triplets
    for fraction in LOWER_FRACTIONS:
        holds, count = gram.is_above((fraction * smallest) ** 2, BOUND_STEPS, request.generator)
        matvecs += count
        if holds:
            return replace(
                triplets,
                lower=torch.full_like(triplets.s, fraction * smallest),
                others=fraction * smallest,
                matvecs=matvecs,
                certificate=(
                    "Rayleigh-Ritz values above; below, Lanczos on the shifted Gram matrix, "
                    f"which fails with probability {FAILURE_PROBABILITY:.0e}"
                ),
            )
    return replace(triplets, matvecs=matvecs)
