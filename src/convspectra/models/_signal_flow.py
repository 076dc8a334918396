"""Which activation follows each layer, which layers feed it, and where branches meet.

Training needs to know it: the right gain of a layer is that of the activation behind it, and
mirrored kernels fit only where both sides of a ReLU agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

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
NORMALIZATIONS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_group_norm",
    "native_layer_norm",
    "_fused_rms_norm",
)
"""Normalizations as ATen calls them."""


_CONCATENATIONS = ("cat", "stack")
"""Operations that put arrays beside each other."""


@dataclass(frozen=True)
class Activation:
    """An activation by name, with the slope of a leaky ReLU."""

    name: str
    slope: float = 0.0


@dataclass(frozen=True)
class _Origin:
    """Where an array comes from: the last layers before it; `waiting` are not activated yet."""

    uses: tuple[Use, ...] = ()
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

    def start(self, inputs: Any) -> None:
        """Take the arrays of the example input as where everything begins."""
        for tensor in _tensors(inputs):
            self._origins[tensor] = _Origin(external=True)

    def begin(self, use: Use, x: object) -> None:
        """Note what feeds a layer."""
        origin = self._origins.get(x) if isinstance(x, Tensor) else None
        if origin is not None:
            use.fed_by.extend(origin.uses)
            use.reads_input = origin.external
            use.normalized = use.normalized or origin.normalized
            use.reads_concatenation = origin.concatenated

    def end(self, use: Use, output: object) -> None:
        """Let a layer's output begin with it."""
        if isinstance(output, Tensor):
            depth = 1 + max((u.depth for u in use.fed_by), default=0)
            use.depth = depth
            self._origins[output] = _Origin((use,), (use,), depth=depth)

    def note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Pass an operation on from its arguments to its results."""
        found = [o for t in _tensors((args, kwargs)) if (o := self._origins.get(t)) is not None]
        if not found:
            return
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        joined = _Origin(
            tuple(dict.fromkeys(use for origin in found for use in origin.uses)),
            tuple(dict.fromkeys(use for origin in found for use in origin.waiting)),
            any(origin.external for origin in found),
            max(origin.depth for origin in found),
            any(origin.normalized for origin in found),
            any(o.concatenated for o in found) or (name in _CONCATENATIONS and len(found) > 1),
        )
        if name in ACTIVATIONS:
            slope = float(args[1]) if name == "leaky_relu" and len(args) > 1 else 0.0
            activation = Activation(ACTIVATIONS[name], slope)
            for use in joined.waiting:
                if activation not in use.activations:
                    use.activations.append(activation)
            joined = replace(joined, waiting=())
        elif name in NORMALIZATIONS:
            for use in joined.waiting:
                use.normalized = True
            joined = replace(joined, normalized=True)
        elif name in ("add", "sub") and len(found) > 1:
            deepest = max(found, key=lambda origin: origin.depth)
            if any(origin.depth < deepest.depth for origin in found):
                for use in deepest.waiting:
                    use.ends_branch = True
        for tensor in _tensors(result):
            self._origins[tensor] = joined


def layer_flows(uses: list[Use]) -> dict[str, LayerFlow]:
    """The flow around every layer of a recorded pass, by its name."""
    names = list(dict.fromkeys(use.name for use in uses))
    flows = {}
    for name in names:
        own = [use for use in uses if use.name == name]
        activations = list(dict.fromkeys(a for use in own for a in use.activations))
        feeds = [use.name for use in uses if any(source.name == name for source in use.fed_by)]
        flows[name] = LayerFlow(
            name,
            activations[0] if len(activations) == 1 else None,
            any(use.normalized for use in own),
            tuple(dict.fromkeys(source.name for use in own for source in use.fed_by)),
            any(use.reads_input for use in own),
            tuple(dict.fromkeys(feeds)),
            any(use.reads_concatenation for use in own),
            any(use.ends_branch for use in own),
            len(own),
        )
    return flows


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
