"""How many nodes the functions of an ONNX model stand for, before they are written out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, ModelProto, NodeProto

MOST_NODES = 200_000
"""Nodes that the calls of functions may come to. A choice, meant to lie above what exporters write:
each function that calls another one twice doubles the number."""

_Key = tuple[str, str, str]


def written_out(model: ModelProto) -> int:
    """The number of nodes once every call of a function is replaced by its body.

    Raises
    ------
    ValueError
        If there are more than `MOST_NODES`, or if a function calls itself.

    Notes
    -----
    Cost: one pass over the nodes in the file, however many they stand for.
    """
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    sizes: dict[_Key, int] = {}
    # Depth first without recursion: a chain of functions may be longer than Python's stack.
    for start in bodies:
        open_calls = [start]
        while open_calls:
            key = open_calls[-1]
            callees = {k for node in _nodes(bodies[key]) if (k := _key(node)) in bodies}
            waiting = callees - set(sizes)
            if waiting & set(open_calls):
                raise ValueError(f"the function {key[1]!r} calls itself")
            if waiting and key not in sizes:
                open_calls.append(min(waiting))
                continue
            sizes[open_calls.pop()] = _size(bodies[key], sizes)
    return _size(model.graph.node, sizes)


def _size(nodes: Iterable[NodeProto], sizes: dict[_Key, int]) -> int:
    size = sum(sizes.get(_key(node), 1) for node in _nodes(nodes))
    if size > MOST_NODES:
        raise ValueError(
            f"its functions call each other so often that they stand for more than {MOST_NODES:,} "
            "nodes"
        )
    return size


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those of the graphs in their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for graph in graphs:
                yield from _nodes(graph.node)


def _key(node: NodeProto) -> _Key:
    return node.domain, node.op_type, node.overload
