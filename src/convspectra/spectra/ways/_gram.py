"""The smaller Gram matrix of a block: a third of the work of an SVD, and half of the digits."""

from __future__ import annotations

from convspectra.operator import ConvOperator, group_matrices
from convspectra.solvers import SingularTriplets, gram_eigh
from convspectra.spectra._request import Request
from convspectra.spectra.ways._way import Cost, Question, Way, dense_work, group_shape


class Gram(Way):
    """Eigenvalues of M M' or M'M, whichever is smaller."""

    name = "gram"
    needs = "room for the dense matrix within max_bytes"
    answers = ("LM", "SM")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Every block has a Gram matrix."""
        return True

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """``2 m^2 n`` flops for the product and ``9 m^3`` for the eigenvalues, m <= n."""
        small, large = sorted(group_shape(op))
        flops = 2.0 * dense_work(op) + 9.0 * op.groups * small**3
        return Cost(flops, 8.0 * op.groups * small * (small + large))

    def run(self, request: Request) -> SingularTriplets:
        """All eigenvalues, and the k wanted."""
        blocks = group_matrices(request.op, request.max_bytes)
        if blocks.shape[1] <= blocks.shape[2]:
            return gram_eigh(blocks, request.k, request.largest)
        return gram_eigh(blocks.mT, request.k, request.largest).transposed()
