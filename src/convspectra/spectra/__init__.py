"""The answers for one operator: singular values, bounds, counts, solutions, densities."""

from convspectra.spectra._auto import direct_cost
from convspectra.spectra._bounds import norm_bound, tap_norm_bound
from convspectra.spectra._circular_padding import circular_extremes, circular_operator, is_circular
from convspectra.spectra._count import CountResult, count
from convspectra.spectra._density import SpectralDensity, spectral_density
from convspectra.spectra._explain import Explanation, explain
from convspectra.spectra._inverse import SolveBound, logabsdet, solve
from convspectra.spectra._rank import mean_log_singular_value, numerical_rank
from convspectra.spectra._singular_values import (
    ConvergenceError,
    SVDResult,
    check_count,
    cond,
    frobenius_norm,
    sigma_max,
    sigma_min,
    svds,
    svdvals,
)
from convspectra.spectra._stable_rank import StableRank, stable_rank
from convspectra.spectra.ways import glimpsed_ends

__all__ = [
    "ConvergenceError",
    "CountResult",
    "Explanation",
    "SVDResult",
    "SolveBound",
    "SpectralDensity",
    "StableRank",
    "check_count",
    "circular_extremes",
    "circular_operator",
    "cond",
    "count",
    "direct_cost",
    "explain",
    "frobenius_norm",
    "glimpsed_ends",
    "is_circular",
    "logabsdet",
    "mean_log_singular_value",
    "norm_bound",
    "numerical_rank",
    "sigma_max",
    "sigma_min",
    "solve",
    "spectral_density",
    "stable_rank",
    "svds",
    "svdvals",
    "tap_norm_bound",
]
