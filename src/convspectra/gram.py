"""The smaller Gram matrix of a layer: its preconditioner, and a certified lower bound.

The preconditioner is the inverse of the circulant's Gram matrix, restricted to the points of the
layer: two FFTs and one product per frequency.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.batched_lu import inverse_and_logabsdet
from convspectra.circulant import CirculantEmbedding
from convspectra.operator import ConvOperator
from convspectra.request import Product
from convspectra.solvers.lanczos import lanczos

REGULARISATION = 1e-3
"""Added to the circulant's Gram matrices, relative to their norm: they may be singular, and with
less than this LOBPCG is lost in their null space."""


class GramPreconditioner:
    """G = M'M for a tall layer, M M' for a wide one, and an approximate inverse B of it.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64.

    Notes
    -----
    Cost: an inversion of every symbol's Gram matrix. Memory: two such matrices per frequency.
    """

    def __init__(self, op: ConvOperator) -> None:
        self.tall, wide = Product.tall(op)
        if op.geometry.ndim == 0:
            op = ConvOperator(op.weight[:, :, None], 1)
        embedding = CirculantEmbedding(op)
        self._embed = embedding.embed_output if wide else embedding.embed_input
        self._restrict = embedding.restrict_output if wide else embedding.restrict_input
        self._shape = op.output_shape if wide else op.input_shape
        self._multiply = embedding.multiply
        symbols = embedding.symbols()
        gram = symbols @ symbols.mH if wide else symbols.mH @ symbols
        self._norm = float(torch.linalg.matrix_norm(gram).amax())
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse, _ = inverse_and_logabsdet(gram + REGULARISATION * self._norm * identity)
        self._inverse = 0.5 * (inverse + inverse.mH)

    def apply(self, x: Tensor) -> Tensor:
        """B x for vectors in rows."""
        embedded = self._embed(x.reshape(-1, *self._shape))
        return self._restrict(self._multiply(self._inverse, embedded)).flatten(1)

    def is_above(self, square: float, maxiter: int, generator: torch.Generator) -> tuple[bool, int]:
        """Whether all eigenvalues of G are above `square`, except with a small probability.

        (square - G) B has the signs of square - G and a spectrum that a few Lanczos steps tell
        from 0. Also gives the number of applications of M and M'.
        """
        run = lanczos(
            lambda x: square * x - self.tall.gram(x),
            math.prod(self._shape),
            1,
            largest=True,
            tol=0.5,
            maxiter=maxiter,
            like=self.tall.op.weight,
            generator=generator,
            enclosure=0.0,
            beyond=0.0,
            metric=self.apply,
            smallest_of_metric=1 / (self._norm * (1 + REGULARISATION)),
        )
        return run.bound <= 0, 2 * run.products
