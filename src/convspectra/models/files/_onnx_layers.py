"""The linear layers of an ONNX graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from onnx import GraphProto, NodeProto
from torch import Tensor

from convspectra.models._gather import with_outer_padding
from convspectra.models._named_operators import NamedOperator
from convspectra.models.files._errors import LoadError, refusing
from convspectra.models.files._onnx_constants import FoldingError
from convspectra.models.files._onnx_file import (
    ONNX_DOMAINS,
    Scope,
    attributes,
    fill,
    label,
    read_model,
    read_names,
    subgraphs,
)
from convspectra.models.files._onnx_flow import with_flows
from convspectra.models.files._onnx_gather import gather_before
from convspectra.models.files._onnx_options import convolution_options
from convspectra.operator import ConvOperator

_QUANTIZED = "its weight is quantized; give the floating model"
"""Reason for operators with integer weights."""

_RECURRENT = "a recurrence is not a linear map of its input"
"""Reason for recurrent layers."""

_WEIGHTED = {  # operators with a stored weight that are not taken, and why
    "QLinearConv": _QUANTIZED,
    "ConvInteger": _QUANTIZED,
    "QLinearMatMul": _QUANTIZED,
    "MatMulInteger": _QUANTIZED,
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "DeformConv": "its taps move with its input",
}
"""Operators with a stored weight that are not taken, and why."""


class _PassedOverError(Exception):
    """Why a layer has no operator."""


def onnx_operators(
    path: Path, shapes: Sequence[tuple[int, ...]], max_bytes: int
) -> list[NamedOperator]:
    """Conv, ConvTranspose, Gemm and MatMul nodes with stored weights, in the order of the file."""
    scope = read_model(path, shapes, max_bytes)
    with refusing(path, "not a valid ONNX graph", "export it again"):
        return with_flows(scope, list(_graph_operators(scope, scope.graph, inside="")))


def _graph_operators(
    scope: Scope, graph: GraphProto, inside: str
) -> Iterator[tuple[NodeProto | None, NamedOperator]]:
    """The layers, each with its node, or None for one of a graph inside another."""
    for node in graph.node:
        for named in _node_operators(scope, node, inside):
            yield None if inside else node, named
        for inner in subgraphs(node):
            nested = Scope(
                scope.path,
                inner,
                scope.max_bytes,
                dict(scope.stored),
                dict(scope.computed),
                opset=scope.opset,
                folded=scope.folded,
            )
            fill(nested, inner)
            yield from _graph_operators(nested, inner, f"{node.op_type} node {label(node)!r}")


def _node_operators(scope: Scope, node: NodeProto, inside: str) -> Iterator[NamedOperator]:
    kind, standard = node.op_type, node.domain in ONNX_DOMAINS
    weighted = any(scope.is_constant(name) for name in node.input)
    if standard and kind in ("Conv", "ConvTranspose"):
        build = _convolution
    elif standard and kind in ("Gemm", "MatMul") and _has_one_factor(scope, node):
        build = _product
    elif standard and kind == "Einsum" and _has_one_factor(scope, node):
        build = _contraction
    elif standard and kind in _WEIGHTED and weighted:
        yield NamedOperator(label(node), kind, None, skipped=_WEIGHTED[kind])
        return
    elif not standard and weighted and any(w in kind for w in ("Conv", "MatMul", "Gemm")):
        reason = f"an operator of the domain {node.domain}, not of ONNX itself"
        yield NamedOperator(label(node), kind, None, skipped=reason)
        return
    else:
        return
    try:
        if inside:
            raise _PassedOverError(f"it is inside a branch or loop, {inside}")
        op, note = build(scope, node)
    except _PassedOverError as reason:
        yield NamedOperator(label(node), kind, None, skipped=str(reason))
    else:
        maps = _attention_maps(scope, node, op)
        for part, block in maps.items():
            yield NamedOperator(f"{label(node)}.{part}", kind, block)
        if not maps:
            named = NamedOperator(label(node), kind, op, notes=(note,) * bool(note))
            yield _with_surroundings(scope, node, named)


def _attention_maps(scope: Scope, node: NodeProto, op: ConvOperator) -> dict[str, ConvOperator]:
    """Three maps into attention, where PyTorch's exporters wrote one product for them.

    The name of the bias tells.
    """
    names = [name for r in scope.readers.get(node.output[0], ()) for name in read_names(r)]
    packed = any(name.rpartition(".")[2] == "in_proj_bias" for name in names)
    rows, columns = op.shape
    if not packed or op.geometry.ndim or rows != 3 * columns:
        return {}
    blocks = op.weight.reshape(3, columns, columns)
    return {
        part: ConvOperator(block, ())
        for part, block in zip(("query", "key", "value"), blocks, strict=True)
    }


def _has_one_factor(scope: Scope, node: NodeProto) -> bool:
    constant = [scope.is_constant(name) for name in node.input[:2]]
    return len(constant) == 2 and constant[0] != constant[1]


def _weight(scope: Scope, name: str) -> Tensor:
    if name in scope.computed:
        try:
            weight = scope.constant(name)
        except FoldingError as error:
            raise _PassedOverError(
                f"its weight is not stored as it is, but comes from {_origin(scope, name)}: {error}"
            ) from error
        if weight.dtype.kind != "f":
            raise _PassedOverError("its weight is not of a floating type")
        return torch.from_numpy(np.array(weight))
    if name not in scope.stored:
        raise _PassedOverError("its weight is computed from the input")
    if not scope.is_floating(name):
        raise _PassedOverError("its weight is not of a floating type")
    return scope.array(name)


def _origin(scope: Scope, name: str) -> str:
    node = scope.computed[name]
    return "a sparse initializer" if node is None else f"a {node.op_type} node"


def _convolution(scope: Scope, node: NodeProto) -> tuple[ConvOperator, str]:
    weight = _weight(scope, node.input[1])
    transposed = node.op_type == "ConvTranspose"
    shape = scope.shapes.get(node.input[0], ())
    size = shape[2:]
    if len(shape) != weight.ndim or min(size, default=1) < 1:
        raise _PassedOverError(
            f"its input size could not be inferred{_where_sizes_end(scope, node.input[0])}"
        )
    try:
        options = convolution_options(attributes(node), size, tuple(weight.shape[2:]), transposed)
        op = ConvOperator(weight, size, **options)
    except ValueError as error:
        raise _PassedOverError(str(error)) from error
    _check_sizes(scope, node, op, shape)
    name = node.input[0]
    return with_outer_padding(
        op, gather_before(scope, name), lambda: gather_before(scope, name, restarts=True)
    )


def _where_sizes_end(scope: Scope, name: str) -> str:
    """The first node before a value whose output has no known size, in words."""

    def known(value: str) -> bool:
        sizes = scope.shapes.get(value, ())
        return scope.is_constant(value) or min(sizes, default=0) > 0

    seen: set[str] = set()
    while (node := scope.producers.get(name)) is not None and name not in seen:
        seen.add(name)
        unknown = [value for value in node.input if value and not known(value)]
        if not unknown:
            place = f" past the {node.op_type} node {label(node)!r}"
            if node.domain not in ONNX_DOMAINS:
                return f"{place} of the domain {node.domain}; export without this operator"
            return f"{place}, whose sizes depend on values; simplify the model first"
        name = unknown[0]
    return "; give every input shape, --input"


def _check_sizes(scope: Scope, node: NodeProto, op: ConvOperator, shape: tuple[int, ...]) -> None:
    if shape[1] not in (0, op.input_shape[0]):
        raise LoadError(
            f"{scope.path}: {label(node)!r} takes {op.input_shape[0]} channels, its input has "
            f"{shape[1]}; check the input shapes, --input"
        )
    output = scope.shapes.get(node.output[0], ())[2:]
    if output and min(output) > 0 and output != op.output_shape[1:]:
        raise _PassedOverError(
            f"ONNX infers an output of {output}, its attributes give {op.output_shape[1:]}"
        )


def _product(scope: Scope, node: NodeProto) -> tuple[ConvOperator, str]:
    """The operator of Gemm or MatMul: on rows for a stored right factor, on columns for a left."""
    left = scope.is_constant(node.input[0])
    weight = _weight(scope, node.input[0] if left else node.input[1])
    if weight.ndim != 2:
        raise _PassedOverError("a product with a batch of stored matrices is not supported")
    given = attributes(node)
    flipped = "transA" if left else "transB"
    if flipped in given and given[flipped].i:
        weight = weight.T
    if "alpha" in given:
        weight = weight * given["alpha"].f
    try:
        return ConvOperator(weight if left else weight.T, ()), ""
    except ValueError as error:
        raise _PassedOverError(str(error)) from error


def _contraction(scope: Scope, node: NodeProto) -> tuple[ConvOperator, str]:
    """The operator of Einsum, from the axes that it sums over to those that it makes."""
    terms, _, result = attributes(node)["equation"].s.decode().replace(" ", "").partition("->")
    left = scope.is_constant(node.input[0])
    names = terms.split(",")
    ours, others = (names[0], names[1]) if left else (names[1], names[0])
    weight = _weight(scope, node.input[0] if left else node.input[1])
    summed = [axis for axis in ours if axis in others and axis not in result]
    made = [axis for axis in ours if axis in result and axis not in others]
    if not result or not summed or len({*summed, *made}) != weight.ndim or len(ours) != weight.ndim:
        raise _PassedOverError(f"Einsum of {terms}->{result} is no product with one stored matrix")
    rows = math.prod(weight.shape[ours.index(axis)] for axis in made)
    matrix = weight.permute([ours.index(axis) for axis in (*made, *summed)]).reshape(rows, -1)
    try:
        return ConvOperator(matrix, ()), ""
    except ValueError as error:
        raise _PassedOverError(str(error)) from error


def _with_surroundings(scope: Scope, node: NodeProto, named: NamedOperator) -> NamedOperator:
    """The named with the padding before it and the batch normalization after it."""
    notes = list(named.notes)
    output = node.output[0]
    readers = scope.readers.get(output, [])
    norms = [r for r in readers if r.op_type == "BatchNormalization" and r.input[0] == output]
    if not norms or (node.op_type in ("Gemm", "MatMul") and len(scope.shapes.get(output, ())) != 2):
        return dataclasses.replace(named, notes=tuple(notes))
    norm, others = norms[0], [label(r) for r in readers if r is not norms[0]]
    others += ["the model's output"] * (output in {value.name for value in scope.graph.output})
    if others or read_names(norm).count(output) != 1:
        listed = ", ".join(others) or label(norm)
        notes.append(f"batch normalization {label(norm)} is not alone to read it: {listed} too")
        return dataclasses.replace(named, notes=tuple(notes))
    assert named.operator is not None
    scale = _normalization_scale(scope, norm, named.operator.output_shape[0])
    if scale is None:
        notes.append(f"batch normalization {label(norm)} has no stored statistics")
        return dataclasses.replace(named, notes=tuple(notes))
    return dataclasses.replace(named, scale=scale, batch_norm=label(norm), notes=tuple(notes))


def _normalization_scale(scope: Scope, node: NodeProto, channels: int) -> Tensor | None:
    """Weight over the root of the variance, (channels,) in float64; None if it is not stored."""
    given = attributes(node)
    names = (node.input[1], node.input[4])
    if "training_mode" in given and given["training_mode"].i:
        return None
    if not all(name in scope.stored and scope.is_floating(name) for name in names):
        return None
    weight, variance = (scope.array(name).double() for name in names)
    if weight.shape != (channels,) or variance.shape != (channels,):
        raise LoadError(
            f"{scope.path}: expected {channels} entries in {label(node)!r}, got "
            f"{tuple(weight.shape)} and {tuple(variance.shape)}"
        )
    eps = given["epsilon"].f if "epsilon" in given else 1e-5
    scale: Tensor = weight * torch.rsqrt(variance + eps)
    return scale
