"""Stochastic Lanczos quadrature: the distribution of all eigenvalues of a symmetric operator.

For a unit vector q the eigenvalues, each weighted by the square of q's component along its
eigenvector, are a distribution; Lanczos from q gives the Gauss rule of that distribution (Golub and
Meurant 2010). For a random q its expectation is the distribution
of the eigenvalues themselves (Ubaru, Chen and Saad 2017).

Note [Variance]. For q uniform on the sphere in n dimensions and any function f,
``Var(q'f(A)q) = 2 / (n + 2) Var(f)``, with Var(f) that of f over the n eigenvalues. It is not
estimated from the few vectors drawn.

References
----------
G. H. Golub and G. Meurant (2010), "Matrices, moments and quadrature with applications",
    Princeton University Press, doi:10.1515/9781400833887.
S. Ubaru, J. Chen and Y. Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature", SIAM J. Matrix Anal. Appl. 38, doi:10.1137/16M1104974.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.interpolate
import torch
from torch import Tensor

from convspectra.solvers._result import check_products

FloatArray = npt.NDArray[np.float64]

ROUNDING_UNITS = 64
"""An off-diagonal entry of so many eps of the norm says that the Krylov space is invariant.

At too little of it the recurrence goes on in rounding error; at more it ends before small
components have been seen.
"""
SETTLED = 1e-2
"""A Ritz value with a residual of this fraction of it, or of rounding, is an eigenvalue.

A choice, about the width of a bin: with a smaller one jumps of the distribution are smoothed.
"""
APART = 1e-13
"""Least distance of an interpolant's points, relative to the last: some hundred eps, a choice."""


@dataclass(frozen=True)
class Tridiagonals:
    """The recurrences of Lanczos from several vectors at once.

    Attributes
    ----------
    alphas, betas : array
        Diagonals and the entries beside them, (b, steps); the last beta is that of the next step.
    last : array of int
        Steps after which the Krylov space was invariant, (b,); `steps` where it never was. From
        there on alphas and betas are 0.
    """

    alphas: FloatArray
    betas: FloatArray
    last: npt.NDArray[np.int64]

    @property
    def steps(self) -> int:
        """How many were done."""
        return self.alphas.shape[1]

    def each(self) -> Iterator[tuple[FloatArray, FloatArray, int]]:
        """Diagonal, entries beside it and steps of each."""
        for alphas, betas, last in zip(self.alphas, self.betas, self.last, strict=True):
            yield alphas, betas, int(last)


@dataclass(frozen=True)
class GaussRule:
    """A quadrature rule for a distribution.

    Attributes
    ----------
    nodes : array
        Ascending.
    weights : array
        Their sum is 1.
    residuals : array
        So near to each node is an eigenvalue.
    settled : array of bool
        Nodes that are values of the distribution themselves, with all of their weight.
    """

    nodes: FloatArray
    weights: FloatArray
    residuals: FloatArray
    settled: npt.NDArray[np.bool_]

    @property
    def roots(self) -> GaussRule:
        """The rule for the square roots of what this one is for."""
        return replace(self, nodes=np.sqrt(np.maximum(self.nodes, 0.0)))

    def mean(self, function: Callable[[FloatArray], FloatArray]) -> float:
        """The integral of a function."""
        return float(self.weights @ function(self.nodes))

    def fraction_below(self, points: FloatArray) -> FloatArray:
        """The part of a distribution on the positive numbers below each of the points.

        By the Chebyshev-Markov-Stieltjes inequalities the part below a node is between the sum of
        the weights before it and that with its own: half of it is counted there, and in between the
        interpolant is monotone and cubic. At a settled node all of the weight is one jump.
        """
        after = np.cumsum(self.weights)
        before = after - self.weights
        copies = 1 + self.settled.astype(int)
        first = np.concatenate([[True], np.diff(np.repeat(np.arange(len(copies)), copies)) > 0])
        ends = np.where(first, np.repeat(before, copies), np.repeat(after, copies))
        single = np.repeat(~self.settled, copies)
        y = np.where(single, np.repeat(0.5 * (before + after), copies), ends)
        x = np.repeat(self.nodes, copies)
        return _monotone(np.append(0.0, x), np.append(0.0, y), points)

    def unresolved(self, points: FloatArray) -> FloatArray:
        """How far off `fraction_below` may be by what the nodes do not tell.

        Between nodes of about the same weight a distribution is smooth and the interpolant good;
        below the first one, and between a heavy and a light one, the heavier's weight may lie
        anywhere in its interval. A settled node has no weight to spread.
        """
        spread = np.concatenate([[0.0], np.where(self.settled, 0.0, self.weights), [0.0]])
        return np.abs(np.diff(spread))[np.searchsorted(self.nodes, points)]


def random_directions(
    count: int, size: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Unit rows uniform on the sphere, (count, size), of the dtype and device of `like`."""
    rows = torch.randn(count, size, dtype=like.dtype, device=like.device, generator=generator)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def tridiagonals(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tridiagonals:
    """Lanczos from each of several unit vectors, with full reorthogonalization.

    Parameters
    ----------
    product : callable
        A symmetric (or Hermitian) operator on rows, (b, n) -> (b, n): one for all, or one each.
    start : Tensor
        Unit rows, (b, n), real or complex.
    steps : int

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost: b products and ``8 b n j`` flops in the j-th step. Memory: ``b n steps`` numbers.
    """
    rows, size = start.shape
    steps = min(steps, size)
    basis = start.new_zeros(rows, steps, size)
    real = torch.zeros(2, rows, steps, dtype=torch.float64, device="cpu")
    eps = torch.finfo(start.dtype).eps
    norm = torch.zeros(rows, dtype=torch.float64, device="cpu")
    alive = torch.ones(rows, dtype=torch.bool, device="cpu")
    last = torch.full((rows,), steps, device="cpu")
    q = start
    for j in range(steps):
        basis[:, j] = q
        w = product(q)
        alpha = (q.conj() * w).sum(1).real
        done = basis[:, : j + 1]
        for _ in range(2):
            inside = torch.bmm(done.conj(), w[:, :, None])
            w = w - torch.bmm(done.mT, inside)[:, :, 0]
        beta = torch.linalg.vector_norm(w, dim=1)
        check_products(bool(torch.isfinite(beta).all() & torch.isfinite(alpha).all()))
        real[0, :, j] = alpha.cpu() * alive
        norm = torch.maximum(norm, real[0, :, j].abs() + beta.cpu())
        ended = alive & (beta.cpu() <= ROUNDING_UNITS * eps * norm)
        last[ended] = j + 1
        alive = alive & ~ended
        real[1, :, j] = beta.cpu() * alive
        scale = torch.where(alive.to(beta.device), 1 / beta.clamp_min(1e-300), 0.0)
        q = w * scale[:, None]
        if not bool(alive.any()):
            break
    alphas, betas = real[:, :, : j + 1].numpy()
    return Tridiagonals(alphas, betas, last.clamp_max(j + 1).numpy())


def gauss_rules(recurrences: Tridiagonals, steps: int) -> list[GaussRule]:
    """The Gauss rule of every start vector after its first `steps` steps."""
    rules = []
    for alphas, betas, last in recurrences.each():
        order = min(steps, last)
        rules.append(_rule(alphas[:order], betas[:order]))
    return rules


def radau_rules(recurrences: Tridiagonals, node: float) -> list[GaussRule]:
    """Gauss-Radau rules with one more node, at `node`, below all eigenvalues.

    For a function with derivatives of alternating signs, like the logarithm, the integral lies
    between this rule's and the Gauss rule's.
    """
    rules = []
    for alphas, betas, last in recurrences.each():
        a, b = alphas[:last], betas[:last]
        if b[-1] > 0.0:
            a = np.append(a, node + b[-1] ** 2 / _last_pivot(a, b[:-1], node))
            b = np.append(b, 0.0)
        rules.append(_rule(a, b))
    return rules


def _rule(alphas: FloatArray, betas: FloatArray) -> GaussRule:
    beside = betas[:-1]
    nodes, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(beside, 1) + np.diag(beside, -1))
    residuals = betas[-1] * np.abs(vectors[-1])
    rounding = ROUNDING_UNITS * np.finfo(float).eps * np.abs(nodes).max()
    settled = residuals <= SETTLED * np.abs(nodes) + rounding
    return GaussRule(nodes, vectors[0] ** 2, residuals, settled)


def _monotone(x: FloatArray, y: FloatArray, points: FloatArray) -> FloatArray:
    """Monotone cubic interpolation of y between ascending x, set apart a little; 1 beyond them."""
    apart = np.maximum.accumulate(x) + APART * (x[-1] or 1.0) * np.arange(len(x))
    inside = scipy.interpolate.PchipInterpolator(apart, y)(np.clip(points, 0.0, apart[-1]))
    result: FloatArray = np.where(points > apart[-1], 1.0, inside)
    return result


def _last_pivot(alphas: FloatArray, betas: FloatArray, node: float) -> float:
    """The last pivot of T - node I; kept positive where a Ritz value is as good as at the node."""
    least = float(np.finfo(float).eps) * float(np.abs(alphas).max())
    pivot = max(float(alphas[0]) - node, least)
    for alpha, beta in zip(alphas[1:], betas, strict=True):
        pivot = max(float(alpha) - node - float(beta) ** 2 / pivot, least)
    return pivot


def bin_fractions(
    runs: Tridiagonals, size: int, edges: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The part of the square roots of the eigenvalues in each bin, and its error.

    Parameters
    ----------
    runs : Tridiagonals
        Recurrences of a positive semidefinite operator, from vectors uniform on the sphere.
    size : int
        n, how many eigenvalues there are.
    edges : array
        Ascending; what lies beyond the first or the last counts for the bin there.

    Returns
    -------
    fractions, errors : array
        The errors join the sampling's (Note [Variance]; at least that of one eigenvalue), the
        change from fewer steps to all of them, and a third of `GaussRule.unresolved`.
    """
    fractions = _mean_fractions(runs, runs.steps, edges)
    fewer = {max(1, order) for order in (runs.steps - 1, runs.steps - 2, 3 * runs.steps // 4)}
    changes = [np.abs(_mean_fractions(runs, order, edges) - fractions) for order in fewer]
    likely = np.clip(fractions, min(1 / size, 0.5), 1 - min(1 / size, 0.5))
    sampling = 2 * likely * (1 - likely) / ((size + 2) * len(runs.last))
    rules = [rule.roots for rule in gauss_rules(runs, runs.steps)]
    hidden = np.mean([rule.unresolved(edges) for rule in rules], axis=0)
    hidden[[0, -1]] = 0.0
    hidden = np.maximum(hidden[1:], hidden[:-1]) / 3
    errors = np.sqrt(sampling + np.max(changes, axis=0) ** 2 + hidden**2)
    return fractions, np.minimum(errors, 1.0) if len(fractions) > 1 else 0.0 * errors


def mean_log(runs: Tridiagonals, size: int) -> tuple[float, float]:
    """The mean of the logarithms of the eigenvalues, and its error.

    The Gauss rule is above the integral for every start vector, the Gauss-Radau rule with a node at
    eps^2 of the norm below it, unless there are smaller eigenvalues. The value is the Gauss rule's;
    three errors reach the other. The error is inf where a node is rounding error.
    """
    rules = gauss_rules(runs, runs.steps)
    eps = float(np.finfo(float).eps)
    norm = max(float(rule.nodes[-1]) for rule in rules)
    if norm <= 0.0:
        return -np.inf, np.inf
    rounding, least = ROUNDING_UNITS * eps * norm, eps**2 * norm

    def above(x: FloatArray) -> FloatArray:
        return np.log(np.maximum(x, rounding))

    def below(x: FloatArray) -> FloatArray:
        return np.log(np.maximum(x, least))

    value = float(np.mean([rule.mean(above) for rule in rules]))
    if any(float(rule.weights[rule.nodes <= rounding].sum()) > eps for rule in rules):
        return value, float(np.inf)
    variance = float(np.mean([rule.mean(lambda x: (above(x) - value) ** 2) for rule in rules]))
    gap = value - float(np.mean([rule.mean(below) for rule in radau_rules(runs, least)]))
    sampling = 2 * variance / ((size + 2) * len(rules))
    return value, float(np.hypot(sampling**0.5, max(gap, 0.0) / 3))


def _mean_fractions(runs: Tridiagonals, steps: int, edges: FloatArray) -> FloatArray:
    rules = [rule.roots for rule in gauss_rules(runs, steps)]
    below = np.mean([rule.fraction_below(edges) for rule in rules], axis=0)
    below[0], below[-1] = 0.0, 1.0
    fractions: FloatArray = np.diff(np.maximum.accumulate(below.clip(0.0, 1.0)))
    return fractions
