"""The exact inverse of a square zero-padded layer by the capacitance method.

Inside a block circulant the inverse of M differs from that of the circulant by a matrix on the
border: Buzbee, Dorr, George and Golub, "The direct solution of the discrete Poisson equation on
irregular regions", SIAM J. Numer. Anal. 8, 1971. docs/mathematics.md, "Capacitance method".
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    from_phases,
    grid,
    grid_padding,
    has_augmented,
    inputs_per_point,
    is_square_grid,
    polyphase,
    to_phases,
)
from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import Request
from convspectra.spectra.ways._inverse_iteration import smallest_by_inverse
from convspectra.spectra.ways._way import Cost, Question, Way
from convspectra.torus import CapacitanceFactorization, border_cost


class Capacitance(Way):
    """Factors of the border matrix of M, of stride 1 on the grid of its output points."""

    name = "capacitance"
    needs = "a square layer with zero padding and N = stride N_out on every axis"
    answers = ("SM", "logabsdet", "solve")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Square, zero padding, and every output has all phases of the stride."""
        return has_augmented(op) and is_square_grid(op) and op.shape[0] == op.shape[1]

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """An LU factorization of the border matrix, from integers alone."""
        sides = zip(grid(op), grid_padding(op), strict=True)
        periods = [n + max(padding) for n, padding in sides]
        lengths = torch.tensor(grid(op), device="cpu")[:, None].expand(-1, inputs_per_point(op))
        border = border_cost(periods, lengths)
        return Cost(op.groups * border.flops, float(op.groups * border.bytes))

    def run(self, request: Request) -> SingularTriplets:
        """The smallest triplets of M are the largest of its inverse."""
        op, layer = request.op, polyphase(request.op)
        factorization = CapacitanceFactorization(layer, request.max_bytes)
        triplets = smallest_by_inverse(request, layer, factorization)
        v = from_phases(op, triplets.v.reshape(-1, *layer.input_shape)).flatten(1)
        return replace(triplets, v=v)

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """The determinants of the symbols and of the border matrix (Jacobi's identity)."""
        factorization = CapacitanceFactorization(polyphase(op), max_bytes)
        if factorization.is_singular():
            raise ArithmeticError("the layer is singular to working precision")
        return factorization.logabsdet()

    def solve(self, op: ConvOperator, y: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
        """Two passes over the inverted symbols and one solve at the border."""
        factorization = CapacitanceFactorization(polyphase(op), max_bytes)
        if adjoint:
            return factorization.solve_adjoint(to_phases(op, y))
        return from_phases(op, factorization.solve(y))
