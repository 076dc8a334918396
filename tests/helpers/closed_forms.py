"""Layers whose singular values are known at any size, by NumPy alone, and a check against them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers.strategies import Layer, random
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator

EPS = 2.0**-52
PAD = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def orthogonal(order: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(random(order, order, seed=seed).numpy())[0]


def descending(values: Any) -> np.ndarray:
    return np.sort(np.abs(np.asarray(values, dtype=float)).ravel())[::-1]


def tridiagonal(center: float, beside: float, order: int) -> np.ndarray:
    """Singular values of the tridiagonal Toeplitz matrix: |center + 2 beside cos(pi i/(N+1))|.

    Where center = +-2 beside, without the cancellation: 4 beside cos^2(pi i/(2 (N+1))).
    """
    i = np.arange(1, order + 1)
    if abs(center) == 2 * abs(beside):
        return descending(4 * beside * np.sin(np.pi * i / (2 * (order + 1))) ** 2)
    if center == 0:
        return descending(2 * beside * np.sin(np.pi * (order + 1 - 2 * i) / (2 * (order + 1))))
    return descending(center + 2 * beside * np.cos(np.pi * i / (order + 1)))


def ends(taps: Sequence[float], dilation: int, padding: int | str) -> tuple[int, int]:
    total = dilation * (len(taps) - 1)
    return (total // 2, total - total // 2) if padding == "same" else (int(padding),) * 2


def axis_matrix(taps: Sequence[float], size: int, options: dict[str, Any]) -> np.ndarray:
    """The 1-D layer of one channel: pad the identity, then add up shifted rows of it."""
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    pair = ends(taps, dilation, options.get("padding", "same"))
    padded = np.pad(np.eye(size), (pair, (0, 0)), mode=PAD[options.get("padding_mode", "zeros")])
    rows = (len(padded) - dilation * (len(taps) - 1) - 1) // stride + 1
    last = (rows - 1) * stride + 1
    return sum(t * padded[p * dilation :][:last:stride] for p, t in enumerate(taps))


@dataclass(frozen=True)
class Separable:
    """channels (h x g) times one kernel per axis: M is their Kronecker product, whatever its size.

    Its singular values are all products of those of the factors, and zeros up to min(M.shape).
    """

    channels: np.ndarray
    taps: tuple[tuple[float, ...], ...]
    size: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        return torch.from_numpy(functools.reduce(np.multiply.outer, (self.channels, *self.taps)))

    def factors(self) -> list[np.ndarray]:
        axes = zip(self.taps, self.size, strict=True)
        return [self.channels, *(axis_matrix(t, n, self.options) for t, n in axes)]

    def operator(self, scale: float = 1.0) -> ConvOperator:
        return ConvOperator(scale * self.weight, self.size, **self.options)

    def transposed(self) -> ConvOperator:
        """The nn.ConvTranspose layer of the same weight: its matrix is M'."""
        stride, dilation = self.options.get("stride", 1), self.options.get("dilation", 1)
        extra = []
        for taps, n in zip(self.taps, self.size, strict=True):
            pair = ends(taps, dilation, self.options.get("padding", "same"))
            extra.append((n + sum(pair) - dilation * (len(taps) - 1) - 1) % stride)
        size = tuple(len(matrix) for matrix in self.factors()[1:])
        return ConvOperator(
            self.weight, size, transposed=True, output_padding=tuple(extra), **self.options
        )

    def values(self) -> np.ndarray:
        """Descending; rounding errors of exact zeros are set to zero."""
        factors = self.factors()
        spectra = [np.linalg.svd(f, compute_uv=False) for f in factors]
        spectra = [np.where(s <= 8 * EPS * len(s) * s[0], 0.0, s) for s in spectra]
        found = functools.reduce(np.multiply.outer, spectra).ravel()
        count = min(math.prod(f.shape[axis] for f in factors) for axis in (0, 1))
        return descending(np.pad(found, (0, count - len(found))))


def dense_values(layer: Layer) -> np.ndarray:
    """NumPy's SVD of the naive matrix, descending."""
    return np.linalg.svd(layer.dense().detach().double().numpy(), compute_uv=False)


def check_enclosure(
    result: cs.SVDResult, which: str, values: np.ndarray, rounding: float | None = None
) -> None:
    """What must hold whether it converged or not: lower <= truth <= upper, and `others`.

    `rounding` is the truth's own error relative to each value; without it, 32 eps of the largest.
    """
    k = len(result.s)
    ordered = values if which == "LM" else values[::-1]
    s, lower, upper = (x.numpy() for x in (result.s, result.lower, result.upper))
    assert s.shape == lower.shape == upper.shape == (k,)
    assert np.isfinite(s).all()
    order = np.diff(s) if which == "LM" else -np.diff(s)
    assert (order <= 0).all(), f"{which} in the wrong order: {s}"
    assert (lower >= 0).all()
    assert (lower <= s).all(), f"estimates below their bounds: {s - lower}"
    assert (s <= upper).all(), f"estimates above their bounds: {upper - s}"
    slack = 32 * EPS * values[0] if rounding is None else rounding * ordered[:k]
    wrong = f"{result.method} ({result.certificate}): truth {ordered[:k]}, "
    assert (lower <= ordered[:k] + slack).all(), f"{wrong}lower {lower}"
    assert (ordered[:k] <= upper + slack).all(), f"{wrong}upper {upper}"
    if k < len(ordered):
        slack = 32 * EPS * values[0]
        if which == "LM":
            assert ordered[k] <= result.others + slack, f"{wrong}others {result.others}"
        else:
            assert result.others <= ordered[k] + slack, f"{wrong}others {result.others}"
    assert result.certificate
    assert result.method
    assert result.matvecs >= 0


def check_triplets(op: ConvOperator, result: cs.SVDResult, tolerance: float = 1e-6) -> None:
    """Shapes, orthonormal vectors, and the residuals as stated and small."""
    k, s = len(result.s), result.s
    assert result.u.shape == (k, *op.output_shape)
    assert result.v.shape == (k, *op.input_shape)
    u, v = result.u.flatten(1), result.v.flatten(1)
    for name, vectors in (("u", u), ("v", v)):
        error = float((vectors @ vectors.T - torch.eye(k, dtype=s.dtype)).abs().max())
        assert error <= 1e-7, f"{name} not orthonormal by {error:.1e} ({result.method})"
    wide = op.with_weight(op.weight.double())
    forward = wide.matvec(result.v).flatten(1) - s[:, None] * u
    adjoint = wide.rmatvec(result.u).flatten(1) - s[:, None] * v
    measured = torch.hypot(forward.norm(dim=1), adjoint.norm(dim=1))
    scale = cs.frobenius_norm(op)
    assert torch.allclose(result.residuals, measured, rtol=1e-6, atol=1e-12 * scale)
    assert float(measured.max()) <= tolerance * scale, f"residuals {measured} ({result.method})"


def check(
    op: ConvOperator,
    k: int,
    which: str,
    values: np.ndarray,
    *,
    rounding: float | None = None,
    rtol: float = 1e-7,
    atol: float = 1e-12,
    **options: Any,
) -> cs.SVDResult:
    """`svds` of the layer converges to the truth, with its enclosure and its vectors."""
    result = cs.svds(op, k, which, **options)
    check_enclosure(result, which, values, rounding)
    where = f"{which}, k={k}, {result.method}: {result.s.tolist()}"
    assert result.converged, f"not converged ({where}) in [{result.lower}, {result.upper}]"
    wanted = (values if which == "LM" else values[::-1])[:k]
    error = np.abs(result.s.numpy() - wanted)
    assert (error <= rtol * wanted + atol * values[0]).all(), f"{where}, expected {wanted}"
    check_triplets(op, result)
    return result


def check_ends(op: ConvOperator, values: np.ndarray, k: int = 2, **options: Any) -> None:
    """Both ends, and the floats `sigma_max` and `sigma_min`."""
    assert len(values) == min(op.shape)
    for which in ("LM", "SM"):
        check(op, min(k, len(values)), which, values, **options)
    assert math.isclose(cs.sigma_max(op), values[0], rel_tol=1e-6)
    assert math.isclose(cs.sigma_min(op), values[-1], rel_tol=1e-6, abs_tol=1e-12 * values[0])


def check_singular(op: ConvOperator, scale: float, tiny: float) -> None:
    """sigma_min = 0 exactly, for a layer of norm `scale`: never a wrong value, never a crash."""
    result = cs.svds(op, 1, "SM")
    s, lower, upper = (float(x[0]) for x in (result.s, result.lower, result.upper))
    assert lower == 0.0, f"{result.method} excludes the truth: lower {lower}"
    assert 0.0 <= s <= upper
    assert upper <= tiny * scale, f"{result.method} cannot tell: upper {upper}, norm {scale}"
    assert result.certificate
    if result.converged:
        check_triplets(op, result)
    assert cs.cond(op) == math.inf
