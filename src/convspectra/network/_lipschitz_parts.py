"""The linear parts of a traced network: what stands between its activations."""

from __future__ import annotations

from dataclasses import dataclass

from convspectra.network._lipschitz_rules import Bounded, Linear, Slopes
from convspectra.network._lipschitz_trace import Node, ancestors


@dataclass(frozen=True)
class Part:
    """Arrays that one reader takes side by side, as a linear function of the arrays before.

    Attributes
    ----------
    targets : tuple of Node
    reader : Node or None
        The activation, or other operation that is not linear; None at the end of the network.
    """

    targets: tuple[Node, ...]
    reader: Node | None

    @property
    def constant(self) -> float:
        """The Lipschitz constant of the reader."""
        rule = None if self.reader is None else self.reader.rule
        return rule.constant if isinstance(rule, (Slopes, Bounded)) else 1.0


def parts(end: Node) -> list[Part]:
    """The linear parts of a network in their order, by its last node."""
    found = [
        Part(node.inputs, node)
        for node in ancestors(end)
        if isinstance(node.rule, (Slopes, Bounded))
    ]
    return found if isinstance(end.rule, (Slopes, Bounded)) else [*found, Part((end,), None)]


def passes(node: Node, expanded: frozenset[Node]) -> bool:
    """Whether a node is a linear function of its inputs, with some activations expanded."""
    return node in expanded or (isinstance(node.rule, Linear) and bool(node.inputs))


def sources(targets: tuple[Node, ...], expanded: frozenset[Node] = frozenset()) -> list[Node]:
    """The arrays that the targets are linear functions of, and the expanded activations."""
    seen: set[Node] = set()
    found: dict[int, Node] = {}
    waiting = list(targets)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in expanded or not passes(node, expanded):
            found[node.index] = node
        if passes(node, expanded):
            waiting.extend(node.inputs)
    return [found[index] for index in sorted(found)]
