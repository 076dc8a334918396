"""The numerical linear algebra of convolutional layers."""

from importlib.metadata import version

from convspectra import matlab, penalties
from convspectra.bounds import norm_bound
from convspectra.convolution import kernel_to_weight, weight_to_kernel
from convspectra.descent import DescentResult, descend
from convspectra.inverse import logabsdet, solve
from convspectra.operator import ConvOperator
from convspectra.precondition import PreconditionedLayer, precondition
from convspectra.regularizer import SpectralRegularizer
from convspectra.regularizer_report import LayerReport, RegularizerReport
from convspectra.schedule import Schedule
from convspectra.spectra import (
    ConvergenceError,
    SVDResult,
    cond,
    frobenius_norm,
    sigma_max,
    sigma_min,
    svds,
    svdvals,
)

__version__ = version("convspectra")

__all__ = [
    "ConvOperator",
    "ConvergenceError",
    "DescentResult",
    "LayerReport",
    "PreconditionedLayer",
    "RegularizerReport",
    "SVDResult",
    "Schedule",
    "SpectralRegularizer",
    "cond",
    "descend",
    "frobenius_norm",
    "kernel_to_weight",
    "logabsdet",
    "matlab",
    "norm_bound",
    "penalties",
    "precondition",
    "sigma_max",
    "sigma_min",
    "solve",
    "svds",
    "svdvals",
    "weight_to_kernel",
]
