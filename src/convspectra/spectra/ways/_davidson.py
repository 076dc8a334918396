"""Triplets by block Davidson, preconditioned by the Gram matrix of the circulant."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product, has_embedding, rounding_of
from convspectra.solvers import (
    NO_BOUND_BELOW,
    Eigenpairs,
    LinearMap,
    SingularTriplets,
    Stop,
    davidson,
)
from convspectra.spectra._request import Request, refined
from convspectra.spectra.ways._preconditioned import (
    NOISE,
    STEPS_FOR_SMALLEST,
    TYPICAL_PRODUCTS,
    bounded_below,
    layer_and_circulant,
)
from convspectra.spectra.ways._way import Cost, Question, Way, product_flops
from convspectra.torus import CirculantGram, gram_cost

DAVIDSON_STEPS = 300
"""Most block steps for largest values: a choice, ten times what layers of
docs/benchmarks/spectra.md take."""
DAVIDSON_TRIAL_STEPS = 400
"""Most block steps for the smallest values where another way is next: a choice, two thirds of
all."""
SINGLE_NORM_TOLERANCE = 1e-7
"""Least tolerance on a norm for which single precision finds the vector: eps of single precision,
since the error of a Rayleigh quotient is the square of that of its vector."""
SINGLE_RESIDUAL = 5e-6
"""Residual down to which single precision goes when double is to follow: forty eps of it; a
choice."""
MUCH_SMALLER = 10.0
"""Where the circulant's smallest eigenvalue is so many times smaller than the layer's, its inverse
amplifies functions that the layer does not know, and is regularized: a choice."""


class Davidson(Way):
    """Block Davidson on the smaller Gram matrix, with the circulant's for a preconditioner."""

    name = "davidson"
    needs = "a layer with zero padding, or circular all around, and no separation"
    answers = ("LM", "SM")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Largest values need M inside the circulant; for smallest ones a rough one will do."""
        return question == "SM" or has_embedding(op)

    def separates(self, question: Question) -> bool:
        """Not the largest values, whose bounds come from the circulant."""
        return question == "SM"

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """The circulant's Gram matrices, and a typical number of products."""
        products = TYPICAL_PRODUCTS[question]
        flops, size = gram_cost(op)
        return Cost(flops + products * product_flops(op), size, f"{products} products")

    def run(self, request: Request) -> SingularTriplets:
        """Largest values with a bound by the circulant, smallest ones with one by Lanczos."""
        return davidson_largest(request) if request.largest else davidson_smallest(request)

    def trial(self, request: Request) -> SingularTriplets:
        """The same where there is another way: not many steps."""
        return self.run(replace(request, maxiter=request.most_steps(DAVIDSON_TRIAL_STEPS)))


def davidson_largest(request: Request) -> SingularTriplets:
    """The largest triplets, with the circulant's Gram matrix for a preconditioner and for bounds.

    Single precision finds the vectors as far as it can. For a norm that is enough, since the error
    of a Rayleigh quotient is the square of that of its vector; otherwise double precision goes on.
    """
    op, k = request.op, request.k
    norm_only = k == 1 and request.values_only and request.tol >= SINGLE_NORM_TOLERANCE
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
            stop=Stop(tol, request.most_steps(DAVIDSON_STEPS), values_only),
            like=layer.op.weight,
            generator=request.generator,
            start=start,
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
    tall, gram = layer_and_circulant(request)

    def run(precondition: LinearMap | None, start: Tensor | None) -> Eigenpairs:
        return davidson(
            tall.gram,
            size,
            request.k,
            largest=False,
            stop=Stop(request.tol, request.most_steps(STEPS_FOR_SMALLEST), request.values_only),
            like=op.weight,
            generator=request.generator,
            start=start,
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
    return bounded_below(request, triplets, gram)
