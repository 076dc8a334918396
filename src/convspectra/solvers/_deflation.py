"""Extreme eigenpairs, repeated or not, with a bound on both sides of each.

Note [Deflation]. Lanczos from one vector finds one copy of each eigenvalue. So it is run once more,
from another random vector, in the orthogonal complement of what was found, until it either shows a
value that belongs among the extreme ones, and that one is added, or shows that there is none.

Note [Bounds by deflation]. In an orthonormal basis of the vectors found and of their complement,
A is ``[[T, E'], [E, D]]`` with T diagonal, ``||E||`` at most the norm of all residuals together,
and the eigenvalues of D below b, by Lanczos in the complement. By Weyl's theorem an eigenvalue of A
is at most max(T_ii, b) + ||E||, each by its rank; where T_ii is above b, the second term may be
``||E||^2 / (T_ii - b)`` instead (Mathias 1998). Vectors of
different runs are coupled, too: T is then diagonal up to the residuals only, and the first bound
holds with twice their norm.

References
----------
R. Mathias (1998), "Quadratic residual bounds for the Hermitian eigenvalue problem", SIAM J. Matrix
    Anal. Appl. 19, 541-550.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.solvers._lanczos import lanczos
from convspectra.solvers._result import Eigenpairs, LinearMap
from convspectra.solvers._stop import DeflationStop, LanczosStop


@dataclass(frozen=True)
class ExtremeEigenpairs:
    """The k extreme eigenpairs, the most extreme first.

    Attributes
    ----------
    values : Tensor
        (k,)
    vectors : Tensor
        Orthonormal rows, (k, n).
    bounds : list of float
        An outer bound on each eigenvalue, and then one on every other.
    norm : float
        An estimate of the norm of the operator.
    converged : bool
    products : int
    """

    values: Tensor
    vectors: Tensor
    bounds: list[float]
    norm: float
    converged: bool
    products: int


def extreme_eigenpairs(
    deflated: Callable[[Tensor], LinearMap],
    size: int,
    k: int,
    *,
    largest: bool,
    stop: DeflationStop,
    like: Tensor,
    generator: torch.Generator | None = None,
    full_orthogonalization: bool = False,
    most_kept: int | None = None,
    resolution: float = 0.0,
    first: Eigenpairs | None = None,
) -> ExtremeEigenpairs:
    """The k largest or smallest eigenpairs of a symmetric operator A, all copies of them.

    Parameters
    ----------
    deflated : callable
        For orthonormal rows V (c, n): the operator ``(I - V'V) A (I - V'V)`` on a row in the
        complement of V.
    size : int
        n.
    k : int
        At most n.
    largest, like, generator, full_orthogonalization, most_kept
        The same as for `lanczos`.
    stop : DeflationStop
        When pairs are accurate enough, and what is to be known of the rest of the spectrum.
    resolution : float
        Values that are less than this fraction of the first are lost in its rounding: they are
        looked for again in the complement.
    first : Eigenpairs, optional
        Instead of the first run: k pairs that have converged, Rayleigh-Ritz in one subspace.

    Notes
    -----
    Cost: `lanczos` for k pairs, and once more for one value; again for every further copy of a
    repeated value.
    """
    sign = 1.0 if largest else -1.0
    found = _Found(sign, like, size)

    def run(count: int, enclosure: float = math.inf, beyond: float | None = None) -> Eigenpairs:
        return lanczos(
            deflated(found.vectors),
            size,
            count,
            largest=largest,
            stop=LanczosStop(stop.tol, stop.maxiter, stop.values_only, enclosure, beyond),
            like=like,
            generator=generator,
            full_orthogonalization=full_orthogonalization,
            most_kept=most_kept,
            excluded=found.vectors,
        )

    norm, all_bounds, rest, ended = 0.0, math.inf, -math.inf, False
    # First k pairs. Those lost in the rounding of the first are left to the next run.
    while len(found.values) < k and not ended:
        pairs, first = first, None
        if pairs is None:
            pairs = run(k - len(found.values), stop.enclosure if stop.alone else math.inf)
        norm = max(norm, pairs.norm)
        if len(found.values) == 0:
            all_bounds = sign * pairs.bound
        resolved = pairs.values.abs() >= resolution * pairs.values[0].abs()
        found.add(pairs, int(resolved.sum()) if pairs.converged else len(resolved))
        if stop.alone or not pairs.converged:
            # Nothing is known of the rest, and nothing more is to be.
            rest, ended = math.inf, True
    # Then their complement, for as long as it shows a value that belongs among them.
    while len(found.values) < size and not ended:
        kth = float(found.values[k - 1])
        if stop.separation is None:
            pairs = run(1, stop.enclosure, kth)
        else:
            pairs = run(1, 0.0, kth - sign * stop.separation * abs(kth))
        belongs = sign * float(pairs.values[0]) > sign * kth + stop.tol * abs(kth)
        ended = not (belongs and pairs.converged)
        found.add(pairs, 0 if ended else 1)
        rest = sign * pairs.bound if ended else -math.inf
    ranked = _bounds(sign * found.values, found.residuals, rest, found.runs == 1)
    return ExtremeEigenpairs(
        values=found.values[:k],
        vectors=found.vectors[:k],
        bounds=[sign * min(bound, all_bounds) for bound in ranked[: k + 1]],
        norm=norm,
        converged=found.converged,
        products=found.products,
    )


class _Found:
    """The pairs of all runs so far, the most extreme first, and what the runs took."""

    def __init__(self, sign: float, like: Tensor, size: int) -> None:
        self._sign = sign
        self.values, self.residuals = like.new_zeros(0), like.new_zeros(0)
        self.vectors = like.new_zeros(0, size)
        self.products, self.runs, self.converged = 0, 0, True

    def add(self, pairs: Eigenpairs, count: int) -> None:
        """Count what a run took, and add the first pairs that it found."""
        self.products += pairs.products
        self.converged = self.converged and pairs.converged
        if count == 0:
            return
        self.runs += 1
        values = torch.cat([self.values, pairs.values[:count]])
        order = torch.argsort(self._sign * values, descending=True, stable=True)
        self.values = values[order]
        self.residuals = torch.cat([self.residuals, pairs.residuals[:count]])[order]
        self.vectors = torch.cat([self.vectors, pairs.vectors[:count]])[order]


def _bounds(values: Tensor, residuals: Tensor, rest: float, one_run: bool) -> list[float]:
    """Bounds by rank, descending, and on all others: Note [Bounds by deflation]."""
    coupling = float(torch.linalg.vector_norm(residuals))
    bounds = []
    for value in values.tolist():
        gap = value - rest
        if one_run and gap > coupling:
            bounds.append(value + coupling**2 / gap)
        else:
            bounds.append(max(value, rest) + 2 * coupling)
    return [*bounds, rest + 2 * coupling]
