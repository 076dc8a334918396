"""Algorithms for eigenvalues and singular values that know no convolution, one a file."""

from convspectra.solvers._banded import BandedTriangle
from convspectra.solvers._batched_lu import (
    differentiable_once,
    inverse_and_logabsdet,
    log_diagonal,
    logabsdet,
    lu_factor,
)
from convspectra.solvers._davidson import davidson
from convspectra.solvers._deflation import ExtremeEigenpairs, extreme_eigenpairs
from convspectra.solvers._dense import dense_svd, gram_eigh
from convspectra.solvers._gaussian import BOUND_VECTORS, FAILURE_PROBABILITY, gaussian, norm_bound
from convspectra.solvers._lanczos import Metric, lanczos, ritz_ends
from convspectra.solvers._leading import leading_eigenpairs
from convspectra.solvers._lobpcg import lobpcg
from convspectra.solvers._orthonormal import less
from convspectra.solvers._quadrature import (
    GaussRule,
    Tridiagonals,
    bin_fractions,
    gauss_rules,
    mean_log,
    random_directions,
    tridiagonals,
)
from convspectra.solvers._result import (
    NO_BOUND_BELOW,
    Eigenpairs,
    LinearMap,
    SingularTriplets,
    joined_triplets,
)
from convspectra.solvers._stop import DeflationStop, LanczosStop, Stop
from convspectra.solvers._tracking import Ends, improved, towards_norm, working_dtype
from convspectra.solvers._warm_lanczos import warm_lanczos

__all__ = [
    "BOUND_VECTORS",
    "FAILURE_PROBABILITY",
    "NO_BOUND_BELOW",
    "BandedTriangle",
    "DeflationStop",
    "Eigenpairs",
    "Ends",
    "ExtremeEigenpairs",
    "GaussRule",
    "LanczosStop",
    "LinearMap",
    "Metric",
    "SingularTriplets",
    "Stop",
    "Tridiagonals",
    "bin_fractions",
    "davidson",
    "dense_svd",
    "differentiable_once",
    "extreme_eigenpairs",
    "gauss_rules",
    "gaussian",
    "gram_eigh",
    "improved",
    "inverse_and_logabsdet",
    "joined_triplets",
    "lanczos",
    "leading_eigenpairs",
    "less",
    "lobpcg",
    "log_diagonal",
    "logabsdet",
    "lu_factor",
    "mean_log",
    "norm_bound",
    "random_directions",
    "ritz_ends",
    "towards_norm",
    "tridiagonals",
    "warm_lanczos",
    "working_dtype",
]
