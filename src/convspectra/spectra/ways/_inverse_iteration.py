"""The smallest singular triplets from the largest of the inverse or the pseudo-inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product, rounding_of
from convspectra.solvers import (
    FAILURE_PROBABILITY,
    DeflationStop,
    ExtremeEigenpairs,
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
    found = _largest_of_inverse(request, op, factorization)
    # One step of inverse iteration for each side: what is left is small beside s, not the norm.
    rtol = max(REFINEMENT_THRESHOLD, SOLVED * request.tol)
    u = _solved(partial(factorization.solve_adjoint, rtol=rtol), found.vectors, op.input_shape)
    v = _solved(partial(factorization.solve, rtol=rtol), u, op.output_shape)
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


def _largest_of_inverse(
    request: Request, op: ConvOperator, factorization: Factorization
) -> ExtremeEigenpairs:
    """The largest eigenpairs of ``(M'M)^{-1}`` by Lanczos with deflation."""
    inverse, inverse_adjoint = factorization.apply_inverse, factorization.apply_inverse_adjoint

    def deflated(v: Tensor) -> Callable[[Tensor], Tensor]:
        # Taken out on both sides: the values left may be lost in the rounding of those found.
        u = _solved(inverse_adjoint, v, op.input_shape) if len(v) else v.new_zeros(0, op.shape[0])

        def inverse_gram(x: Tensor) -> Tensor:
            y = inverse_adjoint(less(x, v).reshape(-1, *op.input_shape)).flatten(1)
            return less(inverse(less(y, u).reshape(-1, *op.output_shape)).flatten(1), v)

        return inverse_gram

    return extreme_eigenpairs(
        deflated,
        op.shape[1],
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
        like=op.weight,
        generator=request.generator,
        full_orthogonalization=True,
        resolution=INVERSE_RESOLUTION,
    )


def _solved(solve: Callable[[Tensor], Tensor], rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Orthonormal rows along the solutions for these right-hand sides."""
    solutions = solve(rows.reshape(-1, *shape)).flatten(1)
    q, r = torch.linalg.qr(
        (solutions / torch.linalg.vector_norm(solutions, dim=1, keepdim=True)).mT
    )
    return (q * r.diagonal().sign()).mT
