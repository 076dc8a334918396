"""A layer as a block diagonal of dense matrices, up to unitary transformations and permutations.

Independent blocks (kernel 1, sub-lattices), groups, and for circular padding all around the Fourier
symbols make the singular values of many layers affordable.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from convspectra.operator import ConvOperator, independent_blocks
from convspectra.spectra.ways import CIRCULANT, DENSE, Way
from convspectra.torus import half_frequencies, row_grams_at, symbol_shape


@dataclass(frozen=True)
class Part:
    """An independent block of a layer that is not transposed, and how often it stands there."""

    op: ConvOperator
    places: int

    @property
    def count(self) -> int:
        """How many singular values all of its copies have."""
        return self.places * min(self.op.shape)

    @property
    def way(self) -> Way:
        """The way to all of its singular values."""
        return CIRCULANT if CIRCULANT.admits(self.op, "values") else DENSE

    @property
    def flops(self) -> float:
        """The cost of all of its singular values, about."""
        return self.way.cost(self.op, "values").flops

    def matrices(self, max_bytes: int) -> tuple[Tensor, Tensor]:
        """Dense matrices (b, m, n), real or complex, and how often each stands there, (b,).

        Raises
        ------
        ValueError
            If they take more than `max_bytes`.
        """
        blocks, copies = self.way.matrices(self.op, max_bytes)
        return blocks, self.places * copies

    def grams(self, max_bytes: int) -> tuple[Tensor, Tensor]:
        """The smaller Gram matrices of `matrices`, (b, n, n), and how often each stands there.

        Raises
        ------
        ValueError
            If they, or the matrices, take more than `max_bytes`.
        """
        if self.way is CIRCULANT:
            rows, columns = symbol_shape(self.op)
            if rows <= columns:
                frequencies, copies = half_frequencies(self.op)
                blocks = row_grams_at(self.op, frequencies, max_bytes)
                return blocks, self.places * copies.repeat(self.op.groups)
        blocks, copies = self.matrices(max_bytes)
        tall = blocks if blocks.shape[1] >= blocks.shape[2] else blocks.mH
        return tall.mH @ tall, copies


def parts(op: ConvOperator) -> tuple[list[Part], int]:
    """The blocks of a layer, which may be transposed, and how many more singular values are 0."""
    blocks = independent_blocks(op.T if op.transposed else op)
    found = [Part(block.op, len(block.places)) for block in blocks]
    return found, min(op.shape) - sum(part.count for part in found)
