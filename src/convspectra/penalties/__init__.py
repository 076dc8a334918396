"""Penalties on the weight of a convolution, as 0-dim float64 tensors with gradient.

Each takes a `ConvOperator` and is exact at every call; `SpectralRegularizer` tracks those of single
singular values instead. The first three are the paper's; those on the
reshaped weight are others', to compare with.
"""

from convspectra.penalties._extremes import band, cond, conditioning, sigma_max, sigma_min
from convspectra.penalties._isometry import isometry
from convspectra.penalties._reshaped import reshaped_norm, soft_orthogonality, srip
from convspectra.penalties._spectrum import circular_stein, frobenius, orthogonality, stein

__all__ = [
    "band",
    "circular_stein",
    "cond",
    "conditioning",
    "frobenius",
    "isometry",
    "orthogonality",
    "reshaped_norm",
    "sigma_max",
    "sigma_min",
    "soft_orthogonality",
    "srip",
    "stein",
]
