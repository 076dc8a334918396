"""The stable rank: of how many directions a linear map passes on a comparable part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    LinearOperatorLike,
    check_positive_integer,
    not_compiled,
)
from convspectra.spectra._singular_values import frobenius_norm, svds

AT_ONCE = 16
"""Vectors in one product: a choice, memory of so many passes of a network."""


@dataclass(frozen=True)
class StableRank:
    """The answer of `stable_rank`.

    Attributes
    ----------
    value : float
    error : float
        Half the width of the enclosure of the norm, carried over, and one standard error of the
        Frobenius norm where random vectors measured it.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> found = cs.stable_rank(cs.ConvOperator(torch.ones(2, 2, 1), 1))
    >>> round(found.value, 6), found.error < 1e-10
    (1.0, True)
    """

    value: float
    error: float


@not_compiled
def stable_rank(
    op: ConvOperator | LinearOperatorLike,
    *,
    probes: int = 64,
    generator: torch.Generator | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> StableRank:
    """``||A||_F^2 / ||A||^2``, the sum of squares of the singular values over the largest square.

    It is between 1 and the rank, and moves little with small singular values.

    Parameters
    ----------
    op : ConvOperator, JacobianOperator or the like
    probes : int
        Random vectors for the Frobenius norm of an operator that is known by its products. One with
        a side of at most as many is measured exactly, by unit vectors.
    generator : torch.Generator, optional
        A fixed seed by default.
    max_bytes : int
        As for `svds`.

    Returns
    -------
    StableRank
        0 for a map that is 0.

    Raises
    ------
    ValueError
        For `probes` that are no positive integer; what `svds` raises.

    Notes
    -----
    For Gaussian x, ``E ||A x||^2 = ||A||_F^2`` with the variance ``2 ||A'A||_F^2``, at most
    ``2 ||A||^2 ||A||_F^2`` (M. F. Hutchinson (1990), "A stochastic estimator of the trace of the
    influence matrix for Laplacian smoothing splines", Commun. Stat. Simul. Comput. 19,
    doi:10.1080/03610919008812866): the standard error of a stable rank r is at most
    ``sqrt(2 r / probes)``.
    Cost: that of the largest singular value, and `probes` products.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> round(cs.stable_rank(cs.ConvOperator(torch.eye(3)[:, :, None], 5)).value, 6)
    15.0
    """
    check_positive_integer("probes", probes)
    largest = svds(op, 1, return_singular_vectors=False, max_bytes=max_bytes)
    norm = float(largest.s[0])
    if norm == 0.0:
        return StableRank(0.0, 0.0)
    if isinstance(op, ConvOperator):
        square, by_chance = (frobenius_norm(op) / norm) ** 2, False
    else:
        square, by_chance = _squares(op, norm, probes, generator)
    width = float(largest.upper[0] - largest.lower[0]) / norm
    chance = math.sqrt(2 * square / probes) if by_chance else 0.0
    return StableRank(square, square * width + chance)


def _squares(
    op: LinearOperatorLike, norm: float, probes: int, generator: torch.Generator | None
) -> tuple[float, bool]:
    """||A||_F^2 over a square of the norm, and whether random vectors measured it."""
    rows, columns = op.shape
    side, product, shape = min(
        (columns, op.apply, op.input_shape), (rows, op.apply_adjoint, op.output_shape),
        key=lambda choice: choice[0],
    )  # fmt: skip
    if side <= probes:
        vectors, count = torch.eye(side, dtype=op.dtype, device=op.device), 1
    else:
        generator = generator or torch.Generator(device=op.device).manual_seed(0)
        vectors = torch.randn(probes, side, generator=generator, dtype=op.dtype, device=op.device)
        count = probes
    total = math.fsum(
        float((product(part.reshape(-1, *shape)).detach() / norm).square().sum())
        for part in vectors.split(AT_ONCE)
    )
    return total / count, side > probes
