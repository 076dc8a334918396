"""An ONNX file, read and checked, as the facts that its layers need."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from convspectra.models.files._errors import LoadError, refusing
from convspectra.models.files._onnx_constants import FOLDED, Array, FoldingError, evaluated
from convspectra.models.files._onnx_functions import written_out

ONNX_DOMAINS = ("", "ai.onnx")
"""The names of ONNX's own domain."""

_FLOATING: dict[int, int] = {  # bytes of one entry
    TensorProto.FLOAT: 4,
    TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
}
"""Floating types, with the bytes of one entry."""

_KEPT_ENTRIES = 1024  # of an initializer, in shape inference: what Reshape and Resize may need
"""Entries of a value up to which shape inference gets it, and it is folded at once: amounts of
Pad, shapes of Reshape and sizes of Resize have some ten. A choice: half or double of it
changes nothing known.
"""


@dataclass(frozen=True)
class Stored:
    """A tensor in the file, and the axes that Transpose nodes put it in."""

    tensor: TensorProto
    axes: tuple[int, ...] | None = None


@dataclass
class Scope:
    """A graph with what its nodes can see.

    Attributes
    ----------
    stored : dict
        Tensors of the file by the names of their values.
    computed : dict
        Nodes of values that depend on stored tensors only, or None for a sparse tensor.
    shapes : dict
        Inferred shapes; 0 for a size that is not known.
    producers, readers : dict
        The node that writes a value, and the nodes that read it.
    """

    path: Path
    graph: GraphProto
    max_bytes: int
    stored: dict[str, Stored] = field(default_factory=dict)
    computed: dict[str, NodeProto | None] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto]] = field(default_factory=dict)
    opset: int = 1
    folded: dict[str, Array] = field(default_factory=dict)

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on stored tensors only."""
        return name in self.stored or name in self.computed

    def constant(self, name: str) -> Array:
        """A value that depends on stored tensors only.

        Raises
        ------
        FoldingError
            If an operator behind it is not one of `FOLDED`, or has no value.
        LoadError
            As `array`.
        """
        known: dict[str, Array] = dict(self.folded)
        pending = [name]
        while pending:
            value = pending[-1]
            if value in known:
                pending.pop()
            elif value in self.stored:
                known[value] = self._stored_array(value)
            else:
                node = self._folded_node(value)
                missing = [i for i in node.input if i and i not in known]
                if node.op_type == "Shape" and not all(map(self.is_constant, node.input)):
                    known[value] = _known_shape(self, node)
                elif missing:
                    pending += missing
                else:
                    known |= evaluated(node, known, self.opset, self.max_bytes)
        return known[name]

    def _folded_node(self, name: str) -> NodeProto:
        node = self.computed.get(name)
        if node is None:
            raise FoldingError("it is a sparse initializer")
        if node.op_type not in FOLDED or node.domain not in ONNX_DOMAINS:
            raise FoldingError(f"it comes from a {node.op_type} node")
        return node

    def _stored_array(self, name: str) -> Array:
        stored = self.stored[name]
        if stored.tensor.data_type not in _FLOATING:
            size = math.prod(stored.tensor.dims) * 8
            if uses_external_data(stored.tensor) or size > self.max_bytes:
                raise FoldingError("it holds integers that are not in the file")
            array: Array = onnx.numpy_helper.to_array(stored.tensor)
        elif stored.tensor.data_type == TensorProto.BFLOAT16:
            raise FoldingError("it is of type bfloat16")
        else:
            array = _read(self.path, stored.tensor, self.max_bytes).numpy()
        return array if stored.axes is None else array.transpose(stored.axes)

    def array(self, name: str) -> Tensor:
        """A stored tensor's data.

        Raises
        ------
        LoadError
            If the data is not what its type and sizes say, or more than `max_bytes`.
        """
        stored = self.stored[name]
        tensor = _read(self.path, stored.tensor, self.max_bytes)
        return tensor if stored.axes is None else tensor.permute(stored.axes).contiguous()

    def is_floating(self, name: str) -> bool:
        """Whether a stored tensor has a floating type that PyTorch has too."""
        return self.stored[name].tensor.data_type in _FLOATING


def read_model(path: Path, shapes: Sequence[tuple[int, ...]], max_bytes: int) -> Scope:
    """Read, check and infer shapes for inputs of a batch of 1 and the given sizes.

    Raises
    ------
    LoadError
        If the file is no whole ONNX model, its nodes are out of order or form a cycle, its external
        data lies elsewhere, or its inputs are others.
    """
    with refusing(path, "not a whole ONNX model", "export it again"):
        model = onnx.load_model(str(path), load_external_data=False)
        if not (model.graph.node or model.graph.initializer) or not model.opset_import:
            raise LoadError(f"{path}: not an ONNX model, or one without a graph; export it again")
        if model.functions and written_out(model):
            model = onnx.inliner.inline_local_functions(model)
    with refusing(path, "not a valid ONNX graph", "export it again"):
        _check_order(path, model.graph, frozenset())
        for tensor in _tensors(model.graph):
            _check_location(path, tensor)
    _set_inputs(path, model.graph, shapes)
    opset = max((o.version for o in model.opset_import if o.domain in ONNX_DOMAINS), default=1)
    folded: dict[str, Array] = {}
    while True:
        inferred = _inferred_shapes(path, model, folded)
        scope = Scope(
            path, model.graph, max_bytes, shapes=inferred, opset=opset, folded=dict(folded)
        )
        fill(scope, model.graph)
        more = _small_constants(scope)
        # Constants tell more sizes, and sizes more constants; each round knows more of them.
        if not _take_branches(scope) and more.keys() == folded.keys():
            _name_numbers(scope.graph)
            return scope
        folded = more


def _name_numbers(graph: GraphProto) -> None:
    """Give nodes that only have a number for a name their operator and its position as well."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        name, position = label(node), counts[node.op_type]
        counts[node.op_type] += 1
        if name.isdigit() or name == node.op_type:
            node.name = f"{node.op_type}@{position}" + f" ({name})" * name.isdigit()


def _small_constants(scope: Scope) -> dict[str, Array]:
    """The small values that depend on stored tensors only, such as the amounts of a Pad."""
    found = dict(scope.folded)
    for name, node in scope.computed.items():
        sizes = scope.shapes.get(name)
        small = sizes is None or math.prod(sizes) <= _KEPT_ENTRIES
        if name in found or node is None or not small or name not in scope.producers:
            continue
        with contextlib.suppress(FoldingError, LoadError):
            value = scope.constant(name)
            if value.size <= _KEPT_ENTRIES:
                found[name] = scope.folded[name] = value
    return found


def _take_branches(scope: Scope) -> bool:
    """Put the branch of every If with a constant condition in its place; whether there was one."""
    nodes: list[NodeProto] = []
    taken = False
    for node in scope.graph.node:
        condition = None
        is_if = node.op_type == "If" and node.domain in ONNX_DOMAINS
        if is_if and scope.is_constant(node.input[0]):
            with contextlib.suppress(FoldingError, LoadError):
                condition = scope.constant(node.input[0])
        if condition is None or condition.size != 1:
            nodes.append(node)
            continue
        branch = attributes(node)["then_branch" if condition.item() else "else_branch"].g
        taken = True
        scope.graph.initializer.extend(branch.initializer)
        scope.graph.sparse_initializer.extend(branch.sparse_initializer)
        nodes += branch.node
        for inner, outer in zip(branch.output, node.output, strict=True):
            nodes.append(helper.make_node("Identity", [inner.name], [outer]))
    if taken:
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del scope.graph.node[:]
        scope.graph.node.extend(copies)
    return taken


def _known_shape(scope: Scope, node: NodeProto) -> Array:
    given = attributes(node)
    start = given["start"].i if "start" in given else 0
    end = given["end"].i if "end" in given else None
    return np.array(scope.shapes[node.input[0]][start:end], dtype=np.int64)


def fill(scope: Scope, graph: GraphProto) -> None:
    """Put a graph's tensors, computed values, producers and readers into a scope."""
    scope.stored.update({tensor.name: Stored(tensor) for tensor in graph.initializer})
    for sparse in graph.sparse_initializer:
        scope.computed[sparse.values.name] = None
    for node in graph.node:
        for name in read_names(node):
            scope.readers.setdefault(name, []).append(node)
        scope.producers.update(dict.fromkeys(node.output, node))
        _note_constant(scope, node)


def attributes(node: NodeProto) -> dict[str, AttributeProto]:
    """The attributes of a node by name."""
    return {attribute.name: attribute for attribute in node.attribute}


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes, as If, Loop and Scan have them."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def read_names(node: NodeProto) -> list[str]:
    """The values that a node reads, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        names += [name for inner in graph.node for name in read_names(inner)]
        names += [output.name for output in graph.output]
    return names


def _note_constant(scope: Scope, node: NodeProto) -> None:
    if node.op_type == "Constant":
        value = attributes(node).get("value")
        if value is not None:
            scope.stored[node.output[0]] = Stored(value.t)
        else:
            scope.computed.update(dict.fromkeys(node.output, node))
        return
    inputs = [name for name in node.input if name]
    source = scope.stored.get(inputs[0]) if len(inputs) == 1 else None
    if source is not None and node.op_type == "Identity":
        scope.stored[node.output[0]] = source
    elif source is not None and node.op_type == "Transpose" and source.axes is None:
        ndim = len(source.tensor.dims)
        given = attributes(node).get("perm")
        axes = tuple(reversed(range(ndim))) if given is None else tuple(given.ints)
        if sorted(axes) != list(range(ndim)):
            raise LoadError(f"{scope.path}: node {label(node)!r} has a perm of {axes}")
        scope.stored[node.output[0]] = Stored(source.tensor, axes)
    elif inputs and all(name in scope.stored or name in scope.computed for name in inputs):
        scope.computed.update(dict.fromkeys(node.output, node))
    elif node.op_type == "Shape" and min(scope.shapes.get(node.input[0], ()), default=0) > 0:
        scope.computed[node.output[0]] = node


def label(node: NodeProto) -> str:
    """A node's name, or that of its first output."""
    return node.name or next(iter(node.output), "") or node.op_type


def _check_order(path: Path, graph: GraphProto, outer: frozenset[str]) -> None:
    """Every value that is read was written before: there are no cycles and no gaps."""
    known = set(outer) | {value.name for value in graph.input}
    known |= {tensor.name for tensor in graph.initializer}
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise LoadError(
                    f"{path}: node {label(node)!r} reads {name!r}, which nothing before it writes: "
                    "a cycle or a missing node; export it again"
                )
        for inner in subgraphs(node):
            _check_order(path, inner, frozenset(known))
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            raise LoadError(f"{path}: nothing writes the output {value.name!r}; export it again")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for inner in subgraphs(node):
            yield from _tensors(inner)


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_location(path: Path, tensor: TensorProto) -> Path | None:
    """The file of a tensor's external data, which must lie in the model's folder."""
    if not uses_external_data(tensor):
        return None
    location = _external(tensor).get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder):
        raise LoadError(
            f"{path}: the data of {tensor.name!r} is said to lie in {location!r}, outside the "
            "model's folder; refused"
        )
    return file


def _read(path: Path, tensor: TensorProto, max_bytes: int) -> Tensor:
    name = tensor.name
    with refusing(path, f"the data of {name!r} is not what its sizes say", "export it again"):
        if any(n < 0 for n in tensor.dims):
            raise ValueError(f"sizes {list(tensor.dims)}")
        size = math.prod(tensor.dims) * _FLOATING[tensor.data_type]
        if size > max_bytes:
            raise LoadError(
                f"{path}: {name!r} says it holds {size} bytes, more than the limit of {max_bytes} "
                "for a model file"
            )
        file = _check_location(path, tensor)
        if file is not None:
            tensor = _with_external_data(tensor, file, size)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != size:
            raise ValueError(f"expected {size} bytes, got {len(tensor.raw_data)}")
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.BFLOAT16:  # not a type of NumPy's own
            return torch.from_numpy(array.astype("float32")).bfloat16()
        return torch.from_numpy(array.copy())


def _with_external_data(tensor: TensorProto, file: Path, size: int) -> TensorProto:
    if not file.is_file():  # a pipe would keep the reader waiting for ever
        raise ValueError(f"{file.name} is not a file")
    with file.open("rb") as stream:
        stream.seek(int(_external(tensor).get("offset", "0")))
        data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"expected {size} bytes in {file.name}, got {len(data)}")
    return TensorProto(
        name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=data
    )


def _set_inputs(path: Path, graph: GraphProto, shapes: Sequence[tuple[int, ...]]) -> None:
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    declared = {value.name: _shape(value) for value in inputs}
    if len(shapes) > len(inputs):
        raise LoadError(
            f"{path}: expected at most {len(inputs)} input shapes, for {list(declared)}, "
            f"got {len(shapes)}"
        )
    for value, shape in zip(inputs, shapes, strict=False):
        sizes, known = (1, *shape), declared[value.name]
        if value.type.tensor_type.HasField("shape") and len(known) != len(sizes):
            raise LoadError(
                f"{path}: expected {max(len(known) - 1, 0)} sizes after the batch for the input "
                f"{value.name!r}, got {shape}"
            )
        kind = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(kind, sizes))


def _inferred_shapes(
    path: Path, model: ModelProto, folded: dict[str, Array]
) -> dict[str, tuple[int, ...]]:
    """Shapes by ONNX's own inference, which gets no large weight; `folded` values are known.

    Outputs of operators of other domains are of floats: sizes that are given behind them tell the
    rest.
    """
    light = ModelProto()
    light.CopyFrom(model)
    graph = light.graph
    del graph.value_info[:]
    for node in graph.node:
        if node.domain not in ONNX_DOMAINS:
            graph.value_info.extend(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                for name in node.output
                if name
            )
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    inputs = {value.name for value in graph.input}
    small = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _KEPT_ENTRIES and not uses_external_data(tensor):
            small.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in small]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes = [
        NodeProto.FromString(node.SerializeToString())
        for node in graph.node
        if not all(name in folded for name in node.output)
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    produced = {name for node in nodes for name in node.output}
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, value in folded.items()
        if name not in produced
    )
    with refusing(path, "shapes cannot be inferred", "check the input shapes, --input"):
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name: _shape(v) for v in values if v.type.tensor_type.HasField("shape")}


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim)
