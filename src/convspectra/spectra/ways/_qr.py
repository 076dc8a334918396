"""The smallest singular values from a QR factorization, line by line along one axis.

A layer is block-banded in the lines of an axis, and so is the triangle R of M = QR. Nothing but R
is kept: the singular values of M are those of R, and the eigenvectors of ``R^{-1} R'^{-1}`` are its
right singular vectors. Householder's transformations are backward stable: a singular layer has a
null vector to working precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    Lines,
    Product,
    best_lines,
    check_bytes,
    derived_operator,
    elimination_flops,
    rounding_of,
)
from convspectra.solvers import (
    FAILURE_PROBABILITY,
    BandedTriangle,
    ExtremeEigenpairs,
    SingularTriplets,
    joined_triplets,
)
from convspectra.spectra._request import ZERO, Request, refined
from convspectra.spectra.ways._inverse_iteration import (
    RESIDUAL_UNITS,
    ROUNDING_UNITS,
    largest_of_inverse,
    orthonormal,
)
from convspectra.spectra.ways._way import Cost, Question, Way

UNRESOLVED = 0.25
"""Rounding over the smallest singular value from which on it has no lower bound: a choice."""
PART_BYTES = 2**28
"""Bytes of the triangles of the groups that are searched together: a choice. A smaller one makes
searches of their own for more groups; a larger one takes memory."""


class Qr(Way):
    """R of a QR factorization of M, or of M' if M is wide."""

    name = "qr"
    needs = "room for a triangle, banded in the lines of an axis, within max_bytes"
    answers = ("SM",)

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Every block has lines, a linear layer one."""
        return True

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """The elimination of every line, and the rows of the triangle."""
        lines = best_lines(op)
        return Cost(op.groups * elimination_flops(lines), op.groups * _triangle_bytes(lines))

    def run(self, request: Request) -> SingularTriplets:
        """Some groups after the others, until there are zeros enough; else all at once."""
        op, k, size = request.op, request.k, self.cost(request.op, "SM").bytes
        check_bytes("the triangle", math.ceil(size), request.max_bytes)
        at_once = max(1, min(op.groups, int(PART_BYTES * op.groups // size)))
        scale = ZERO * float(torch.linalg.vector_norm(op.weight))
        heads, zeros = range(0, op.groups, at_once), 0
        regular: dict[int, _Inverse] = {}
        found: dict[int, SingularTriplets] = {}

        def searched(first: int, inverse: _Inverse) -> SingularTriplets:
            part = inverse.op
            return _smallest(replace(request, op=part, k=min(k, min(part.shape))), [inverse])

        for first in heads:
            part = _groups(op, first, min(at_once, op.groups - first))
            inverse = _Inverse(part, request.norm_estimate)
            if inverse.is_singular(request.generator):
                found[first] = searched(first, inverse.damped())
                zeros += int((found[first].upper <= scale).sum())
            else:
                regular[first] = inverse
            if zeros >= k:
                return _joined(found, request)
        if not found:
            return _smallest(request, list(regular.values()))
        found |= {first: searched(first, inverse) for first, inverse in regular.items()}
        return _joined(found, request)


def _joined(found: dict[int, SingularTriplets], request: Request) -> SingularTriplets:
    """The smallest triplets of the layer from those of the groups that begin at these."""
    rows, columns = (n // request.op.groups for n in request.op.shape)
    places = [(first * rows, first * columns) for first in found]
    return joined_triplets(list(found.values()), places, request.k, request.op.shape)


def _groups(op: ConvOperator, first: int, count: int) -> ConvOperator:
    """Some of the groups, as a layer."""
    if count == op.groups:
        return op
    outputs = op.weight.shape[0] // op.groups
    weight = op.weight[first * outputs : (first + count) * outputs]
    return derived_operator(weight, op.geometry, count)


def _triangle_bytes(lines: Lines) -> float:
    return 8.0 * lines.count * lines.reach * lines.width**2


class _Inverse:
    """Solves with R, and with R', of vectors of the shorter side."""

    def __init__(
        self, op: ConvOperator, norm: float, *, adjoint: bool = False, damping: float = 0.0
    ) -> None:
        self.op, self._norm = op, norm
        self._lines = lines = best_lines(op, adjoint=adjoint)
        self.triangle = BandedTriangle(
            lines.starts, lines.block_rows, lines.width, lines.reach, norm, damping
        )

    def damped(self) -> _Inverse:
        """The same for M'M + rounding^2: the inverse of a singular matrix overflows."""
        return _Inverse(self.op, self._norm, damping=self.triangle.rounding)

    def solve(self, y: Tensor) -> Tensor:
        return self._lines.join(self.triangle.solve(self._lines.split(y)))

    def solve_transposed(self, x: Tensor) -> Tensor:
        return self._lines.join(self.triangle.solve_transposed(self._lines.split(x)))

    def is_singular(self, generator: torch.Generator) -> bool:
        """Whether a random vector grows so much that rounding hides the smallest value."""
        weight = self.op.weight
        shape = 1, min(self.op.shape)
        x = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        grown = float(torch.linalg.vector_norm(self.solve_transposed(x)))
        size = grown / float(torch.linalg.vector_norm(x))
        return not self.triangle.rounding * size < UNRESOLVED


def _largest(request: Request, inverses: Sequence[_Inverse]) -> ExtremeEigenpairs:
    """The smallest of M, with one step of inverse iteration more for the vectors.

    What is left is then small beside s, not the norm.
    """
    columns = min(request.op.shape)
    sizes = [min(inverse.op.shape) for inverse in inverses]

    def solve(y: Tensor) -> Tensor:
        rows = zip(inverses, y.split(sizes, 1), strict=True)
        return torch.cat([inverse.solve(part) for inverse, part in rows], 1)

    def solve_transposed(x: Tensor) -> Tensor:
        rows = zip(inverses, x.split(sizes, 1), strict=True)
        return torch.cat([inverse.solve_transposed(part) for inverse, part in rows], 1)

    found = largest_of_inverse(request, solve, solve_transposed, (columns, columns))
    once = orthonormal(solve_transposed(found.vectors))
    return replace(found, vectors=orthonormal(solve(once)))


def _smallest(request: Request, inverses: Sequence[_Inverse]) -> SingularTriplets:
    """The smallest triplets of some groups."""
    columns = min(request.op.shape)
    found = _largest(request, inverses)
    rounding = max(inverse.triangle.rounding for inverse in inverses)
    logarithm = sum(inverse.triangle.logarithm() for inverse in inverses)
    tall, wide = Product.tall(request.op)
    slack = rounding_of(request.op) * request.norm_estimate
    u, s, v = refined(tall, found.vectors, largest=False)
    upper, lost = s, _residuals(request, tall, u, s, v)[1]
    if lost and not wide and len(u[0]) == columns:
        # M v / s is rounding error: left vectors are looked for with M' as those of M were.
        u, s, v = _with_left(request, tall, v)
        s = torch.minimum(s, upper)
    residuals, lost = _residuals(request, tall, u, s, v)
    below = [_bound_below(b, found.bounds[0], rounding) for b in found.bounds]
    triplets = SingularTriplets(
        u=u,
        s=s,
        v=v,
        lower=torch.minimum(s.new_tensor(below[: request.k]), (s - slack).clamp_min(0)),
        upper=upper + slack,
        others=below[request.k] if request.k < columns else math.inf,
        converged=found.converged and not lost,
        matvecs=2 * found.products,
        certificate=(
            "Rayleigh-Ritz values of M above; below, the Lanczos bound for the inverse, which "
            f"fails with probability {FAILURE_PROBABILITY:.0e}, and the backward error of a QR "
            "factorization"
        ),
        logabsdet=logarithm if below[0] > 0 else None,
        residuals=residuals,
    )
    return triplets.transposed() if wide else triplets


def _bound_below(bound: float, largest: float, rounding: float) -> float:
    """A lower bound on a singular value of M from an upper one on the square of R's inverse."""
    if not bound > 0:
        return math.inf
    # The inverse is known to some eps of its norm, whichever of its values is asked for, and the
    # triangle to its rounding.
    wrong = rounding * largest**0.5
    if not wrong < UNRESOLVED:
        return 0.0
    eps = torch.finfo(torch.float64).eps
    least: float = (bound + ROUNDING_UNITS * eps * largest) ** -0.5 * (1 - wrong) - rounding
    return max(least, 0.0)


def _residuals(
    request: Request, tall: Product, u: Tensor, s: Tensor, v: Tensor
) -> tuple[Tensor, bool]:
    """The residuals of triplets, and whether those of left vectors are above what is allowed."""
    forward = torch.linalg.vector_norm(tall.apply(v) - s[:, None] * u, dim=1)
    adjoint = torch.linalg.vector_norm(tall.apply_adjoint(u) - s[:, None] * v, dim=1)
    part = request.tol**0.5 if request.values_only else RESIDUAL_UNITS * request.tol
    allowed = part * s + rounding_of(request.op) * request.norm_estimate
    return torch.hypot(forward, adjoint), not bool((adjoint <= allowed).all())


def _with_left(request: Request, tall: Product, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (u, s, v) of a square M in the span of orthonormal rows v, the smallest first."""
    inverse = _Inverse(request.op, request.norm_estimate, adjoint=True)
    y = _largest(request, [inverse]).vectors
    left, s, right = torch.linalg.svd(tall.apply(v) @ y.mT)
    return right.flip(0) @ y, s.flip(0), left.flip(1).mT @ v
