"""Which algorithm suits which layer: the one place that knows both.

Works on a layer detached, in float64 and scaled to entries near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convspectra.capacitance import CapacitanceFactorization, is_square_toeplitz
from convspectra.operator import ConvOperator
from convspectra.solvers.dense import dense_svd, gram_eigh
from convspectra.solvers.golub_kahan import ROUNDING_UNITS, golub_kahan
from convspectra.solvers.lobpcg import lobpcg
from convspectra.solvers.result import SingularTriplets

METHODS = {
    "LM": ("auto", "dense", "gram", "golub-kahan"),
    "SM": ("auto", "dense", "gram", "lobpcg", "capacitance"),
}
SMALL_WORK = 2e7
"""Flops, m n min(m, n), under which a dense SVD beats everything."""
GRAM_LIMIT = 4096
DENSE_WORK_LIMIT = 1e11
INVERSE_RESOLUTION = 1e-4
"""Rounding error of the inverse, relative to a singular value of it, beyond which that is lost."""


@dataclass(frozen=True)
class Search:
    """One request for singular triplets of a normalised operator, and the ways to answer it."""

    op: ConvOperator
    k: int
    largest: bool
    tol: float
    maxiter: int
    generator: torch.Generator
    max_bytes: int
    separation: float | None

    def run(self, method: str) -> tuple[SingularTriplets, str]:
        """The triplets and the way that gave them; "auto" goes on until one is certified."""
        ways: dict[str, Callable[[], SingularTriplets]] = {
            "dense": self._dense,
            "gram": self._gram,
            "golub-kahan": self._golub_kahan,
            "lobpcg": self._lobpcg,
            "capacitance": self._capacitance,
        }
        if method != "auto":
            return ways[method](), method
        for name in self._candidates():
            try:
                triplets = ways[name]()
            except ArithmeticError:
                continue
            if triplets.converged:
                break
        return triplets, name

    def _candidates(self) -> list[str]:
        """Ways that this layer admits, the best first; the last one always gives an answer."""
        small, large = sorted(self.op.shape)
        work = small * small * large
        fits = 8 * small * large <= self.max_bytes and work <= DENSE_WORK_LIMIT
        if work <= SMALL_WORK:
            return ["dense"]
        if self.largest:
            return ["golub-kahan"]
        admitted = {
            "capacitance": is_square_toeplitz(self.op),
            "gram": small <= GRAM_LIMIT and fits,
            "dense": fits,
            "lobpcg": not fits,
        }
        return [name for name, admits in admitted.items() if admits]

    def _dense(self) -> SingularTriplets:
        return dense_svd(self.op.to_dense(self.max_bytes), self.k, self.largest)

    def _gram(self) -> SingularTriplets:
        rows, columns = self.op.shape
        op = self.op if rows <= columns else self.op.T
        products = op.apply_adjoint(_identity(op.output_shape, op.weight))
        gram = op.apply(products).flatten(1)
        triplets = gram_eigh(0.5 * (gram + gram.T), products.flatten(1), self.k, self.largest)
        return triplets if rows <= columns else replace(triplets, u=triplets.v, v=triplets.u)

    def _golub_kahan(self) -> SingularTriplets:
        return golub_kahan(
            lambda x: self.op.apply(x.reshape(self.op.input_shape)).flatten(),
            lambda y: self.op.apply_adjoint(y.reshape(self.op.output_shape)).flatten(),
            self.op.shape,
            self.k,
            tol=self.tol,
            maxiter=self.maxiter,
            like=self.op.weight,
            generator=self.generator,
            separation=self.separation,
        )

    def _lobpcg(self) -> SingularTriplets:
        rows, columns = self.op.shape
        op = self.op if rows >= columns else self.op.T
        triplets = lobpcg(
            lambda x: op.apply(x.reshape(-1, *op.input_shape)).flatten(1),
            lambda y: op.apply_adjoint(y.reshape(-1, *op.output_shape)).flatten(1),
            op.shape,
            self.k,
            tol=self.tol,
            maxiter=self.maxiter,
            like=op.weight,
            generator=self.generator,
        )
        return triplets if rows >= columns else replace(triplets, u=triplets.v, v=triplets.u)

    def _capacitance(self) -> SingularTriplets:
        """The smallest from the largest of the inverse."""
        factorization = CapacitanceFactorization(self.op, self.max_bytes)
        inverse = golub_kahan(
            lambda y: factorization.solve(y.reshape(1, *self.op.output_shape)).flatten(),
            lambda x: factorization.solve_adjoint(x.reshape(1, *self.op.input_shape)).flatten(),
            (self.op.shape[1], self.op.shape[0]),
            self.k,
            tol=self.tol,
            maxiter=self.maxiter,
            like=self.op.weight,
            generator=self.generator,
            separation=self.separation,
        )
        # The solves invert M (I - R) with ||R|| about the largest residual seen.
        wrong = 10 * factorization.worst_residual
        if not math.isfinite(wrong) or wrong >= 1:
            raise ArithmeticError("the solves with M leave residuals as large as their data")
        # Beside a very small singular value of M the others drown in the rounding of the inverse.
        rounding = ROUNDING_UNITS * torch.finfo(inverse.s.dtype).eps * inverse.s[0]
        resolved = bool(rounding <= INVERSE_RESOLUTION * inverse.s[-1])
        return replace(
            inverse,
            u=inverse.v,
            v=inverse.u,
            s=1 / inverse.s,
            converged=inverse.converged and resolved,
            lower=(1 - wrong) / inverse.upper,
            upper=(1 + wrong) / inverse.lower,
            others=(1 - wrong) / inverse.others if inverse.others > 0 else math.inf,
            certificate=(
                f"of the inverse: {inverse.certificate}; and ten times the largest residual of "
                f"its solves, {factorization.worst_residual:.1e}"
            ),
        )


def _identity(shape: tuple[int, ...], like: Tensor) -> Tensor:
    size = math.prod(shape)
    return torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *shape)
