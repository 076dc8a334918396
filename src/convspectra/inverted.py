"""The smallest singular triplets from the largest of the inverse, by the capacitance method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.capacitance import CapacitanceFactorization
from convspectra.iterative import ENCLOSURE, largest_pairs
from convspectra.request import Product, Request, rounding_of
from convspectra.solvers.lanczos_bound import FAILURE_PROBABILITY
from convspectra.solvers.result import SingularTriplets

INVERSE_RESOLUTION = 1e-6
"""Squared singular values of the inverse that are smaller than this part of its largest one are
computed apart from it."""
ROUNDING_UNITS = 64
RESIDUAL_UNITS = 100
"""Residuals with M may be so many times the tolerance of an iteration with the inverse."""


def capacitance(request: Request) -> SingularTriplets:
    """The smallest from the largest of the inverse.

    Values that are lost in the rounding of larger ones of the inverse are looked for again,
    with those found projected out.
    """
    op = request.op
    factorization = CapacitanceFactorization(op, request.max_bytes)
    u, v = (op.weight.new_zeros(0, n) for n in op.shape)
    bounds: list[float] = []
    products, converged = 0, True

    def inverse_gram(x: Tensor) -> Tensor:
        x = _less(x, v)
        y = factorization.solve_adjoint(x.reshape(-1, *op.input_shape)).flatten(1)
        y = _less(y, u)
        return _less(factorization.solve(y.reshape(-1, *op.output_shape)).flatten(1), v)

    while len(v) < request.k:
        count = request.k - len(v)
        pairs = largest_pairs(
            request,
            inverse_gram,
            op.shape[1],
            count,
            enclosure=ENCLOSURE,
            block=1 if request.alone else None,
            excluded=v,
        )
        resolved = int((pairs.values >= INVERSE_RESOLUTION * pairs.values[0]).sum())
        products += pairs.products
        if resolved < count and not pairs.converged:
            resolved = count
        converged = converged and (pairs.converged or resolved < count)
        bounds = bounds[: len(v)] + pairs.bounds[: resolved if resolved < count else None]
        found = pairs.vectors[:resolved]
        images = factorization.solve_adjoint(found.reshape(-1, *op.input_shape)).flatten(1)
        turn, _, directions = torch.linalg.svd(images, full_matrices=False)
        u, v = torch.cat([u, directions]), torch.cat([v, turn.mT @ found])
    # The solves invert M (I + R): a bound on ||R|| bounds what they say of M.
    wrong = factorization.error_bound
    if not math.isfinite(wrong) or wrong >= 0.5:
        raise ArithmeticError("the solves with M leave residuals as large as their data")
    adjoint = op.apply_adjoint(u.reshape(-1, *op.output_shape)).flatten(1)
    images = Product(op).apply(v)
    slack = rounding_of(op) * request.norm_estimate
    upper = torch.linalg.svdvals(images).flip(0) + slack
    s = torch.minimum(torch.linalg.vector_norm(adjoint, dim=1), upper)
    residual = torch.linalg.vector_norm(images - s[:, None] * u, dim=1)
    allowed = (
        request.tol**0.5 if request.values_only else RESIDUAL_UNITS * request.tol
    ) * s + slack
    converged = converged and bool((residual <= allowed).all())
    # The inverse is known to some eps of its norm, whichever of its values is asked for.
    rounding = ROUNDING_UNITS * torch.finfo(s.dtype).eps * bounds[0]
    below = [(b + rounding) ** -0.5 * (1 - 2 * wrong) if b > 0 else math.inf for b in bounds]
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
        matvecs=2 * products,
        certificate=(
            "Rayleigh-Ritz values of M above; below, the Lanczos bound for the inverse and a "
            f"bound on the error of its solves, {wrong:.0e}, each of which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def _less(rows: Tensor, found: Tensor) -> Tensor:
    """Rows less their components along orthonormal ones."""
    return torch.addmm(rows, rows @ found.mT, found, alpha=-1) if len(found) else rows
