"""The ways to what is asked of one block: one object a method, one file each.

`WAYS` is the registry. Each entry says what it needs, whether it fits a block, what it costs, and
runs; `convspectra.spectra._auto` chooses.
"""

from convspectra.spectra.ways._augmented import Augmented
from convspectra.spectra.ways._capacitance import Capacitance
from convspectra.spectra.ways._circulant import Circulant
from convspectra.spectra.ways._davidson import Davidson
from convspectra.spectra.ways._dense import Dense
from convspectra.spectra.ways._gram import Gram
from convspectra.spectra.ways._lanczos import (
    WELL_CONDITIONED,
    Lanczos,
    glimpsed_ends,
    glimpsed_least,
)
from convspectra.spectra.ways._lobpcg import Lobpcg
from convspectra.spectra.ways._preconditioned import circulant_fits, circulant_helps
from convspectra.spectra.ways._qr import Qr
from convspectra.spectra.ways._triangular import Triangular
from convspectra.spectra.ways._way import (
    QUESTIONS,
    Cost,
    Question,
    Way,
    dense_work,
    group_shape,
    product_flops,
)

DENSE = Dense()
"""The dense matrix: every question."""
GRAM = Gram()
"""The smaller Gram matrix."""
QR = Qr()
"""The triangle of a QR factorization, banded in the lines of an axis."""
CIRCULANT = Circulant()
"""The symbols of a circularly padded layer."""
TRIANGULAR = Triangular()
"""The diagonal block of a causal or masked layer, and substitution."""
CAPACITANCE = Capacitance()
"""The exact inverse of a square zero-padded layer."""
AUGMENTED = Augmented()
"""The pseudo-inverse of another zero-padded layer."""
LANCZOS = Lanczos()
"""Products with M, and nothing else."""
DAVIDSON = Davidson()
"""Products, preconditioned by the circulant."""
LOBPCG = Lobpcg()
"""The same for the smallest values, down to rounding."""

WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        DENSE,
        GRAM,
        QR,
        CIRCULANT,
        TRIANGULAR,
        CAPACITANCE,
        AUGMENTED,
        LANCZOS,
        DAVIDSON,
        LOBPCG,
    )
}
"""Every way by its name, direct ones first."""

__all__ = [
    "AUGMENTED",
    "CAPACITANCE",
    "CIRCULANT",
    "DAVIDSON",
    "DENSE",
    "GRAM",
    "LANCZOS",
    "LOBPCG",
    "QR",
    "QUESTIONS",
    "TRIANGULAR",
    "WAYS",
    "WELL_CONDITIONED",
    "Cost",
    "Question",
    "Way",
    "circulant_fits",
    "circulant_helps",
    "dense_work",
    "glimpsed_ends",
    "glimpsed_least",
    "group_shape",
    "product_flops",
]
