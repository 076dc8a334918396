"""The smallest triplets of a rectangular zero-padded layer from its pseudo-inverse."""

from __future__ import annotations

from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import Request
from convspectra.spectra.ways._inverse_iteration import smallest_by_inverse
from convspectra.torus import AugmentedFactorization


def augmented(request: Request) -> SingularTriplets:
    """The smallest triplets of a layer from the largest of its pseudo-inverse."""
    op, wide = request.op, request.op.shape[0] < request.op.shape[1]
    factorization = AugmentedFactorization(op, request.max_bytes)
    triplets = smallest_by_inverse(request, op.T if wide else op, factorization)
    return triplets.transposed() if wide else triplets
