"""All the numbers of one layer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from convspectra.auditing._record import (
    Certified,
    Circular,
    Conditioning,
    Feed,
    LayerAudit,
    Spectrum,
)
from convspectra.models import NamedOperator
from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    scaled_outputs,
)
from convspectra.spectra import (
    SVDResult,
    circular_extremes,
    circular_operator,
    frobenius_norm,
    is_circular,
    mean_log_singular_value,
    numerical_rank,
    spectral_density,
    svds,
)

TOLERANCE = 1e-6
"""Relative, of sigma_max and sigma_min; a largest value may be within ten of these of the next, and
then is told from it no better. The enclosures hold in any case.
"""
_FAILURES = (ValueError, ArithmeticError, RuntimeError)
"""Errors of one layer that become its reason for being skipped; others are faults of the
program."""


@dataclass(frozen=True)
class AuditOptions:
    """The choice of numbers that are computed of each layer.

    Attributes
    ----------
    spectrum : bool
        The whole distribution of singular values too.
    fold : bool
        The layer with the batch normalization that follows it too.
    max_bytes : int
        Limit on any matrix that is formed.
    """

    spectrum: bool = False
    fold: bool = True
    max_bytes: int = DEFAULT_MAX_BYTES


def audit_layer(
    layer: NamedOperator, device: str | torch.device | None, options: AuditOptions
) -> LayerAudit:
    """The numbers of one layer, computed on a device or where its weight is.

    One that cannot be computed is skipped with the reason.
    """
    start = time.perf_counter()
    found = described(layer)
    op = layer.operator
    if op is not None and device is not None:
        op = op.with_weight(op.weight.to(device))
    if op is not None:
        try:
            found = _computed(found, op, layer, options)
        except _FAILURES as error:
            found = replace(found, skipped=_reason(error))
    return replace(found, seconds=time.perf_counter() - start)


def described(layer: NamedOperator) -> LayerAudit:
    """The facts of a layer that are known before anything is computed."""
    blank = LayerAudit(
        layer.name,
        layer.type,
        skipped=layer.skipped,
        notes=layer.notes,
        uses=layer.uses,
        place=layer.place,
        feeds=tuple(Feed(feed.place, feed.gain) for feed in layer.feeds),
        followed_by=layer.followed_by,
    )
    op = layer.operator
    if op is None:
        return blank
    g = op.geometry
    return replace(
        blank,
        kernel=g.kernel_size,
        stride=g.stride,
        dilation=g.dilation,
        padding=g.padding,
        padding_mode=g.padding_mode,
        groups=op.groups,
        transposed=op.transposed,
        input_shape=op.input_shape,
        output_shape=op.output_shape,
        shape=op.shape,
        dtype=str(op.dtype).removeprefix("torch."),
        batch_norm=layer.batch_norm,
    )


def cost(layer: NamedOperator) -> float:
    """Flops, very roughly: to hand out layers and to tell the time left."""
    op = layer.operator
    if op is None:
        return 0.0
    g = op.geometry
    products = 100.0 * op.weight.numel() * math.prod(g.output_size)
    across = math.prod(g.input_size) / max(g.input_size, default=1)
    border = op.groups * (op.weight.shape[1] * across) ** 3
    points = math.prod(g.output_size) * (2 if math.prod(g.kernel_size) > 1 else 0)
    symbols = points * op.weight.shape[0] * op.weight.shape[1] * min(op.weight.shape[:2])
    return (products + symbols + (border if g.ndim else 0.0)) * (1 + (layer.scale is not None))


def _computed(
    found: LayerAudit, op: ConvOperator, layer: NamedOperator, options: AuditOptions
) -> LayerAudit:
    op = op.with_weight(op.weight.detach().double())
    applied = conditioning(op, options)
    torus = circular_operator(op)
    found = replace(
        found, applied=applied, circular=_with_circular_padding(op, torus, applied, options)
    )
    if options.fold and layer.scale is not None:
        try:
            scale = layer.scale.to(op.weight)
            folded = op.with_weight(scaled_outputs(op.weight, scale, op.groups, op.transposed))
            found = replace(found, folded=conditioning(folded, options))
        except _FAILURES as error:
            found = _noted(found, "with its batch normalization", error)
    if options.spectrum:
        try:
            found = replace(found, spectrum=_spectrum(op, torus, options))
        except _FAILURES as error:
            found = _noted(found, "its spectrum", error)
    return found


def _noted(found: LayerAudit, what: str, error: Exception) -> LayerAudit:
    note = f"{what}: not computed, {_reason(error)}"
    return replace(found, notes=(*found.notes, note))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


def conditioning(op: ConvOperator, options: AuditOptions) -> Conditioning:
    """The numbers of one matrix."""
    largest, smallest = (
        svds(
            op,
            1,
            which,
            return_singular_vectors=False,
            tol=TOLERANCE,
            max_bytes=options.max_bytes,
        )
        for which in ("LM", "SM")
    )
    sigma_max, sigma_min = _certified(largest), _certified(smallest)
    tolerance = max(op.shape) * torch.finfo(torch.float64).eps * sigma_max.value
    singular = sigma_min.value <= tolerance
    growth, error, method = _log_growth(op, (smallest, largest), singular, options)
    return Conditioning(
        frobenius_norm=frobenius_norm(op),
        sigma_max=sigma_max,
        sigma_min=sigma_min,
        condition=_ratio(sigma_max.value, 0.0 if singular else sigma_min.value),
        condition_lower=_ratio(sigma_max.lower, sigma_min.upper),
        condition_upper=_ratio(sigma_max.upper, sigma_min.lower),
        rank=numerical_rank(op, tolerance, smallest, max_bytes=options.max_bytes),
        rank_tolerance=tolerance,
        log_growth=growth,
        log_growth_error=error,
        log_growth_method=method,
    )


def _certified(result: SVDResult) -> Certified:
    return Certified(
        value=float(result.s[0]),
        lower=float(result.lower[0]),
        upper=float(result.upper[0]),
        method=result.method,
        certificate=result.certificate,
        converged=result.converged,
    )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0.0:
        return math.nan if numerator == 0.0 else math.inf
    return numerator / denominator


def _log_growth(
    op: ConvOperator, results: tuple[SVDResult, ...], singular: bool, options: AuditOptions
) -> tuple[float | None, float, str]:
    """The mean of log s, its error, and how it was computed."""
    count = min(op.shape)
    if singular:
        return -math.inf, 0.0, "sigma_min is 0 to working precision"
    for result in results:
        if result.logabsdet is not None:
            return result.logabsdet / count, 0.0, result.method
    if not all(result.converged for result in results):
        return None, 0.0, "sigma_min did not converge"
    # Of a well-conditioned layer svds needs no factorization, and so gives none along.
    return mean_log_singular_value(op, max_bytes=options.max_bytes)


def _with_circular_padding(
    op: ConvOperator, torus: ConvOperator | str, applied: Conditioning, options: AuditOptions
) -> Circular:
    if isinstance(torus, str):
        return Circular(None, None, None, torus)
    if is_circular(op) and applied.log_growth is not None and applied.log_growth_error == 0.0:
        return Circular(applied.sigma_max.value, applied.sigma_min.value, applied.log_growth, "")
    try:
        return Circular(*circular_extremes(op, max_bytes=options.max_bytes), "")
    except ValueError as error:  # too large
        return Circular(None, None, None, str(error))


def _spectrum(op: ConvOperator, torus: ConvOperator | str, options: AuditOptions) -> Spectrum:
    density = spectral_density(op, max_bytes=options.max_bytes)
    circular: tuple[float, ...] = ()
    if not isinstance(torus, str):
        circular = spectral_density(op, edges=density.edges, method="circular").fractions
    quadrature = f"stochastic Lanczos quadrature, probes {density.probes}"
    return Spectrum(
        edges=density.edges,
        fractions=density.fractions,
        errors=density.errors,
        circular=circular,
        method=density.method.replace("quadrature", quadrature),
    )
