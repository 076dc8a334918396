"""Singular triplets of diagonal blocks in hand: by their SVD, or by Gram matrices.

The matrix is block diagonal, given by its blocks (b, m, n); one block is any matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.solvers._result import SingularTriplets

GRAM_RESOLUTION = 1e-8
"""Relative width of an enclosure up to which a Gram matrix counts as having the value: a choice."""
GRAM_LOGARITHM = 1e-7
"""Relative error of the smallest square up to which logarithms of all are taken: a choice."""


def dense_svd(blocks: Tensor, k: int, largest: bool) -> SingularTriplets:
    """The k largest (descending) or smallest (ascending) triplets of a block diagonal matrix.

    The enclosure is the backward error of LAPACK's SVD, ``(max(m, n) + 32) eps sigma_max`` of the
    block around each value: 25 eps have been seen for an 8 x 12 matrix. Cost: about
    ``10 m n min(m, n)`` flops a block.
    """
    # LAPACK takes twice as long for a matrix that is much wider than it is high.
    wide = blocks.shape[-2] < blocks.shape[-1]
    u, s, vh = torch.linalg.svd(blocks.mT if wide else blocks, full_matrices=False)
    if wide:
        u, vh = vh.mT, u.mT
    units = (max(blocks.shape[1:]) + 32) * torch.finfo(s.dtype).eps
    error = (units * s[:, :1]).expand_as(s)
    block, place, others = _chosen_values(s, error, k, largest)
    lower, upper = _ranked_bounds(s, error, k, largest)
    return SingularTriplets(
        u=_in_block(u[block, :, place], block, len(blocks)),
        s=s[block, place],
        v=_in_block(vh[block, place], block, len(blocks)),
        lower=lower,
        upper=upper,
        others=others,
        converged=True,
        matvecs=0,
        certificate="backward error of a dense SVD, (max(m, n) + 32) eps sigma_max",
        logabsdet=float(s.log().sum()) if bool((s > error).all()) else -math.inf,
    )


def gram_eigh(blocks: Tensor, k: int, largest: bool) -> SingularTriplets:
    """The k largest or smallest triplets of a block diagonal matrix, from A A' for m <= n.

    Notes
    -----
    The error of a squared singular value is ``(n + 32) eps sigma_max^2`` (the symmetric
    eigenproblem, and forming A A'), so that values below about ``sqrt(n eps) sigma_max`` are lost:
    their enclosure reaches down to 0 and the result is not `converged`. Cost: about
    ``2 m^2 n + 9 m^3`` flops a block.
    """
    squares, vectors = torch.linalg.eigh(blocks @ blocks.mT)
    squares, vectors = squares.flip(1), vectors.flip(2)
    units = (max(blocks.shape[1:]) + 32) * torch.finfo(squares.dtype).eps
    error = (units * squares[:, :1]).expand_as(squares)
    resolved = bool((error <= GRAM_LOGARITHM * squares).all())
    block, place, others = _chosen_values(squares, error, k, largest)
    low, high = _ranked_bounds(squares, error, k, largest)
    u = vectors[block, :, place]
    images = torch.stack([row @ blocks[i] for row, i in zip(u, block.tolist(), strict=True)])
    s = torch.linalg.vector_norm(images, dim=1)
    # Values that are lost in rounding need not come in the order of their squares.
    s, order = torch.sort(s, descending=largest)
    lower, upper = torch.minimum(s, low.sqrt()), torch.maximum(s, high.sqrt())
    v = images[order] / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return SingularTriplets(
        u=_in_block(u[order], block[order], len(blocks)),
        s=s,
        v=_in_block(v, block[order], len(blocks)),
        lower=lower,
        upper=upper,
        others=max(others, 0.0) ** 0.5,
        converged=bool(((upper - lower <= GRAM_RESOLUTION * s) & (s > 0)).all()),
        matvecs=0,
        certificate="backward error of the Gram matrix, (max(m, n) + 32) eps sigma_max^2",
        logabsdet=0.5 * float(squares.log().sum()) if resolved else None,
    )


def _chosen_values(
    values: Tensor, errors: Tensor, k: int, largest: bool
) -> tuple[Tensor, Tensor, float]:
    """Block and place of the k values wanted, best first, and a bound on all the other values.

    Where there are no others the bound is one on nothing: 0 or inf.
    """
    flat = values.flatten()
    order = torch.argsort(flat, descending=largest, stable=True)
    chosen, rest = order[:k], order[k:]
    others = 0.0 if largest else float("inf")
    if len(rest):
        bounds = (values + errors if largest else (values - errors).clamp_min(0)).flatten()[rest]
        others = float(bounds.amax() if largest else bounds.amin())
    return chosen // values.shape[1], chosen % values.shape[1], others


def _ranked_bounds(values: Tensor, errors: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds on the k largest or smallest of values that are uncertain.

    The i-th of them is between the i-th of the lower bounds and the i-th of the upper ones: blocks
    of unlike scale have unlike errors, and a value that is lost in one may be the smallest.
    """
    low, high = ((values + sign * errors).clamp_min(0).flatten() for sign in (-1, 1))
    lower, upper = (torch.sort(x, descending=largest).values[:k] for x in (low, high))
    return lower, upper


def _in_block(rows: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Vectors (k, m) of the blocks given, as vectors of the whole matrix, (k, blocks * m)."""
    whole = rows.new_zeros(len(rows), blocks, rows.shape[1])
    whole[torch.arange(len(rows), device=rows.device), block] = rows
    return whole.flatten(1)
