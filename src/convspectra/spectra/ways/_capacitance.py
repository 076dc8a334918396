"""The smallest triplets of a square zero-padded layer from its exact inverse."""

from __future__ import annotations

from dataclasses import replace

from convspectra.operator import from_phases, polyphase
from convspectra.solvers import SingularTriplets
from convspectra.spectra._request import Request
from convspectra.spectra.ways._inverse_iteration import smallest_by_inverse
from convspectra.torus import CapacitanceFactorization


def capacitance(request: Request) -> SingularTriplets:
    """The smallest triplets of a square layer from the largest of its inverse."""
    op, layer = request.op, polyphase(request.op)
    factorization = CapacitanceFactorization(layer, request.max_bytes)
    triplets = smallest_by_inverse(request, layer, factorization)
    v = from_phases(op, triplets.v.reshape(-1, *layer.input_shape)).flatten(1)
    return replace(triplets, v=v)
