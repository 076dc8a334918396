"""Singular triplets from products with M: Lanczos, and LOBPCG with the circulant's help."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from convspectra.circulant import CirculantEmbedding, has_embedding
from convspectra.gram import GramPreconditioner
from convspectra.operator import ConvOperator
from convspectra.request import Product, Request, rounding_of
from convspectra.solvers.deflation import extreme_eigenpairs, less
from convspectra.solvers.gaussian import FAILURE_PROBABILITY
from convspectra.solvers.lanczos import lanczos
from convspectra.solvers.lobpcg import lobpcg
from convspectra.solvers.result import SingularTriplets

ENCLOSURE = 1e-2
"""Relative width of an enclosure that Lanczos goes on for, within reason."""
LOWER_ENCLOSURE = 0.1
"""The same for a smallest value, where every step is dear."""
STEPS = 25
"""Steps of Lanczos that one of `maxiter` stands for, for the largest values; they are cheap."""
STEPS_FOR_SMALLEST = 5
SINGLE_TOLERANCE = 1e-7
"""Least tolerance on a norm for which single precision finds the vector."""
PRODUCTS_SAVED = 80
"""Products with M that the circulant's norm may cost as much as."""
GRAM_UNITS = 64
"""Rounding error of a Gram matrix in eps of its norm."""
LOST_UNITS = 1024
"""Eigenvectors of a Gram matrix are known to so many eps of its norm, over the gap."""
LOWER_FRACTIONS = (0.95, 0.8, 0.5)
"""Lower bounds tried on a singular value of LOBPCG, relative to it."""
BOUND_STEPS = 400
NOISE = 1e-7
"""The left vector ``M v / s`` of a singular value this small beside the norm is noise."""
ZERO = 1e-11
"""A smallest singular value with an upper bound of this much of the norm of M counts as 0."""


def lanczos_triplets(request: Request) -> SingularTriplets:
    """The largest or smallest triplets from products with M; one norm by the circulant if cheap."""
    if not request.largest:
        return _lanczos(request, LOWER_ENCLOSURE)
    if not request.alone or not _bound_is_cheap(request.op):
        return _lanczos(request, ENCLOSURE)
    bound = CirculantEmbedding(request.op).norm_bound()
    if request.values_only and request.tol >= SINGLE_TOLERANCE:
        triplets = _norm_by_single_precision(request)
        if triplets.converged:
            return _bounded_by_circulant(triplets, bound)
    return _bounded_by_circulant(_lanczos(request, math.inf), bound)


def _lanczos(request: Request, enclosure: float) -> SingularTriplets:
    tall, wide = Product.tall(request.op)
    size = min(request.op.shape)
    steps = request.maxiter * (STEPS if request.largest else STEPS_FOR_SMALLEST)
    separation = request.separation
    if separation is not None:
        separation = 1 - (1 - separation) ** 2 if request.largest else (1 + separation) ** 2 - 1
    found = extreme_eigenpairs(
        lambda excluded: lambda x: less(tall.gram(x), excluded),
        size,
        request.k,
        largest=request.largest,
        tol=request.tol,
        maxiter=min(steps, request.max_bytes // (8 * size)),
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        alone=request.alone,
        enclosure=2 * enclosure,
        separation=separation,
    )
    images, s, v = _refined(tall, found.vectors, request.largest)
    eps = torch.finfo(s.dtype).eps
    slack = rounding_of(tall.op) * max(found.norm, 0.0) ** 0.5
    # Squares are known to some eps of the largest.
    rounding = GRAM_UNITS * eps * found.norm * (1.0 if request.largest else -1.0)
    far = [max(bound + rounding, 0.0) ** 0.5 for bound in found.bounds]
    others = far[request.k]
    bounds = s.new_tensor(far[: request.k])
    if request.largest:
        lower, upper = s - slack, torch.maximum(bounds, s) + slack
    else:
        lower, upper = torch.minimum(bounds, s) - slack, s + slack
    # A Gram matrix has lost what is below sqrt(eps) of its norm.
    lost = float(s.amin()) ** 2 <= LOST_UNITS * eps * found.norm / request.tol**0.5
    near, beyond = ("below", "above") if request.largest else ("above", "below")
    return SingularTriplets(
        u=v if wide else images,
        s=s,
        v=images if wide else v,
        lower=lower.clamp_min(0),
        upper=upper,
        others=others + slack if request.largest else max(others - slack, 0.0),
        converged=found.converged and (request.largest or not lost),
        matvecs=2 * found.products + request.k,
        certificate=(
            f"Rayleigh-Ritz values {near}; {beyond}, the Lanczos bound, which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def _norm_by_single_precision(request: Request) -> SingularTriplets:
    """The largest triplet: its vector by Lanczos in single precision, its value in double.

    The error of a Rayleigh quotient is the square of that of its vector.
    """
    op, size = request.op, min(request.op.shape)
    tall, wide = Product.tall(op)
    single, _ = Product.tall(op.with_weight(op.weight.float()))
    pair = lanczos(
        single.gram,
        size,
        1,
        largest=True,
        tol=request.tol,
        maxiter=min(request.maxiter * STEPS, request.max_bytes // (4 * size)),
        like=single.op.weight,
        generator=request.generator,
        values_only=True,
    )
    u, s, v = _refined(tall, pair.vectors.double(), largest=True)
    residual = torch.linalg.vector_norm(tall.apply_adjoint(u) - s[:, None] * v)
    allowed = request.tol**0.5 * s
    return SingularTriplets(
        u=v if wide else u,
        s=s,
        v=u if wide else v,
        lower=(s - rounding_of(op) * s).clamp_min(0),
        upper=torch.full_like(s, math.inf),
        others=math.inf,
        converged=pair.converged and bool((residual <= allowed).all()),
        matvecs=2 * pair.products + 2,
        certificate="Rayleigh quotient below; no bound above",
    )


def _bound_is_cheap(op: ConvOperator) -> bool:
    """Whether the symbols cost no more than the products with M of a Lanczos bound."""
    if not has_embedding(op):
        return False
    product = 2.0 * op.weight.numel() * math.prod(op.geometry.output_size)
    return CirculantEmbedding(op).flops <= PRODUCTS_SAVED * product


def _bounded_by_circulant(triplets: SingularTriplets, bound: float) -> SingularTriplets:
    return replace(
        triplets,
        upper=triplets.s.clamp_min(bound),
        others=bound,
        certificate="Rayleigh quotient below; above, the norm of the circulant on a torus",
    )


def lobpcg_smallest(request: Request) -> SingularTriplets:
    """The smallest triplets, with the circulant's Gram matrix for a preconditioner."""
    preconditioner = GramPreconditioner(request.op)
    tall = preconditioner.tall
    triplets = lobpcg(
        tall.apply,
        tall.apply_adjoint,
        tall.op.shape,
        request.k,
        tol=request.tol,
        maxiter=request.maxiter,
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        precondition=preconditioner.apply,
    )
    triplets = _with_null_vectors(request, triplets, tall)
    if request.op.shape[0] < request.op.shape[1]:
        triplets = triplets.transposed()
    smallest, matvecs = float(triplets.s[0]), triplets.matvecs
    if not triplets.converged or not float(triplets.upper[0]) < smallest * (1 + 1e-6):
        return triplets
    for fraction in LOWER_FRACTIONS:
        holds, count = preconditioner.is_above(
            (fraction * smallest) ** 2, BOUND_STEPS, request.generator
        )
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
        maxiter=request.maxiter,
        like=request.op.weight,
        generator=request.generator,
    )
    return replace(
        triplets,
        u=torch.cat([null.v, triplets.u[zeros:]]),
        converged=triplets.converged and null.converged,
        matvecs=triplets.matvecs + null.matvecs,
    )


def _refined(tall: Product, vectors: Tensor, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (u, s, v) from Rayleigh-Ritz with M itself in the span of orthonormal rows."""
    images = tall.apply(vectors)
    left, s, right = torch.linalg.svd(images, full_matrices=False)
    if not largest:
        left, s, right = left.flip(1), s.flip(0), right.flip(0)
    return right, s, left.mT @ vectors
