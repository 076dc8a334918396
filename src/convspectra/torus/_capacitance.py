"""Exact inverse and determinant of a square zero-padded convolution: the capacitance method.

Embed M in a block circulant C on a torus and order its points as interior (where M lives) and
border. With ``C^{-1} = [[A, B], [D, W]]``,

    M^{-1} = A - B W^{-1} D        and        |det M| = |det C| |det W|.

W is the capacitance matrix of Buzbee, Dorr, George and Golub (1971); the
formula for the determinant is Jacobi's identity for complementary minors.

Note [Border modes]. A zero-padded layer has singular vectors that live at its border and that the
circulant knows nothing of. They carry the smallest singular values: M can be nearly singular where
C is not. All of that is in W.

Note [One axis at a time]. The border of a square is a strip along each axis. Here the torus is cut
open one axis at a time, the last one first: with the other axes still in Fourier space that is one
small capacitance matrix per frequency, and only the last cut, across the longest axis, meets a
large one, half the order of a W for all strips together. The earlier cuts add one matrix
product to it. In two dimensions that is half the flops and a quarter of the memory. A solve reads
the symbols twice for every cut, before and after the border, and keeps no other blocks.

References
----------
B. L. Buzbee, F. W. Dorr, J. A. George and G. H. Golub (1971), "The direct solution of the discrete
    Poisson equation on irregular regions", SIAM J. Numer. Anal. 8, doi:10.1137/0708066.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from convspectra.operator import DEFAULT_MAX_BYTES, ConvOperator, check_bytes
from convspectra.solvers import BOUND_VECTORS, gaussian, norm_bound
from convspectra.torus._cut import BorderCost, CutTorus, all_lengths, border_cost
from convspectra.torus._symbols import smallest_periods

MAX_FACTORIZATIONS = 4
"""Tori that are factored before the best of them is taken, of six that there are.

A choice: of 40 Gaussian 4 x 4 x 3 x 3 weights on 8 x 8 points the first torus served all.
"""
CONDITION_ACCEPTED_AT_ONCE = 1e6
"""Condition number of a circulant up to which its torus is tried as it comes.

At most 650 for those 40 weights. It is an order of trials only: the probe decides.
"""
PROBE_ACCEPTED_AT_ONCE = 1e-11
"""Backward error of a solve with which no other torus is looked at.

At most 2e-15 for those 40 weights; one step of refinement takes 1e-11 to rounding. At a larger
one a worse torus is taken where a better one may be at hand.
"""
PROBE_LIMIT = 1e-6
"""Backward error above which the factors are refused: refinement leaves about its square, 1e-12."""
REFINEMENT_THRESHOLD = 1e-10
"""Residual, relative to the data, up to which a solve is not refined by default.

A choice: refinement doubles the cost of a solve.
"""
REFINED_ALWAYS = 1e-7
"""Residual of a solve from which on the approximate inverse takes in a step of refinement.

A choice: below it the error of the inverse widens an enclosure by less than that; at a smaller one
more layers pay for two solves where one would do.
"""
BACKWARD_ERROR_REACHED = 1e-15
"""Backward error at which a solve is as good as rounding lets it be: about 5 eps."""
SINGULAR_RESIDUAL = 0.1
"""A solve that leaves this much of its data says that M is singular to working precision.

Between rounding error times the condition number, far below 1 for a regular M, and 1, all of the
data: a choice.
"""


class CapacitanceFactorization:
    """Factorization of a square zero-padded stride-1 convolution for solves and log-determinant.

    Parameters
    ----------
    op : ConvOperator
        Such that `is_square_toeplitz(op)`; float64. Gradients flow from `logabsdet` to its weight.
    max_bytes : int
        Limit on the border matrix W, of ``groups * (g / groups * border)^2`` numbers; border is the
        number of points of the last cut, N for 3 x 3 taps on N x N points.
    lengths : Tensor, optional
        How many of the points of `op` along each axis, from the first, each channel of a group has
        in M, (axes, channels): M is the layer with the other rows and columns left out. Arrays have
        all points; those left out are ignored, and come out as 0.

    Raises
    ------
    ValueError
        If W would take more than `max_bytes`.
    ArithmeticError
        If C is singular or nearly so on every torus tried: a rank-deficient weight.

    Notes
    -----
    Cost in two dimensions, for b border lines: ``(2 (2 b - 1) b + 2/3 b^3) (channels N)^3`` flops,
    twice that again for a gradient. Memory: the inverted symbols, ``16 channels^2 N^2 / 2`` bytes,
    three times until W is there, and up to three times W.
    """

    def __init__(
        self, op: ConvOperator, max_bytes: int = DEFAULT_MAX_BYTES, lengths: Tensor | None = None
    ) -> None:
        self._op = op.with_weight(op.weight.detach(), check=False)
        self._inside = None if lengths is None else _inside(op, lengths)
        check_bytes("the border matrix", border_bytes(op, lengths), max_bytes)
        direct = op.T if op.transposed else op
        best: tuple[float, CutTorus, Tensor, float] | None = None
        for torus in itertools.islice(_tori(direct, lengths), MAX_FACTORIZATIONS):
            torus.factorize()
            error, direction, left = self._probe(torus)
            if best is None or error < best[0]:
                best = error, torus, direction, left
            del torus  # A torus holds memory, and the next is to come.
            if error <= PROBE_ACCEPTED_AT_ONCE:
                break
        if best is None or best[0] > PROBE_LIMIT:
            raise ArithmeticError(
                "the circulant embedding is singular or nearly so on every torus tried; the "
                "kernel is probably rank deficient"
            )
        _, self._torus, self._direction, left = best
        self._refine_always = left > REFINED_ALWAYS

    def is_singular(self) -> bool:
        """Whether M is singular to working precision: a smallest singular value near eps ||M||.

        The direction that M^{-1} makes largest is solved for with M'; where sigma_min is lost in
        rounding that solve leaves a residual as large as its data. Cost: one solve.
        """
        x = self._direction
        solution = self.solve_adjoint(x)
        residual = torch.linalg.vector_norm(x - self._forward(solution, not self._op.transposed))
        return bool(residual >= SINGULAR_RESIDUAL * torch.linalg.vector_norm(x))

    def solve(self, y: Tensor, rtol: float = REFINEMENT_THRESHOLD) -> Tensor:
        """M^{-1} y for a batch (b, *output_shape), with one step of refinement where it helps.

        The step is left out where without it the residual is at most `rtol` times the size of y.
        Cost: 2^d passes over the inverted symbols in d dimensions, and one solve with W's factors.
        """
        return self._refined(y, self._op.transposed, rtol)

    def solve_adjoint(self, x: Tensor, rtol: float = REFINEMENT_THRESHOLD) -> Tensor:
        """M'^{-1} x for a batch (b, *input_shape): as `solve`."""
        return self._refined(x, not self._op.transposed, rtol)

    def apply_inverse(self, y: Tensor) -> Tensor:
        """X y with a fixed X near M^{-1}, for a batch (b, *output_shape): see `error_bound`.

        Half the cost of `solve`, which refines the answer.
        """
        return self._linear(y, self._op.transposed)

    def apply_inverse_adjoint(self, x: Tensor) -> Tensor:
        """Y x with a fixed Y near M'^{-1}, for a batch (b, *input_shape)."""
        return self._linear(x, not self._op.transposed)

    @functools.cached_property
    def error_bound(self) -> float:
        """A bound on ||M X - I|| and ||Y M' - I|| for `apply_inverse` and `apply_inverse_adjoint`.

        Then ``X Y = M^{-1} (I + R) (I + R') M'^{-1}`` with R and R' of that size: small even where
        channels next to nothing make M ill-conditioned, which ``M' Y - I`` is not. From the
        residuals for Gaussian vectors; it fails with the probability of `log_smallest_norm`.
        Cost: two applications to 4 vectors each.
        """
        y = self._gaussian(BOUND_VECTORS, seed=1)
        plain, adjoint = self._op.transposed, not self._op.transposed
        return norm_bound(
            self._forward(self.apply_inverse(y), plain) - y,
            self.apply_inverse_adjoint(self._forward(y, adjoint)) - y,
        )

    def logabsdet(self) -> Tensor:
        """Log |det M|, a 0-dim tensor with gradient; of no meaning for a singular M.

        The gradient is M'^{-1} summed over the index sets Omega, obtained through the symbols.
        """
        return self._torus.logabsdet()

    def _gaussian(self, count: int, seed: int) -> Tensor:
        """Gaussian data for solves with M, (count, *output_shape), 0 at points that are cut out."""
        return self._restricted(gaussian(count, self._op.output_shape, self._op.weight, seed))

    def _probe(self, torus: CutTorus) -> tuple[float, Tensor, float]:
        """Backward error ``||M x - y|| / (||M|| ||x||)`` of a solve for a random y, x, and what is
        left of y, relatively.

        The first tells a poor embedding from an ill-conditioned M, which no embedding can mend.
        """
        y = self._gaussian(1, seed=0)
        x = self._restricted(torus.apply_inverse(y, self._op.transposed))
        residual = float(torch.linalg.vector_norm(y - self._forward(x, self._op.transposed)))
        error = residual / (torus.norm * float(torch.linalg.vector_norm(x)))
        left = residual / float(torch.linalg.vector_norm(y))
        return error if math.isfinite(error) else math.inf, x, left

    def _forward(self, x: Tensor, adjoint: bool) -> Tensor:
        """The direct layer, or its adjoint."""
        apply = self._op.apply_adjoint if adjoint != self._op.transposed else self._op.apply
        return self._restricted(apply(x))

    def _backward(self, y: Tensor, adjoint: bool) -> Tensor:
        """The inverse of `_forward` by the torus, without refinement."""
        return self._restricted(self._torus.apply_inverse(self._restricted(y), adjoint))

    def _restricted(self, x: Tensor) -> Tensor:
        return x if self._inside is None else x * self._inside

    def _linear(self, y: Tensor, adjoint: bool) -> Tensor:
        y = self._restricted(y)
        x = self._backward(y, adjoint)
        if self._refine_always:
            x = x + self._backward(y - self._forward(x, adjoint), adjoint)
        return x

    def _refined(self, y: Tensor, adjoint: bool, rtol: float) -> Tensor:
        y = self._restricted(y)
        x = self._backward(y, adjoint)
        residual = y - self._forward(x, adjoint)
        size = float(torch.linalg.vector_norm(residual))
        if not math.isfinite(size):
            raise ArithmeticError("a solve with M overflowed: M is singular to working precision")
        reached = max(
            rtol * float(torch.linalg.vector_norm(y)),
            BACKWARD_ERROR_REACHED * self._torus.norm * float(torch.linalg.vector_norm(x)),
        )
        if size > reached:
            refined = x + self._backward(residual, adjoint)
            if float(torch.linalg.vector_norm(y - self._forward(refined, adjoint))) < size:
                return refined
        return x


def border_bytes(op: ConvOperator, lengths: Tensor | None = None) -> int:
    """Size of the largest border matrices, in double precision: of those across the longest axis,
    or of all those across another.
    """
    return op.groups * _border_cost(op, lengths).bytes


def _border_cost(op: ConvOperator, lengths: Tensor | None) -> BorderCost:
    lengths = all_lengths(op) if lengths is None else lengths
    return border_cost(smallest_periods(op.geometry), lengths)


def _tori(op: ConvOperator, lengths: Tensor | None) -> Iterator[CutTorus]:
    """Tori to try: well-conditioned ones as they come, then the others by condition."""
    others = []
    for extra, phase in itertools.product(range(3), (0.0, 0.5)):
        torus = CutTorus(op, extra, phase, lengths)
        if torus.condition <= CONDITION_ACCEPTED_AT_ONCE:
            yield torus
        elif math.isfinite(torus.condition):
            others.append((torus.condition, extra, phase))
        del torus
    for _, extra, phase in sorted(others):
        yield CutTorus(op, extra, phase, lengths)


def _inside(op: ConvOperator, lengths: Tensor) -> Tensor:
    """1 at the points that a channel has, and 0 elsewhere, (channels, *input_size)."""
    inside = torch.ones(op.weight.shape[1], dtype=op.dtype, device="cpu")
    for n, along in zip(op.geometry.input_size, lengths, strict=True):
        inside = inside[..., None] * (
            torch.arange(n, device="cpu") < along.reshape(-1, *(1,) * inside.ndim)
        )
    return inside.repeat(op.groups, *(1,) * op.geometry.ndim).to(op.device)
