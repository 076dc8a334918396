"""Exact inverse and determinant of a square zero-padded convolution: the capacitance method.

Embed M in a block circulant C on a torus and order its points as interior (where M lives) and
border. With ``C^{-1} = [[A, B], [D, W]]``,

    M^{-1} = A - B W^{-1} D        and        |det M| = |det C| |det W|,

so that one LU factorisation of the border matrix W, of order (channels) x (border points), gives
every solve with M and M' for two FFTs and one triangular solve. W is the capacitance matrix of
Buzbee, Dorr, George and Golub (SIAM J. Numer. Anal. 8, 1971); the formula for the determinant is
Jacobi's identity for complementary minors.

Note [Border modes]. A zero-padded layer has singular vectors that live at its border and that the
circulant knows nothing of. They carry the smallest singular values: M can be nearly singular where
C is not. All of that is in W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from convspectra.batched_lu import inverse_and_logabsdet, logabsdet, lu_factor
from convspectra.geometry import ConvGeometry
from convspectra.matrices import check_bytes
from convspectra.operator import ConvOperator
from convspectra.symbol import Torus, smallest_periods, symbols, weight_blocks

DEFAULT_MAX_BYTES = 4 * 2**30
CONDITION_ACCEPTED_AT_ONCE = 1e6
MAX_FACTORIZATIONS = 4
PROBE_ACCEPTED_AT_ONCE = 1e-11
PROBE_LIMIT = 1e-6
REFINEMENT_THRESHOLD = 1e-11
SINGULAR_RESIDUAL = 0.1
"""A solve that leaves this much of its data says that M is singular to working precision."""


def is_square_toeplitz(op: ConvOperator) -> bool:
    """Whether M is square with zero padding and stride 1: what the capacitance method inverts."""
    g = op.geometry
    return (
        g.ndim > 0
        and g.padding_mode == "zeros"
        and all(s == 1 for s in g.stride)
        and g.output_size == g.input_size
        and op.weight.shape[0] == op.weight.shape[1] * op.groups
    )


class CapacitanceFactorization:
    """Factorisation of a square zero-padded stride-1 convolution for solves and log-determinant.

    Parameters
    ----------
    op : ConvOperator
        Such that `is_square_toeplitz(op)`; float64. Gradients flow from `logabsdet` to its weight.
    max_bytes : int
        Limit on the border matrix W, of ``groups * (g / groups * border)^2`` numbers.

    Attributes
    ----------
    worst_residual : float
        Largest ``||M x - y|| / ||y||`` of the solves so far.

    Raises
    ------
    ValueError
        If W would take more than `max_bytes`.
    ArithmeticError
        If C is singular or nearly so on every torus tried: a rank-deficient weight.

    Notes
    -----
    Cost: ``2/3 (channels * border)^3`` flops once, and the same again for a gradient; border is
    2 N + 1 for 3 x 3 taps on N x N points. Memory: up to three times W.
    """

    def __init__(self, op: ConvOperator, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._op = op.with_weight(op.weight.detach())
        _check_border(op, max_bytes)
        best = None
        for embedding in itertools.islice(_embeddings(op), MAX_FACTORIZATIONS):
            self._use(embedding)
            accuracy, direction = self._probe()
            if best is None or accuracy < best[0]:
                best = accuracy, embedding, direction
            if accuracy <= PROBE_ACCEPTED_AT_ONCE:
                break
        if best is None or best[0] > PROBE_LIMIT:
            raise ArithmeticError(
                "the circulant embedding is singular or nearly so on every torus tried; the "
                "kernel is probably rank deficient"
            )
        if self._embedding is not best[1]:
            self._use(best[1])
        self._direction = best[2]
        self.worst_residual = 0.0

    def _use(self, embedding: _Embedding) -> None:
        self._embedding = embedding
        self._factors = lu_factor(embedding.border_matrix.detach())
        self._inverse_symbols = embedding.inverse_symbols.detach()

    def _probe(self) -> tuple[float, Tensor]:
        """Backward error ``||M x - y|| / (||M|| ||x||)`` of one solve for a random y, and x.

        It tells a poor embedding from an ill-conditioned M, which no embedding can mend.
        """
        generator = torch.Generator(device=self._op.device).manual_seed(0)
        y = torch.randn(
            1,
            *self._op.output_shape,
            dtype=self._op.dtype,
            device=self._op.device,
            generator=generator,
        )
        x = self._apply_inverse(y, self._op.transposed)
        residual = torch.linalg.vector_norm(y - self._op.apply(x))
        error = float(residual / (self._embedding.norm * torch.linalg.vector_norm(x)))
        return error if math.isfinite(error) else math.inf, x

    def is_singular(self) -> bool:
        """Whether M is singular to working precision: a smallest singular value near eps ||M||.

        The direction that M^{-1} makes largest is solved for with M'; where sigma_min is lost in
        rounding that solve leaves a residual as large as its data. Cost: one solve.
        """
        _, residual = self._refined(self._direction, not self._op.transposed)
        return residual >= SINGULAR_RESIDUAL

    def solve(self, y: Tensor) -> Tensor:
        """M^{-1} y for a batch (b, *output_shape), with one step of refinement where it helps.

        Cost: two FFTs, a product with every inverted symbol, and one solve with the factors of W.
        """
        return self._recorded(y, self._op.transposed)

    def solve_adjoint(self, x: Tensor) -> Tensor:
        """M'^{-1} x for a batch (b, *input_shape): as `solve`."""
        return self._recorded(x, not self._op.transposed)

    def logabsdet(self) -> Tensor:
        """Log |det M|, a 0-dim tensor with gradient; of no meaning for a singular M.

        The gradient is M'^{-1} summed over the index sets Omega, obtained through the symbols.
        """
        log_det_border = logabsdet(self._embedding.border_matrix, *self._factors)
        total: Tensor = self._embedding.log_det_circulant + log_det_border.sum()
        return total

    def _recorded(self, y: Tensor, adjoint: bool) -> Tensor:
        x, residual = self._refined(y, adjoint)
        self.worst_residual = max(self.worst_residual, residual)
        return x

    def _refined(self, y: Tensor, adjoint: bool) -> tuple[Tensor, float]:
        """The solution, and its residual relative to y."""
        forward = self._op.apply_adjoint if adjoint != self._op.transposed else self._op.apply
        x = self._apply_inverse(y, adjoint)
        residual = y - forward(x)
        scale = float(torch.linalg.vector_norm(y))
        size = float(torch.linalg.vector_norm(residual))
        if size > REFINEMENT_THRESHOLD * scale:
            refined = x + self._apply_inverse(residual, adjoint)
            refined_size = float(torch.linalg.vector_norm(y - forward(refined)))
            if refined_size < size:
                x, size = refined, refined_size
        if not math.isfinite(size):
            raise ArithmeticError("a solve with M overflowed: M is singular to working precision")
        return x, size / scale if scale > 0 else 0.0

    def _apply_inverse(self, y: Tensor, adjoint: bool) -> Tensor:
        """``[I 0] C^{-1} [y; -W^{-1} D y]``; with `adjoint`, the same of the transposes."""
        geometry = self._op.geometry
        groups = self._op.groups
        y = y.reshape(y.shape[0], groups, -1, *geometry.input_size)
        pads = [
            amount
            for n, p in zip(
                reversed(geometry.input_size), reversed(self._embedding.torus.periods), strict=True
            )
            for amount in (0, p - n)
        ]
        on_torus = torch.nn.functional.pad(y, pads)
        at_border = self._circulant_inverse(on_torus, adjoint).flatten(3)[
            ..., self._embedding.border
        ]
        right = at_border.flatten(2).permute(1, 2, 0)
        correction = torch.linalg.lu_solve(*self._factors, right, adjoint=adjoint)
        correction = correction.permute(2, 0, 1).reshape(at_border.shape)
        flat = on_torus.flatten(3).index_copy(3, self._embedding.border, -correction)
        x = self._circulant_inverse(flat.reshape(on_torus.shape), adjoint)
        for axis, n in enumerate(geometry.input_size):
            x = x.narrow(3 + axis, 0, n)
        return x.flatten(1, 2)

    def _circulant_inverse(self, x: Tensor, adjoint: bool) -> Tensor:
        """C^{-1} x or C'^{-1} x, both (b, groups, channels, *periods)."""
        symbols_inverse = self._inverse_symbols.mH if adjoint else self._inverse_symbols
        coefficients = self._embedding.torus.transform(x).permute(1, 3, 2, 0)
        product = symbols_inverse @ coefficients
        return self._embedding.torus.inverse_transform(product.permute(3, 0, 2, 1))


@dataclass(frozen=True)
class _Embedding:
    """M inside the circulant of one torus; the tensors carry gradients to the weight."""

    torus: Torus
    norm: float
    border: Tensor
    inverse_symbols: Tensor
    log_det_circulant: Tensor
    border_matrix: Tensor


def _embeddings(op: ConvOperator) -> Iterator[_Embedding]:
    """Embeddings of M: well-conditioned ones as they are found, then the others, best first."""
    blocks, geometry = weight_blocks(op), op.geometry
    smallest = smallest_periods(geometry)
    others: list[tuple[float, int, Callable[[], _Embedding]]] = []
    for extra, twisted in itertools.product(range(3), (False, True)):
        torus = Torus(tuple(p + extra for p in smallest), twisted)
        symbol = symbols(blocks, geometry, torus)
        inverse, log_dets = inverse_and_logabsdet(symbol)
        norm, inverse_norm = (torch.linalg.matrix_norm(x.detach()) for x in (symbol, inverse))
        condition = float((norm.amax(1) * inverse_norm.amax(1)).amax())
        size = float(norm.amax())
        border = _border_points(geometry, torus, op.device)
        embed: Callable[[], _Embedding] = partial(_embed, torus, size, border, inverse, log_dets)
        if condition <= CONDITION_ACCEPTED_AT_ONCE:
            yield embed()
        elif math.isfinite(condition):
            others.append((condition, len(others), embed))
    for _, _, embed in sorted(others):
        yield embed()


def _embed(
    torus: Torus, norm: float, border: Tensor, inverse: Tensor, log_dets: Tensor
) -> _Embedding:
    log_det_circulant = (log_dets @ torus.multiplicity(log_dets.device)).sum()
    border_matrix = _border_matrix(inverse, torus, border)
    return _Embedding(torus, norm, border, inverse, log_det_circulant, border_matrix)


def _check_border(op: ConvOperator, max_bytes: int) -> None:
    geometry = op.geometry
    points = math.prod(smallest_periods(geometry)) - math.prod(geometry.input_size)
    order = op.weight.shape[1] * points
    itemsize = op.weight.element_size()
    check_bytes("the border matrix", op.groups * order**2 * itemsize, max_bytes)


def _border_points(geometry: ConvGeometry, torus: Torus, device: torch.device) -> Tensor:
    """Flat torus indices of the points outside the interior, (border,)."""
    inside = torch.ones((), dtype=torch.bool, device=device)
    for n, period in zip(geometry.input_size, torus.periods, strict=True):
        inside = inside[..., None] & (torch.arange(period, device=device) < n)
    return torch.nonzero(~inside.flatten()).flatten()


def _border_matrix(inverse: Tensor, torus: Torus, border: Tensor) -> Tensor:
    """W, the border rows and columns of C^{-1}: (groups, channels * border, channels * border)."""
    kernel = torus.inverse_transform(inverse.movedim(-3, -1)).flatten(3)
    difference = torch.zeros((), dtype=torch.int64, device=border.device)
    wraps = torch.zeros((), dtype=torch.int64, device=border.device)
    for axis, period in enumerate(torus.periods):
        stride = math.prod(torus.periods[axis + 1 :])
        position = (border // stride) % period
        step = position[:, None] - position[None, :]
        difference = difference * period + step % period
        wraps = wraps + (step < 0)
    entries = kernel.index_select(3, difference.flatten())
    entries = entries.reshape(*kernel.shape[:3], *difference.shape)
    if torus.twisted:
        entries = entries * (1 - 2 * (wraps % 2))
    return entries.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
