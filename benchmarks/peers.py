"""The ways to the singular values of a convolution that one would take today, one function each.

Each takes a `ConvOperator` and returns an `Answer`. To run one in this process:
``python -m benchmarks.peers "64->64 3x3 at 32x32" "scipy svds LM"``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

import convspectra as cs
from benchmarks.layers import find
from common.measure import timed

DENSE_BYTES = 2**30
"""Bytes of the largest dense matrix that a peer may form. A choice: larger ones take too long."""
TOLERANCE = {"LM": 1e-6, "SM": 1e-8}
"""Relative tolerances of the largest and the smallest value. A choice, the same for all peers."""
QUANTITY = {"LM": "sigma_max", "SM": "sigma_min"}
"""Names of the largest and the smallest value in the table."""
SEVERAL = {"LM": "largest", "SM": "smallest"}
"""Names of several of them in the table."""


@dataclass(frozen=True)
class Answer:
    """A peer's answer for each quantity ("sigma_max", "10 smallest", ...), and what it took."""

    values: dict[str, list[float]]
    applications: int = 0
    note: str = ""


class Counting(scipy.sparse.linalg.LinearOperator):
    """A LinearOperator that counts the applications of M and M' together."""

    def __init__(self, op: cs.ConvOperator) -> None:
        self.operator = op.to_scipy()
        self.applications = 0
        super().__init__(self.operator.dtype, self.operator.shape)

    def _matvec(self, x: Any) -> Any:
        self.applications += 1
        return self.operator.matvec(x)

    def _rmatvec(self, y: Any) -> Any:
        self.applications += 1
        return self.operator.rmatvec(y)

    def _matmat(self, X: Any) -> Any:
        self.applications += X.shape[1]
        return self.operator.matmat(X)

    def _rmatmat(self, Y: Any) -> Any:
        self.applications += Y.shape[1]
        return self.operator.rmatmat(Y)


def quantity(which: str, k: int) -> str:
    """Name of what is asked for: "sigma_max" and "sigma_min", or "10 largest" and so on."""
    return QUANTITY[which] if k == 1 else f"{k} {SEVERAL[which]}"


def dense_svd(op: cs.ConvOperator, max_bytes: int = DENSE_BYTES) -> Answer:
    """All singular values from M itself; refused where M takes more than `max_bytes`."""
    return _ends(torch.linalg.svdvals(op.to_dense(max_bytes).detach()), "")


def circular(op: cs.ConvOperator) -> Answer:
    """Sedghi, Gupta and Long (2019): the layer as if it were padded circularly, by FFT.

    Exact for circular padding; for stride s by the polyphase symbols: the s^d symbols that fold
    into one output frequency, side by side, over s^(d/2). A size that the stride does not divide
    is rounded up.
    """
    geometry = op.geometry
    if geometry.ndim == 0:
        return _ends(torch.linalg.svdvals(op.weight.detach()), "a linear layer: exact")
    stride = geometry.stride
    outputs = [math.ceil(n / s) for n, s in zip(geometry.input_size, stride, strict=True)]
    periods = [n * s for n, s in zip(outputs, stride, strict=True)]
    kernel = op.weight.detach().reshape(op.groups, -1, *op.weight.shape[1:])
    for axis, period in enumerate(periods):
        dim = 3 + axis
        taps = torch.arange(kernel.shape[dim]) * geometry.dilation[axis] % period
        shape = (*kernel.shape[:dim], period, *kernel.shape[dim + 1 :])
        kernel = kernel.new_zeros(shape).index_add(dim, taps, kernel)
    if max(stride) == 1:  # the half of the last axis has every singular value of a real kernel
        symbols = torch.fft.rfftn(kernel, dim=tuple(range(3, kernel.ndim)))
        symbols = symbols.flatten(3).movedim(3, 1)
        return _ends(torch.linalg.svdvals(symbols), "")
    symbols = torch.fft.fftn(kernel, dim=tuple(range(3, kernel.ndim)))
    shape = [n for pair in zip(stride, outputs, strict=True) for n in pair]
    folded = symbols.reshape(*kernel.shape[:3], *shape)
    aliases = [3 + 2 * axis for axis in range(geometry.ndim)]
    frequencies = [4 + 2 * axis for axis in range(geometry.ndim)]
    folded = folded.permute(0, *frequencies, 1, 2, *aliases).flatten(2 + geometry.ndim)
    return _ends(torch.linalg.svdvals(folded / math.prod(stride) ** 0.5), "polyphase symbols")


def reshaped_weight(op: cs.ConvOperator) -> Answer:
    """The weight as a matrix (h, g k^d), whose norm torch's `spectral_norm` converges to."""
    weight = op.weight.detach()
    matrix = weight.transpose(0, 1) if op.transposed else weight
    return _ends(torch.linalg.svdvals(matrix.flatten(1)), "")


def scipy_svds(op: cs.ConvOperator, k: int, which: str) -> Answer:
    """ARPACK by `scipy.sparse.linalg.svds` with its own settings."""
    counting = Counting(op)
    values = scipy.sparse.linalg.svds(
        counting, k, which=which, return_singular_vectors=False, rng=0
    )
    return Answer({quantity(which, k): _ordered(values, which)}, counting.applications)


def primme_svds(op: cs.ConvOperator, k: int, which: str) -> Answer:
    """PRIMME without a preconditioner, to a residual of 1e-6 (LM) or 1e-8 (SM) times ||M||."""
    import primme  # optional: without it this peer's row says so

    counting = Counting(op)
    values = primme.svds(
        counting, k, which=which, tol=TOLERANCE[which], return_singular_vectors=False
    )
    return Answer({quantity(which, k): _ordered(values, which)}, counting.applications)


def lanczos(op: cs.ConvOperator, tol: float = 1e-6, steps: int = 1000) -> Answer:
    """Golub-Kahan-Lanczos from a random start, float64, full reorthogonalization, to `tol`."""
    detached = op.with_weight(op.weight.detach())
    value, taken, reached = _golub_kahan(detached, steps, tol, reorthogonalise=True)
    note = "" if reached else f"residual over {tol:g} after {steps} steps"
    return Answer({"sigma_max": [value]}, 2 * taken, note)


def lanczos_float32(op: cs.ConvOperator, steps: int = 200) -> Answer:
    """The same in float32 with 200 steps, without reorthogonalization or stopping test."""
    single = op.with_weight(op.weight.detach().float())
    value, taken, _ = _golub_kahan(single, steps, 0.0, reorthogonalise=False)
    return Answer({"sigma_max": [value]}, 2 * taken)


@dataclass(frozen=True)
class Peer:
    """A function of this file with its options, and which quantities it answers."""

    function: Callable[..., Answer]
    quantities: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def _with_k(function: Callable[..., Answer], which: str, k: int) -> Peer:
    return Peer(function, (quantity(which, k),), {"k": k, "which": which})


BOTH = ("sigma_max", "sigma_min")
"""What a peer gives that computes all values."""
PEERS = {
    "dense SVD": Peer(dense_svd, BOTH),
    "circular FFT": Peer(circular, BOTH),
    "reshaped weight": Peer(reshaped_weight, BOTH),
    "scipy svds LM": _with_k(scipy_svds, "LM", 1),
    "scipy svds SM": _with_k(scipy_svds, "SM", 1),
    "PRIMME LM": _with_k(primme_svds, "LM", 1),
    "PRIMME SM": _with_k(primme_svds, "SM", 1),
    "Lanczos, float64": Peer(lanczos, ("sigma_max",)),
    "Lanczos, float32, 200 steps": Peer(lanczos_float32, ("sigma_max",)),
}
"""The peers for one value, by name."""
PEERS_OF_TEN = {
    "scipy svds LM, k=10": _with_k(scipy_svds, "LM", 10),
    "scipy svds SM, k=10": _with_k(scipy_svds, "SM", 10),
    "PRIMME LM, k=10": _with_k(primme_svds, "LM", 10),
    "PRIMME SM, k=10": _with_k(primme_svds, "SM", 10),
}
"""The peers for ten values, by name."""


def run(layer: str, peer: str, seed: int = 0) -> dict[str, Any]:
    """One peer on one layer of the table."""
    op, chosen = find(layer).operator(seed), (PEERS | PEERS_OF_TEN)[peer]
    seconds, answer = timed(partial(chosen.function, op, **chosen.options))
    return {**vars(answer), "seconds": seconds}


def _golub_kahan(
    op: cs.ConvOperator, steps: int, tol: float, *, reorthogonalise: bool
) -> tuple[float, int, bool]:
    """The largest singular value, the steps taken, and whether the residual reached `tol`."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(op.input_shape, dtype=op.dtype, generator=generator)
    v /= torch.linalg.vector_norm(v)
    kept = min(steps, *op.shape) if reorthogonalise else 0
    left, right = (op.weight.new_empty(kept, n) for n in op.shape)
    alphas: list[float] = []
    betas: list[float] = []
    u, beta, value = v.new_zeros(op.output_shape), 0.0, 0.0
    for step in range(1, min(steps, *op.shape) + 1):
        u = op.apply(v) - beta * u
        if reorthogonalise:
            right[step - 1] = v.flatten()
            u = _orthogonalized(u, left[: step - 1])
        alpha = float(torch.linalg.vector_norm(u))
        u = u / alpha if alpha > 0 else u
        v = op.apply_adjoint(u) - alpha * v
        if reorthogonalise:
            left[step - 1] = u.flatten()
            v = _orthogonalized(v, right[:step])
        beta = float(torch.linalg.vector_norm(v))
        v = v / beta if beta > 0 else v
        alphas.append(alpha)
        betas.append(beta)
        if tol > 0 and (step % 10 == 0 or beta == 0):
            value, residual = _top_of_bidiagonal(alphas, betas)
            if residual <= tol * value:
                return value, step, True
    value, residual = _top_of_bidiagonal(alphas, betas)
    return value, len(alphas), residual <= tol * value


def _top_of_bidiagonal(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    bidiagonal = np.diag(alphas) + np.diag(betas[:-1], 1)
    left, values, _ = np.linalg.svd(bidiagonal)
    return float(values[0]), abs(betas[-1] * float(left[-1, 0]))


def _orthogonalized(x: Tensor, basis: Tensor) -> Tensor:
    flat = x.flatten()
    for _ in range(2):
        flat = flat - basis.T @ (basis @ flat)
    return flat.reshape(x.shape)


def _ends(values: Tensor, note: str) -> Answer:
    return Answer(
        {"sigma_max": [float(values.max())], "sigma_min": [float(values.min())]}, note=note
    )


def _ordered(values: Any, which: str) -> list[float]:
    return sorted((float(value) for value in values), reverse=which == "LM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layer")
    parser.add_argument("peer", choices=PEERS | PEERS_OF_TEN)
    parser.add_argument("--seed", type=int, default=0)
    print(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
