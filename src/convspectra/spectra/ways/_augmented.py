"""The pseudo-inverse of a zero-padded layer that is not square, by its augmented matrix.

``[[a I, M], [M', 0]]`` is part of a square zero-padded layer, which the capacitance method factors:
Bjorck, "Iterative refinement of linear least squares solutions I", BIT 7, 1967, and
docs/mathematics.md, "Capacitance method".
"""

from __future__ import annotations

from torch import Tensor

from convspectra.operator import ConvOperator, has_augmented
from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import Request
from convspectra.spectra.ways._inverse_iteration import smallest_by_inverse
from convspectra.spectra.ways._way import Cost, Question, Way
from convspectra.torus import AugmentedFactorization, augmented_bytes, augmented_flops


class Augmented(Way):
    """Factors of the augmented matrix of M, or of M' if M is wide."""

    name = "augmented"
    needs = "zero padding and at least as many channels on the longer side of M"
    answers = ("SM", "logabsdet")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Zero padding, and channels in the proportion of the sides."""
        return has_augmented(op)

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """The border matrix for the channels of both sides, and the inverses of its symbols."""
        return Cost(augmented_flops(op), float(augmented_bytes(op)))

    def run(self, request: Request) -> SingularTriplets:
        """The smallest triplets of M are the largest of its pseudo-inverse."""
        op, wide = request.op, request.op.shape[0] < request.op.shape[1]
        factorization = AugmentedFactorization(op, request.max_bytes)
        triplets = smallest_by_inverse(request, op.T if wide else op, factorization)
        return triplets.transposed() if wide else triplets

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """Half of that of the augmented matrix, less the shifts."""
        factorization = AugmentedFactorization(op, max_bytes)
        if factorization.is_singular():
            raise ArithmeticError("the layer is rank deficient to working precision")
        return factorization.logabsdet()
