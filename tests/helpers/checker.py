"""One checker for all singular-value algorithms, and the matrices they must survive.

The truth is computed by mpmath with 40 digits, so that enclosures are held to the last bit.
"""

from __future__ import annotations

import functools

import mpmath
import pytest
import torch
from helpers.strategies import random
from torch import Tensor

from convspectra.solvers._result import SingularTriplets

EPS = torch.finfo(torch.float64).eps


def with_values(rows: int, columns: int, values: list[float], seed: int = 1) -> Tensor:
    """A matrix with singular vectors drawn at random and, up to rounding, these values."""
    u = torch.linalg.qr(random(rows, len(values), seed=seed)).Q
    v = torch.linalg.qr(random(columns, len(values), seed=seed + 1)).Q
    return u * torch.tensor(values, dtype=torch.float64) @ v.T


def toeplitz(order: int, taps: dict[int, float]) -> Tensor:
    ones = torch.ones(order, dtype=torch.float64)
    return sum(value * torch.diag(ones[abs(k) :], k) for k, value in taps.items())


MATRICES = {
    "1 x 1": random(1, 1),
    "1 x 1 zero": torch.zeros(1, 1, dtype=torch.float64),
    "1 x n": random(1, 7),
    "n x 1": random(7, 1),
    "2 x 2": random(2, 2),
    "square": random(8, 8),
    "tall": random(9, 5),
    "wide": random(4, 9),
    "very wide": random(2, 30),
    "identity": torch.eye(7, dtype=torch.float64),
    "orthogonal": torch.linalg.qr(random(8, 8)).Q,
    "minus identity": -torch.eye(3, dtype=torch.float64),
    "zero": torch.zeros(5, 4, dtype=torch.float64),
    "rank 1": random(6, 1) @ random(1, 5, seed=2),
    "rank deficient": with_values(7, 6, [3, 2, 1, 0.5]),
    "repeated column": random(6, 5)[:, [0, 1, 2, 2, 4]],
    "zero row and column": torch.nn.functional.pad(random(4, 4), (1, 0, 0, 1)),
    "nilpotent": toeplitz(7, {1: 1.0}),
    "repeated at the top": with_values(8, 7, [2, 2, 2, 1, 0.5, 0.3, 0.1]),
    "repeated at the bottom": with_values(8, 7, [3, 2.5, 2, 1, 0.1, 0.1, 0.1]),
    "two values": with_values(8, 8, [1.0] * 4 + [0.25] * 4),
    "clustered": with_values(8, 7, [1 + 1e-9, 1, 1 - 1e-9, 0.5, 0.2, 0.2 - 1e-10, 0.2 - 2e-10]),
    "clustered at the bottom": with_values(6, 6, [5, 4, 3, 1e-3 + 1e-9, 1e-3 + 1e-10, 1e-3]),
    "graded": with_values(8, 8, [10.0**-i for i in range(8)]),
    "steeply graded": with_values(9, 7, [100.0**-i for i in range(7)]),
    "graded columns": random(7, 6) * 10.0 ** -torch.arange(0, 12, 2, dtype=torch.float64),
    "integers": torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64),
    "second difference": toeplitz(10, {-1: 1.0, 0: -2.0, 1: 1.0}),
    "one large": with_values(9, 9, [1e6] + [1.0] * 8),
    "one small": with_values(9, 9, [1.0] * 8 + [1e-6]),
    "tiny": 1e-120 * random(6, 5),
    "huge": 1e120 * random(5, 6),
}
each_matrix = pytest.mark.parametrize("name", MATRICES)


@functools.cache
def truth(name: str) -> tuple[mpmath.mpf, ...]:
    """All singular values, descending, to 40 digits."""
    matrix = MATRICES[name]
    matrix = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    with mpmath.workdps(40):
        values = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
        return tuple(sorted(values, reverse=True))


def counts(name: str) -> list[int]:
    smallest = min(MATRICES[name].shape)
    return sorted({1, min(2, smallest), min(3, smallest), smallest})


def check(
    name: str,
    result: SingularTriplets,
    k: int,
    *,
    largest: bool,
    tol: float = 1e-8,
    left_vectors: bool = True,
) -> None:
    """Assert all that `SingularTriplets` promises, against the truth.

    ``left_vectors=False`` leaves out what a method that works with A'A cannot give for values that
    are 0: their left vectors.
    """
    matrix, values = MATRICES[name], truth(name)
    m, n = matrix.shape
    assert result.u.shape == (k, m)
    assert result.v.shape == (k, n)
    assert result.s.shape == result.lower.shape == result.upper.shape == (k,)
    for tensor in (result.u, result.s, result.v, result.lower, result.upper):
        assert tensor.dtype == torch.float64
        assert not tensor.isnan().any()
    ordered = torch.sort(result.s, descending=largest).values
    assert torch.equal(result.s, ordered)
    assert (result.lower >= 0).all()
    assert (result.lower <= result.s).all()
    assert (result.s <= result.upper).all()

    wanted = values[:k] if largest else values[::-1][:k]
    for true, lower, upper in zip(
        wanted, result.lower.tolist(), result.upper.tolist(), strict=True
    ):
        assert lower <= true <= upper

    if k < len(values):
        assert values[k] <= result.others if largest else result.others <= values[-1 - k]
    assert result.others >= 0

    if not result.converged:
        return
    scale = float(values[0])
    for true, s in zip(wanted, result.s.tolist(), strict=True):
        assert abs(s - true) <= 2 * tol * scale
    rounding = 50 * max(m, n) * EPS
    forward = result.v @ matrix.T - result.s[:, None] * result.u
    adjoint = result.u @ matrix - result.s[:, None] * result.v
    identity = torch.eye(k, dtype=torch.float64)
    if left_vectors or result.s.min() > 1e-6 * scale:
        assert forward.norm(dim=1).max() <= (2 * tol + rounding) * scale
        assert adjoint.norm(dim=1).max() <= (2 * tol + rounding) * scale
        assert (result.u @ result.u.T - identity).abs().max() <= 1e-8
    assert (result.v @ result.v.T - identity).abs().max() <= 1e-8
