"""A made-up audit for the tests of the reports: every case that a page must show."""

from __future__ import annotations

import dataclasses
import math

from convspectra.auditing._record import (
    Certified,
    Circular,
    Circumstances,
    Conditioning,
    Finding,
    LayerAudit,
    Spectrum,
)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onclick='alert(3)",
    "javascript:alert(4)",
    "</style></title></svg>{{ 7919 * 7907 }}",
)
CIRCUMSTANCES = Circumstances(
    model="PlainNet",
    input_shape="1x3x64x64",
    created="2026-01-02T03:04:05Z",
    machine="16 cores, Linux",
    versions="convspectra 0.1.0, torch 2.13.0",
    command="convspectra audit plain.pt --input 1x3x64x64",
    complete=True,
)
NETWORK = (
    ("product of all sigma_max", "1.2e+14"),
    ("typical gain of a gradient along the layers alone", "leaves 0.1 to 10 after stage2.conv1"),
    ("time", "12.3 s"),
)


def certified(value: float, radius: float = 1e-10, **changes: object) -> Certified:
    """A number with a relative enclosure."""
    lower, upper = value * (1 - radius), value * (1 + radius)
    number = Certified(value, lower, upper, "Lanczos, 41 steps", "residual and inertia", True)
    return dataclasses.replace(number, **changes)


def conditioning(largest: Certified, smallest: Certified, **changes: object) -> Conditioning:
    """The numbers of a matrix of rank 4096 with these extreme singular values."""
    tolerance = 4096 * 2.2e-16 * largest.value
    numbers = Conditioning(
        frobenius_norm=30.0 * largest.value,
        sigma_max=largest,
        sigma_min=smallest,
        condition=largest.value / smallest.value if smallest.value else math.inf,
        condition_lower=largest.lower / smallest.upper if smallest.upper else math.inf,
        condition_upper=largest.upper / smallest.lower if smallest.lower else math.inf,
        rank=4096,
        rank_tolerance=tolerance,
        log_growth=-0.4321,
        log_growth_error=0.0,
        log_growth_method="exact, from the determinant",
    )
    return dataclasses.replace(numbers, **changes)


def spectrum(low: float = 2e-3, high: float = 2.0, bins: int = 40, error: float = 0.0) -> Spectrum:
    """A bump on a logarithmic scale, and another one with circular padding."""
    step = math.log(high / low) / bins
    edges = tuple(low * math.exp(i * step) for i in range(bins + 1))
    bump = [math.exp(-(((i - 0.72 * bins) / (0.17 * bins)) ** 2)) + 0.02 for i in range(bins)]
    other = [math.exp(-(((i - 0.75 * bins) / (0.13 * bins)) ** 2)) for i in range(bins)]
    return Spectrum(
        edges,
        tuple(b / sum(bump) for b in bump),
        (error,) * bins,
        tuple(b / sum(other) for b in other),
        "exact" if not error else "stochastic Lanczos quadrature, 30 probes of 60 steps",
    )


def layer(name: str, **changes: object) -> LayerAudit:
    """An ordinary layer."""
    ordinary = LayerAudit(
        name=name,
        type="Conv2d",
        kernel=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        padding=((1, 1), (1, 1)),
        input_shape=(16, 16, 16),
        output_shape=(16, 16, 16),
        shape=(4096, 4096),
        dtype="float32",
        applied=conditioning(certified(1.8), certified(0.0213)),
        circular=Circular(1.83, 0.31, -0.2, ""),
        spectrum=spectrum(),
        seconds=0.42,
    )
    return dataclasses.replace(ordinary, **changes)


def small_audit() -> list[LayerAudit]:
    """One layer of every kind that a reader may meet."""
    zero = Certified(0.0, 0.0, 0.0, "structure", "more rows than the rank allows", True)
    open_below = certified(3.2e-9, lower=0.0, upper=4e-9, certificate="residual only")
    stopped = certified(12.5, lower=12.1, upper=math.inf, converged=False)
    tail = Spectrum(
        (0.0, 1e-6, 1e-3, 0.1, 2.0), (0.1, 0.2, 0.3, 0.4), (0.01,) * 4, (), "quadrature"
    )
    return [
        layer(
            "stem.conv", batch_norm="stem.bn", folded=conditioning(certified(2.4), certified(0.03))
        ),
        layer(
            "stage1.down",
            stride=(2, 2),
            padding=((0, 1), (1, 1)),
            output_shape=(16, 8, 8),
            shape=(1024, 4096),
            applied=conditioning(certified(2.0), zero, rank=1000, log_growth=-math.inf),
        ),
        layer(
            "stage1.conv",
            applied=conditioning(certified(2.0), open_below, rank=None, log_growth_error=0.012),
            spectrum=spectrum(1e-7, 2.0, error=0.002),
            notes=("the weight is shared with stage2.conv",),
        ),
        layer(
            "stage2.conv",
            groups=4,
            dilation=(2, 2),
            padding_mode="reflect",
            applied=conditioning(
                stopped, certified(0.5), log_growth=None, log_growth_method="too large"
            ),
            circular=Circular(None, None, None, "no circular counterpart of reflect padding"),
            spectrum=tail,
        ),
        layer("up", type="ConvTranspose2d", transposed=True, circular=None, spectrum=None),
        LayerAudit("head.pool", "LPPool2d", skipped="not a convolution"),
    ]


FINDINGS = (
    Finding("exploding", "some gradients grow 12.5 times, in 1 layer", ("stage2.conv",), "", True),
    Finding("singular", "24 directions lost, in 1 layer", ("stage1.down",), "precondition", True),
    Finding("ill-conditioned", "condition 6.25e+08, in 1 layer", ("stage1.conv",), "", True),
    Finding("uncertain", "sigma_max did not converge, in 1 layer", ("stage2.conv",), "", True),
    Finding("skipped", "not a convolution, in 1 layer", ("head.pool",), "", False),
)


def hostile_audit() -> tuple[list[LayerAudit], list[Finding]]:
    """Layers whose every text tries to break out of the page."""
    layers = [
        layer(
            name, type=name, padding_mode=name, dtype=name, batch_norm=name, notes=(name,),
            folded=conditioning(certified(2.0, method=name, certificate=name), certified(1.0)),
            circular=Circular(None, None, None, name),
            spectrum=dataclasses.replace(spectrum(), method=name),
        )
        for name in HOSTILE
    ]  # fmt: skip
    skipped = [LayerAudit(name, name, skipped=name) for name in HOSTILE]
    return [*layers, *skipped], [Finding(name, name, (name,), name, True) for name in HOSTILE]
