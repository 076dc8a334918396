"""Bounds by Gaussian vectors: the probability behind all that is not for certain.

Note [Bound beyond an end]. Let p_j be the polynomial of the recurrence, q_{j+1} = p_j(A) q_1. For a
unit eigenvector z of an eigenvalue x, ``(z'q_1)^2 sum_j p_j(x)^2 = sum_j (z'q_{j+1})^2 <= 1``.
Outside the Ritz values p_j grows, and a Gaussian q_1 has a component |z'q_1| of at least delta,
except with the probability `FAILURE_PROBABILITY`: no eigenvalue lies where the sum is larger than
``1 / delta^2`` (after van Dorsselaer, Hochstenbach and van der Vorst 2000). Rounding enters as a
change of q_1 by a few eps: far below delta in double precision.

References
----------
J. L. M. van Dorsselaer, M. E. Hochstenbach and H. A. van der Vorst (2000), "Computing probabilistic
    bounds for extreme eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix
    Anal. Appl. 22, doi:10.1137/S0895479800366859.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FAILURE_PROBABILITY = 1e-10
"""Probability with which a bound by Gaussian vectors fails.

A choice: one in ten billion. Bounds of Lanczos depend on its logarithm, those of `norm_bound` on
its fourth root.
"""
BOUND_VECTORS = 4
"""Vectors for `norm_bound`, which is so many times the norm of a map of rank one, about:

8e9 with 1 vector, 1e5 with 2, 376 with 4, 24 with 8 (from the formula). Bounds on the error of an
inverse are near 4e-10 with 4 vectors (Gaussian weights); with 2 they would be near 1e-7.
"""


def log_smallest_norm(count: int) -> float:
    """The log of a t that the norm of `count` standard normal numbers is below with
    `FAILURE_PROBABILITY` at most: the density of that norm is below ``c t^(count - 1)``.
    """
    log_density = math.log(2) * (1 - count / 2) - math.lgamma(count / 2)
    return (math.log(FAILURE_PROBABILITY) + math.log(count) - log_density) / count


def gaussian(count: int, shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Standard normal arrays (count, *shape), always the same ones for a seed."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(count, *shape, dtype=like.dtype, device=like.device, generator=generator)


def norm_bound(*images: Tensor) -> float:
    """A bound on the spectral norm of each of some maps, from images of the same Gaussian vectors.

    Parameters
    ----------
    *images : Tensor
        (b, ...): what a map makes of the b arrays of `gaussian`, one after the other.

    Notes
    -----
    The component of the arrays along a right singular vector of the norm is a vector of b standard
    normal numbers, which is shorter than `log_smallest_norm` says with `FAILURE_PROBABILITY` only.
    """
    largest = max(float(torch.linalg.vector_norm(image)) for image in images)
    return largest / math.exp(log_smallest_norm(len(images[0])))


def bound_beyond(
    value: float, alphas: Sequence[float], betas: Sequence[float], log_delta: float, floor: float
) -> float:
    """The nearest point above the largest Ritz value where the sum of squares is 1 / delta^2.

    Parameters
    ----------
    value : float
        The largest Ritz value.
    alphas, betas : sequence of float
        The tridiagonal matrix of as many steps; the last beta is that of the next vector.
    log_delta : float
    floor : float
        Size of their rounding error.
    """
    enough = -2 * log_delta
    floor = max(floor, 1e-300)
    betas = [max(beta, floor) for beta in betas]

    def reaches(gap: float) -> bool:
        x = value + gap
        now, before, behind, total, log_scale = 1.0, 0.0, 0.0, 1.0, 0.0
        for alpha, beta in zip(alphas, betas, strict=True):
            now, before = ((x - alpha) * now - behind * before) / beta, now
            behind = beta
            total += now * now
            if total > 1e100:
                now, before, total = now * 1e-50, before * 1e-50, total * 1e-100
                log_scale += 100 * math.log(10.0)
                if log_scale >= enough:
                    return True
        return math.log(total) + log_scale >= enough

    high = floor
    while not reaches(high):
        high *= 4
    low = high / 4
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return value + high
