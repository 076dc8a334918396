"""The audit of one layer, of which a test names only what it is about."""

from __future__ import annotations

import math
from dataclasses import replace

from convspectra.auditing._record import Certified, Conditioning, LayerAudit


def conditioning(
    sigma_max: float = 2.0, sigma_min: float = 0.5, growth: float | None = 0.0, **changes: object
) -> Conditioning:
    def certified(value: float) -> Certified:
        return Certified(value, value * 0.99, value * 1.01, "dense", "", True)

    condition = sigma_max / sigma_min if sigma_min else math.inf
    numbers = Conditioning(
        3.0, certified(sigma_max), certified(sigma_min), condition, condition, condition,
        100, 1e-14 * sigma_max, growth, 0.0, "dense",
    )  # fmt: skip
    return replace(numbers, **changes)  # type: ignore[arg-type]


def layer(name: str = "conv", applied: Conditioning | None = None, **fields: object) -> LayerAudit:
    return LayerAudit(name, "Conv2d", shape=(100, 100), applied=applied, seconds=1.5, **fields)  # type: ignore[arg-type]
