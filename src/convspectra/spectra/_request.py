"""A request for singular triplets of one block of a layer, and what every answer to it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product

ZERO = 1e-11
"""A smallest singular value with an upper bound of this much of the norm of M counts as 0."""


@dataclass(frozen=True)
class Request:
    """The k largest or smallest triplets of a block.

    The block is detached, not transposed, in float64 and scaled to entries near 1.
    """

    op: ConvOperator
    k: int
    largest: bool
    values_only: bool
    tol: float
    maxiter: int | None
    generator: torch.Generator
    max_bytes: int
    separation: float | None

    @property
    def alone(self) -> bool:
        """Whether one value is asked for, and nothing of the others."""
        return self.k == 1 and self.separation is None

    def most_steps(self, default: int) -> int:
        """`maxiter`, or what a way takes by default."""
        return default if self.maxiter is None else self.maxiter

    @property
    def norm_estimate(self) -> float:
        """An upper bound on sigma_max of the right order: for rounding errors."""
        taps = math.prod(self.op.weight.shape[2:])
        weight = self.op.weight.reshape(self.op.groups, -1, *self.op.weight.shape[1:])
        return float(torch.linalg.vector_norm(weight.flatten(1), dim=1).amax()) * taps**0.5


def refined(tall: Product, vectors: Tensor, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (u, s, v) from Rayleigh-Ritz with M itself in the span of nearly orthonormal rows.

    Those of an iteration that did not converge may be far from it, and values would come out below
    the smallest of M: they are made orthonormal first.
    """
    gram = vectors @ vectors.mT
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not torch.allclose(gram, identity, rtol=0, atol=1e-6):
        vectors = torch.linalg.qr(vectors.mT).Q.mT
    images = tall.apply(vectors)
    left, s, right = torch.linalg.svd(images, full_matrices=False)
    if not largest:
        left, s, right = left.flip(1), s.flip(0), right.flip(0)
    return right, s, left.mT @ vectors
