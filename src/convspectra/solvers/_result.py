"""The arguments and results that all algorithms for singular values share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

LinearMap: TypeAlias = Callable[[Tensor], Tensor]

PAIRS_COUNT_AS_ONE = 10
"""Where values alone are asked for, two that are nearer than so many tolerances may be taken for
one: residuals, which bound the distance to some value, are allowed so much.

A larger one takes the wrong one of two near values more often: with 10 that is less than once in
15 (`test_pairs_rarely_cost_more_than_ten_tolerances`).
"""

NO_BOUND_BELOW = "Rayleigh-Ritz values above; no bound below"
"""The certificate of smallest values that an iteration alone has found."""


def check_products(finite: bool) -> None:
    """Raise an ArithmeticError unless the products with the matrix were finite."""
    if not finite:
        raise ArithmeticError("expected finite products with the matrix, got NaN or Inf")


@dataclass(frozen=True)
class SingularTriplets:
    """Some singular triplets of an m x n matrix A, with what is known of their accuracy.

    Attributes
    ----------
    u : Tensor
        Left singular vectors in rows, (k, m).
    s : Tensor
        Singular values, (k,).
    v : Tensor
        Right singular vectors in rows, (k, n).
    lower, upper : Tensor
        Enclosure of each singular value, (k,).
    others : float
        Bound on every singular value that is not given: from above if the largest were sought, from
        below for the smallest; inf or 0 where nothing is known.
    converged : bool
        Whether every value reached the tolerance.
    matvecs : int
        Applications of A and of A' taken together.
    certificate : str
        The reason for which the enclosure holds.
    logabsdet : float, optional
        Sum of the logarithms of all min(m, n) singular values, where the way taken gives it along;
        -inf where one of them is 0 to working precision.
    residuals : Tensor, optional
        ``sqrt(||A v - s u||^2 + ||A' u - s v||^2)``, (k,), where the algorithm has measured them.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    lower: Tensor
    upper: Tensor
    others: float
    converged: bool
    matvecs: int
    certificate: str
    logabsdet: float | None = None
    residuals: Tensor | None = None

    def transposed(self) -> SingularTriplets:
        """The triplets of A' from those of A."""
        return replace(self, u=self.v, v=self.u)


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs of a symmetric operator, the most extreme first.

    Attributes
    ----------
    values : Tensor
        (k,), or fewer where the Krylov space had no more.
    vectors : Tensor
        Orthonormal rows, (k, n).
    residuals : Tensor
        (k,)
    bound : float
        No eigenvalue is beyond it: above it for the largest, below it for the smallest; infinite
        where nothing is known.
    norm : float
        An estimate of the norm of the operator, of the right order.
    converged : bool
        Whether the pairs have; or, where that was asked, that there is none beyond a value.
    products : int
        Vectors that the operator was applied to.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bound: float
    norm: float
    converged: bool
    products: int
