"""The arguments and results that all algorithms for singular values share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
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


def joined_triplets(
    parts: Sequence[SingularTriplets],
    places: Sequence[tuple[int, int]],
    k: int,
    shape: tuple[int, int],
) -> SingularTriplets:
    """The k smallest triplets of a block diagonal matrix from those of its blocks.

    Parameters
    ----------
    parts : sequence
        Of each block its min(k, m, n) smallest triplets. Blocks that are not there are unknown:
        they may have any smaller values.
    places : sequence of tuple of int
        First row and first column of each block.
    k : int
    shape : tuple of int
        Of the whole matrix.
    """
    rows: list[list[Tensor]] = [[], []]
    for part, place in zip(parts, places, strict=True):
        for side, vectors in enumerate((part.u, part.v)):
            behind = shape[side] - place[side] - vectors.shape[1]
            rows[side].append(torch.nn.functional.pad(vectors, (place[side], behind)))
    s, lower, upper = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("s", "lower", "upper")
    )
    order = torch.argsort(s, stable=True)
    # The i-th least end bounds the i-th least value.
    lower, upper = lower.sort().values, upper.sort().values
    complete = sum(part.u.shape[1] for part in parts) == shape[0]
    others = min([part.others for part in parts] + lower[k:].tolist())
    logarithms = [part.logabsdet for part in parts if part.logabsdet is not None]
    residuals = [part.residuals for part in parts if part.residuals is not None]
    return SingularTriplets(
        u=torch.cat(rows[0])[order[:k]],
        s=s[order[:k]],
        v=torch.cat(rows[1])[order[:k]],
        lower=lower[:k] if complete else torch.zeros_like(lower[:k]),
        upper=upper[:k],
        others=others if complete else 0.0,
        converged=all(part.converged for part in parts),
        matvecs=sum(part.matvecs for part in parts),
        certificate="; ".join(dict.fromkeys(part.certificate for part in parts)),
        logabsdet=sum(logarithms) if complete and len(logarithms) == len(parts) else None,
        residuals=torch.cat(residuals)[order[:k]] if len(residuals) == len(parts) else None,
    )
