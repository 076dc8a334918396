"""The nearest kernel whose layer has a norm of at most c, by its dual.

Note [Dual of the projection]. The kernel K nearest to K0 with ``||A(K)|| <= c``, for a linear map A
to matrices, is ``K0 - A'(Y)`` where Y maximizes ``<A'(Y), K0> - 1/2 ||A'(Y)||^2 - c ||Y||_*``
(``||.||_*``: the sum of singular values). Every Y bounds the distance from below. The proximal
step of the dual clips singular values at c: ``Y <- W - clip(W), W = A(K) + Y``, and is accelerated
(FISTA). Two maps A are used: M itself, dense, and plane waves under a window.

Note [Windowed waves]. For unit windows w, v along the outputs and the inputs and a frequency f, the
arrays ``w e^{ifx} a`` and ``v e^{ifx} b`` are of norms |a| and |b|, so that the symbol
``S(f) = sum_t r_t K_t e^{ift}`` with ``r_t = sum_x w(x) v(x + t)`` has ``||S(f)|| <= ||M||``: the
symbols of M on its torus, with taps made smaller by the border. On N points with 3 taps the best
windows are half waves of a sine and r is ``cos(pi / (N + 1))`` at the outer taps: the norms of the
symbols are within O(1 / N^2) of ||M||, from below, whatever the frequencies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convspectra.operator import (
    ConvGeometry,
    ConvOperator,
    FloatArray,
    IntArray,
    group_matrices,
    independent_blocks,
    is_circulant,
    polyphase,
)

FREQUENCIES = 16
"""Frequencies per axis, at most, at which windowed waves are held.

For 8 channels on 16 x 16 points, 0.7 of the norm, 6, 12 and 24 of them led to kernels 22%, 10% and
8% farther than the bound below, in 0.03, 1 and 2 s. From 32 on nothing changes for small images.
"""
MOST_STEPS = 400
"""Steps of FISTA: the slowest of 36 projections of random layers took 400, most 20 to 200.

At half of it the gap of some is larger by a tenth; at twice as many nothing else changes.
"""
GAP = 1e-3
"""Part of the distance, relative, at which a gap ends the iteration. A choice."""


@dataclass(frozen=True)
class NormModel:
    """A linear map from kernels to matrices whose norms are at most that of M.

    Attributes
    ----------
    apply : callable
        The map, (h, g / groups, *kernel) to (b, m, n), real or complex; differentiable.
    weights : Tensor
        (b,), of the matrices in the inner product: how many frequencies one stands for.
    lipschitz : float
        The square of the norm of the map in this inner product.
    exact : bool
        Whether the largest norm of the matrices is that of M.
    """

    apply: Callable[[Tensor], Tensor]
    weights: Tensor
    lipschitz: float
    exact: bool

    def adjoint(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The adjoint of the map."""
        with torch.enable_grad():
            kernel = torch.zeros_like(like).requires_grad_()
            image = self.apply(kernel)
            product = (matrices.conj() * image).real.sum((1, 2)) @ self.weights
            (found,) = torch.autograd.grad(product, kernel)
        return found


@dataclass(frozen=True)
class Nearest:
    """The kernel found, half the squared distance at least, and the dual variable.

    The `plane` g is of unit dual norm: ``<g, K>`` is at most the norm of K's matrices. None where
    nothing was above the limit.
    """

    kernel: Tensor
    bound: float
    dual: Tensor
    plane: Tensor | None
    steps: int


def nearest(model: NormModel, kernel: Tensor, limit: float, start: Tensor | None = None) -> Nearest:
    """The kernel nearest to one given whose matrices have norms of at most `limit`.

    Notes
    -----
    Source: Note [Dual of the projection]; Beck and Teboulle, "A Fast Iterative
    Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM J. Imaging Sci. 2 (2009),
    doi:10.1137/080716542, started anew where the dual falls: O'Donoghue and Candes, "Adaptive
    Restart for Accelerated Gradient Schemes", Found. Comput. Math. 15 (2015),
    doi:10.1007/s10208-013-9150-3. Cost: an eigendecomposition of the smaller Gram matrix of every
    matrix a step, 20 to 300 steps.
    """
    with torch.no_grad():
        dual = torch.zeros_like(model.apply(kernel)) if start is None else start
        ahead, momentum, best, before = dual, 1.0, 0.0, -math.inf
        for step in range(1, MOST_STEPS + 1):
            point = kernel - model.adjoint(ahead, kernel) / model.lipschitz
            excess, nuclear = _above(model.apply(point) + ahead, limit)
            drop = model.adjoint(excess, kernel) / model.lipschitz
            found = kernel - drop
            value = float((drop * kernel).sum() - 0.5 * drop.square().sum())
            value -= limit / model.lipschitz * float(nuclear @ model.weights)
            best = max(best, value)
            if value < before:
                momentum, ahead, before = 1.0, dual, -math.inf
                continue
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = excess + (momentum - 1) / following * (excess - dual)
            dual, momentum, before = excess, following, value
            if step % 5 == 0 or step == 1:
                norm = float(_norms(model.apply(found)).amax())
                scaled = found * min(1.0, limit / norm) if norm else found
                reached = 0.5 * float((scaled - kernel).square().sum())
                if reached - best <= 2 * GAP * reached:
                    break
        total = float(nuclear @ model.weights)
        plane = drop * model.lipschitz / total if total else None
    return Nearest(found, best, dual, plane, step)


def dense_model(op: ConvOperator, max_bytes: int) -> NormModel:
    """M itself, a matrix for each group."""

    def apply(kernel: Tensor) -> Tensor:
        return group_matrices(op.with_weight(kernel, check=False), max_bytes)

    weights = torch.ones(op.groups, dtype=torch.float64, device=op.device)
    return NormModel(apply, weights, _largest_count(op.geometry), exact=True)


def wave_model(op: ConvOperator) -> NormModel | None:
    """Windowed plane waves of the largest independent block; None where no output is inside."""
    blocks = [block.op for block in independent_blocks(op)]
    block = max(blocks, key=lambda part: math.prod(part.geometry.output_size))
    periodic = is_circulant(block)
    waves, counts = [], np.ones(1)
    table = polyphase(block).geometry
    for axis in range(block.geometry.ndim):
        reach, before = table.kernel_size[axis], table.padding[axis][0]
        offsets = np.arange(reach) - before
        if periodic:
            period = block.geometry.output_size[axis]
            overlaps = np.ones(reach)
        else:
            period = min(FREQUENCIES, table.output_size[axis] + reach - 1)
            overlaps = _overlaps(block.geometry, axis, offsets)
        if not overlaps.any():
            return None
        last = axis == block.geometry.ndim - 1
        chosen = np.arange(period // 2 + 1 if last else period)
        mirrored = 2.0 - ((2 * chosen) % period == 0) if last else np.ones(period)
        counts = np.multiply.outer(counts, mirrored / period).ravel()
        waves.append(overlaps * np.exp(2j * np.pi / period * np.multiply.outer(chosen, offsets)))
    matrix = functools.reduce(np.kron, waves, np.ones((1, 1), dtype=complex))
    transform = torch.from_numpy(matrix).to(op.device)
    weights = torch.from_numpy(counts).to(op.device)
    gram = (transform.mH * weights) @ transform

    def apply(kernel: Tensor) -> Tensor:
        taps = polyphase(block.with_weight(kernel, check=False)).weight
        taps = taps.reshape(op.groups, len(taps) // op.groups, taps.shape[1], -1)
        return torch.einsum("ft,ghct->fghc", transform, taps.to(transform.dtype)).flatten(0, 1)

    return NormModel(
        apply,
        weights.repeat_interleave(op.groups),
        float(torch.linalg.eigvalsh(gram)[-1]),
        exact=periodic and len(blocks) == 1,
    )


def _overlaps(geometry: ConvGeometry, axis: int, offsets: IntArray) -> FloatArray:
    """The correlation of the best windows of an axis at every offset of a point (Note above)."""
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    n, m, before = geometry.input_size[axis], geometry.output_size[axis], geometry.padding[axis][0]
    outputs = np.arange(m)
    if geometry.padding_mode != "zeros":  # only outputs that read no padding
        reach = dilation * (geometry.kernel_size[axis] - 1)
        first = stride * outputs - before
        outputs = outputs[(first >= 0) & (first + reach < n)]
    shifts = np.zeros((len(offsets), m, max(1, n // stride)))
    for shift, offset in zip(shifts, offsets, strict=True):
        inside = outputs[(outputs + offset >= 0) & (outputs + offset < shift.shape[1])]
        shift[inside, inside + offset] = 1
    u, _, vh = np.linalg.svd(shifts.sum(0))
    return np.einsum("x,txy,y->t", u[:, 0], shifts, vh[0])


def _largest_count(geometry: ConvGeometry) -> float:
    """The square of the norm of the map from kernels to M, by Gram matrices of taps per axis."""
    return math.prod(
        float(np.linalg.eigvalsh(geometry.tap_gram(axis).astype(float))[-1])
        for axis in range(geometry.ndim)
    )


def _above(matrices: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Matrices less their clipped selves, and the sums of the singular values of that."""
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mH
    squares, vectors = torch.linalg.eigh(tall.mH @ tall)
    values = squares.clamp_min(0).sqrt()
    excess = (values - limit).clamp_min(0)
    share = excess / values.clamp_min(torch.finfo(values.dtype).tiny)
    above = ((tall @ vectors) * share[:, None, :]) @ vectors.mH
    return above if tall is matrices else above.mH, excess.sum(1)


def _norms(matrices: Tensor) -> Tensor:
    """The norm of every matrix."""
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mH
    return torch.linalg.eigvalsh(tall.mH @ tall)[:, -1].clamp_min(0).sqrt()
