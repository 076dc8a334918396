"""The smallest triplets by LOBPCG, down to rounding, preconditioned by the circulant."""

from __future__ import annotations

from dataclasses import replace

import torch

from convspectra.operator import ConvOperator, Product
from convspectra.solvers import SingularTriplets, Stop, lobpcg
from convspectra.spectra._request import Request, refined
from convspectra.spectra.ways._preconditioned import (
    NOISE,
    STEPS_FOR_SMALLEST,
    TYPICAL_PRODUCTS,
    bounded_below,
    layer_and_circulant,
)
from convspectra.spectra.ways._way import Cost, Question, Way, product_flops
from convspectra.torus import gram_cost


class Lobpcg(Way):
    """LOBPCG by products with M and M' in turns, for values down to rounding."""

    name = "lobpcg"
    needs = "any layer, for its smallest values"
    answers = ("SM",)

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Every block has products."""
        return True

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """The circulant's Gram matrices, and a typical number of products."""
        products = TYPICAL_PRODUCTS[question]
        flops, size = gram_cost(op)
        return Cost(flops + products * product_flops(op), size, f"{products} products")

    def run(self, request: Request) -> SingularTriplets:
        """The smallest triplets."""
        return lobpcg_smallest(request)


def lobpcg_smallest(request: Request) -> SingularTriplets:
    """The smallest triplets by products with M and M' in turns: of values down to rounding.

    With the circulant's inverse Gram matrix for a preconditioner.
    """
    tall, gram = layer_and_circulant(request)
    triplets = lobpcg(
        tall.apply,
        tall.apply_adjoint,
        tall.op.shape,
        request.k,
        stop=Stop(request.tol, request.most_steps(STEPS_FOR_SMALLEST), request.values_only),
        like=request.op.weight,
        generator=request.generator,
        precondition=None if gram is None else gram.inverse_near_zero()[0],
    )
    # M v / s of a small s is orthogonal to others only as far as rounding lets it be.
    images, s, v = refined(tall, triplets.v, largest=False)
    upper = s + (triplets.upper - triplets.s)
    matvecs = triplets.matvecs + request.k
    triplets = replace(triplets, u=images, s=s, v=v, upper=upper, matvecs=matvecs)
    return bounded_below(request, _with_null_vectors(request, triplets, tall), gram)


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
        stop=Stop(request.tol, request.most_steps(STEPS_FOR_SMALLEST)),
        like=request.op.weight,
        generator=request.generator,
    )
    return replace(
        triplets,
        u=torch.cat([null.v, triplets.u[zeros:]]),
        converged=triplets.converged and null.converged,
        matvecs=triplets.matvecs + null.matvecs,
    )
