from . import matlab, penalties
from .auditing import audit
from .bounds import norm_bound
from .convolution import kernel_to_weight, weight_to_kernel
from .density import SpectralDensity, spectral_density
from .descent import DescentResult, descend
from .inverse import logabsdet, solve
from .operator import ConvOperator
from .preconditioning import PreconditionedLayer, precondition
from .regularizer import SpectralRegularizer
from .regularizer_report import LayerReport, RegularizerReport
from .report.audit_report import AuditReport
from .schedule import Schedule
from .spectra import (
    ConvergenceError,
    SVDResult,
    cond,
    frobenius_norm,
    sigma_max,
    sigma_min,
    svds,
    svdvals,
)

__version__: str

__all__ = [
    "AuditReport",
    "ConvOperator",
    "ConvergenceError",
    "DescentResult",
    "LayerReport",
    "PreconditionedLayer",
    "RegularizerReport",
    "SVDResult",
    "Schedule",
    "SpectralDensity",
    "SpectralRegularizer",
    "audit",
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
    "spectral_density",
    "svds",
    "svdvals",
    "weight_to_kernel",
]
