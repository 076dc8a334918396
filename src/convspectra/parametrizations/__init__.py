"""Parametrizations of layers: bounds that hold while weights are trained."""

from convspectra.parametrizations._spectral_norm import (
    NormCertificate,
    SpectralNorm,
    spectral_norm,
)

__all__ = ["NormCertificate", "SpectralNorm", "spectral_norm"]
