"""M inside a block circulant: symbols, bounds, preconditioners, the cut-open inverse."""

from convspectra.torus._augmented import AugmentedFactorization, augmented_bytes, augmented_flops
from convspectra.torus._capacitance import REFINEMENT_THRESHOLD, CapacitanceFactorization
from convspectra.torus._circulant_gram import CirculantGram, gram_cost
from convspectra.torus._circulant_norm import circulant_norm_bound
from convspectra.torus._cut import border_cost
from convspectra.torus._embedding import CirculantEmbedding
from convspectra.torus._inertia import Inertia, InertiaTorus, inertia_cost
from convspectra.torus._symbols import (
    angles,
    half_count,
    half_frequencies,
    half_multiplicity,
    row_grams_at,
    symbol_shape,
    symbols,
    symbols_at,
)

__all__ = [
    "REFINEMENT_THRESHOLD",
    "AugmentedFactorization",
    "CapacitanceFactorization",
    "CirculantEmbedding",
    "CirculantGram",
    "Inertia",
    "InertiaTorus",
    "angles",
    "augmented_bytes",
    "augmented_flops",
    "border_cost",
    "circulant_norm_bound",
    "gram_cost",
    "half_count",
    "half_frequencies",
    "half_multiplicity",
    "inertia_cost",
    "row_grams_at",
    "symbol_shape",
    "symbols",
    "symbols_at",
]
