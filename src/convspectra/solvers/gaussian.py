"""What a Gaussian vector promises: the probability behind every bound that is not for certain."""

from __future__ import annotations

import math

FAILURE_PROBABILITY = 1e-10


def log_smallest_norm(count: int) -> float:
    """The log of a t that the norm of `count` standard normal numbers is below with
    `FAILURE_PROBABILITY` at most: the density of that norm is below ``c t^(count - 1)``.
    """
    log_density = math.log(2) * (1 - count / 2) - math.lgamma(count / 2)
    return (math.log(FAILURE_PROBABILITY) + math.log(count) - log_density) / count
