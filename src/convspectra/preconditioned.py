"""Singular triplets by iterations that the circulant's inverse Gram matrix speeds up."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from convspectra.circulant import has_embedding
from convspectra.gram import CirculantGram, gram_cost
from convspectra.operator import ConvOperator
from convspectra.request import Product, Request, refined, rounding_of
from convspectra.solvers.davidson import davidson
from convspectra.solvers.gaussian import FAILURE_PROBABILITY
from convspectra.solvers.lobpcg import lobpcg
from convspectra.solvers.result import NO_BOUND_BELOW, Eigenpairs, LinearMap, SingularTriplets

STEPS = 300
STEPS_FOR_SMALLEST = 600
TRIAL_STEPS = 400
"""Most steps for the smallest values where another way is next."""
SINGLE_TOLERANCE = 1e-7
"""Least tolerance on a norm for which single precision finds the vector."""
SINGLE_RESIDUAL = 5e-6
"""Residual down to which single precision goes when double is to follow."""
PRODUCTS_SAVED = 400
"""Products with M that the circulant's Gram matrices may cost as much as, over the number of
vectors, four or more: Lanczos needs a few more products for each vector more, Davidson as many.
"""
MUCH_SMALLER = 10.0
"""Where the circulant's smallest eigenvalue is so many times smaller than G's, it says nothing."""
LOWER_FRACTIONS = (0.95, 0.7)
"""Lower bounds tried on the smallest singular value, relative to it."""
BOUND_STEPS = 800
NOISE = 1e-7
"""The left vector ``M v / s`` of a singular value this small beside the norm is noise."""


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


def davidson_largest(request: Request) -> SingularTriplets:
    """The largest triplets, with the circulant's Gram matrix for a preconditioner and for bounds.

    Single precision finds the vectors as far as it can. For a norm that is enough, since the error
    of a Rayleigh quotient is the square of that of its vector; otherwise double precision goes on.
    """
    op, k = request.op, request.k
    norm_only = k == 1 and request.values_only and request.tol >= SINGLE_TOLERANCE
    single = op.with_weight(op.weight.float())
    gram = CirculantGram(single if norm_only else op, fast=True)
    precondition, norm_bound = gram.inverse_near_norm()
    bounds = op.weight.new_tensor([norm_bound] * 2) if norm_only else gram.upper_bounds(k + 1)
    tol = 2 * request.tol if request.values_only else request.tol

    def run(layer: Product, tol: float, values_only: bool, start: Tensor | None) -> Eigenpairs:
        return davidson(
            layer.gram,
            min(op.shape),
            k,
            tol=tol,
            maxiter=request.most_steps(STEPS),
            like=layer.op.weight,
            generator=request.generator,
            start=start,
            values_only=values_only,
            precondition=precondition,
        )

    found = run(
        Product.tall(single)[0], tol if norm_only else max(tol, SINGLE_RESIDUAL), norm_only, None
    )
    products = found.products
    tall = Product.tall(op)[0] if norm_only else gram.tall
    vectors: Tensor = torch.linalg.qr(found.vectors.double().mT).Q.mT
    if not norm_only:
        found = run(tall, tol, request.values_only, vectors)
        products, vectors = products + found.products, found.vectors
    images, s, v = refined(tall, vectors, largest=True)
    others = 0.0 if k == min(op.shape) else float(bounds[k])
    triplets = SingularTriplets(
        u=images,
        s=s,
        v=v,
        lower=(s - rounding_of(op) * s[0]).clamp_min(0),
        upper=torch.maximum(bounds[:k], s),
        others=others,
        converged=found.converged,
        matvecs=2 * products + k,
        certificate="Rayleigh-Ritz values below; above, a circulant on a torus that M is part of",
    )
    return triplets.transposed() if op.shape[0] < op.shape[1] else triplets


def davidson_smallest(request: Request) -> SingularTriplets:
    """The smallest triplets, with the circulant's inverse Gram matrix for a preconditioner.

    By products with the layer's Gram matrix, in which values far below 1e-7 of the norm are lost.
    """
    op, size = request.op, min(request.op.shape)
    tall, gram = _circulant(request)

    def run(precondition: LinearMap | None, start: Tensor | None) -> Eigenpairs:
        return davidson(
            tall.gram,
            size,
            request.k,
            largest=False,
            tol=request.tol,
            maxiter=request.most_steps(STEPS_FOR_SMALLEST),
            like=op.weight,
            generator=request.generator,
            start=start,
            values_only=request.values_only,
            precondition=precondition,
            most_kept=request.max_bytes // (8 * size),
        )

    precondition, amplifies = (None, 0.0) if gram is None else gram.inverse_near_zero()
    found, in_vain = run(precondition, None), 0
    value = float(found.values[0])
    if gram is not None and not found.converged and value * amplifies > MUCH_SMALLER:
        # What the circulant amplifies most are functions that the layer does not know.
        precondition, _ = gram.inverse_near_zero(value)
        found, in_vain = run(precondition, found.vectors), found.products
    images, s, v = refined(tall, found.vectors, largest=False)
    triplets = SingularTriplets(
        u=images,
        s=s,
        v=v,
        lower=torch.zeros_like(s),
        upper=s + rounding_of(op) * found.norm**0.5,
        others=0.0,
        converged=found.converged and float(s[0]) > NOISE * request.norm_estimate,
        matvecs=2 * (in_vain + found.products) + request.k,
        certificate=NO_BOUND_BELOW,
    )
    return _bounded_below(request, triplets, gram)


def davidson_trial(request: Request) -> SingularTriplets:
    """The same where there is another way: not many steps."""
    return davidson_smallest(replace(request, maxiter=request.most_steps(TRIAL_STEPS)))


def lobpcg_smallest(request: Request) -> SingularTriplets:
    """The smallest triplets by products with M and M' in turns: of values down to rounding.

    With the circulant's inverse Gram matrix for a preconditioner.
    """
    tall, gram = _circulant(request)
    triplets = lobpcg(
        tall.apply,
        tall.apply_adjoint,
        tall.op.shape,
        request.k,
        tol=request.tol,
        maxiter=request.most_steps(STEPS_FOR_SMALLEST),
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        precondition=None if gram is None else gram.inverse_near_zero()[0],
    )
    # M v / s of a small s is orthogonal to others only as far as rounding lets it be.
    images, s, v = refined(tall, triplets.v, largest=False)
    upper = s + (triplets.upper - triplets.s)
    matvecs = triplets.matvecs + request.k
    triplets = replace(triplets, u=images, s=s, v=v, upper=upper, matvecs=matvecs)
    return _bounded_below(request, _with_null_vectors(request, triplets, tall), gram)


def _circulant(request: Request) -> tuple[Product, CirculantGram | None]:
    """The layer, M or M', and the circulant's Gram matrices if there is room for them."""
    if not circulant_fits(request.op, request.max_bytes):
        return Product.tall(request.op, fast=True)[0], None
    gram = CirculantGram(request.op, fast=True)
    return gram.tall, gram


def _bounded_below(
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


def _with_null_vectors(
    request: Request, triplets: SingularTriplets, tall: Product
) -> SingularTriplets:
    """A v / s is noise for an s near 0: the left vector is then looked for with M' in its turn."""
    zeros = int((triplets.s <= NOISE * request.norm_estimate).sum())
    if zeros == 0 or request.values_only:
        return triplets
    null = lobpcg(
        tall.apply_adjoint,
        tall.apply,
        (tall.op.shape[1], tall.op.shape[0]),
        zeros,
        tol=request.tol,
        maxiter=request.most_steps(STEPS_FOR_SMALLEST),
        like=request.op.weight,
        generator=request.generator,
    )
    return replace(
        triplets,
        u=torch.cat([null.v, triplets.u[zeros:]]),
        converged=triplets.converged and null.converged,
        matvecs=triplets.matvecs + null.matvecs,
    )
