"""What a `SpectralRegularizer` accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from convspectra.layers import Layer
from convspectra.objectives import OBJECTIVES
from convspectra.terms import EXACT_PENALTIES

LayerWeights: TypeAlias = Mapping[str, float] | Callable[[str, nn.Module], float]


def check_penalty(penalty: object, options: Mapping[str, Any] | None) -> None:
    """Raise a ValueError for an unknown penalty, or for options that it cannot have."""
    names = (*OBJECTIVES, *EXACT_PENALTIES)
    if isinstance(penalty, str):
        if penalty not in names:
            raise ValueError(
                f"expected penalty to be one of {names} or a function of a ConvOperator, got "
                f"{penalty!r}"
            )
    elif not callable(penalty):
        raise ValueError(
            f"expected penalty to be a name or a function, got {type(penalty).__name__}"
        )
    if options and penalty not in OBJECTIVES:
        raise ValueError(
            f"expected no penalty_options for {penalty!r}, got {dict(options)!r}; give a function, "
            "for example functools.partial of one in convspectra.penalties"
        )


def checked_factor(name: str, value: object) -> float:
    """The value, or a ValueError unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected {name} to be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"expected {name} to be finite and at least 0, got {value!r}")
    return float(value)


def layer_factors(layers: Sequence[Layer], given: LayerWeights | None) -> list[float]:
    """The factor of each layer, by name or by a function of it."""
    if given is None:
        return [1.0] * len(layers)
    if not isinstance(given, Mapping):
        found = [given(layer.name, layer.module) for layer in layers]
    else:
        unknown = sorted(set(given) - {layer.name for layer in layers})
        if unknown:
            raise ValueError(
                f"expected layer_weights of the layers {[layer.name for layer in layers]}, got "
                f"some for {unknown}"
            )
        found = [given.get(layer.name, 1.0) for layer in layers]
    return [
        checked_factor(f"the weight of layer {layer.name!r}", factor)
        for layer, factor in zip(layers, found, strict=True)
    ]
