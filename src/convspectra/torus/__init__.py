"""M inside a block circulant: symbols, bounds, preconditioners, the cut-open inverse."""

from convspectra.torus._augmented import AugmentedFactorization, augmented_bytes, augmented_flops
from convspectra.torus._block_diagonal import (
    Part,
    half_frequencies,
    parts,
    symbol_shape,
    symbols_at,
)
from convspectra.torus._capacitance import (
    REFINEMENT_THRESHOLD,
    CapacitanceFactorization,
    border_bytes,
    factor_flops,
)
from convspectra.torus._circulant_gram import CirculantGram, gram_cost
from convspectra.torus._circulant_norm import circulant_norm_bound
from convspectra.torus._embedding import CirculantEmbedding
from convspectra.torus._symbols import angles, half_count, half_multiplicity, symbols

__all__ = [
    "REFINEMENT_THRESHOLD",
    "AugmentedFactorization",
    "CapacitanceFactorization",
    "CirculantEmbedding",
    "CirculantGram",
    "Part",
    "angles",
    "augmented_bytes",
    "augmented_flops",
    "border_bytes",
    "circulant_norm_bound",
    "factor_flops",
    "gram_cost",
    "half_count",
    "half_frequencies",
    "half_multiplicity",
    "parts",
    "symbol_shape",
    "symbols",
    "symbols_at",
]
