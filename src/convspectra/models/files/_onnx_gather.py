"""The pixels that stand before a layer of an ONNX graph (Note [The gather before a layer])."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from convspectra.models._gather import Gather, entrywise_labels
from convspectra.models.files._onnx_constants import Array, FoldingError, evaluated
from convspectra.models.files._onnx_file import ONNX_DOMAINS, Scope, attributes, label

_COPYING = frozenset(
    """Concat Expand Gather GatherElements GatherND Pad ScatterElements ScatterND Slice
    Tile""".split()  # noqa: SIM905
)
"""Operators that may write something beside their input, or a part of it again."""

_MOVING = _COPYING | {
    "Cast",
    "DepthToSpace",
    "DequantizeLinear",
    "Dropout",
    "Flatten",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""All operators that only move pixels."""

_POINTWISE = frozenset(
    """Abs Add Clip Cos Div Elu Equal Erf Exp Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    LeakyRelu Less LessOrEqual Max Min Mish Mul Neg Not PRelu Pow Relu Selu Sigmoid Sign Sin
    Softplus Softsign Sqrt Sub Sum Tanh ThresholdedRelu Where""".split()  # noqa: SIM905
)
"""Functions of each entry, of one array or of several."""

_NUMPY_MODES: dict[str, Any] = {
    "constant": "constant",
    "edge": "edge",
    "reflect": "reflect",
    "wrap": "wrap",
}
"""Modes of Pad by the names that NumPy gives them."""


@dataclass(frozen=True)
class _Traced:
    """Indices into one value; `origin` is equal for those into the same."""

    origin: Hashable
    index: Array
    by: tuple[str, ...] = ()
    constant: bool = False


def gather_before(scope: Scope, name: str, restarts: bool = False) -> Gather | None:
    """Moves of pixels between the last computed value and this one; None for nothing.

    With `restarts`, a node that pads what was padded already is the first of them.

    Notes
    -----
    Cost: the nodes that pad or copy are evaluated on an array of indices of their size.
    """
    nodes = _chain(scope, name)
    if not any(node.op_type in _COPYING for node in nodes):
        return None
    traced: dict[str, _Traced] = {}
    for node in nodes:
        if restarts and node.op_type == "Pad" and _mode(node) != "wrap":
            traced.pop(node.input[0], None)
        found = _traced(scope, node, traced)
        if found is not None:
            traced |= found
    result = traced.get(name)
    return None if result is None else Gather(result.index, ", ".join(result.by), result.constant)


def _chain(scope: Scope, name: str) -> list[NodeProto]:
    """The nodes that move pixels or map each, back to what is computed; in the file's order."""
    seen: dict[int, NodeProto] = {}
    pending = [name]
    while pending:
        node = scope.producers.get(pending.pop())
        if node is None or id(node) in seen or node.domain not in ONNX_DOMAINS:
            continue
        if node.op_type in _MOVING | _POINTWISE and not scope.is_constant(node.output[0]):
            seen[id(node)] = node
            pending += _data(node)
    place = {id(node): i for i, node in enumerate(scope.graph.node)}
    return sorted(seen.values(), key=lambda node: place.get(id(node), 0))


def _data(node: NodeProto) -> list[str]:
    """The inputs of a node that hold pixels."""
    if node.op_type == "Concat" or node.op_type in _POINTWISE:
        return [name for name in node.input if name]
    return [node.input[i] for i in ((0, 2) if node.op_type.startswith("Scatter") else (0,))]


def _traced(scope: Scope, node: NodeProto, traced: dict[str, _Traced]) -> dict[str, _Traced] | None:
    """The node on indices; None where it puts together what is not of one value."""
    data = _data(node)
    if any(not scope.is_constant(i) and i not in traced for i in data) and any(
        math.prod(scope.shapes.get(i, (0,))) == 0 for i in data if not scope.is_constant(i)
    ):
        return None
    found = {
        i: traced.get(i) or _Traced(i, _indices(scope.shapes[i]))
        for i in data
        if not scope.is_constant(i)
    }
    if node.op_type in _POINTWISE:
        return _mapped(scope, node, data, found)
    moved = any(part.by for part in found.values())
    if not moved and len(found) == len(data) and len({p.origin for p in found.values()}) > 1:
        return None
    found = _apart(found)
    by = tuple(dict.fromkeys(b for part in found.values() for b in part.by))
    if node.op_type in _COPYING and node.op_type != "Slice":
        by = (*by, f"{node.op_type} node {label(node)}")
    try:
        values = {i: found[i].index if i in found else 0 * scope.constant(i) for i in data}
        values |= {i: scope.constant(i) for i in node.input if i and i not in data}
        constant = any(bool(np.any(scope.constant(i))) for i in data if i not in found)
        if node.op_type == "Pad":
            arrays = {node.output[0]: _padded(scope, node, values[node.input[0]])}
            constant = constant or _pads_with_another_value(scope, node)
        else:
            arrays = evaluated(_of_doubles(node), values, scope.opset, scope.max_bytes)
    except FoldingError:
        shape = scope.shapes.get(node.output[0], ())
        if not moved or min(shape, default=0) < 1:
            return None
        # Edited where one cannot say: one pixel everywhere is no padding that a layer has.
        return {node.output[0]: _Traced(node.output[0], np.ones(shape), by)}
    origin = next(iter(found.values())).origin
    constant = constant or any(part.constant for part in found.values())
    return {output: _Traced(origin, array, by, constant) for output, array in arrays.items()}


def _apart(found: dict[str, _Traced]) -> dict[str, _Traced]:
    """The same with labels of their own for the pixels of each origin."""
    origins = list(dict.fromkeys(part.origin for part in found.values()))
    if len(origins) == 1:
        return found
    most = max(float(part.index.max(initial=0)) for part in found.values())
    return {
        i: replace(
            part,
            origin=tuple(origins),
            index=np.where(part.index > 0, part.index + most * origins.index(part.origin), 0),
        )
        for i, part in found.items()
    }


def _indices(shape: tuple[int, ...]) -> Array:
    return np.arange(1, math.prod(shape) + 1, dtype=np.float64).reshape(shape)


def _padded(scope: Scope, node: NodeProto, x: Array) -> Array:
    """The indices with 0 around them, or with some of their own; negative amounts cut off."""
    given, mode = attributes(node), _mode(node)
    if "pads" in given:
        amounts = list(given["pads"].ints)
    else:
        amounts = scope.constant(node.input[1]).tolist()
    axes = list(range(x.ndim))
    if len(node.input) > 3 and node.input[3]:
        axes = [axis % x.ndim for axis in scope.constant(node.input[3]).tolist()]
    pads, cuts = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        before, after = amounts[i], amounts[i + len(axes)]
        cuts[axis] = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
        pads[axis] = (max(before, 0), max(after, 0))
    size = 8 * math.prod(n + sum(pair) for n, pair in zip(x.shape, pads, strict=True))
    if mode not in _NUMPY_MODES or size > scope.max_bytes:
        raise FoldingError("an amount or mode of padding that is none")
    padded: Array = np.pad(x[tuple(cuts)], pads, mode=_NUMPY_MODES[mode])
    return padded


def _pads_with_another_value(scope: Scope, node: NodeProto) -> bool:
    given = attributes(node)
    if "value" in given:
        return bool(given["value"].f != 0)
    return len(node.input) > 2 and bool(node.input[2]) and bool(scope.constant(node.input[2]).any())


def _of_doubles(node: NodeProto) -> NodeProto:
    """A Cast leaves indices as they are, and so does rounding to integers and back.

    Raises
    ------
    FoldingError
        If entries are added up.
    """
    given = attributes(node)
    if "reduction" in given and given["reduction"].s not in (b"", b"none"):
        raise FoldingError("entries that are added up")
    if node.op_type in ("Cast", "Dropout", "QuantizeLinear", "DequantizeLinear"):
        return helper.make_node("Identity", node.input[:1], node.output[:1])
    return node


def _mode(node: NodeProto) -> str:
    given = attributes(node)
    return given["mode"].s.decode() if "mode" in given else "constant"


def _mapped(
    scope: Scope, node: NodeProto, data: list[str], found: dict[str, _Traced]
) -> dict[str, _Traced] | None:
    """A function of each entry: another array, whose pixels are moved alike."""
    if not any(part.by for part in found.values()):  # a computed value
        return None
    output = node.output[0]
    by = tuple(dict.fromkeys(b for part in found.values() for b in part.by))
    try:
        constants = {i: scope.constant(i) for i in data if i not in found}
        every = [part.index for part in found.values()] + list(constants.values())
        shape = np.broadcast_shapes(*(array.shape for array in every))
        indices = {i: np.broadcast_to(part.index, shape) for i, part in found.items()}
        zero = np.all([index == 0 for index in indices.values()], axis=0)
        factors = data if node.op_type == "Mul" else data[:1] if node.op_type == "Div" else []
        for i in factors:  # 0 times anything
            if i in found and not found[i].constant:
                zero = zero | (indices[i] == 0)
        tables = list(indices.values())
        codes = [
            np.unique(array, return_inverse=True)[1].reshape(array.shape)
            for array in constants.values()
            if array.size > 1
        ]
        labels: Array | None = tables[0]
        if codes or not all(np.array_equal(tables[0], table) for table in tables[1:]):
            labels = entrywise_labels([*tables, *(np.broadcast_to(c, shape) for c in codes)], zero)
        constant = _at_zeros(scope, node, zero, {i: found[i].index.shape for i in found}, constants)
    except (FoldingError, ValueError):  # no value, or shapes that do not fit
        return None
    if labels is None:
        return None
    return {output: _Traced(output, labels.astype(np.float64), by, constant)}


def _at_zeros(
    scope: Scope,
    node: NodeProto,
    zero: Array,
    shapes: dict[str, tuple[int, ...]],
    constants: dict[str, Array],
) -> bool:
    """Whether a function of each entry has another value than 0 where its arguments are 0."""
    if not zero.any():
        return False
    if len(shapes) == 1 and not any(array.size > 1 for array in constants.values()):
        shapes, zero = dict.fromkeys(shapes, (1,)), np.ones(1, dtype=bool)
    kind = dict.fromkeys(
        shapes, bool if node.op_type in ("Not", "And", "Or", "Xor") else np.float32
    )
    if node.op_type == "Where" and node.input[0] in shapes:
        kind[node.input[0]] = bool
    zeros = {i: np.zeros(shape, dtype=kind[i]) for i, shape in shapes.items()}
    (value,) = evaluated(node, {**zeros, **constants}, scope.opset, scope.max_bytes).values()
    return bool(np.broadcast_to(value, zero.shape)[zero].any())
