from . import matlab, penalties
from .auditing import AuditReport, audit
from .operator import ConvOperator, kernel_to_weight, weight_to_kernel
from .spectra import (
    ConvergenceError,
    SpectralDensity,
    SVDResult,
    cond,
    frobenius_norm,
    logabsdet,
    norm_bound,
    sigma_max,
    sigma_min,
    solve,
    spectral_density,
    svds,
    svdvals,
)
from .training import (
    DescentResult,
    LayerReport,
    PreconditionedLayer,
    RegularizerReport,
    Schedule,
    SpectralRegularizer,
    descend,
    precondition,
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
