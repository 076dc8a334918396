"""One extreme eigenpair of a symmetric operator by Lanczos without reorthogonalisation.

Two products a step and nothing else that grows. In finite precision the recurrence finds copies of
values that have converged, but none that are false (Paige, J. Inst. Maths Applics 18, 1976), and it
is stopped when the first one has.

Note [Bound beyond an end]. Let p_j be the polynomial of the recurrence, q_{j+1} = p_j(A) q_1. For a
unit eigenvector z of an eigenvalue x, ``|p_j(x)| |z'q_1| = |z'q_{j+1}| <= 1``. Outside the Ritz
values |p_j| grows, and a Gaussian q_1 has a component |z'q_1| of at least delta, except with the
probability `FAILURE_PROBABILITY`: no eigenvalue lies where ``|p_j| > 1 / delta`` (van Dorsselaer,
Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000). Rounding enters as a change of
q_1 by a few eps, which is far below delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from convspectra.solvers.lanczos_bound import log_smallest_squared_singular_value

ROUNDING_UNITS = 16
"""The operator is known to so many eps of its norm."""


@dataclass(frozen=True)
class ExtremeEigenpair:
    """The largest or smallest eigenvalue with a unit vector (1, n).

    Attributes
    ----------
    bound : float
        On the far side of the eigenvalue: no eigenvalue is beyond it.
    norm : float
        The largest Ritz value in size.
    """

    value: float
    vector: Tensor
    residual: float
    bound: float
    norm: float
    converged: bool
    products: int


def extreme_eigenpair(
    product: Callable[[Tensor], Tensor],
    size: int,
    largest: bool,
    *,
    tol: float,
    maxiter: int,
    like: Tensor,
    generator: torch.Generator | None = None,
    values_only: bool = False,
    enclosure: float = math.inf,
) -> ExtremeEigenpair:
    """The largest or the smallest eigenpair of a symmetric positive semidefinite operator.

    Parameters
    ----------
    product : callable
        The operator on a row (1, n).
    size : int
        n.
    largest : bool
    tol : float
        The residual relative to the value; with `values_only`, the error of the value, estimated as
        residual^2 over the gap to the next Ritz value.
    maxiter : int
        Most steps; as many vectors of length n are kept.
    like : Tensor
        Gives the dtype and the device.
    generator : torch.Generator, optional
    values_only : bool
    enclosure : float
        Go on until the bound is within this fraction of the value, for at most as many steps again
        as the value took.

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost: one product and about ``8 n`` flops a step.
    """
    q = torch.randn(1, size, dtype=like.dtype, device=like.device, generator=generator)
    length = float(torch.linalg.vector_norm(q))
    log_delta = 0.5 * log_smallest_squared_singular_value(1, 1) - math.log(length)
    q = q / length
    eps = torch.finfo(like.dtype).eps
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    reached_at, check_at = 0, 1
    while True:
        basis.append(q)
        w = product(q)
        alpha = float((w * q).sum())
        w = w - alpha * q
        if betas:
            w = w - betas[-1] * basis[-2]
        beta = float(torch.linalg.vector_norm(w))
        if not math.isfinite(beta):
            raise ArithmeticError("expected finite products with the matrix, got NaN or Inf")
        alphas.append(alpha)
        betas.append(beta)
        steps = len(alphas)
        floor = ROUNDING_UNITS * eps * max(map(abs, alphas))
        last = steps >= maxiter or beta <= floor
        if last or steps >= check_at:
            check_at = steps + 1 + steps // 16
            values, coefficients = _ritz(alphas, betas, largest)
            value, next_value, far_value = values
            norm = max(abs(value), abs(far_value))
            residual = beta * abs(float(coefficients[-1]))
            floor = ROUNDING_UNITS * eps * norm
            error = residual
            if values_only:
                error = min(residual, residual**2 / max(abs(next_value - value), floor))
            if not reached_at and error <= max(tol * abs(value), 0.0 if values_only else floor):
                reached_at = steps
            converged = bool(reached_at) or (beta <= floor and steps == size)
            if converged and not last:
                bound = _bound(alphas, betas, largest, value, log_delta, floor)
                close = abs(bound - value) <= enclosure * abs(value)
                last = close or steps >= 2 * reached_at
            if last:
                break
        q = w / beta
    vector = torch.zeros_like(q)
    for weight, row in zip(coefficients.tolist(), basis, strict=True):
        vector += weight * row
    bound = _bound(alphas, betas, largest, value, log_delta, floor)
    return ExtremeEigenpair(
        value=value,
        vector=vector / torch.linalg.vector_norm(vector),
        residual=residual,
        bound=bound + floor if largest else bound - floor,
        norm=norm,
        converged=converged,
        products=steps,
    )


def _ritz(alphas: list[float], betas: list[float], largest: bool) -> tuple[list[float], np.ndarray]:
    """The first two Ritz values at the end sought and the one at the other end; a Ritz vector."""
    order = len(alphas)
    if order == 1:
        return [alphas[0]] * 3, np.ones(1)
    diagonal, beside = np.array(alphas), np.array(betas[:-1])
    near = (order - 2, order - 1) if largest else (0, 1)
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside, select="i", select_range=near)
    if largest:
        values, vectors = values[::-1], vectors[:, ::-1]
    far = 0 if largest else order - 1
    other = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside, select="i", select_range=(far, far))
    return [float(values[0]), float(values[1]), float(other[0])], vectors[:, 0]


def _bound(
    alphas: list[float],
    betas: list[float],
    largest: bool,
    value: float,
    log_delta: float,
    floor: float,
) -> float:
    """The nearest point beyond the value where ``log |p_j| >= -log_delta``."""
    sign = 1.0 if largest else -1.0

    def reaches(gap: float) -> bool:
        x = value + sign * gap
        now, before, behind, log_scale = 1.0, 0.0, 0.0, 0.0
        for alpha, beta in zip(alphas, betas, strict=True):
            beta = max(beta, floor)
            now, before = ((x - alpha) * now - behind * before) / beta, now
            behind = beta
            if abs(now) > 1e100:
                now, before, log_scale = now * 1e-100, before * 1e-100, log_scale + 1
        size = math.log(max(abs(now), 1e-300)) + 100 * math.log(10.0) * log_scale
        return size >= -log_delta

    high = floor if floor > 0 else 1e-300
    while not reaches(high):
        high *= 4
    low = high / 4
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return value + sign * high
