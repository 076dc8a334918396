"""The smallest singular triplets from the largest of the inverse or the pseudo-inverse."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product, rounding_of
from convspectra.solvers import (
    FAILURE_PROBABILITY,
    DeflationStop,
    ExtremeEigenpairs,
    LinearMap,
    SingularTriplets,
    extreme_eigenpairs,
    less,
)
from convspectra.spectra._request import Request
from convspectra.torus import REFINEMENT_THRESHOLD

INVERSE_RESOLUTION = 1e-6
"""Squared singular values of the inverse that are smaller than this part of its largest one are
computed apart from it."""
INVERSE_ENCLOSURE = 2e-2
"""Relative width of an enclosure of the inverse's values that Lanczos goes on for: a choice."""
INVERSE_STEPS = 300
"""Most steps with the inverse: a choice; some ten are enough for one value."""
ROUNDING_UNITS = 64
"""Rounding error of the inverse in eps of its norm: an allowance. Too small a one misses the
enclosures that `benchmarks.truth` checks."""
RESIDUAL_UNITS = 100
"""Residuals with M may be so many times the tolerance of an iteration with the inverse: a
choice."""
SOLVED = 0.1
"""Residuals of the last solves, relative to the data, in tolerances: a choice."""


class Factorization(Protocol):
    """A fixed X near M^+, and solves that are refined, for an M with no more columns than rows."""

    def apply_inverse(self, y: Tensor) -> Tensor:
        """X y for a batch."""

    def apply_inverse_adjoint(self, x: Tensor) -> Tensor:
        """X' x for a batch."""

    def solve(self, y: Tensor, rtol: float) -> Tensor:
        """M^+ y for a batch."""

    def solve_adjoint(self, x: Tensor, rtol: float) -> Tensor:
        """M^+' x for a batch."""

    @property
    def error_bound(self) -> float:
        """``||M^+|| <= ||X|| / (1 - error_bound)``, and so for every singular value."""

    def logabsdet(self) -> Tensor:
        """The sum of the logarithms of the singular values of M."""


def smallest_by_inverse(
    request: Request, op: ConvOperator, factorization: Factorization
) -> SingularTriplets:
    """The smallest of M from the largest of the inverse.

    Values that are lost in the rounding of larger ones of the inverse are looked for again,
    with those found projected out.
    """
    # The largest eigenvalues of the inverse Gram matrix, all copies, those found deflated.
    found = largest_of_inverse(
        request,
        lambda y: factorization.apply_inverse(y.reshape(-1, *op.output_shape)).flatten(1),
        lambda x: factorization.apply_inverse_adjoint(x.reshape(-1, *op.input_shape)).flatten(1),
        op.shape[::-1],
    )
    # One step of inverse iteration for each side: what is left is small beside s, not the norm.
    rtol = max(REFINEMENT_THRESHOLD, SOLVED * request.tol)
    x = found.vectors.reshape(-1, *op.input_shape)
    u = orthonormal(factorization.solve_adjoint(x, rtol).flatten(1))
    v = orthonormal(factorization.solve(u.reshape(-1, *op.output_shape), rtol).flatten(1))
    # The solves invert M (I + R): a bound on ||R|| bounds what they say of M.
    wrong = factorization.error_bound
    if not math.isfinite(wrong) or wrong >= 0.5:
        raise ArithmeticError("the solves with M leave residuals as large as their data")
    product = Product(op)
    images = product.apply(v)
    slack = rounding_of(op) * request.norm_estimate
    upper = torch.linalg.svdvals(images).flip(0) + slack
    s = torch.minimum(torch.linalg.vector_norm(images, dim=1), upper)
    forward = torch.linalg.vector_norm(images - s[:, None] * u, dim=1)
    adjoint = torch.linalg.vector_norm(product.apply_adjoint(u) - s[:, None] * v, dim=1)
    allowed = (
        request.tol**0.5 if request.values_only else RESIDUAL_UNITS * request.tol
    ) * s + slack
    converged = found.converged and bool((adjoint <= allowed).all())
    # The inverse is known to some eps of its norm, whichever of its values is asked for.
    rounding = ROUNDING_UNITS * torch.finfo(s.dtype).eps * found.bounds[0]
    below = [(b + rounding) ** -0.5 * (1 - 2 * wrong) if b > 0 else math.inf for b in found.bounds]
    lower = torch.tensor(below[: request.k], dtype=s.dtype, device=s.device)
    order = torch.argsort(s, stable=True)
    return SingularTriplets(
        u=u[order],
        s=s[order],
        v=v[order],
        lower=torch.minimum(lower, (s[order] - slack).clamp_min(0)),
        upper=upper,
        others=below[request.k],
        converged=converged,
        matvecs=2 * found.products,
        certificate=(
            "Rayleigh-Ritz values of M above; below, the Lanczos bound for the inverse and a "
            f"bound on the error of its solves, {wrong:.0e}, each of which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
        logabsdet=float(factorization.logabsdet()),
        residuals=torch.hypot(forward, adjoint)[order],
    )


def largest_of_inverse(
    request: Request, inverse: LinearMap, inverse_adjoint: LinearMap, shape: tuple[int, int]
) -> ExtremeEigenpairs:
    """The largest eigenpairs of X X', X an inverse of this shape, by Lanczos with deflation."""

    def deflated(v: Tensor) -> LinearMap:
        # Taken out on both sides: the values left may be lost in the rounding of those found.
        u = orthonormal(inverse_adjoint(v)) if len(v) else v.new_zeros(0, shape[1])
        return lambda x: less(inverse(less(inverse_adjoint(less(x, v)), u)), v)

    return extreme_eigenpairs(
        deflated,
        shape[0],
        request.k,
        largest=True,
        stop=DeflationStop(
            request.tol,
            request.most_steps(INVERSE_STEPS),
            request.values_only,
            enclosure=INVERSE_ENCLOSURE,
            separation=request.separation and 1 - (1 + request.separation) ** -2,
            alone=request.alone,
        ),
        like=request.op.weight,
        generator=request.generator,
        full_orthogonalization=True,
        resolution=INVERSE_RESOLUTION,
    )


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows along these, which are solutions of any size."""
    q, r = torch.linalg.qr((rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).mT)
    return (q * r.diagonal().sign()).mT
