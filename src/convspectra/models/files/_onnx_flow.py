"""Gradients along an ONNX graph: what follows each layer, and which layers it feeds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

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
    softmax_slope,
    with_statistics,
)
from convspectra.models._named_operators import NamedOperator, with_flow
from convspectra.models._recorder import Use
from convspectra.models._signal_flow import clamped, end_branches
from convspectra.models.files._errors import LoadError
from convspectra.models.files._onnx_constants import FoldingError
from convspectra.models.files._onnx_file import Scope, attributes, read_names

ACTIVATIONS = {
    "Relu": "relu",
    "Tanh": "tanh",
    "Gelu": "gelu",
    "Elu": "elu",
    "Celu": "elu",
    "Sigmoid": "sigmoid",
    "HardSwish": "hardswish",
    "HardSigmoid": "hardsigmoid",
    "Softplus": "softplus",
    "Mish": "mish",
    "Abs": "abs",
    "Sin": "sin",
    "Erf": "erf",
    "ThresholdedRelu": "relu",
    "QuickGelu": "silu",
    "FastGelu": "gelu",
}
"""Operators that act on every number alone, and what they are called here."""
NORMALIZATIONS = {
    "InstanceNormalization": "instance normalization",
    "GroupNormalization": "group normalization",
    "LayerNormalization": "layer normalization",
    "RMSNormalization": "RMS normalization",
    "SimplifiedLayerNormalization": "RMS normalization",
    "LpNormalization": "normalization",
}
"""Normalizations by statistics of their input, and what they are called here."""
_POINTWISE = frozenset(
    """Add Cast Clip Div Dropout Erf Exp Expand Flatten Identity Mul Neg Pow Reciprocal Reshape Sqrt
    Squeeze Sub Sum Transpose Unsqueeze""".split()  # noqa: SIM905
)
"""Operators that make each entry of the result from one entry of each array."""
_WITHOUT_GRADIENT = frozenset(
    """ArgMax ArgMin Equal Greater GreaterOrEqual Less LessOrEqual NonZero Not Shape
    Size""".split()  # noqa: SIM905
)
"""Operators whose result no gradient goes back through."""
_AVERAGES = ("ReduceMean", "ReduceSum", "ReduceSumSquare")
"""Operators that average over entries, up to a factor."""
_DEVIATIONS = ("ReduceL2",)
"""Roots of averages of squares, in one operator."""
_ROOTS = ("Sqrt", "Pow")
"""Operators that make a deviation from an average of squares."""


def with_flows(
    scope: Scope, layers: Sequence[tuple[NodeProto | None, NamedOperator]]
) -> list[NamedOperator]:
    """The layers of a graph, with their places and what they feed.

    Parameters
    ----------
    scope : Scope
        The whole graph.
    layers : sequence of (node, NamedOperator)
        In the order of the file; the node is None for one inside a branch or loop, which keeps
        its ways unknown.
    """
    uses = [
        Use(named.name, named.type, named.operator, skipped=named.skipped) for _, named in layers
    ]
    own = {id(node): use for (node, _), use in zip(layers, uses, strict=True) if node is not None}
    walk = _Walk(scope, own)
    for node in scope.graph.node:
        walk.pass_on(node)
    ends = [walk.origins[o.name] for o in scope.graph.output if o.name in walk.origins]
    return with_flow([named for _, named in layers], uses, added(ends, [1.0] * len(ends)))


class _Walk:
    """Origins of the values of a graph, node after node."""

    def __init__(self, scope: Scope, uses: dict[int, Use]) -> None:
        self._scope, self._uses = scope, uses
        self.origins = {
            value.name: Origin(external=True)
            for value in scope.graph.input
            if not scope.is_constant(value.name)
        }

    def pass_on(self, node: NodeProto) -> None:
        """Give the outputs of a node their origin."""
        names = [name for name in read_names(node) if name in self.origins]
        if not names or node.op_type in _WITHOUT_GRADIENT:
            return
        found = [self.origins[name] for name in names]
        use = self._uses.get(id(node))
        origin = self._layer(use, found) if use else self._computed(node, names, found)
        self.origins.update(dict.fromkeys(node.output, origin))

    def _layer(self, use: Use, found: Sequence[Origin]) -> Origin:
        before = joined(found, [1.0] * len(found))
        use.fed_by.update(before.gains)
        use.reads_input = before.external
        use.depth = 1 + max((u.depth for u in use.fed_by), default=0)
        return Origin({use: 1.0}, (use,), depth=use.depth)

    def _computed(self, node: NodeProto, names: list[str], found: list[Origin]) -> Origin:
        kind = node.op_type
        if kind in ACTIVATIONS or kind in ("LeakyRelu", "PRelu", "Softmax", "Clip"):
            return self._activated(node, joined(found, [1.0] * len(found), pointwise=True))
        if kind in NORMALIZATIONS or kind == "BatchNormalization":
            return self._normalized(node, joined(found, [1.0] * len(found)))
        if kind in ("Mul", "Div") and len(found) == 2:
            return product(*found)
        if kind == "Sub" and is_centering(found):
            return replace(found[0], entry=object(), functions=())
        shares = [1.0] * len(found)
        if kind == "Concat":
            sizes = [math.prod(self._scope.shapes.get(name, ())) for name in node.input]
            every = dict(zip(node.input, sizes, strict=True))
            known = all(size > 0 for size in sizes)
            shares = [every[n] / sum(sizes) if known else 1 / len(sizes) for n in names]
        pointwise = kind in _POINTWISE
        origin = joined(found, shares, concatenated=kind == "Concat", pointwise=pointwise)
        origin = with_statistics(
            origin,
            averages=kind in _AVERAGES,
            roots=kind in _ROOTS,
            norms=kind in _DEVIATIONS,
            pointwise=pointwise,
        )
        if kind in ("Add", "Sub", "Sum"):
            end_branches(found)
        return self._scaled(node, names, origin)

    def _scaled(self, node: NodeProto, names: list[str], origin: Origin) -> Origin:
        """The origin after the factors that a node multiplies by."""
        if node.op_type in ("Mul", "Div") and len(names) == 1:
            factors = self._constant(node, next(n for n in node.input if n != names[0]))
            square = 1.0 if factors is None else mean_square(factors)
            if node.op_type == "Div":
                square = 1.0 / square if square > 0 else 1.0
            return origin.times(square)
        if node.op_type == "ReduceSum":
            before, after = (
                math.prod(self._scope.shapes.get(name, ())) for name in (names[0], node.output[0])
            )
            return origin.times((before / after) ** 2) if before > 0 and after > 0 else origin
        return origin

    def _activated(self, node: NodeProto, origin: Origin) -> Origin:
        given, kind = attributes(node), node.op_type
        if kind == "Clip":
            ends = []
            for place, name in enumerate(("min", "max"), start=1):
                value = self._constant(node, node.input[place]) if len(node.input) > place else None
                limit = given[name].f if name in given else None
                ends.append(limit if value is None or value.numel() != 1 else float(value))
            return clamped(origin, *ends)
        if kind == "LeakyRelu":
            slope = given["alpha"].f if "alpha" in given else 0.01
            return activated(origin, Activation("leaky_relu", slope), leaky_slope(slope))
        if kind == "PRelu":
            slopes = self._constant(node, node.input[1])
            square = leaky_slope(0.25 if slopes is None else slopes)
            return activated(origin, Activation("prelu"), square)
        if kind == "Softmax":
            sizes = self._scope.shapes.get(node.input[0], ())
            axis = given["axis"].i if "axis" in given else -1
            known = -len(sizes) <= axis < len(sizes)
            return activated(
                origin, Activation("softmax"), softmax_slope(sizes[axis] if known else 1)
            )
        name = ACTIVATIONS[kind]
        return activated(origin, Activation(name), MEAN_SQUARE_SLOPES[name])

    def _normalized(self, node: NodeProto, origin: Origin) -> Origin:
        weight = self._constant(node, node.input[1]) if len(node.input) > 1 else None
        if node.op_type != "BatchNormalization":
            square = 1.0 if weight is None else mean_square(weight)
            return normalized(origin, NORMALIZATIONS[node.op_type], square, by_statistics=True)
        given = attributes(node)
        variance = self._constant(node, node.input[4])
        training = "training_mode" in given and bool(given["training_mode"].i)
        if weight is None or variance is None or training:
            return normalized(origin, "batch normalization", 1.0, by_statistics=True)
        eps = given["epsilon"].f if "epsilon" in given else 1e-5
        square = mean_square(weight.double() * torch.rsqrt(variance.double() + eps))
        return normalized(origin, "batch normalization", square, by_statistics=False)

    def _constant(self, node: NodeProto, name: str) -> Tensor | None:
        """A stored floating value that a node reads; None for one that is not known."""
        with contextlib.suppress(FoldingError, LoadError):
            if self._scope.is_constant(name):
                value = np.asarray(self._scope.constant(name))
                if value.dtype.kind in "fiu":
                    return torch.from_numpy(value.astype(np.float64))
        return None
