"""Extreme eigenpairs of a symmetric operator by Lanczos with selective orthogonalization.

Two short products of vectors a step; only the basis grows.

Note [Selective orthogonalization]. In finite precision Lanczos vectors lose orthogonality only
along Ritz vectors that have converged (Paige 1976). New vectors are
made orthogonal to those, and copies of them never appear (Parlett and Scott 1979).
As long as the basis is small they are made orthogonal to all of it.

Note [Repeated values]. A Krylov sequence sees one copy of a repeated eigenvalue; the others are
found by Note [Deflation].

References
----------
C. C. Paige (1976), "Error analysis of the Lanczos algorithm for tridiagonalizing a symmetric
    matrix", J. Inst. Maths Applics 18, doi:10.1093/imamat/18.3.341.
B. N. Parlett and D. S. Scott (1979), "The Lanczos algorithm with selective orthogonalization",
    Math. Comp. 33, doi:10.2307/2006037.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from convspectra.solvers._gaussian import bound_beyond, log_smallest_norm
from convspectra.solvers._orthonormal import less
from convspectra.solvers._result import PAIRS_COUNT_AS_ONE, Eigenpairs, LinearMap, check_products
from convspectra.solvers._stop import LanczosStop

FloatArray = npt.NDArray[np.float64]

ROUNDING_UNITS = 16
"""The operator is known to so many eps of its norm.

Part of every bound. At less of it a bound may be missed by rounding, and an invariant Krylov space
is not seen; at more, values small beside the norm are not resolved.
"""
SINGLE_RESIDUAL_UNITS = 4
"""The same for residuals that count as 0 in single precision: they come down to 2 to 4 eps."""
LOOSEST_ESTIMATE = 1e-8
"""Estimates of relative errors above this are made too early to be trusted: of two values a part in
a thousand apart the iteration sees one for a while.

A looser one ends on the wrong one of two such values; a tighter one costs steps where a loose
tolerance was asked for.
"""
SMALL_BASIS = 1_000_000
"""Numbers in a basis that new vectors are made orthogonal to, all of it: they stay in a cache.

A choice of time alone: with 0 and with four times as much the products are the same.
"""
CHUNK = 32
"""Vectors that the basis grows by: memory is taken as steps are. A choice of memory alone."""


@dataclass(frozen=True)
class Metric:
    """A positive definite B, whose inner product takes the place of the usual one.

    Attributes
    ----------
    product : callable
        B on a row, (1, n) -> (1, n).
    smallest : float
        A lower bound on the eigenvalues of B, above 0.
    """

    product: LinearMap
    smallest: float


def lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    largest: bool,
    stop: LanczosStop,
    like: Tensor,
    generator: torch.Generator | None = None,
    excluded: Tensor | None = None,
    metric: Metric | None = None,
    full_orthogonalization: bool = False,
    most_kept: int | None = None,
) -> Eigenpairs:
    """The k largest or smallest eigenpairs of a symmetric operator, one copy of each.

    Parameters
    ----------
    product : callable
        The operator on a row, (1, n) -> (1, n).
    size : int
        n.
    k : int
    largest : bool
    stop : LanczosStop
        A pair has converged when its residual is at most ``tol |value|``; with `values_only`, when
        the error of the value is estimated so, or at `LOOSEST_ESTIMATE`, of the value and of the
        spread of all, residual^2 over the gap to the next Ritz value, and the residual is at most
        ``10 tol |value|``: an eigenvalue is that near. At least k steps are taken.
    like : Tensor
        Gives the dtype and the device. In single precision the bound means nothing.
    generator : torch.Generator, optional
        Source of the Gaussian start vector, on that device.
    excluded : Tensor, optional
        Orthonormal rows; the eigenpairs are those in their orthogonal complement, which the
        operator must map into itself.
    metric : Metric, optional
        With k = 1: B. The eigenvalue is that of A B, with the inner product of B.
    full_orthogonalization : bool
        New vectors are made orthogonal to the whole basis: where products are dearer than that.
    most_kept : int, optional
        Vectors of length n that are kept. With k = 1 the iteration goes on beyond, and computes the
        others once more for the eigenvector, by products that must come out as before; with more
        it ends there.

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost: one product and about ``8 n`` flops a step; one pass over the basis when a pair converges.
    """
    sign = 1.0 if largest else -1.0
    tol, maxiter, enclosure, beyond = stop.tol, stop.maxiter, stop.enclosure, stop.beyond
    keep = max(maxiter if most_kept is None else most_kept, k)
    run = _Recurrence(product, sign, size, like, generator, excluded, metric, keep)
    limit = max(maxiter if k == 1 else min(maxiter, keep), k)
    reached_at, check_at = 0, 1
    while True:
        run.step()
        steps = run.steps
        last = steps >= limit or run.exhausted
        if not last and steps < check_at:
            continue
        check_at = steps + 1 + steps // 16
        # Has every pair the accuracy asked for?
        ritz = run.ritz(k)
        errors = ritz.errors(tol) if stop.values_only else ritz.residuals
        allowed = tol * np.abs(ritz.values[:k])
        near = ritz.residuals[:k] <= np.maximum(PAIRS_COUNT_AS_ONE * allowed, run.least_residual)
        if stop.values_only:
            # Beside a multiple of the identity every residual is small, and says nothing.
            relative = min(tol, LOOSEST_ESTIMATE)
            allowed = relative * np.minimum(np.abs(ritz.values[:k]), ritz.spread)
        reached = near & (errors[:k] <= np.maximum(allowed, run.least_residual))
        if not reached_at and len(ritz.values) >= k and bool(reached.all()):
            reached_at = steps
        # They have: is the bound as near as asked, or will it not come nearer?
        converged = bool(reached_at) or run.exhausted
        first = float(ritz.values[0])
        target = first if beyond is None else sign * beyond
        if converged and not last:
            if beyond is None:
                last = math.isinf(enclosure) or steps >= 2 * reached_at
            else:
                in_vain = ritz.residuals[0] <= run.least_residual and steps >= 4 * reached_at
                last = first > target or in_vain
        expected = converged if beyond is None else first + ritz.errors(tol)[0] <= target
        if expected and not last:
            last = run.bound(first) <= target + enclosure * abs(target)
            converged = converged or last
        if last:
            break
        whole = full_orthogonalization or steps * size <= SMALL_BASIS
        run.orthogonalize(ritz, k, whole=whole and metric is None)
    # A vector may cost as many products again.
    wanted = k if beyond is None or first > target else 0
    vectors = run.vectors(ritz.coefficients[:, :wanted])
    return Eigenpairs(
        values=like.new_tensor(sign * ritz.values[:k]),
        vectors=vectors,
        residuals=like.new_tensor(ritz.residuals[:k]),
        bound=sign * (run.bound(float(ritz.values[0])) + run.floor),
        norm=run.norm,
        converged=converged,
        products=run.products,
    )


def ritz_ends(
    product: Callable[[Tensor], Tensor],
    size: int,
    steps: int,
    *,
    like: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The least and the largest Ritz value after some steps: within the spectrum, up to rounding.

    No basis is kept: that costs copies of values that have converged, and none outside the spectrum
    (Paige 1976). Options as for `lanczos`.
    """
    run = _Recurrence(product, 1.0, size, like, generator, None, None, keep=1)
    while run.steps < min(steps, size) and not run.exhausted:
        run.step()
    return run.ends()


@dataclass(frozen=True)
class _Ritz:
    """The first Ritz values, descending, with coefficients in columns.

    The spread is a lower bound on that of all of them.
    """

    values: FloatArray
    coefficients: FloatArray
    residuals: FloatArray
    spread: float

    def errors(self, tol: float) -> FloatArray:
        """Estimated errors: residual^2 over the gap, or the residual if that is less.

        Values closer to each other than the tolerance are one value. A gap counts for no more than
        the value: before they have converged Ritz values may be far apart for no reason.
        """
        distance = np.abs(self.values[:, None] - self.values[None, :])
        distance[distance <= tol * np.abs(self.values)[:, None]] = math.inf
        gap = np.minimum(distance.min(1), np.abs(self.values))
        tiny = float(np.finfo(float).tiny)
        estimates: FloatArray = self.residuals * (self.residuals / np.maximum(gap, tiny))
        # Without another Ritz value nothing is known of the gap.
        estimates = estimates if len(gap) > 1 else self.residuals
        return np.minimum(self.residuals, estimates)


class _Recurrence:
    """The three-term recurrence of sign A, its basis and its tridiagonal matrix."""

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        sign: float,
        size: int,
        like: Tensor,
        generator: torch.Generator | None,
        excluded: Tensor | None,
        metric: Metric | None,
        keep: int,
    ) -> None:
        self._product, self._sign, self._metric, self._keep = product, sign, metric, keep
        self._excluded = like.new_zeros(0, size) if excluded is None else excluded
        self._eps = float(torch.finfo(like.dtype).eps)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._chunks: list[Tensor] = []
        self._found = like.new_zeros(0, size)
        self._good = 0
        self._whole = metric is None
        omega = torch.randn(1, size, dtype=like.dtype, device=like.device, generator=generator)
        omega = less(less(omega, self._excluded), self._excluded)
        self._next, self._dual, length = self._normalized(omega)
        self._before = torch.zeros_like(self._next)
        self._first_lost = self._before, self._next, self._dual
        self._log_delta = (
            log_smallest_norm(1)
            + 0.5 * math.log(1.0 if metric is None else metric.smallest)
            - math.log(max(length, 1e-300))
        )
        self.norm = 0.0
        self.products = 0

    @property
    def steps(self) -> int:
        return len(self._alphas)

    @property
    def floor(self) -> float:
        """The size of rounding error in values and residuals."""
        return ROUNDING_UNITS * self._eps * self.norm

    @property
    def least_residual(self) -> float:
        """Residuals up to which count as 0."""
        units = SINGLE_RESIDUAL_UNITS if self._next.dtype == torch.float32 else ROUNDING_UNITS
        return units * self._eps * self.norm

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space is invariant."""
        return self.steps > 0 and self._betas[-1] <= self.floor

    def step(self) -> None:
        """One step: ``beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1}``."""
        q, dual, steps = self._next, self._dual, self.steps
        # Beyond `keep` vectors only what is needed to go through the rest once more is remembered.
        if steps == self._keep:
            self._first_lost = self._before, q, dual
        elif steps < self._keep:
            if steps % CHUNK == 0:
                rows = min(CHUNK, self._keep - steps)
                self._chunks.append(q.new_empty(rows, q.shape[1]))
            self._chunks[-1][steps % CHUNK] = q[0]
        # With a metric B the dual of q is B q: A B is symmetric in the inner product of B.
        w = self._times(dual)
        alpha = float(torch.dot(w[0], dual[0]))
        before = self._betas[-1] if self._betas else 0.0
        w.add_(q, alpha=-alpha).add_(self._before, alpha=-before)
        # Orthogonality that rounding has cost: Note [Selective orthogonalization]. Against the
        # whole basis twice, for what is taken out the first time leaves rounding of its own size.
        whole = self._whole and steps < self._keep
        for _ in range(2 if whole else 1):
            w = less(less(w, self._excluded), self._found)
            if whole:
                for i, chunk in enumerate(self._chunks):
                    w = less(w, chunk[: steps + 1 - i * CHUNK])
        self._before = q
        self._next, self._dual, beta = self._normalized(w)
        check_products(math.isfinite(alpha) and math.isfinite(beta))
        self.norm = max(self.norm, abs(alpha) + beta + before)
        self._alphas.append(alpha)
        self._betas.append(beta)

    def ritz(self, k: int) -> _Ritz:
        """The k + 2 largest Ritz pairs, or as many as there are."""
        order = self.steps
        wanted = min(order, k + 2)
        diagonal, beside = np.array(self._alphas), np.array(self._betas[:-1])
        if order == 1:
            values, vectors = diagonal, np.ones((1, 1))
        else:
            values, vectors = scipy.linalg.eigh_tridiagonal(
                diagonal, beside, select="i", select_range=(order - wanted, order - 1)
            )
        values, vectors = values[::-1], vectors[:, ::-1]
        spread = float(values[0] - diagonal.min())
        return _Ritz(values, vectors, self._betas[-1] * np.abs(vectors[-1]), spread)

    def ends(self) -> tuple[float, float]:
        """The least and the largest Ritz value."""
        values = scipy.linalg.eigvalsh_tridiagonal(self._alphas, self._betas[:-1])
        return float(values[0]), float(values[-1])

    def orthogonalize(self, ritz: _Ritz, k: int, *, whole: bool) -> None:
        """From now on, against the whole basis or the Ritz vectors that have converged."""
        self._whole = whole
        if whole or k == 1:
            return
        good = ritz.residuals[:k] <= math.sqrt(self._eps) * np.abs(ritz.values[:k])
        if int(good.sum()) > self._good:
            self._good = int(good.sum())
            self._found = self.vectors(ritz.coefficients[:, :k][:, good])
            self._next = self._dual = less(self._next, self._found)

    def vectors(self, coefficients: FloatArray) -> Tensor:
        """Combinations of the basis, orthonormal rows."""
        weights = torch.tensor(coefficients.T.copy(), device="cpu").to(self._chunks[0])
        rows = self._chunks[0].new_zeros(len(weights), self._chunks[0].shape[1])
        for i, chunk in enumerate(self._chunks):
            part = weights[:, i * CHUNK : i * CHUNK + len(chunk)]
            rows.addmm_(part, chunk[: part.shape[1]])
        if self.steps > self._keep:
            for weight, q in zip(weights.T[self._keep :], self._lost(), strict=True):
                rows.addr_(weight, q[0])
        if self._metric is not None:
            return rows
        orthonormal: Tensor = torch.linalg.qr(rows.T).Q.T
        return orthonormal

    def bound(self, value: float) -> float:
        """A bound above the Ritz value on every eigenvalue, except with the failure probability."""
        return bound_beyond(value, self._alphas, self._betas, self._log_delta, self.floor)

    def _lost(self) -> Iterator[Tensor]:
        """The basis vectors that were not kept, computed once more."""
        before, q, dual = self._first_lost
        yield q
        for i in range(self._keep, self.steps - 1):
            w = self._times(dual).add_(q, alpha=-self._alphas[i])
            w = less(w.add_(before, alpha=-self._betas[i - 1]), self._excluded)
            before = q
            q, dual, _ = self._normalized(w)
            yield q

    def _times(self, dual: Tensor) -> Tensor:
        self.products += 1
        return self._sign * self._product(dual)  # A new tensor, whatever the operator gives.

    def _normalized(self, w: Tensor) -> tuple[Tensor, Tensor, float]:
        if self._metric is None:
            length = float(torch.linalg.vector_norm(w))
            w = w / max(length, float(torch.finfo(w.dtype).tiny))
            return w, w, length
        dual = self._metric.product(w)
        length = math.sqrt(max(float(torch.dot(w[0], dual[0])), 0.0))
        scale = 1 / max(length, float(torch.finfo(w.dtype).tiny))
        return scale * w, scale * dual, length
