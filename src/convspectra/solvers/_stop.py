"""When an iteration ends: one frozen record for each kind of question."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """When every iteration ends, with a bound or without.

    Attributes
    ----------
    tol : float
        Relative tolerance of a pair; each algorithm says of what.
    maxiter : int
        Most steps.
    values_only : bool
        Whether only values need to reach the tolerance: their errors are estimated by the squares
        of the residuals.
    """

    tol: float
    maxiter: int
    values_only: bool = False


@dataclass(frozen=True)
class LanczosStop(Stop):
    """When `lanczos` ends, which knows a bound on every eigenvalue.

    Attributes
    ----------
    enclosure : float
        Go on until the bound is within this fraction of the first value, for at most as many steps
        again as the values took.
    beyond : float, optional
        Stop as soon as no eigenvalue beyond this one is to be expected: the bound is within
        `enclosure` of it, and the first Ritz value with its estimated error is not beyond it. If
        one is, go on until it has converged; otherwise no vectors are given.
    """

    enclosure: float = math.inf
    beyond: float | None = None


@dataclass(frozen=True)
class DeflationStop(Stop):
    """When `extreme_eigenpairs` ends, which looks at the rest of the spectrum, too.

    Attributes
    ----------
    enclosure : float
        The rest is looked at until its bound is this near the k-th value, relatively; if that is
        alone, Lanczos goes on until its own bound is. A choice: at half of it the bounds are twice
        as near, for more products.
    separation : float, optional
        Instead: until the rest is shown to be apart from the k-th value by this fraction of it, or
        not to be.
    alone : bool
        With k = 1: the rest is not looked at.
    """

    enclosure: float = 0.1
    separation: float | None = None
    alone: bool = False
