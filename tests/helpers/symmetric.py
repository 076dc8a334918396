"""Symmetric matrices of prescribed spectra, for the eigenvalue algorithms."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers.checker import EPS
from helpers.strategies import random
from torch import Tensor

from convspectra.solvers._lanczos import Eigenpairs, lanczos
from convspectra.solvers._stop import LanczosStop, Stop

SPECTRA = {
    "one": [3.0],
    "one zero": [0.0],
    "two": [2.0, 1.0],
    "simple": list(np.linspace(0.1, 1, 60) ** 2),
    "repeated at the top": [2.0] * 3 + [1.0 - 0.02 * i for i in range(40)],
    "many copies at the top": [2.0] * 9 + [1.0 - 0.02 * i for i in range(30)],
    "repeated inside": [3.0] + [2.0] * 4 + [1.0 - 0.02 * i for i in range(35)],
    "repeated at both ends": [2.0] * 3 + list(np.linspace(0.5, 1.0, 60)) + [0.2] * 3,
    "two values": [1.0] * 10 + [0.25] * 12,
    "identity": [1.0] * 17,
    "clustered": [1 + 1e-9, 1.0, 1 - 1e-9, 1 - 2e-9] + [0.5 - 0.01 * i for i in range(40)],
    "huge spread": [10.0 ** (-i / 2) for i in range(50)],
    "one large": [1e8] + [1.0 - 0.01 * i for i in range(50)],
    "one small": [1.0 - 0.005 * i for i in range(100)] + [1e-3],
    "zero": [0.0] * 12,
    "rank two": [2.0, 1.0] + [0.0] * 20,
    "both signs": list(np.linspace(-2, 1, 40)),
    "negative": list(-np.linspace(1, 5, 40)),
    "tiny": [1e-140 * (1 - 0.02 * i) for i in range(30)],
    "huge": [1e140 * (1 - 0.02 * i) for i in range(30)],
}
LINE = list(np.linspace(0.1, 1.0, 200))

each_spectrum = pytest.mark.parametrize("name", SPECTRA)
each_end = pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
IN_ROUNDING = {("huge spread", False)}
"""Ends whose values are far below eps of the norm: nothing tells them apart."""


def with_spectrum(values: list[float], seed: int = 3) -> Tensor:
    q = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    matrix = q * torch.tensor(values, dtype=torch.float64) @ q.T
    return 0.5 * (matrix + matrix.T)


def truth(matrix: Tensor, largest: bool = True) -> np.ndarray:
    """All eigenvalues by LAPACK, the most extreme first."""
    ascending = np.linalg.eigvalsh(matrix.numpy())
    return ascending[::-1] if largest else ascending


def rounding(matrix: Tensor) -> float:
    eps = torch.finfo(matrix.dtype).eps if matrix.dtype == torch.float32 else EPS
    return 64 * len(matrix) * eps * float(np.abs(truth(matrix)).max())


def counts(name: str) -> list[int]:
    return sorted({min(k, len(SPECTRA[name])) for k in (1, 3, 6)})


def stop_from(options: dict, kind: type[Stop], maxiter: int) -> Stop:
    """The fields of a record for when to stop, taken out of the options; tol is 1e-8 by default."""
    given = {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
    return kind(**{"tol": 1e-8, "maxiter": maxiter, **given})


def run_lanczos(
    matrix: Tensor, k: int = 1, *, largest: bool = True, seed: int = 0, **options
) -> Eigenpairs:
    stop = stop_from(options, LanczosStop, maxiter=500)
    count = 0

    def product(x: Tensor) -> Tensor:
        nonlocal count
        assert x.shape == (1, len(matrix))
        count += 1
        return x @ matrix

    generator = torch.Generator().manual_seed(seed)
    pairs = lanczos(
        product,
        len(matrix),
        k,
        largest=largest,
        stop=stop,
        like=matrix,
        generator=generator,
        **options,
    )
    assert pairs.products == count <= max(stop.maxiter, k)
    return pairs


def check_pairs(matrix: Tensor, pairs: Eigenpairs, *, largest: bool, tol: float = 1e-8) -> None:
    """All that `Eigenpairs` promises, converged or not."""
    true, slack = truth(matrix, largest), rounding(matrix)
    sign = 1.0 if largest else -1.0
    count = len(pairs.values)
    values = pairs.values.numpy()
    assert pairs.values.shape == pairs.residuals.shape == (count,)
    assert pairs.vectors.shape == (count, len(matrix))
    assert (sign * np.diff(values) <= 0).all()
    gram = pairs.vectors @ pairs.vectors.T
    assert (gram - torch.eye(count, dtype=torch.float64)).abs().max() <= 1e-10
    images = pairs.vectors @ matrix
    measured = (images - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    # Selective orthogonalization keeps bases orthogonal to sqrt(eps), and residuals known to that.
    blur = slack if count == 1 else 1e-8 * float(np.abs(true).max())
    assert (measured - pairs.residuals).abs().max() <= blur
    assert ((pairs.vectors * images).sum(1) - pairs.values).abs().max() <= blur
    assert sign * values[0] <= sign * true[0] + slack, "a Ritz value is never beyond the end"
    assert sign * pairs.bound >= sign * true[0] - slack
    assert sign * pairs.bound >= sign * values[0]
    assert np.abs(values).max() <= pairs.norm * (1 + 1e-12) <= 4 * np.abs(true).max() + slack
    if pairs.converged:
        assert (measured.numpy() <= tol * np.abs(values) + blur).all()
