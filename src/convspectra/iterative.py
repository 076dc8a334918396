"""Singular triplets from products with M: Lanczos, and LOBPCG with the circulant's help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from convspectra.circulant import CirculantEmbedding
from convspectra.gram import GramPreconditioner
from convspectra.request import Product, Request, rounding_of
from convspectra.solvers.lanczos import GUARD_VECTORS, Eigenpairs, lanczos
from convspectra.solvers.lanczos_bound import FAILURE_PROBABILITY
from convspectra.solvers.lobpcg import lobpcg
from convspectra.solvers.result import SingularTriplets
from convspectra.solvers.simple_lanczos import extreme_eigenpair

ENCLOSURE = 1e-2
"""Relative width of an enclosure that Lanczos goes on for, within reason."""
LOWER_ENCLOSURE = 0.1
"""The same for a smallest value, where every step is dear."""
LARGEST_BASIS = 800
"""Most vectors of a basis that is kept orthogonal."""
SIMPLE_STEPS = 5
"""Steps without reorthogonalisation that one of `maxiter` stands for."""
PRECONDITIONER_SHARE = 0.5
"""The preconditioner for sigma_max^2 has its pole above the circulant's norm, at this share of the
distance from there to the Rayleigh quotient of the circulant's top mode."""
PRECONDITIONER_GAP = 1e-3
"""That distance is taken for at least so much of the squared norm."""
GRAM_UNITS = 64
"""Rounding error of a Gram matrix in eps of its norm."""
LOWER_FRACTIONS = (0.95, 0.8, 0.5)
"""Lower bounds tried on a singular value of LOBPCG, relative to it."""
BOUND_STEPS = 80
NOISE = 1e-9
"""The left vector ``M v / s`` of a singular value this small beside the norm is noise."""
ZERO = 1e-11
"""A smallest singular value with an upper bound of this much of the norm of M counts as 0."""


def lanczos_triplets(request: Request) -> SingularTriplets:
    """The largest triplets, or the smallest one, from products with M alone."""
    if not request.alone:
        return _block_lanczos(request)
    tall, wide = Product.tall(request.op)
    size = min(request.op.shape)
    pair = extreme_eigenpair(
        tall.gram,
        size,
        request.largest,
        tol=request.tol,
        maxiter=max(2, min(request.maxiter * SIMPLE_STEPS, request.max_bytes // (8 * size))),
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        enclosure=2 * (ENCLOSURE if request.largest else LOWER_ENCLOSURE),
    )
    u = tall.apply(pair.vector)
    s = torch.linalg.vector_norm(u, dim=1)
    u, v = u / s.clamp_min(torch.finfo(s.dtype).tiny), pair.vector
    slack = rounding_of(tall.op) * pair.norm**0.5
    far = torch.full_like(s, max(pair.bound, 0.0) ** 0.5)
    near, far = ("below", far + slack) if request.largest else ("above", far - slack)
    lower, upper = (s - slack, far) if request.largest else (far, s + slack)
    # A Gram matrix has lost what is below sqrt(eps) of its norm.
    lost = float(s) ** 2 <= GRAM_UNITS * torch.finfo(s.dtype).eps * pair.norm / request.tol**0.5
    return SingularTriplets(
        u=v if wide else u,
        s=s,
        v=u if wide else v,
        lower=torch.minimum(lower, s).clamp_min(0),
        upper=torch.maximum(upper, s),
        others=math.inf if request.largest else 0.0,
        converged=pair.converged and (request.largest or not lost),
        matvecs=2 * pair.products + 1,
        certificate=(
            f"Rayleigh quotient {near}; on the other side, the Lanczos bound, which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def _block_lanczos(request: Request) -> SingularTriplets:
    """The largest triplets, repeated or not."""
    tall, wide = Product.tall(request.op)
    size = min(request.op.shape)
    pairs = largest_pairs(request, tall.gram, size, request.k, enclosure=ENCLOSURE, block=None)
    images, s, v = _refined(tall, pairs)
    slack = rounding_of(tall.op) * float(s[0])
    # Squares are known to some eps of the largest.
    rounding = GRAM_UNITS * torch.finfo(s.dtype).eps * float(s[0]) ** 2
    bounds = [max(bound, 0.0) + rounding for bound in pairs.bounds]
    upper = torch.tensor(bounds[: request.k], dtype=s.dtype, device=s.device)
    return SingularTriplets(
        u=v if wide else images,
        s=s,
        v=images if wide else v,
        lower=(s - slack).clamp_min(0),
        upper=torch.maximum(upper.sqrt(), s) + slack,
        others=math.sqrt(bounds[request.k]) + slack,
        converged=pairs.converged,
        matvecs=2 * pairs.products + request.k,
        certificate=(
            "Rayleigh-Ritz values below; above, the Lanczos bound, which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def largest_pairs(
    request: Request,
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    *,
    enclosure: float,
    block: int | None,
    excluded: Tensor | None = None,
) -> Eigenpairs:
    """Largest eigenpairs of a Gram operator, within a basis of `max_bytes`."""
    width = block or count + GUARD_VECTORS
    room = min(LARGEST_BASIS, request.max_bytes // (8 * size))
    return lanczos(
        product,
        size,
        count,
        tol=request.tol,
        maxiter=max(2, min(request.maxiter, room // width)),
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        enclosure=enclosure,
        separation=None if request.separation is None else 1 - (1 - request.separation) ** 2,
        block=block,
        excluded=excluded,
    )


def lobpcg_largest(request: Request) -> SingularTriplets:
    """The largest triplets, preconditioned and bounded by the circulant."""
    op, embedding = request.op, CirculantEmbedding(request.op)
    bounds = embedding.largest_bounds(request.k + 1) if request.k > 1 else []
    norms = embedding.norm_bounds()
    bounds = bounds or [min(norms)]
    # The iteration is with vectors on the side that has fewer channels on the torus.
    outputs = embedding.fewer_outputs
    product = Product(op.T if outputs else op)
    embed = embedding.embed_output if outputs else embedding.embed_input
    restrict = embedding.restrict_output if outputs else embedding.restrict_input
    mode = embedding.top_mode()
    mode = op.apply(mode) if outputs else mode
    quotient = product.apply(mode).square().sum() / mode.square().sum().clamp_min(1e-300)
    gap = max(norms[0] ** 2 - float(quotient), PRECONDITIONER_GAP * norms[0] ** 2)
    inverse = embedding.inverse_of_gap(norms[0] ** 2 + PRECONDITIONER_SHARE * gap)

    def precondition(x: Tensor) -> Tensor:
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-300)
        on_torus = embed(x.float().reshape(-1, *product.op.input_shape))
        return restrict(embedding.multiply(inverse, on_torus)).flatten(1).to(x)

    triplets = lobpcg(
        product.apply,
        product.apply_adjoint,
        product.op.shape,
        request.k,
        largest=True,
        tol=request.tol,
        maxiter=request.maxiter,
        like=request.op.weight,
        generator=request.generator,
        values_only=request.values_only,
        precondition=precondition,
        guard=0 if request.k == 1 else GUARD_VECTORS,
    )
    if outputs:
        triplets = triplets.transposed()
    distinct = bool((triplets.s > NOISE * norms[0]).all())
    return replace(
        triplets,
        converged=triplets.converged and distinct,
        upper=torch.maximum(triplets.s.new_tensor(bounds[: request.k]), triplets.s),
        others=bounds[request.k] if len(bounds) > request.k else math.inf,
        certificate="Rayleigh-Ritz values below; above, those of the circulant on a torus",
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


def _refined(tall: Product, pairs: Eigenpairs) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (u, s, v), descending, from Rayleigh-Ritz with M itself in the span of vectors."""
    images = tall.apply(pairs.vectors)
    left, s, right = torch.linalg.svd(images, full_matrices=False)
    return right, s, left.mT @ pairs.vectors
