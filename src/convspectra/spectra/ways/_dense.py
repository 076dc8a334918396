"""The dense matrix of a block: exact for every question, where there is room for it."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, group_matrices
from convspectra.solvers import SingularTriplets, dense_svd, lu_factor
from convspectra.spectra._request import Request
from convspectra.spectra.ways._pseudo_determinant import log_pseudo_determinant
from convspectra.spectra.ways._way import Cost, Question, Way, dense_work, group_shape

FLOPS = {"LM": 10.0, "SM": 10.0, "values": 4.0, "logabsdet": 2.0, "solve": 2 / 3}
"""Flops over m n min(m, n): an SVD with vectors, one without, a QR and an LU factorization (Golub
and Van Loan, "Matrix Computations", 4th edition, 2013, sections 3.2, 5.2 and 8.6)."""


class Dense(Way):
    """LAPACK on the dense diagonal blocks of M that its groups are."""

    name = "dense"
    needs = "room for the dense matrix within max_bytes"
    answers = ("LM", "SM", "values", "logabsdet", "solve")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Every block is a matrix."""
        return True

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """A factorization of order min(m, n) of each group."""
        rows, columns = group_shape(op)
        return Cost(FLOPS[question] * dense_work(op), 8.0 * op.groups * rows * columns)

    def run(self, request: Request) -> SingularTriplets:
        """An SVD with vectors."""
        blocks = group_matrices(request.op, request.max_bytes)
        return dense_svd(blocks, request.k, request.largest)

    def matrices(self, op: ConvOperator, max_bytes: int) -> tuple[Tensor, Tensor]:
        """The groups, once each."""
        blocks = group_matrices(op, max_bytes)
        return blocks, blocks.new_ones(len(blocks))

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """A QR factorization; -inf for a matrix that is rank deficient to working precision."""
        return log_pseudo_determinant(group_matrices(op, max_bytes))

    def solve(self, op: ConvOperator, y: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
        """An LU factorization with partial pivoting."""
        matrices = group_matrices(op, max_bytes)
        lu, pivots = lu_factor(matrices.mT if adjoint else matrices)
        right = y.reshape(len(y), op.groups, -1).permute(1, 2, 0)
        solution = torch.linalg.lu_solve(lu, pivots, right).permute(2, 0, 1)
        return solution.reshape(-1, *(op.output_shape if adjoint else op.input_shape))
