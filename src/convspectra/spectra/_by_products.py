"""Singular triplets of an operator of which only its two products are known.

Note [Measured rounding]. How accurate products are depends on what computes them: a Jacobian's pass
through all layers. So it is measured. With E the difference between the product forward and the
transpose of the one back, y'E x for Gaussian x and y has mean 0 and variance ||E||_F^2, and
||E|| <= ||E||_F: four times the root mean square over eight pairs stands for ||E||.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import LinearOperatorLike, check_bytes, check_choice
from convspectra.solvers import (
    FAILURE_PROBABILITY,
    DeflationStop,
    SingularTriplets,
    dense_svd,
    extreme_eigenpairs,
    less,
    random_directions,
)
from convspectra.spectra.ways._lanczos import (
    GRAM_UNITS,
    LANCZOS_ENCLOSURE,
    LOST_UNITS,
    LOWER_ENCLOSURE,
)

METHODS = ("auto", "dense", "lanczos")
"""The ways to the singular values of an operator that has products only."""
DENSE_AT_ONCE = {"LM": 64, "SM": 1024}
"""Products, one for each row of the smaller side, that form the matrix instead of Lanczos.
Lanczos takes about as many for the largest value, and does not resolve the smallest ones below the
square root of eps. A choice: at half or double of it the answers are the same, later."""
DENSE_WORK = 1e11
"""Flops of a dense SVD, m n min(m, n), up to which it is gone back to where Lanczos failed: about a
minute of one core."""
STEPS = {"LM": 2000, "SM": 1500}
"""Most Lanczos steps: a spectrum that takes more is too clustered at its end for this way."""
PAIRS = 8
"""Random pairs of vectors that hold the two products against each other: a choice."""
AT_ONCE = 16
"""Rows in one product of a dense matrix: memory of so many passes. A choice."""


@dataclass(frozen=True)
class ProductRequest:
    """Some extreme triplets of an operator in float64.

    Attributes
    ----------
    k : int
    largest, values_only : bool
    tol : float
    maxiter : int or None
    generator : torch.Generator
    max_bytes : int
        Limit on the dense matrix and on the Lanczos basis.
    separation : float or None
        As for `svds`.
    """

    k: int
    largest: bool
    values_only: bool
    tol: float
    maxiter: int | None
    generator: torch.Generator
    max_bytes: int
    separation: float | None

    @property
    def which(self) -> str:
        """The end of the spectrum that is asked for."""
        return "LM" if self.largest else "SM"


class ScaledRows:
    """An operator as maps between flat rows, divided by a power of two, its taller side first.

    Parameters
    ----------
    op : LinearOperatorLike
        In float64.
    generator : torch.Generator
        Of the random vectors that size and rounding are measured with.

    Attributes
    ----------
    exponent : int or None
        The operator is divided by 2^exponent; None if its products with random vectors are 0.
    wide : bool
        Whether the rows and columns are exchanged.
    rounding : float
        Norm of the rounding errors of a product (Note [Measured rounding]), scaled.

    Raises
    ------
    ValueError
        For an operator that is not in float64.
    ArithmeticError
        If a product is not finite.
    """

    def __init__(self, op: LinearOperatorLike, generator: torch.Generator) -> None:
        if op.dtype != torch.float64:
            raise ValueError(
                f"expected an operator in float64, got {op.dtype}: its products would be too "
                "coarse for a certificate; leave dtype=torch.float64"
            )
        self.wide = op.shape[0] < op.shape[1]
        rows, columns = op.shape
        self.rows, self.columns = (columns, rows) if self.wide else (rows, columns)
        self._op, self._scale = op, 1.0
        self.like = torch.zeros((), dtype=op.dtype, device=op.device)
        x, y = self._random(self.columns, generator), self._random(self.rows, generator)
        forward, back = self.apply(x), self.apply_adjoint(y)
        if not bool(forward.isfinite().all() and back.isfinite().all()):
            raise ArithmeticError("expected finite products with the operator, got NaN or Inf")
        size = float(forward.abs().amax()) / self.columns**0.5
        self.exponent = math.frexp(size)[1] if size > 0 else None
        self._scale = 2.0 ** -(self.exponent or 0)
        difference = ((forward * y).sum(1) - (x * back).sum(1)) * self._scale
        self.rounding = 4 * float(difference.square().mean().sqrt())

    def apply(self, x: Tensor) -> Tensor:
        """The taller matrix, on rows."""
        return self._map(x, self.wide)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """Its transpose, on rows."""
        return self._map(y, not self.wide)

    def gram(self, x: Tensor) -> Tensor:
        """The smaller Gram operator, on rows."""
        return self.apply_adjoint(self.apply(x))

    def dense(self, max_bytes: int) -> Tensor:
        """The taller matrix itself, by one product for each column."""
        needed = 8 * self.rows * self.columns
        check_bytes("the dense matrix", needed, max_bytes)
        matrix = self.like.new_empty(self.rows, self.columns)
        for first in range(0, self.columns, AT_ONCE):
            units = self.like.new_zeros(min(AT_ONCE, self.columns - first), self.columns)
            units[:, first:].fill_diagonal_(1)
            matrix[:, first : first + len(units)] = self.apply(units).T
        return matrix

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Directions on the shorter side, for a quadrature."""
        return random_directions(count, self.columns, self.like, generator)

    def _map(self, x: Tensor, adjoint: bool) -> Tensor:
        op = self._op
        if adjoint:
            y = op.apply_adjoint(x.reshape(-1, *op.output_shape))
            return self._scale * y.reshape(len(y), -1)
        y = op.apply(x.reshape(-1, *op.input_shape))
        return self._scale * y.reshape(len(y), -1)

    def _random(self, size: int, generator: torch.Generator) -> Tensor:
        like = self.like
        return torch.randn(PAIRS, size, dtype=like.dtype, device=like.device, generator=generator)


def triplets_by_products(
    rows: ScaledRows, request: ProductRequest, method: str
) -> tuple[SingularTriplets, str]:
    """The scaled operator's triplets, and the way that gave them.

    Raises
    ------
    ValueError
        For a method that is not one of `METHODS`, or a matrix over the limit.
    """
    check_choice("method for an operator given by its products", method, METHODS)
    if rows.exponent is None:
        found, name = _zeros(rows, request.k), "zero"
    else:
        found, name = _tall_triplets(rows, request, method)
    return (found.transposed() if rows.wide else found), name


def _tall_triplets(
    rows: ScaledRows, request: ProductRequest, method: str
) -> tuple[SingularTriplets, str]:
    """The triplets of the taller matrix, and the way that gave them.

    "auto" forms the matrix where that takes few products, and goes back to it where Lanczos does
    not converge, within the limits of memory and work.
    """
    if method != "auto":
        way = _dense if method == "dense" else _lanczos
        return way(rows, request), method
    work = rows.rows * rows.columns**2
    fits = 8 * rows.rows * rows.columns <= request.max_bytes and work <= DENSE_WORK
    if fits and rows.columns <= DENSE_AT_ONCE[request.which]:
        return _dense(rows, request), "dense"
    found = _lanczos(rows, request)
    if found.converged or not fits:
        return found, "lanczos"
    return _dense(rows, request), "dense"


def _dense(rows: ScaledRows, request: ProductRequest) -> SingularTriplets:
    found = dense_svd(rows.dense(request.max_bytes)[None], request.k, request.largest)
    slack = rows.rounding
    others = found.others + slack if request.largest else max(found.others - slack, 0.0)
    return SingularTriplets(
        u=found.u,
        s=found.s,
        v=found.v,
        lower=(found.lower - slack).clamp_min(0),
        upper=found.upper + slack,
        others=others,
        converged=True,
        matvecs=rows.columns,
        certificate=f"{found.certificate}, and the rounding of the products, measured",
        logabsdet=found.logabsdet,
    )


def _lanczos(rows: ScaledRows, request: ProductRequest) -> SingularTriplets:
    """The largest or smallest triplets, all copies of repeated ones."""
    largest, k, which = request.largest, request.k, request.which
    most_kept = max(request.max_bytes // (8 * rows.columns), 1)
    separation = request.separation
    if separation is not None:
        separation = 1 - (1 - separation) ** 2 if largest else (1 + separation) ** 2 - 1
    maxiter = STEPS[which] if request.maxiter is None else request.maxiter
    found = extreme_eigenpairs(
        lambda excluded: lambda x: less(rows.gram(x), excluded),
        rows.columns,
        k,
        largest=largest,
        stop=DeflationStop(
            request.tol / 2,
            maxiter if largest else min(maxiter, most_kept),
            request.values_only,
            2 * (LANCZOS_ENCLOSURE if which == "LM" else LOWER_ENCLOSURE),
            separation,
            alone=k == 1 and request.separation is None,
        ),
        like=rows.like,
        generator=request.generator,
        full_orthogonalization=True,
        most_kept=most_kept,
    )
    images = rows.apply(found.vectors)
    left, s, right = torch.linalg.svd(images, full_matrices=False)
    if not largest:
        left, s, right = left.flip(1), s.flip(0), right.flip(0)
    eps = torch.finfo(s.dtype).eps
    norm = max(found.norm, 0.0) ** 0.5
    slack = (16 + 4 * rows.rows**0.5) * eps * norm + rows.rounding
    # Squares are known to some eps of the largest, and to what the products add to it.
    rounding = GRAM_UNITS * eps * found.norm + 2 * norm * rows.rounding
    signed = rounding if largest else -rounding
    far = [max(bound + signed, 0.0) ** 0.5 for bound in found.bounds]
    bounds = s.new_tensor(far[:k])
    if largest:
        lower, upper, others = s - slack, torch.maximum(bounds, s) + slack, far[k] + slack
    else:
        lower, upper = torch.minimum(bounds, s) - slack, s + slack
        others = max(far[k] - slack, 0.0)
    lost = float(s.amin()) ** 2 <= LOST_UNITS * eps * found.norm / request.tol**0.5
    near, beyond = ("below", "above") if largest else ("above", "below")
    return SingularTriplets(
        u=right,
        s=s,
        v=left.mT @ found.vectors,
        lower=lower.clamp_min(0),
        upper=upper,
        others=others,
        converged=found.converged and (largest or not lost),
        matvecs=2 * found.products + k,
        certificate=(
            f"Rayleigh-Ritz values {near}; {beyond}, the Lanczos bound, which fails with "
            f"probability {FAILURE_PROBABILITY:.0e}; rounding of the products, measured"
        ),
    )


def _zeros(rows: ScaledRows, k: int) -> SingularTriplets:
    """Every unit vector is singular for the value 0: the first k coordinate vectors are given."""
    u, v = (rows.like.new_zeros(k, n) for n in (rows.rows, rows.columns))
    for side in (u, v):
        side.fill_diagonal_(1)
    zeros = rows.like.new_zeros(k)
    return SingularTriplets(
        u=u,
        s=zeros,
        v=v,
        lower=zeros,
        upper=zeros,
        others=0.0,
        converged=True,
        matvecs=2 * PAIRS,
        certificate=f"products with {PAIRS} Gaussian vectors on either side are exactly 0",
        logabsdet=-math.inf,
    )
