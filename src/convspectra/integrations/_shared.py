"""Checks of the integrations' arguments, and a report of the regularizer as numbers."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from convspectra.training import SpectralRegularizer


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a TypeError, now and not when training starts, for keywords nobody knows."""
    inspect.signature(SpectralRegularizer).bind(None, None, **options)


def missing(package: str, extra: str) -> ImportError:
    """The error to raise where an optional package is missing."""
    return ImportError(
        f"expected the package {package!r}, which is not installed: "
        f"pip install 'convspectra[{extra}]'",
        name=package,
    )


def check_period(name: str, steps: int | None) -> None:
    """Refuse what is not a number of steps, or None."""
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected {name} to be an integer of at least 1 or None, got {steps!r}")


def scalars(report: Any, per_layer: bool = False, prefix: str = "spectral/") -> dict[str, float]:
    """A report as named numbers, for a logger.

    Parameters
    ----------
    report : RegularizerReport
    per_layer : bool
        Whether to add ``spectral/<layer>/<quantity>`` for every layer; a layer used at several
        input sizes appears as ``<layer>[8x8]`` for each.
    prefix : str
        Before every name.

    Returns
    -------
    dict of str to float
        The aggregates first. Unknown values and NaN are left out; infinities stay.
    """
    values = {f"{prefix}{key}": float(value) for key, value in report.aggregates().items()}
    if not per_layer:
        return values
    records = report.records()
    uses = Counter(record["name"] for record in records)
    for record in records:
        name = record["name"]
        if uses[name] > 1:
            name += f"[{'x'.join(map(str, record['input_size']))}]"
        for key, value in record.items():
            if isinstance(value, (int, float)) and not math.isnan(value):
                values[f"{prefix}{name}/{key}"] = float(value)
    return values
