"""Singular triplets of a matrix in hand: by its SVD, or by the eigenvectors of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.solvers.result import SingularTriplets

GRAM_RESOLUTION = 1e-8
"""Relative width of the enclosure of a value up to which a Gram matrix counts as having it."""


def dense_svd(matrix: Tensor, k: int, largest: bool) -> SingularTriplets:
    """The k largest (descending) or smallest (ascending) triplets of a dense matrix.

    The enclosure is the backward error of LAPACK's SVD, ``(max(m, n) + 32) eps sigma_max`` around
    each value: 25 eps have been seen for an 8 x 12 matrix. Cost: about ``10 m n min(m, n)`` flops.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    error = (max(matrix.shape) + 32) * torch.finfo(s.dtype).eps * s[0]
    chosen = _ends(len(s), k, largest, s.device)
    return SingularTriplets(
        u=u.T[chosen],
        s=s[chosen],
        v=vh[chosen],
        lower=(s[chosen] - error).clamp_min(0),
        upper=s[chosen] + error,
        others=_others(s, k, largest, float(error)),
        converged=True,
        matvecs=0,
        certificate="backward error of a dense SVD, (max(m, n) + 32) eps sigma_max",
    )


def gram_eigh(gram: Tensor, products: Tensor, k: int, largest: bool) -> SingularTriplets:
    """The k largest or smallest triplets of A from A A', where it is the smaller Gram matrix.

    Parameters
    ----------
    gram : Tensor
        A A', (m, m) with m <= n.
    products : Tensor
        A', row by row the images of the identity, (m, n).

    Notes
    -----
    The error of a squared singular value is ``(n + 32) eps sigma_max^2`` (the symmetric
    eigenproblem, and forming A A' by sums of a few terms), so that values below about
    ``sqrt(n eps) sigma_max`` are lost: their enclosure reaches down to 0 and the result is not
    `converged`. Cost: about ``9 m^3`` flops.
    """
    squares, vectors = torch.linalg.eigh(gram)
    units = max(products.shape) + 32
    error = units * torch.finfo(gram.dtype).eps * squares[-1]
    chosen = _ends(len(squares), k, largest, gram.device, ascending=True)
    u = vectors.T[chosen]
    images = u @ products
    s = torch.linalg.vector_norm(images, dim=1)
    # Values that are lost in rounding need not come in the order of their squares.
    s, order = torch.sort(s, descending=largest)
    lower = torch.minimum(s, (squares[chosen] - error).clamp_min(0).sqrt())
    upper = torch.maximum(s, (squares[chosen] + error).clamp_min(0).sqrt())
    return SingularTriplets(
        u=u[order],
        s=s,
        v=images[order] / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None],
        lower=lower,
        upper=upper,
        others=_others(squares.clamp_min(0).flip(0), k, largest, float(error)) ** 0.5,
        converged=bool(((upper - lower <= GRAM_RESOLUTION * s) & (s > 0)).all()),
        matvecs=len(gram),
        certificate="backward error of the Gram matrix, (max(m, n) + 32) eps sigma_max^2",
    )


def _ends(
    count: int, k: int, largest: bool, device: torch.device, ascending: bool = False
) -> Tensor:
    """Positions of the k values wanted in a sorted array, best first."""
    first = torch.arange(k, device=device)
    return first if largest != ascending else count - 1 - first


def _others(descending: Tensor, k: int, largest: bool, error: float) -> float:
    """Bound on the values after the k wanted; where there are none, on nothing: 0 or inf."""
    if k == len(descending):
        return 0.0 if largest else float("inf")
    if largest:
        return float(descending[k]) + error
    return max(float(descending[-1 - k]) - error, 0.0)
