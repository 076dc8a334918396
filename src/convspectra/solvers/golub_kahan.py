"""Largest singular triplets by Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation.

Sources: Golub and Kahan (SIAM J. Numer. Anal. 2, 1965). The upper bound on the largest singular
value is the probabilistic one of van Dorsselaer, Hochstenbach and van der Vorst (SIAM J. Matrix
Anal. Appl. 22, 2000): a random start vector has a component of at least delta along the singular
vector sought, except with a chosen probability, and the Lanczos polynomial would have made that
component larger than 1 had the singular value been above the bound.

Note [Repeated values]. One Krylov sequence finds one copy of a repeated singular value. For k > 1
further sweeps, from fresh random vectors orthogonal to what was found, add the missing copies; the
last sweep finds nothing larger than the k-th value and bounds all that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convspectra.solvers.result import SingularTriplets

FAILURE_PROBABILITY = 1e-10
ROUNDING_UNITS = 16
"""A length of at most this many eps times sigma_max is rounding error, and counts as 0."""


def golub_kahan(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    k: int,
    *,
    tol: float,
    maxiter: int,
    like: Tensor,
    generator: torch.Generator | None = None,
    separation: float | None = None,
) -> SingularTriplets:
    """The k largest singular triplets of A, descending.

    Parameters
    ----------
    matvec, rmatvec : callable
        A x for x of shape (n,) and A' y for y of shape (m,).
    shape : (m, n)
    k : int
        At most min(m, n).
    tol : float
        A triplet has converged when its residual is at most ``tol * sigma``, with its own sigma, or
        down at rounding error. The error of the value itself is then about ``tol^2 sigma^2`` over
        the gap to the next one.
    maxiter : int
        Most steps of one sweep, of which there are never fewer than the values it looks for; the
        basis holds as many vectors of length m and n.
    like : Tensor
        Gives the dtype and the device.
    generator : torch.Generator, optional
        Of the random start vectors, on that device.
    separation : float, optional
        Go on until all other values are known to be smaller than the k-th by this fraction of it,
        or are found not to be: `others` tells.

    Returns
    -------
    SingularTriplets
        The lower bounds hold for certain (Rayleigh-Ritz and residuals), the upper ones except with
        probability `FAILURE_PROBABILITY`. With `converged` False, the best estimate so far.

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost: two applications and ``8 j (m + n)`` flops for step j.
    """
    if shape[0] < shape[1]:
        # On the smaller side the start vector has no component in a null space known beforehand.
        swapped = golub_kahan(
            rmatvec,
            matvec,
            (shape[1], shape[0]),
            k,
            tol=tol,
            maxiter=maxiter,
            like=like,
            generator=generator,
            separation=separation,
        )
        return replace(swapped, u=swapped.v, v=swapped.u)
    found = _Sweep.empty(shape, like)
    matvecs, complete, rest_bound = 0, True, math.inf
    while True:
        sweep = _sweep(
            matvec,
            rmatvec,
            shape,
            max(1, k - len(found.s)),
            found,
            tol=tol,
            maxiter=maxiter,
            enough_below=(1 - (separation or 0)) * float(found.s[k - 1])
            if len(found.s) >= k
            else 0.0,
            bound_wanted=separation is not None and len(found.s) >= k,
            generator=generator,
        )
        matvecs += sweep.matvecs
        complete = complete and sweep.converged
        rest_bound = sweep.bound
        have_k = len(found.s) >= k
        news = len(sweep.s) > 0 and (
            not have_k or float(sweep.s[0]) > float(found.s[k - 1]) * (1 + tol)
        )
        if news:
            found = found.merged_with(sweep)
        exhausted = len(found.s) == min(shape)
        if not complete or not news or exhausted or (k == 1 and not have_k and separation is None):
            break
    u, s, v = found.u[:k], found.s[:k], found.v[:k]
    # Weyl: A is the found triplets plus the rest, up to a matrix no larger than the residuals.
    units = ROUNDING_UNITS + 4 * max(shape) ** 0.5
    slack = found.residuals.sum() + units * torch.finfo(s.dtype).eps * found.s[0]
    upper = torch.maximum(s, s.new_tensor(0.0 if exhausted else rest_bound)) + slack
    return SingularTriplets(
        u=u,
        s=s,
        v=v,
        lower=(s - slack).clamp_min(0),
        upper=upper,
        others=_bound_on_others(found, k, slack, exhausted, rest_bound),
        converged=complete,
        matvecs=matvecs,
        certificate=(
            "Rayleigh-Ritz values and their residuals below; above, the Lanczos bound, which "
            f"fails with probability {FAILURE_PROBABILITY:.0e}"
        ),
    )


def _bound_on_others(
    found: _Sweep, k: int, slack: Tensor, exhausted: bool, rest_bound: float
) -> float:
    further = float(found.s[k]) if len(found.s) > k else 0.0
    return max(further, 0.0 if exhausted else rest_bound) + float(slack)


@dataclass(frozen=True)
class _Sweep:
    """Triplets of one Krylov sequence, or of several together; bound covers all it did not find."""

    u: Tensor
    s: Tensor
    v: Tensor
    residuals: Tensor
    bound: float
    converged: bool
    matvecs: int

    @classmethod
    def empty(cls, shape: tuple[int, int], like: Tensor) -> _Sweep:
        m, n = shape
        none = like.new_zeros(0)
        u, v = like.new_zeros(0, m), like.new_zeros(0, n)
        return cls(u, none, v, none, math.inf, True, 0)

    def merged_with(self, other: _Sweep) -> _Sweep:
        s = torch.cat([self.s, other.s])
        order = torch.argsort(s, descending=True, stable=True)
        return _Sweep(
            torch.cat([self.u, other.u])[order],
            s[order],
            torch.cat([self.v, other.v])[order],
            torch.cat([self.residuals, other.residuals])[order],
            other.bound,
            self.converged and other.converged,
            self.matvecs + other.matvecs,
        )


def _sweep(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    wanted: int,
    found: _Sweep,
    *,
    tol: float,
    maxiter: int,
    enough_below: float,
    bound_wanted: bool,
    generator: torch.Generator | None,
) -> _Sweep:
    """One Krylov sequence in the orthogonal complement of what was found.

    It ends when `wanted` triplets have converged, when its upper bound falls to `enough_below`,
    when the space is exhausted, or after `maxiter` steps.
    """
    dimension = shape[1] - len(found.s)
    left, right = _Basis(found.u), _Basis(found.v)
    alphas: list[float] = []
    betas: list[float] = []
    rounding = ROUNDING_UNITS * torch.finfo(found.u.dtype).eps
    scale = float(found.s[0]) if len(found.s) else 0.0
    v = right.random_direction(generator)
    right.append(v)
    while True:
        u = matvec(v)
        size = float(torch.linalg.vector_norm(u))
        u, alpha = left.orthogonalise(u, generator, floor=rounding * max(size, scale))
        alphas.append(alpha)
        left.append(u)
        w = rmatvec(u)
        size = float(torch.linalg.vector_norm(w))
        scale = max(scale, size)
        v, beta = right.orthogonalise(w, generator, floor=rounding * max(size, scale))
        betas.append(beta)
        steps = len(alphas)
        small = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        small.diagonal(1).copy_(torch.tensor(betas[:-1], dtype=torch.float64))
        p, ritz, qh = torch.linalg.svd(small)
        scale = max(scale, float(ritz[0]))
        residuals = beta * p[-1].abs()
        take = min(wanted, steps)
        exhausted = beta == 0.0 or steps == dimension
        polynomial = _LanczosPolynomial(alphas, betas, ritz, dimension, rounding * scale)
        allowed = (tol * ritz[:take]).clamp_min(rounding * scale)
        converged = bool((residuals[:take] <= allowed).all()) and take == min(wanted, dimension)
        below = enough_below > 0 and polynomial.bounds(enough_below)
        if bound_wanted and float(ritz[0]) <= enough_below:
            converged = False
        if exhausted or converged or below or steps >= max(maxiter, wanted):
            break
        right.append(v)
    return _Sweep(
        p.T[:take].to(found.u) @ left.rows(len(found.s), steps),
        ritz[:take].to(found.u),
        qh[:take].to(found.u) @ right.rows(len(found.s), steps),
        residuals[:take].to(found.u),
        float(ritz[0]) if steps == dimension else polynomial.largest_root(),
        exhausted or converged or below,
        2 * steps,
    )


class _LanczosPolynomial:
    """The polynomial p_j with q_{j+1} = p_j(A'A) q_1, as a test of upper bounds on sigma_max.

    |p_j(sigma^2)| times the component of q_1 along the singular vector is a component of q_{j+1},
    so at most 1. Where q_1 has a component of at least delta, any x above the Ritz values with
    ``p_j(x^2) >= 1 / delta`` is an upper bound. p_j is the product of (lambda - ritz^2) over that
    of the off-diagonal entries alpha_i beta_i of the Lanczos matrix. A factor that was taken for 0
    enters as `floor`, the largest that it can have been.
    """

    def __init__(
        self,
        alphas: list[float],
        betas: list[float],
        ritz: Tensor,
        dimension: int,
        floor: float,
    ) -> None:
        log_delta = math.log(FAILURE_PROBABILITY) + 0.5 * math.log(math.pi / (2 * dimension))
        self._smallest_gap = floor**2
        if floor > 0:
            factors = (max(x, floor) for x in (*alphas, *betas))
            self._target = sum(map(math.log, factors)) - log_delta
        self._squares = (ritz**2).tolist()

    def bounds(self, x: float) -> bool:
        """Whether x is an upper bound."""
        return self._reaches(x**2 - self._squares[0])

    def largest_root(self) -> float:
        """The smallest upper bound."""
        high = self._smallest_gap
        if high == 0:
            return 0.0
        while not self._reaches(high):
            high *= 4
        low = high / 4
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self._reaches(middle) else (middle, high)
        return math.sqrt(self._squares[0] + high)

    def _reaches(self, gap: float) -> bool:
        """Whether ``p_j(ritz_1^2 + gap) >= 1 / delta``."""
        if gap <= 0:
            return False
        largest = self._squares[0]
        return sum(math.log(largest - x + gap) for x in self._squares) >= self._target


class _Basis:
    """Orthonormal rows in one growing block of memory."""

    def __init__(self, rows: Tensor) -> None:
        self._count = len(rows)
        self._store = rows.new_zeros(max(16, 2 * len(rows)), rows.shape[1])
        self._store[: self._count] = rows

    def append(self, row: Tensor) -> None:
        if self._count == len(self._store):
            self._store = torch.cat([self._store, torch.zeros_like(self._store)])
        self._store[self._count] = row
        self._count += 1

    def rows(self, first: int, count: int) -> Tensor:
        return self._store[first : first + count]

    def orthogonalise(
        self, x: Tensor, generator: torch.Generator | None, floor: float
    ) -> tuple[Tensor, float]:
        """The unit vector along x less its projection, and that length; at most `floor` is 0.

        Where nothing is left of x, the vector is a random one orthogonal to the basis.
        """
        x = self._project_out(x)
        length = float(torch.linalg.vector_norm(x))
        if not math.isfinite(length):
            raise ArithmeticError("expected finite products with the matrix, got NaN or Inf")
        if length > floor:
            return x / length, length
        return self.random_direction(generator), 0.0

    def random_direction(self, generator: torch.Generator | None) -> Tensor:
        """A unit vector drawn uniformly from the orthogonal complement of the basis."""
        x = torch.randn(
            self._store.shape[1],
            dtype=self._store.dtype,
            device=self._store.device,
            generator=generator,
        )
        x = self._project_out(x)
        unit: Tensor = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
        return unit

    def _project_out(self, x: Tensor) -> Tensor:
        basis = self._store[: self._count]
        for _ in range(2):
            x = torch.addmv(x, basis.T, basis @ x, alpha=-1)
        return x
