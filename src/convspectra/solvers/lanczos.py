"""Largest eigenpairs of a symmetric operator by block Lanczos with full reorthogonalisation.

Sources: Golub and Underwood (The block Lanczos method for computing eigenvalues, 1977); the bounds
from above are those of Note [Block bound].

Note [Repeated values]. A Krylov sequence from one vector sees one copy of a repeated eigenvalue.
From a Gaussian block of b vectors it sees min(b, multiplicity) copies, so that a block of more than
k vectors gives the k largest as they are, repeated or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.solvers.lanczos_bound import KrylovBlock

ROUNDING_UNITS = 16
"""A length of at most this many eps times the largest one is rounding error, and counts as 0."""
GUARD_VECTORS = 2


@dataclass(frozen=True)
class Eigenpairs:
    """The k largest eigenpairs of a symmetric operator, descending.

    Attributes
    ----------
    values : Tensor
        (k,)
    vectors : Tensor
        Orthonormal, in rows, (k, n).
    residuals : Tensor
        (k,)
    bounds : list of float
        Upper bounds on the k largest eigenvalues and on the one after them.
    converged : bool
    products : int
        Vectors that the operator was applied to.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: list[float]
    converged: bool
    products: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    tol: float,
    maxiter: int,
    like: Tensor,
    generator: torch.Generator | None = None,
    values_only: bool = False,
    enclosure: float = math.inf,
    separation: float | None = None,
    block: int | None = None,
    excluded: Tensor | None = None,
) -> Eigenpairs:
    """The k largest eigenpairs of a symmetric operator.

    Parameters
    ----------
    product : callable
        The operator on vectors in rows, (b, n) -> (b, n).
    size : int
        n.
    k : int
    tol : float
        A pair has converged when its residual is at most ``tol * value``; with `values_only`, when
        the error of the value is estimated so: residual^2 over the gap to the next Ritz value.
    maxiter : int
        Most block steps; the basis holds as many blocks of vectors of length n.
    like : Tensor
        Gives the dtype and the device.
    generator : torch.Generator, optional
        Of the Gaussian start block, on that device.
    values_only : bool
    enclosure : float
        Go on until the bounds are within this fraction of the values, for at most as many steps
        again as the values took.
    separation : float, optional
        Go on until the bound on the eigenvalue after the k-th is below the k-th by this fraction of
        it, or its Ritz value is not.
    block : int, optional
        Vectors in a block, k + 2 unless said otherwise. With k or fewer, copies of a repeated value
        can be missed, and bounds are missing.
    excluded : Tensor, optional
        Orthonormal rows; the eigenpairs are those in their orthogonal complement, which the
        operator must map into itself.

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost: one application to a block, and ``8 j b^2 n`` flops for step j.
    """
    free = size - (0 if excluded is None else len(excluded))
    width = min(block or k + GUARD_VECTORS, free)
    omega = torch.randn(width, size, dtype=like.dtype, device=like.device, generator=generator)
    krylov = _Krylov(product, omega, generator, excluded)
    values_at, check_at = 0, 1
    while True:
        krylov.extend()
        steps = krylov.steps
        last = steps >= maxiter or krylov.exhausted
        if steps < check_at and not last:
            continue
        check_at = steps + 1 + steps // 16
        values, vectors, residuals = krylov.ritz_pairs()
        enough = len(values) >= min(free, k + (separation is not None))
        floor = ROUNDING_UNITS * torch.finfo(like.dtype).eps * float(values[0].abs())
        error = _errors(values, residuals, k) if values_only else residuals[:k]
        reached = bool((error <= (tol * values[:k]).clamp_min(floor)).all())
        converged = krylov.exhausted or (reached and enough)
        bounds: list[float] | None = None
        if converged and not last:
            values_at = values_at or steps
            settled = math.isinf(enclosure) or steps >= 2 * values_at + 2
            if not settled or separation is not None:
                bounds = krylov.bounds(k)
                kth = float(values[k - 1])
                tight = all(
                    bound - float(value) <= enclosure * float(value)
                    for bound, value in zip(bounds, values[:k], strict=False)
                )
                settled = (settled or tight) and (
                    separation is None
                    or bounds[k] <= (1 - separation) * kth
                    or float(values[k]) > (1 - separation) * kth
                )
            last = settled
        if last:
            break
    basis = krylov.basis()
    return Eigenpairs(
        values=values[:k].to(like),
        vectors=vectors[:, :k].T.to(like) @ basis,
        residuals=residuals[:k].to(like),
        bounds=bounds or krylov.bounds(k),
        converged=converged,
        products=krylov.products,
    )


def exceeds(
    product: Callable[[Tensor], Tensor],
    ceiling: float,
    omega: Tensor,
    *,
    maxiter: int,
    metric: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> tuple[bool, int]:
    """Whether some eigenvalue of A B may be above the ceiling, A symmetric and B positive definite.

    Parameters
    ----------
    product : callable
        A on vectors in rows, (b, n) -> (b, n).
    ceiling : float
    metric : callable
        B on vectors in rows; A B is symmetric in the inner product that it gives.
    omega : Tensor
        Start vectors (b, n): their components along the eigenvectors must be at least as large in
        distribution as standard Gaussian ones.
    maxiter : int
        Most block steps.

    Returns
    -------
    bool, int
        False if no eigenvalue is above it, which holds except with the probability of
        Note [Block bound]; True if one was found, or if `maxiter` steps did not tell. And the
        number of vectors that the operator was applied to.
    """
    krylov = _Krylov(product, omega, generator, metric=metric)
    check_at = 2
    while krylov.steps < maxiter and not krylov.exhausted:
        krylov.extend()
        if krylov.steps < min(check_at, maxiter) and not krylov.exhausted:
            continue
        check_at = krylov.steps + 2 + krylov.steps // 16
        values, _, _ = krylov.ritz_pairs()
        if float(values[0]) > ceiling:
            return True, krylov.products
        if krylov.bounds(0)[0] <= ceiling:
            return False, krylov.products
    return True, krylov.products


def _errors(values: Tensor, residuals: Tensor, k: int) -> Tensor:
    """Estimated errors of Ritz values: residual^2 over the gap, or the residual if that is less."""
    distance = (values[:k, None] - values[None, :]).abs()
    distance[range(len(distance)), range(len(distance))] = math.inf
    gap = distance.amin(1) if distance.shape[1] > 1 else residuals.new_zeros(len(distance))
    squared = residuals[:k].square() / gap.clamp_min(torch.finfo(gap.dtype).tiny)
    return torch.minimum(residuals[:k], squared)


class _Krylov:
    """An orthonormal basis of a block Krylov space of A B, with the operator's matrix in it.

    Orthogonality is in the inner product of the metric B; `_dual` holds B times the basis, which is
    the basis itself where there is no metric.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        omega: Tensor,
        generator: torch.Generator | None,
        excluded: Tensor | None = None,
        metric: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._product = product
        self._metric = metric
        self._generator = generator
        self._size = omega.shape[1]
        # The excluded rows stand first in the basis: everything is made orthogonal to them.
        self._first = 0 if excluded is None else len(excluded)
        self._store = omega.new_zeros(min(self._size, self._first + 16 * len(omega)), self._size)
        self._dual = self._store if metric is None else torch.zeros_like(self._store)
        self._count = 0
        if excluded is not None:
            self._append(excluded, excluded)
            omega = self._project_out(omega)
        rows, dual, factor = self._orthonormal(omega)
        self._start = factor.cpu().double()
        self._append(rows, dual)
        self._diagonal: list[Tensor] = []
        self._couplings: list[Tensor] = []
        self._widths = [len(omega)]
        self._scale = 0.0
        self.products = 0

    @property
    def steps(self) -> int:
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.steps > 0 and self._widths[-1] == 0

    def basis(self) -> Tensor:
        return self._store[self._first :][: sum(self._widths[: self.steps])]

    def extend(self) -> None:
        """One block step."""
        width = self._widths[-1]
        block = self._dual[self._count - width : self._count]
        image = self._product(block)
        self.products += width
        matrix = (image @ block.T).cpu().double()
        self._diagonal.append(0.5 * (matrix + matrix.T))
        scale = float(torch.linalg.matrix_norm(matrix))
        if not math.isfinite(scale):
            raise ArithmeticError("expected finite products with the matrix, got NaN or Inf")
        image = self._project_out(image)
        rows, dual, factor = self._orthonormal(image)
        left, sizes, _ = torch.linalg.svd(factor)
        self._scale = max(self._scale, scale, float(sizes[0]))
        floor = ROUNDING_UNITS * torch.finfo(image.dtype).eps * self._scale
        kept = min(width, self._size - self._count)
        found = int((sizes[:kept] > floor).sum())
        rows = left.T[:found] @ rows
        if kept > found:
            random = torch.randn(
                kept - found,
                self._size,
                dtype=image.dtype,
                device=image.device,
                generator=self._generator,
            )
            rows = torch.cat([rows, random / self._size**0.5])
        # Short directions carry rounding error along the basis: once more, and the coupling is
        # measured. That of random directions is 0.
        dual, coupling = rows, image.new_zeros(kept, width)
        if kept:
            rows, dual, _ = self._orthonormal(self._project_out(rows))
            coupling[:found] = dual[:found] @ image.T
        self._append(rows, dual)
        self._couplings.append(coupling.cpu().double())
        self._widths.append(kept)

    def ritz_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """All Ritz values, descending, their coefficients in columns, and the residual norms."""
        order = sum(self._widths[: self.steps])
        matrix = torch.zeros(order, order, dtype=torch.float64)
        first = 0
        for i, diagonal in enumerate(self._diagonal):
            middle = first + self._widths[i]
            matrix[first:middle, first:middle] = diagonal
            if i + 1 < self.steps:
                last = middle + self._widths[i + 1]
                matrix[middle:last, first:middle] = self._couplings[i]
                matrix[first:middle, middle:last] = self._couplings[i].T
            first = middle
        values, vectors = torch.linalg.eigh(matrix)
        self._ritz = values.flip(0), vectors.flip(1)
        values, vectors = self._ritz
        coupling = self._couplings[-1] @ vectors[order - self._widths[self.steps - 1] :]
        return values, vectors, torch.linalg.vector_norm(coupling, dim=0)

    def bounds(self, k: int) -> list[float]:
        """Upper bounds on the k + 1 largest eigenvalues."""
        values, vectors = self._ritz
        if self.exhausted:
            return [float(x) for x in values[: k + 1]] + [-math.inf] * max(0, k + 1 - len(values))
        tail, log_tail = self._start, 0.0
        for coupling in self._couplings:
            tail = coupling @ tail
            size = max(float(torch.linalg.matrix_norm(tail)), torch.finfo(torch.float64).tiny)
            tail, log_tail = tail / size, log_tail + math.log(size)
        known = KrylovBlock(
            values.numpy(),
            (vectors[: self._widths[0]].T @ self._start).numpy(),
            tail.numpy(),
            log_tail,
            self.steps,
        )
        bounds = [known.upper_bound(i + 1) for i in range(k + 1)]
        return list(itertools.accumulate(bounds, min))

    def _append(self, rows: Tensor, dual: Tensor) -> None:
        if self._count + len(rows) > len(self._store):
            more = min(max(len(self._store), len(rows)), self._size - len(self._store))
            room = self._store.new_zeros(more, self._size)
            self._store = torch.cat([self._store, room])
            self._dual = self._store if self._metric is None else torch.cat([self._dual, room])
        self._store[self._count : self._count + len(rows)] = rows
        self._dual[self._count : self._count + len(rows)] = dual
        self._count += len(rows)

    def _project_out(self, rows: Tensor) -> Tensor:
        basis, dual = self._store[: self._count], self._dual[: self._count]
        for _ in range(2):
            rows = torch.addmm(rows, rows @ dual.T, basis, alpha=-1)
        return rows

    def _orthonormal(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal rows Q with ``rows = factor' Q``, B Q, and the factor."""
        if self._metric is None:
            q, factor = torch.linalg.qr(rows.T)
            return q.T, q.T, factor
        factor = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        for _ in range(2):
            dual = self._metric(rows)
            values, vectors = torch.linalg.eigh(rows @ dual.T)
            largest = values[-1].clamp_min(torch.finfo(rows.dtype).tiny)
            root = values.clamp_min(torch.finfo(rows.dtype).eps * largest).sqrt()
            rows, dual = ((vectors / root).T @ x for x in (rows, dual))
            factor = (vectors * root).T @ factor
        return rows, dual, factor
