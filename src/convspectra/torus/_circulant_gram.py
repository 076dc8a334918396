"""The smaller Gram matrix of a layer, G, and that of a circulant around it, block by block.

The circulant's Gram matrices bound the largest eigenvalues of G from above (Cauchy's interlacing),
and what is near their inverses, restricted to the points of the layer, are preconditioners at
either end of the spectrum: two FFTs and one product per frequency.

Note [Rounding of bounds]. A Cholesky factorization of ``t I - S'S``, n x n, that runs through says
that this matrix is positive up to the rounding of the symbol, 8 eps of the sum of its absolute
taps, of the product, n eps ||S||_F^2, and of the factors, n eps of the trace of t I (Higham
2002, theorem 10.3).

References
----------
N. J. Higham (2002), "Accuracy and stability of numerical algorithms", second edition, SIAM,
    doi:10.1137/1.9780898718027.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, Product, conv_geometry, derived_operator, is_wide
from convspectra.solvers import (
    LanczosStop,
    Metric,
    inverse_and_logabsdet,
    lanczos,
    leading_eigenpairs,
)
from convspectra.torus._embedding import CirculantEmbedding
from convspectra.torus._symbols import half_multiplicity, symbol_shape

REGULARIZATION = 1e-8
"""Added to the circulant's Gram matrices, relative to their norm: they may be singular.

A choice, about sqrt(eps): what is inverted has a condition number of 1e8 at most. It is in a
preconditioner only: a larger one slows the smallest values down, and changes none.
"""
LIKELY = 8
"""Matrices whose eigenvalues are computed at once to find the largest of all: a choice of cost."""
FEW_POINTS = 16
"""Points of a torus along every axis, up to which a twist makes a difference to the bounds.

Frequencies of both tori differ by half a step, and norms by about the square of it. A choice: a
smaller one gives looser bounds of small layers, still right ones.
"""
WINDOW = 2.0
"""The largest eigenvalue of G lies below the circulant's by about so much over the square of the
points of the shortest axis, relatively: what a window over the points costs.

Half of it takes 272 products and double 304 where this takes 258 (four norms of 8 channels on
24 x 24 points by Davidson).
"""
LEAST_MARGIN = 1e-3
"""Nearer to the largest eigenvalue a preconditioner in single precision amplifies rounding.

A choice: at half or double of it the products for 2 channels on 64 x 64 points change by 2 %.
"""
PROOF_MARGIN = 1e-4
"""Margin that a factorization in single precision needs to run through: some 800 of its eps.

With less it fails for matrices that are positive, which costs more eigenvalues and no bound.
"""
OTHERS = 0.75
"""Eigenvalues of a block beside its leading ones are taken for this much of the least of those.

A choice: 0.4 and 1 take 1 to 2 % more products.
"""


class CirculantGram:
    """G = M'M for a tall layer, M M' for a wide one, and the circulant's.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64 or float32: in float32 everything is.
    fast : bool
        For many transforms and products to come: see `CirculantEmbedding` and `Product`.

    Notes
    -----
    Cost: one product of every symbol with itself. Memory: one such matrix per frequency.
    """

    def __init__(self, op: ConvOperator, *, fast: bool = False) -> None:
        self.tall, self._wide = Product.tall(op, fast=fast)
        if op.geometry.ndim == 0:
            op = derived_operator(op.weight[:, :, None], conv_geometry((1,), (1,)))
        self._embedding = embedding = CirculantEmbedding(op, fast=fast)
        self._embed = embedding.embed_output if self._wide else embedding.embed_input
        self._restrict = embedding.restrict_output if self._wide else embedding.restrict_input
        self._shape = op.output_shape if self._wide else op.input_shape
        self.blocks = self._gram(0.0)

    def inverse_near_zero(self, shift: float = 0.0) -> tuple[Callable[[Tensor], Tensor], float]:
        """A preconditioner for the smallest eigenvalues: (shift + circulant's Gram matrix)^{-1}.

        The second is its norm, at most a few times too large. Cost: an inversion of every block.
        """
        shift = max(shift, REGULARIZATION * self._norm)
        identity = torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self._device)
        inverse, _ = inverse_and_logabsdet(self.blocks + shift * identity)
        inverse = 0.5 * (inverse + inverse.mH)
        norm = float(torch.linalg.matrix_norm(inverse).amax())
        return lambda x: self._filtered(lambda rows: rows @ inverse.mT, x), norm

    def inverse_near_norm(self) -> tuple[Callable[[Tensor], Tensor], float]:
        """A preconditioner for the largest, near (t - the circulant's Gram matrix)^{-1}; a bound.

        The second is an upper bound on sigma_max: a little more than the circulant's norm, which
        Cholesky factorizations prove. The first has the leading eigenvectors of every block only;
        the iteration takes hardly a step more for that. In single precision, whatever the vectors
        are.
        """
        margin = max(WINDOW / min(self._embedding.periods) ** 2, LEAST_MARGIN)
        values, vectors = self.leading
        single = self.blocks.flatten(0, 1).to(torch.complex64)
        top = _largest_eigenvalues(single, values[:, -1], self._copies(0.0), 1, PROOF_MARGIN)
        bound = rounded_up(top * (1 + PROOF_MARGIN), single, self.tall.op.weight)
        t = (1 + margin) * float(top)
        elsewhere = 1 / (t - OTHERS * values[:, :1])
        more = 1 / (t - values.clamp_max(float(top))) - elsewhere
        into, out, elsewhere = (
            part.resolve_conj().contiguous().unflatten(0, self.blocks.shape[:2])
            for part in (vectors.conj() * more[:, None], vectors.mT, elsewhere[:, None])
        )

        def multiply(rows: Tensor) -> Tensor:
            return elsewhere * rows + (rows @ into) @ out

        return lambda x: self._filtered(multiply, x.float()).to(x.dtype), float(bound)

    def upper_bounds(self, count: int) -> Tensor:
        """Upper bounds on the `count` largest singular values of M, descending, float64.

        Rigorous up to the rounding of the symbols, which is allowed for. Cost: a Cholesky
        factorization of every block, and the eigenvalues of a few.
        """
        squares = _largest_eigenvalues(
            self.blocks.flatten(0, 1), self.leading[0][:, -1], self._copies(0.0), count
        )
        if self.is_small:
            blocks = self._gram(0.5).flatten(0, 1)
            estimates = leading_eigenpairs(blocks)[0][:, -1]
            twisted = _largest_eigenvalues(blocks, estimates, self._copies(0.5), count)
            squares = torch.minimum(squares, twisted)
        return rounded_up(squares, self.blocks.flatten(0, 1), self.tall.op.weight)

    def is_above(self, square: float, maxiter: int, generator: torch.Generator) -> tuple[bool, int]:
        """Whether all eigenvalues of G are above `square`, except with a small probability.

        With B = (square + the circulant's Gram matrix)^{-1}, (square - G) B has the signs of
        square - G and a spectrum that some hundred Lanczos steps tell from 0. Also gives the number
        of applications of M and M'.
        """
        metric, _ = self.inverse_near_zero(square)
        run = lanczos(
            lambda x: square * x - self.tall.gram(x),
            math.prod(self._shape),
            1,
            largest=True,
            stop=LanczosStop(tol=0.5, maxiter=maxiter, enclosure=0.0, beyond=0.0),
            like=self.tall.op.weight,
            generator=generator,
            metric=Metric(metric, smallest=1 / (self._norm * (1 + REGULARIZATION) + square)),
        )
        return run.bound <= 0, 2 * run.products

    @functools.cached_property
    def leading(self) -> tuple[Tensor, Tensor]:
        """`leading_eigenpairs` of the blocks, (groups * frequencies, ...), in single precision."""
        return leading_eigenpairs(self.blocks.flatten(0, 1).to(torch.complex64))

    @property
    def is_small(self) -> bool:
        """Whether a twist of the torus makes a difference to `upper_bounds`."""
        return not self._embedding.is_exact and max(self._embedding.periods) <= FEW_POINTS

    @property
    def _device(self) -> torch.device:
        return self.blocks.device

    @functools.cached_property
    def _norm(self) -> float:
        return float(torch.linalg.matrix_norm(self.blocks).amax())

    def _gram(self, phase: float) -> Tensor:
        """Gram matrices, (groups, frequencies, n, n)."""
        symbols = self._embedding.symbols(phase)
        return smaller_gram(symbols, self._wide)

    def _copies(self, phase: float) -> Tensor:
        """For how many of all frequencies each of the blocks stands."""
        last = half_multiplicity(self._embedding.periods[-1], phase).to(self._device)
        return last.repeat(self.blocks.shape[0] * math.prod(self._embedding.periods[:-1]))

    def _filtered(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        embedded = self._embed(x.reshape(-1, *self._shape))
        return self._restrict(self._embedding.filtered(function, embedded)).flatten(1)


def gram_cost(op: ConvOperator) -> tuple[float, float]:
    """Flops and bytes that a `CirculantGram` and the factors of its blocks take, about."""
    embedding = CirculantEmbedding(op)
    rows, columns = symbol_shape(op)
    symbols = op.groups * (math.prod(embedding.periods) // 2 + 1)
    order = rows if is_wide(op) else columns
    return 32.0 * symbols * order * rows * columns, 16.0 * symbols * (rows * columns + 3 * order**2)


def smaller_gram(symbols: Tensor, wide: bool) -> Tensor:
    """S S* for a wide layer, S*S for a tall one, of all symbols (..., h, g)."""
    return symbols @ symbols.mH if wide else symbols.mH @ symbols


def rounded_up(squares: Tensor, blocks: Tensor, weight: Tensor) -> Tensor:
    """Singular values from squares that factorizations are above: Note [Rounding of bounds]."""
    trace = blocks.diagonal(dim1=-2, dim2=-1).real.sum(-1).amax().double()
    order, taps = blocks.shape[-1], math.prod(weight.shape[2:])
    size = torch.linalg.vector_norm(weight).double() * taps**0.5
    slack = (order + 4) * (trace + order * squares) + 16 * size * trace.sqrt()
    return (squares + torch.finfo(blocks.dtype).eps * slack).sqrt()


def _largest_eigenvalues(
    gram: Tensor, estimates: Tensor, copies: Tensor, count: int, margin: float = 0.0
) -> Tensor:
    """The `count` largest eigenvalues of all Gram matrices (b, n, n), each as often as its copies.

    Those of the matrices with the largest estimates of their norm are computed; the others have
    none larger than the last of these, t, by more than the margin, a fraction of it, where ``(1 +
    margin) t I - G`` has a Cholesky factorization.
    """
    order = torch.argsort(estimates, descending=True)
    likely = max(LIKELY, count)
    chosen, rest = order[:likely], order[likely:]
    found = torch.zeros(count, dtype=torch.float64, device=gram.device)
    while True:
        values = torch.linalg.eigvalsh(gram[chosen].to(torch.complex128))
        values = values.repeat_interleave(copies[chosen].long(), dim=0).flatten()
        found = torch.cat([found, values]).sort(descending=True).values[:count]
        below = gram[rest].neg_()
        below.diagonal(dim1=-2, dim2=-1).add_(float(found[-1]) * (1 + margin))
        failed = torch.linalg.cholesky_ex(below).info != 0
        if not bool(failed.any()):
            return found
        chosen, rest = rest[failed], rest[~failed]
