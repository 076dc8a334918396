"""Which activation follows each layer, which layers feed it, and where branches meet.

Training needs to know it: the right gain of a layer is that of the activation behind it, and
mirrored kernels fit only where both sides of a ReLU agree. An audit follows gradients along it
(Note [Typical gradients]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from convspectra.models._gradient_paths import (
    MEAN_SQUARE_SLOPES,
    Activation,
    Origin,
    activated,
    added,
    is_centering,
    joined,
    leaky_slope,
    mean_square,
    normalized,
    product,
    slope_between,
    softmax_slope,
    with_statistics,
)
from convspectra.models._linear_calls import named_arguments, normalization_scale

if TYPE_CHECKING:
    from convspectra.models._recorder import Use

ACTIVATIONS = {
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "rrelu_with_noise": "leaky_relu",
    "_prelu_kernel": "prelu",
    "tanh": "tanh",
    "gelu": "gelu",
    "silu": "silu",
    "elu": "elu",
    "celu": "elu",
    "sigmoid": "sigmoid",
    "hardtanh": "hardtanh",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
    "softplus": "softplus",
    "mish": "mish",
    "_softmax": "softmax",
    "abs": "abs",
    "sin": "sin",
    "threshold": "relu",
    "clamp": "hardtanh",
    "clamp_min": "hardtanh",
    "erf": "erf",
}
"""Operations of PyTorch that act on every number alone, and what they are called here."""
NORMALIZATIONS = {
    "native_batch_norm": "batch normalization",
    "cudnn_batch_norm": "batch normalization",
    "_native_batch_norm_legit": "batch normalization",
    "_native_batch_norm_legit_no_training": "batch normalization",
    "native_group_norm": "group normalization",
    "native_layer_norm": "layer normalization",
    "_fused_rms_norm": "RMS normalization",
}
"""Normalizations as ATen calls them, and what they are called here."""
_CONCATENATIONS = ("cat", "stack")
"""Operations that put arrays beside each other."""
_POINTWISE = frozenset(
    """_to_copy _unsafe_view add alias clamp clone contiguous detach div erf exp expand mul neg
    permute pow reciprocal reshape rsqrt rsub sqrt square squeeze sub t transpose unsqueeze
    view""".split()  # noqa: SIM905
)
"""Operations that make each entry of the result from one entry of each array."""
_AVERAGES = ("mean", "sum", "var", "var_mean")
"""Operations that average over entries, up to a factor."""
_DEVIATIONS = ("std", "linalg_vector_norm", "norm")
"""Roots of averages of squares, in one operation."""
_ROOTS = ("sqrt", "rsqrt", "pow")
"""Operations that make a deviation from an average of squares, or its inverse."""


@dataclass(frozen=True)
class LayerFlow:
    """Surroundings of one layer in the network.

    Attributes
    ----------
    name : str
    activation : Activation, optional
        What acts on its output before the next layer; None for nothing, or for several that differ.
    normalized : bool
        Whether a normalization reads its output, or made its input.
    fed_by : tuple of str
        The layers whose outputs reach it with no other layer between.
    reads_input : bool
        Whether the input of the model reaches it so, too.
    feeds : tuple of str
        The layers that its output reaches with no other between.
    reads_concatenation : bool
        Whether its input is put together from several arrays.
    ends_branch : bool
        Whether its output is added to that of a shorter path: the end of a residual branch.
    uses : int
        Calls in one forward pass.
    """

    name: str
    activation: Activation | None
    normalized: bool
    fed_by: tuple[str, ...]
    reads_input: bool
    feeds: tuple[str, ...]
    reads_concatenation: bool
    ends_branch: bool
    uses: int


class SignalFlow:
    """Follows arrays from layer to layer during a forward pass; the recorder tells it of each."""

    def __init__(self) -> None:
        self._origins: Any = WeakTensorKeyDictionary()
        self.output_gains: dict[Use, float] = {}

    def start(self, inputs: Any) -> None:
        """Take the arrays of the example input as where everything begins."""
        for tensor in _tensors(inputs):
            self._origins[tensor] = Origin(external=True)

    def begin(self, use: Use, x: object) -> None:
        """Note what feeds a layer."""
        origin = self._origins.get(x) if isinstance(x, Tensor) else None
        if origin is not None:
            use.fed_by.update(origin.gains)
            use.reads_input = origin.external
            use.normalized = use.normalized or origin.normalized
            use.reads_concatenation = origin.concatenated

    def end(self, use: Use, output: object) -> None:
        """Let a layer's output begin with it."""
        if isinstance(output, Tensor):
            depth = 1 + max((u.depth for u in use.fed_by), default=0)
            use.depth = depth
            self._origins[output] = Origin({use: 1.0}, (use,), depth=depth)

    def returned(self, outputs: Any) -> None:
        """Note which layers reach the output of the model with no other between."""
        found = [o for t in _tensors(outputs) if (o := self._origins.get(t)) is not None]
        self.output_gains = added(found, [1.0] * len(found))

    def note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Pass an operation on from its arguments to its results."""
        tracked = [t for t in _tensors((args, kwargs)) if t in self._origins]
        if not tracked:
            return
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        found = [self._origins[t] for t in tracked]
        if name in ACTIVATIONS:
            origin = _activated(found, name, args, tracked[0])
        elif name in NORMALIZATIONS:
            origin = _normalized(joined(found, [1.0] * len(found)), func, args, kwargs)
        elif name in ("mul", "div") and len(found) == 2:
            origin = product(*found)
        else:
            origin = self._computed(name, args, kwargs, tracked, result)
        for tensor in _tensors(result):
            if tensor.is_floating_point() or tensor.is_complex():
                self._origins[tensor] = origin

    def _computed(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tracked: list[Tensor],
        result: Any,
    ) -> Origin:
        """The origin of what an operation gives that is no activation or normalization."""
        found = [self._origins[t] for t in tracked]
        if name == "sub" and is_centering(found):
            return replace(found[0], entry=object(), functions=())
        shares = [1.0] * len(found)
        if name in _CONCATENATIONS:  # each part of the gradient goes its own way
            whole = sum(t.numel() for t in _tensors((args, kwargs))) or 1
            shares = [t.numel() / whole for t in tracked]
        origin = joined(
            found,
            shares,
            concatenated=name in _CONCATENATIONS and len(found) > 1,
            pointwise=name in _POINTWISE,
        )
        origin = with_statistics(
            origin,
            averages=name in _AVERAGES,
            roots=name in _ROOTS,
            norms=name in _DEVIATIONS,
            pointwise=name in _POINTWISE,
        )
        if name in ("mul", "div") and len(found) == 1:
            return origin.times(_scaling(name, args, tracked[0]))
        if name == "sum":  # as many averages
            outputs = sum(t.numel() for t in _tensors(result))
            return origin.times((tracked[0].numel() / max(1, outputs)) ** 2)
        if name in ("add", "sub"):
            end_branches(found)
        return origin


def end_branches(origins: Sequence[Origin]) -> None:
    """Mark the layers whose output is added to that of a shorter path."""
    deepest = max(origins, key=lambda origin: origin.depth)
    if any(origin.depth < deepest.depth for origin in origins):
        for use in deepest.waiting:
            use.ends_branch = True


def _activated(found: Sequence[Origin], name: str, args: tuple[Any, ...], x: Tensor) -> Origin:
    origin = found[0] if len(found) == 1 else joined(found, [1.0] * len(found))
    kind = ACTIVATIONS[name]
    if kind == "hardtanh":
        ends: list[float | None] = [-1.0, 1.0] if name == "hardtanh" else [None, None]
        for i, given in enumerate(args[1:3]):
            ends[i] = given if isinstance(given, int | float) else None
        return clamped(origin, *ends)
    if kind == "softmax":
        axis = args[1] if len(args) > 1 and isinstance(args[1], int) else -1
        return activated(origin, Activation(kind), softmax_slope(x.shape[axis] if x.ndim else 1))
    if kind == "prelu":
        return activated(origin, Activation(kind), leaky_slope(args[1]))
    slope = float(args[1]) if name == "leaky_relu" and len(args) > 1 else 0.0
    squared = leaky_slope(slope) if kind == "leaky_relu" else MEAN_SQUARE_SLOPES[kind]
    return activated(origin, Activation(kind, slope), squared)


def clamped(origin: Origin, low: float | None, high: float | None) -> Origin:
    """The origin of an array kept between limits; `relu` and `relu6` are of this kind."""
    if low is None and high is None:
        return origin
    least = -math.inf if low is None else float(low)
    most = math.inf if high is None else float(high)
    if least > 0 and most == math.inf:  # a guard against a division by zero
        return origin
    name = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6"}.get((least, most), "hardtanh")
    return activated(origin, Activation(name), slope_between(least, most))


def _normalized(
    origin: Origin, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Origin:
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    arguments = named_arguments(func, args, kwargs)
    scale = normalization_scale(f"aten::{name}", arguments)
    kind, weight = NORMALIZATIONS[name], arguments.get("weight")
    if scale is None and kind == "batch normalization":
        # Instances become the channels of one image, which has no stored statistics.
        kind = "instance normalization"
    factors = weight if scale is None else scale
    square = 1.0 if factors is None else mean_square(factors)
    return normalized(origin, kind, square, by_statistics=scale is None)


def _scaling(name: str, args: tuple[Any, ...], x: Tensor) -> float:
    """Mean square of the factors that an array is multiplied by, or divided by."""
    factors = next((a for a in args[:2] if a is not x), 1.0)
    if isinstance(factors, Tensor) and not factors.is_floating_point():
        return 1.0
    if not isinstance(factors, Tensor | int | float):
        return 1.0
    square = mean_square(factors)
    if name == "mul":
        return square
    return 1.0 / square if square > 0 else 1.0


def layer_flows(uses: list[Use]) -> dict[str, LayerFlow]:
    """The flow around every layer of a recorded pass, by its name."""
    by_name: dict[str, list[Use]] = {}
    feeds: dict[str, dict[str, None]] = {}
    for use in uses:
        by_name.setdefault(use.name, []).append(use)
        for source in use.fed_by:
            feeds.setdefault(source.name, {})[use.name] = None
    flows = {}
    for name, own in by_name.items():
        activations = list(dict.fromkeys(a for use in own for a in use.activations))
        flows[name] = LayerFlow(
            name,
            activations[0] if len(activations) == 1 else None,
            any(use.normalized for use in own),
            tuple(dict.fromkeys(source.name for use in own for source in use.fed_by)),
            any(use.reads_input for use in own),
            tuple(feeds.get(name, ())),
            any(use.reads_concatenation for use in own),
            any(use.ends_branch for use in own),
            len(own),
        )
    return flows


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
