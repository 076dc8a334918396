"""Value and gradient of a penalty of one layer."""

from __future__ import annotations

import math

import numpy as np
import torch
from helpers.index_sets import one_hot, some_indices
from helpers.strategies import Layer
from torch import Tensor

from convspectra import penalties


def value_and_gradient(name: str, layer: Layer, **options: int) -> tuple[float, Tensor]:
    weight = layer.weight.clone().requires_grad_()
    value = getattr(penalties, name)(layer.operator(weight), **options)
    assert value.shape == ()
    assert value.dtype == torch.float64
    value.backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad.dtype == weight.dtype
    return float(value.detach()), weight.grad


def reference(name: str, dense: Tensor, k: int = 1) -> tuple[float, np.ndarray]:
    """Value, and the derivative by the matrix; that by a weight is its sum over Omega."""
    matrix = dense.numpy()
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    n = len(s)
    frobenius = 0.5 * (matrix**2).sum(), matrix
    if name == "frobenius":
        return frobenius
    if name == "stein":
        value = frobenius[0] - np.log(s).sum() - 0.5 * n
        return value, matrix - (u / s) @ vh
    # The mean of the k smallest, a repeated last one shared by all its copies.
    ascending = s[::-1]
    same = np.abs(s - ascending[k - 1]) <= 1e-9 * s[0]
    below = (s < ascending[k - 1]) & ~same
    share = (below + (k - below.sum()) / same.sum() * same) / k
    smallest = -ascending[:k].mean(), -(u * share) @ vh
    if name == "sigma_min":
        return smallest
    return frobenius[0] + n * smallest[0], matrix + n * smallest[1]


def has_a_gradient(name: str, dense: Tensor, k: int = 1) -> bool:
    """Away from rank deficiency, and from clusters that are neither one value nor several."""
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    if name == "frobenius":
        return True
    if s[-1] <= 1e-6 * s[0]:
        return False
    distance = np.abs(s - s[-k]) / s[0]
    return name == "stein" or not ((distance > 1e-11) & (distance < 1e-5)).any()


def check(name: str, layer: Layer, *, indices: list[int] | None = None, k: int = 1) -> None:
    dense = layer.dense().detach()
    if not has_a_gradient(name, dense, k):
        return
    expected, by_matrix = reference(name, dense, k)
    value, gradient = value_and_gradient(name, layer, **({} if k == 1 else {"k": k}))
    s = np.linalg.svd(dense.numpy(), compute_uv=False)
    condition, largest_term = (s[0] / s[-1], 1 / s[-1]) if name == "stein" else (1.0, 1.0)
    assert math.isclose(
        value, expected, rel_tol=1e-11, abs_tol=1e-12 * len(s) * (condition + s[0] ** 2)
    )
    terms = np.abs(dense.numpy()).max() + len(s) + largest_term
    tolerance = 1e-9 * terms * math.sqrt(dense.numel())
    for i in some_indices(layer, 8) if indices is None else indices:
        summed = float((one_hot(layer, i).numpy() * by_matrix).sum())
        assert math.isclose(float(gradient.flatten()[i]), summed, rel_tol=1e-7, abs_tol=tolerance)
