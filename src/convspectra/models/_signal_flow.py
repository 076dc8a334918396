"""Which activation follows each layer, which layers feed it, and where branches meet.

Training needs to know it: the right gain of a layer is that of the activation behind it, and
mirrored kernels fit only where both sides of a ReLU agree. An audit follows gradients along it.

Note [Typical gradients]. Between the output of one layer and the input of another stand maps A, of
which only a typical gain is known: E ||A'g||^2 / ||g||^2 for gradients g with independent entries.
It is ||A||_F^2 / rows for a fixed map, such as a batch normalization, and the mean square slope at
a standard normal input for an activation. An average of k numbers is counted as 1: it divides the
norm of a gradient by sqrt(k), and weights before it add up k equal gradients. Where paths meet in a
sum, their squares add up: their gradients are taken as uncorrelated. A normalization by statistics
of its input divides by the root mean square that the layers right before it give to inputs of size
1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from convspectra.models._linear_calls import named_arguments, normalization_scale
from convspectra.operator import squared_frobenius_norm

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
    "clamp_min": "relu",
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
MEAN_SQUARE_SLOPES = {
    "relu": 0.5,
    "tanh": 0.4644,
    "gelu": 0.45585,
    "silu": 0.37948,
    "elu": 0.6681,
    "sigmoid": 0.04484,
    "hardtanh": 0.68269,
    "hardswish": 0.35853,
    "hardsigmoid": 0.0277,
    "softplus": 0.29338,
    "mish": 0.47908,
    "sin": 0.56767,
    "abs": 1.0,
}
"""Mean of the squared slope of an activation over a standard normal input, by quadrature; a test
does it again."""

_CONCATENATIONS = ("cat", "stack")
"""Operations that put arrays beside each other."""


@dataclass(frozen=True)
class Activation:
    """An activation by name, with the slope of a leaky ReLU."""

    name: str
    slope: float = 0.0


@dataclass(frozen=True)
class _Origin:
    """Where an array comes from: the last layers before it; `waiting` are not activated yet.

    `gains` has the mean square of the gradient at the output of each of these layers for one of
    mean square 1 at the array (Note [Typical gradients]).
    """

    gains: Mapping[Use, float] = field(default_factory=dict)
    waiting: tuple[Use, ...] = ()
    external: bool = False
    depth: int = 0
    normalized: bool = False
    concatenated: bool = False


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
            self._origins[tensor] = _Origin(external=True)

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
            self._origins[output] = _Origin({use: 1.0}, (use,), depth=depth)

    def returned(self, outputs: Any) -> None:
        """Note which layers reach the output of the model with no other between."""
        found = [o for t in _tensors(outputs) if (o := self._origins.get(t)) is not None]
        self.output_gains = _added(found, [1.0] * len(found))

    def note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Pass an operation on from its arguments to its results."""
        tracked = [t for t in _tensors((args, kwargs)) if t in self._origins]
        found = [self._origins[t] for t in tracked]
        if not found:
            return
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        shares = [1.0] * len(found)
        if name in _CONCATENATIONS:  # each part of the gradient goes its own way
            whole = sum(t.numel() for t in _tensors((args, kwargs))) or 1
            shares = [t.numel() / whole for t in tracked]
        joined = _Origin(
            _added(found, shares),
            tuple(dict.fromkeys(use for origin in found for use in origin.waiting)),
            any(origin.external for origin in found),
            max(origin.depth for origin in found),
            any(origin.normalized for origin in found),
            any(o.concatenated for o in found) or (name in _CONCATENATIONS and len(found) > 1),
        )
        squared_gain = 1.0
        if name in ACTIVATIONS:
            joined, squared_gain = _activated(joined, name, args, tracked[0])
        elif name in NORMALIZATIONS:
            arguments = named_arguments(func, args, kwargs)
            joined, squared_gain = _normalized(joined, name, arguments)
        elif name in ("mul", "div") and len(tracked) == 1:
            squared_gain = _scaling(name, args, tracked[0])
        elif name == "sum":  # as many averages
            outputs = sum(t.numel() for t in _tensors(result))
            squared_gain = (tracked[0].numel() / max(1, outputs)) ** 2
        elif name in ("add", "sub") and len(found) > 1:
            deepest = max(found, key=lambda origin: origin.depth)
            if any(origin.depth < deepest.depth for origin in found):
                for use in deepest.waiting:
                    use.ends_branch = True
        if squared_gain != 1.0:
            gains = {use: gain * squared_gain for use, gain in joined.gains.items()}
            joined = replace(joined, gains=gains)
        for tensor in _tensors(result):
            self._origins[tensor] = joined


def _added(origins: Sequence[_Origin], shares: Sequence[float]) -> dict[Use, float]:
    """The gains along all the paths that meet, which add up, each with its share of the squares."""
    total: dict[Use, float] = {}
    for origin, share in zip(origins, shares, strict=True):
        for use, gain in origin.gains.items():
            total[use] = total.get(use, 0.0) + share * gain
    return total


def _activated(
    origin: _Origin, name: str, args: tuple[Any, ...], x: Tensor
) -> tuple[_Origin, float]:
    slope = float(args[1]) if name == "leaky_relu" and len(args) > 1 else 0.0
    activation = Activation(ACTIVATIONS[name], slope)
    for use in origin.waiting:
        if activation not in use.activations:
            use.activations.append(activation)
    return replace(origin, waiting=()), _mean_square_slope(activation, args, x)


def _mean_square_slope(activation: Activation, args: tuple[Any, ...], x: Tensor) -> float:
    if activation.name == "softmax":  # of n equal numbers: (I - 11'/n) / n
        axis = args[1] if len(args) > 1 and isinstance(args[1], int) else -1
        return 1.0 / max(1, x.shape[axis]) ** 2 if x.ndim else 1.0
    if activation.name in ("leaky_relu", "prelu"):
        slopes = args[1] if activation.name == "prelu" else activation.slope
        return 0.5 * (1 + _mean_square(slopes))
    return MEAN_SQUARE_SLOPES[activation.name]


def _normalized(origin: _Origin, name: str, arguments: dict[str, Any]) -> tuple[_Origin, float]:
    scale = normalization_scale(f"aten::{name}", arguments)
    kind = NORMALIZATIONS[name]
    if scale is None and kind == "batch normalization":
        # Instances become the channels of one image, which has no stored statistics.
        kind = "instance normalization"
    for use in origin.waiting:
        use.normalized = True
        if kind not in use.normalizations:
            use.normalizations.append(kind)
    if scale is None:
        skipped = origin.external or any(use not in origin.waiting for use in origin.gains)
        size = math.fsum([float(skipped), *map(_squared_gain, origin.waiting)]) or 1.0
        weight = arguments.get("weight")
        squared_gain = (1.0 if weight is None else _mean_square(weight)) / size
    else:
        squared_gain = _mean_square(scale)
    return replace(origin, normalized=True), squared_gain


def _squared_gain(use: Use) -> float:
    """||M||_F^2 / rows of a layer, and 1 for one that is not known."""
    op = use.operator
    if op is None:
        return 1.0
    return float(squared_frobenius_norm(op.weight.double(), op.geometry)) / op.shape[0]


def _scaling(name: str, args: tuple[Any, ...], x: Tensor) -> float:
    """Mean square of the factors that an array is multiplied by, or divided by."""
    factors = next((a for a in args[:2] if a is not x), 1.0)
    if isinstance(factors, Tensor) and not factors.is_floating_point():
        return 1.0
    if not isinstance(factors, Tensor | int | float):
        return 1.0
    square = _mean_square(factors)
    if name == "mul":
        return square
    return 1.0 / square if square > 0 else 1.0


def _mean_square(values: Tensor | float) -> float:
    if isinstance(values, Tensor):
        return float(values.detach().double().square().mean()) if values.numel() else 1.0
    return float(values) ** 2


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
