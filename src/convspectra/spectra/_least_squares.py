"""Least squares and solutions of least norm with a rectangular layer."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, has_augmented, is_wide
from convspectra.torus import AugmentedFactorization, augmented_bytes

DENSE_NUMBERS = 1 << 22
"""Entries of M up to which its QR factorization is taken: 32 megabytes.

At twice that it takes about three times as long; at half of it the factors of the augmented matrix,
which are less exact, are taken for layers that need not.
"""


def pseudo_inverse_times(system: ConvOperator, y: Tensor, max_bytes: int) -> Tensor:
    """M^+ y for a batch (b, *output_shape) in float64, for an M of full rank; NaN if it has none.

    Parameters
    ----------
    system : ConvOperator
        M, rectangular, float64.
    y : Tensor
        (b, *output_shape).

    Notes
    -----
    By a QR factorization of a small M, else by factors of ``[[a I, M], [M', 0]]``: Björck (1967),
    doi:10.1007/BF01939321. Where neither is possible M is formed, or refused with its size.
    """
    direct = system.T if system.transposed else system
    rows, columns = system.shape
    small = rows * columns <= DENSE_NUMBERS
    if not small and has_augmented(direct) and augmented_bytes(direct) <= max_bytes:
        factors = AugmentedFactorization(direct, max_bytes)
        return factors.solve_adjoint(y) if is_wide(system) else factors.solve(y)
    matrix = system.to_dense(max_bytes)
    right = y.flatten(1).T
    wide = is_wide(system)
    q, r = torch.linalg.qr(matrix.mT if wide else matrix)
    diagonal = r.diagonal().abs()
    if not bool(diagonal.amin() > max(rows, columns) * torch.finfo(r.dtype).eps * diagonal.amax()):
        return y.new_full((len(y), *system.input_shape), torch.nan)
    if wide:
        x = q @ torch.linalg.solve_triangular(r.mT, right, upper=False)
    else:
        x = torch.linalg.solve_triangular(r, q.mT @ right, upper=True)
    return x.T.reshape(-1, *system.input_shape)
