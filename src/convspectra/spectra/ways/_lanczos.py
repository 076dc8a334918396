"""Singular triplets by Lanczos: nothing but products with M, with a bound on both sides."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product, rounding_of
from convspectra.solvers import (
    FAILURE_PROBABILITY,
    DeflationStop,
    Eigenpairs,
    LanczosStop,
    SingularTriplets,
    Stop,
    davidson,
    extreme_eigenpairs,
    lanczos,
    less,
    ritz_ends,
)
from convspectra.spectra._request import Request, refined
from convspectra.spectra.ways._way import Cost, Question, Way, product_flops

LANCZOS_ENCLOSURE = 2e-2
"""Relative width of an enclosure that Lanczos goes on for: a choice. `auto` takes a largest value
with an upper bound up to 5% above it."""
LOWER_ENCLOSURE = 0.1
"""The same for a smallest value, where every step is dear: a choice."""
LANCZOS_STEPS = 7500
"""Most steps for the largest values, where they are cheap: a choice, far above the 200 of most
layers."""
LANCZOS_STEPS_FOR_SMALLEST = 1500
"""Most steps for the smallest values: a choice. A value that takes more is looked for in another
way."""
LANCZOS_TRIAL_STEPS = 500
"""Most steps for the smallest values of a layer that seems well-conditioned: the 128 -> 256 layer
of stride 2 at 28 x 28 points takes 669 products, 335 steps (docs/benchmarks/spectra.md). Half of it
sends that layer to its factors."""
SINGLE_VECTOR_TOLERANCE = 1e-6
"""Least tolerance that vectors in single precision come up to: eight eps of single precision."""
STEPS_IN_DOUBLE = 3
"""Most block steps by which vectors that nearly do are brought there: a choice."""
GRAM_UNITS = 64
"""Rounding error of a product with a Gram matrix in eps of its norm: an allowance. Too small a one
misses the enclosures that `benchmarks.truth` checks."""
LOST_UNITS = 1024
"""Eigenvectors of a Gram matrix are known to so many eps of its norm, over the gap: an
allowance."""
PROBE_STEPS = 24
"""Steps of Lanczos that glimpse the ends of a spectrum: a choice; the two limits below go with
it."""
WELL_CONDITIONED = 0.1
"""Least singular value that a few steps see, relative to the norm, from which on Lanczos takes a
few hundred steps at most."""


TYPICAL_PRODUCTS = {"LM": 200, "SM": 1000}
"""Products with M and M' that a value takes, about: the largest and the smallest of Gaussian 64 ->
64 layers at 32 x 32 and of the well-conditioned ones that it suits."""


def glimpsed_ends(
    op: ConvOperator, steps: int, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """The least and the largest singular value that Lanczos sees from one random vector.

    Both are within the spectrum, up to `rounding_of` the layer. A least one below a tenth of the
    largest is given as 0: a Gram matrix loses digits of it. Without a generator the vector is
    always the same. Cost: M and M' on one array a step; memory of a few arrays.
    """
    least, largest = _glimpse(op, steps, generator)
    return least if least > WELL_CONDITIONED * largest else 0.0, largest


def glimpsed_least(request: Request) -> float:
    """The least singular value that a few steps of Lanczos see, over the largest, about.

    They see a small one where there are many; a single one may be missed.
    """
    least, largest = _glimpse(request.op, PROBE_STEPS, request.generator)
    return least / largest if largest > 0 else 0.0


def _glimpse(
    op: ConvOperator, steps: int, generator: torch.Generator | None
) -> tuple[float, float]:
    tall, _ = Product.tall(op, fast=True)
    generator = generator or torch.Generator(device=op.device).manual_seed(0)
    least, largest = ritz_ends(tall.gram, min(op.shape), steps, like=op.weight, generator=generator)
    return max(least, 0.0) ** 0.5, max(largest, 0.0) ** 0.5


class Lanczos(Way):
    """Products with M and M', and nothing else."""

    name = "lanczos"
    needs = "any layer"
    answers = ("LM", "SM")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Every block has products."""
        return True

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """A typical number of products; hundreds more where values lie close together."""
        products = TYPICAL_PRODUCTS[question]
        basis = 8.0 * products / 2 * min(op.shape)
        return Cost(products * product_flops(op), basis, f"{products} products")

    def run(self, request: Request) -> SingularTriplets:
        """All copies of repeated values too, by deflation."""
        return lanczos_triplets(request)

    def trial(self, request: Request) -> SingularTriplets:
        """Smallest triplets where steps are cheap: few of them, and a narrower enclosure."""
        steps = min(LANCZOS_TRIAL_STEPS, request.most_steps(LANCZOS_TRIAL_STEPS))
        return lanczos_triplets(replace(request, maxiter=steps), lower_enclosure=LANCZOS_ENCLOSURE)


def lanczos_triplets(
    request: Request, lower_enclosure: float = LOWER_ENCLOSURE
) -> SingularTriplets:
    """The largest or smallest triplets, all copies of repeated ones."""
    tall, wide = Product.tall(request.op, fast=True)
    size = min(request.op.shape)
    steps = request.most_steps(LANCZOS_STEPS if request.largest else LANCZOS_STEPS_FOR_SMALLEST)
    most_kept = request.max_bytes // (8 * size)
    enclosure = LANCZOS_ENCLOSURE if request.largest else lower_enclosure
    separation = _separation_of_squares(request)
    # Half for the pairs themselves, half for what is not seen to be beyond them.
    tol = request.tol / 2
    # Smallest values that take more steps than vectors are kept are not to be had so.
    most_steps = steps if request.largest else min(steps, most_kept)
    # Several largest vectors are found in single precision first, at half the cost of a product.
    several = request.largest and request.k > 1 and separation is None
    first, in_vain = None, 0
    if several and request.tol >= SINGLE_VECTOR_TOLERANCE:
        pairs = _largest_in_single(request, tall, tol, steps)
        first, in_vain = (pairs, 0) if pairs.converged else (None, pairs.products)
    found = extreme_eigenpairs(
        lambda excluded: lambda x: less(tall.gram(x), excluded),
        size,
        request.k,
        largest=request.largest,
        stop=DeflationStop(
            tol, most_steps, request.values_only, 2 * enclosure, separation, request.alone
        ),
        like=request.op.weight,
        generator=request.generator,
        most_kept=most_kept,
        first=first,
    )
    # Rayleigh-Ritz with M itself: the squares of the Gram matrix have lost half of the digits.
    images, s, v = refined(tall, found.vectors, request.largest)
    eps = torch.finfo(s.dtype).eps
    slack = rounding_of(tall.op) * max(found.norm, 0.0) ** 0.5
    # Squares are known to some eps of the largest.
    rounding = GRAM_UNITS * eps * found.norm * (1.0 if request.largest else -1.0)
    far = [max(bound + rounding, 0.0) ** 0.5 for bound in found.bounds]
    others = far[request.k]
    bounds = s.new_tensor(far[: request.k])
    # The Ritz values bound from the inside, Lanczos for the rest of the spectrum from the outside.
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
        matvecs=2 * (in_vain + found.products) + request.k,
        certificate=(
            f"Rayleigh-Ritz values {near}; {beyond}, the Lanczos bound, which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def _separation_of_squares(request: Request) -> float | None:
    """The separation asked for, as one of eigenvalues of the Gram matrix."""
    if request.separation is None:
        return None
    if request.largest:
        return 1 - (1 - request.separation) ** 2
    return (1 + request.separation) ** 2 - 1


def _largest_in_single(request: Request, tall: Product, tol: float, steps: int) -> Eigenpairs:
    """The largest eigenpairs of the Gram matrix by Lanczos in single precision, at half the cost.

    They have converged if their residuals, in double precision, have come down to `tol`.
    """
    single, _ = Product.tall(request.op.with_weight(request.op.weight.float()))
    size = min(request.op.shape)
    found = lanczos(
        single.gram,
        size,
        request.k,
        largest=True,
        stop=LanczosStop(tol, steps),
        like=single.op.weight,
        generator=request.generator,
        most_kept=request.max_bytes // (4 * size),
    )
    start: Tensor = torch.linalg.qr(found.vectors.double().mT).Q.mT
    pairs = davidson(
        tall.gram,
        size,
        request.k,
        stop=Stop(tol, STEPS_IN_DOUBLE),
        like=request.op.weight,
        start=start,
    )
    return replace(pairs, products=found.products + pairs.products)
