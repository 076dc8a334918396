"""The paper in NumPy, entry by entry: index sets, matrix and Algorithms 3.1 to 3.3 in loops.

Shares no code with the package, and no PyTorch.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Omega = dict[tuple[int, ...], list[tuple[int, int]]]


def index_sets(shape: tuple[int, ...], size: tuple[int, ...]) -> Omega:
    """For each entry of a kernel (*taps, g, h), the entries (i, j) of M where it stands.

    From ``Y[r,s,c] = sum X[r-m+p, s-m+q, d] K[p,q,d,c]`` with m = ceil(k / 2), 1-based.
    """
    taps = shape[:-2]
    omega: Omega = {index: [] for index in np.ndindex(*shape)}
    pixels = math.prod(size)
    for index in omega:
        *tap, d, c = index
        for r in itertools.product(*(range(1, n + 1) for n in size)):
            read = [
                r[a] - math.ceil(taps[a] / 2) + (tap[a] + 1)  # tap counts from 1 in the formula
                for a in range(len(size))
            ]
            if all(1 <= read[a] <= size[a] for a in range(len(size))):
                i = c * pixels + int(np.ravel_multi_index([x - 1 for x in r], size))
                j = d * pixels + int(np.ravel_multi_index([x - 1 for x in read], size))
                omega[index].append((i, j))
    return omega


def matrix(kernel: Array, size: tuple[int, ...], omega: Omega) -> Array:
    *_, g, h = kernel.shape
    pixels = math.prod(size)
    dense = np.zeros((h * pixels, g * pixels))
    for index, entries in omega.items():
        for i, j in entries:
            dense[i, j] = kernel[index]
    return dense


def gradient(algorithm: str, dense: Array, omega: Omega, shape: tuple[int, ...]) -> Array:
    """Theorems 2.1, 2.2 and 2.3, and their forms for several channels, as sums over Omega."""
    u, s, vh = np.linalg.svd(dense)
    smallest = len(s) - 1
    n = min(dense.shape)
    total = np.zeros(shape)
    for index, entries in omega.items():
        for i, j in entries:
            of_norm = dense[i, j]
            of_sigma = -u[i, smallest] * vh[smallest, j]
            total[index] += {"3.1": of_norm, "3.2": of_sigma, "3.3": of_norm + n * of_sigma}[
                algorithm
            ]
    return total


def objective(algorithm: str, dense: Array) -> float:
    norm, smallest = 0.5 * (dense**2).sum(), np.linalg.svd(dense, compute_uv=False)[-1]
    n = min(dense.shape)
    return float({"3.1": norm, "3.2": -smallest, "3.3": norm - n * smallest}[algorithm])


def descend(
    kernel: Array, size: tuple[int, ...], algorithm: str, step: float, iterations: int
) -> dict[str, list[float] | list[Array]]:
    """Histories with the start first, of `iterations` steps of the given size."""
    omega = index_sets(kernel.shape, size)
    kernels: list[Array] = [kernel]
    for _ in range(iterations):
        dense = matrix(kernels[-1], size, omega)
        slope = gradient(algorithm, dense, omega, kernel.shape)
        kernels.append(kernels[-1] - step * slope)
    matrices = [matrix(k, size, omega) for k in kernels]
    spectra = [np.linalg.svd(m, compute_uv=False) for m in matrices]
    return {
        "kernel": kernels,
        "sigma_max": [float(s[0]) for s in spectra],
        "sigma_min": [float(s[-1]) for s in spectra],
        "objective": [objective(algorithm, m) for m in matrices],
    }
