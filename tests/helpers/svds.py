"""Layers large enough for every way to be taken, and the check of their singular triplets."""

from __future__ import annotations

import numpy as np
import torch
from helpers.kernels import LAPLACIAN, SOBEL, dead_channel, identity, kernel
from helpers.strategies import Layer, random

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator._structure import has_augmented, is_square_toeplitz

EPS = 2.0**-52


BY_FACTORS = ("capacitance", "augmented")


def methods(op: ConvOperator, which: str) -> list[str]:
    if which == "LM":
        return ["auto", "dense", "gram", "lanczos"]
    same = has_augmented(op.T if op.transposed else op)
    by_factors = ["capacitance"] * is_square_toeplitz(op) + ["augmented"] * same
    return ["auto", "dense", "gram", "qr", "davidson", "lobpcg", *by_factors]


TRUTHS: dict[int, tuple[Layer, np.ndarray]] = {}


def cached_truth(layer: Layer) -> np.ndarray:
    if id(layer) not in TRUTHS:
        TRUTHS[id(layer)] = layer, truth(layer)
    return TRUTHS[id(layer)][1]


def truth(layer: Layer) -> np.ndarray:
    """Descending."""
    return np.linalg.svd(layer.dense().detach().double().numpy(), compute_uv=False)


def check(layer: Layer, result: cs.SVDResult, k: int, which: str, true: np.ndarray) -> None:
    """Shapes, order, residuals and the enclosure always; values and vectors where converged."""
    op = layer.operator()
    wanted = true[:k] if which == "LM" else true[::-1][:k]
    scale = true[0]
    assert result.u.shape == (k, *op.output_shape)
    assert result.v.shape == (k, *op.input_shape)
    s, lower, upper, residuals = (
        x.numpy() for x in (result.s, result.lower, result.upper, result.residuals)
    )
    assert s.shape == lower.shape == upper.shape == residuals.shape == (k,)
    assert all(not np.isnan(x).any() for x in (s, lower, upper, residuals))
    assert (np.diff(s) <= 0).all() if which == "LM" else (np.diff(s) >= 0).all()
    assert (lower >= 0).all()
    assert (lower <= s).all()
    assert (s <= upper).all()
    # Of NumPy's SVD (25 eps have been seen), and of the bias of the naive layer.
    rounding = 32 * EPS * scale + 2 * EPS
    assert (lower <= wanted + rounding).all(), (result.method, lower - wanted)
    assert (wanted <= upper + rounding).all(), (result.method, wanted - upper)
    if k < len(true):
        next_one = true[k] if which == "LM" else true[-1 - k]
        assert (
            next_one <= result.others + rounding
            if which == "LM"
            else (result.others <= next_one + rounding)
        )

    dense = layer.dense().detach().double()
    u, v = result.u.flatten(1), result.v.flatten(1)
    forward = v @ dense.T - result.s[:, None] * u
    adjoint = u @ dense - result.s[:, None] * v
    measured = (forward.square().sum(1) + adjoint.square().sum(1)).sqrt().numpy()
    assert np.allclose(residuals, measured, rtol=1e-6, atol=1e-12 * scale)
    if not result.converged:
        return
    if result.method == "lobpcg":
        # It knows no lower bound, and nothing of the left vectors of vanishing values.
        assert (np.abs(s - wanted) <= 1e-6 * wanted + 1e-8 * scale).all()
        if s.min() <= 1e-6 * scale:
            return
    else:
        resolved = wanted >= 1e-7 * scale
        error = 1e-8 * wanted + 1e-13 * scale
        # The inverse is rounded relative to 1 / true[-1]; zeros of the structure are apart.
        if result.method in ("qr", *BY_FACTORS) and true[-1] > 0:
            error += 8 * EPS * wanted**2 / true[-1]
        assert (np.abs(s - wanted) <= error)[resolved].all()
    assert measured.max() <= 1e-6 * scale
    for vectors in (u, v):
        gram = vectors @ vectors.T
        assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-7)


LARGE = {
    "random": Layer(random(4, 4, 3, 3), (9, 9)),
    "long and thin": Layer(random(1, 1, 5), (290,)),
    "grouped": Layer(random(6, 2, 3, 3), (7, 7), {"groups": 3}),
    "depthwise": Layer(random(6, 1, 3, 3), (7, 7), {"groups": 6}),
    "transposed": Layer(random(4, 4, 3, 3), (9, 9), {"transposed": True, "padding": 1}),
    "dilated": Layer(random(3, 3, 3, 3) + 5 * identity(3), (10, 10), {"dilation": 2}),
    "asymmetric": Layer(
        random(1, 1, 4, 2) + 4 * kernel([0, 0], [1, 0], [0, 0], [0, 0]),
        (16, 18),
        {"padding": [(1, 2), (0, 1)]},
    ),
    "3 axes": Layer(random(2, 2, 3, 2, 3), (5, 5, 6)),
    "identity": Layer(identity(4), (9, 9)),
    "separable": Layer(kernel([1, 2, 1], [2, 4, 2], [1, 2, 1]), (17, 17)),
    "Laplacian": Layer(LAPLACIAN, (17, 17)),
    "depthwise Laplacian": Layer(LAPLACIAN.repeat(5, 1, 1, 1), (8, 8), {"groups": 5}),
    "symmetric": Layer(random(1, 1, 3, 3) + random(1, 1, 3, 3).flip(2, 3), (17, 18)),
    "kernel 1": Layer(random(12, 12, 1, 1), (5, 5)),
    "graded channels": Layer(
        random(4, 4, 3, 3) * 10.0 ** -torch.arange(4.0)[:, None, None, None].double(), (9, 9)
    ),
    "rectangular": Layer(random(4, 3, 3, 3), (9, 10)),
    "wide": Layer(random(3, 4, 3, 3), (10, 9)),
    "strided": Layer(random(4, 1, 3, 3), (17, 17), {"stride": 2, "padding": 1}),
    "circular": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "circular"}),
    "reflect": Layer(random(4, 4, 3, 3), (9, 9), {"padding_mode": "reflect"}),
}
SINGULAR = {
    "copied output": Layer(dead_channel(4, 0, True), (9, 9)),
    "copied input": Layer(dead_channel(4, 1, True), (9, 9)),
    "dead output": Layer(dead_channel(4, 0, False), (9, 9)),
    "dead input": Layer(dead_channel(4, 1, False), (9, 9)),
    "1 0 1": Layer(kernel(1, 0, 1), (291,)),
    "Sobel": Layer(SOBEL, (17, 17)),
    "shift": Layer(identity(4).roll(1, 3), (9, 9)),
    "dilated, asymmetric": Layer(
        random(3, 3, 3, 2), (11, 10), {"dilation": (2, 3), "padding": [(3, 1), (0, 3)]}
    ),
    "shift and a little": Layer(identity(4).roll(1, 3) + 1e-3 * identity(4), (9, 9)),
    "kernel 1": Layer((random(12, 6) @ random(6, 12, seed=1))[..., None, None], (5, 5)),
    "rectangular": Layer(random(4, 3, 3, 3)[:, [0, 1, 1]], (9, 10)),
    "strided": Layer(random(4, 1, 3, 3)[[0, 1, 1, 3]], (16, 17), {"stride": 2, "padding": 1}),
    "circular difference": Layer(kernel(1, -2, 1), (280,), {"padding_mode": "circular"}),
}
