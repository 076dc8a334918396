"""The linear map between two places of a traced network, and its norm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convspectra.network._frozen import quiet
from convspectra.network._lipschitz_parts import passes
from convspectra.network._lipschitz_rules import Linear, Slopes
from convspectra.network._lipschitz_trace import Node
from convspectra.operator import (
    ConvOperator,
    LinearOperatorLike,
    derived_operator,
    scaled_outputs,
)
from convspectra.spectra import norm_bound, svds

AT_ONCE = 16
"""Arrays in one batched product. A choice: it bounds the memory to so many times that of one pass,
and changes no answer."""
TOLERANCE = 1e-4
"""Relative accuracy of a norm. Upper ends are used, so that a coarser one only widens the bound: by
about so much for every layer."""
DENSE_SIDE = 512
"""Smaller side up to which a composed map is formed, in as many products: half a second. Above it
Lanczos takes fewer products, and its upper end is 1 to 2 % above the norm."""
WIDE = 1e-3
"""Relative width of the enclosure of a layer's norm from which on `norm_bound` is asked, too. Upper
ends by iterations are up to 5 % above the norm, and `norm_bound` is 0.02 to 0.3 %."""


@dataclass(frozen=True)
class Norm:
    """The norm of a linear map: an upper bound, and the way to it, as `svds` calls it."""

    upper: float
    method: str


class LinearMap:
    """A linear map from one array of the graph to others, side by side, by replaying operations.

    Parameters
    ----------
    source : Node
    targets : sequence of Node
    expanded : set of Node
        Activations that are passed through, by the slope in their middle.
    like : Tensor
        Of the dtype and device of the arrays.
    before, behind : Tensor, optional
        Factors of the source and of the target, of shapes that broadcast.
    """

    def __init__(
        self,
        source: Node,
        targets: Sequence[Node],
        expanded: frozenset[Node],
        like: Tensor,
        *,
        before: Tensor | None = None,
        behind: Tensor | None = None,
    ) -> None:
        self.source, self.targets = source, tuple(targets)
        self._before, self._after = before, behind
        self.program = _program(source, self.targets, expanded)
        self._like = like
        self._graph: tuple[Tensor, Tensor] | None = None
        self._batched = {"forward": True, "adjoint": True}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the source."""
        return self.source.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the target; a flat one for several."""
        sizes = [math.prod(target.shape) for target in self.targets]
        return self.targets[0].shape if len(sizes) == 1 else (sum(sizes),)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return math.prod(self.output_shape), math.prod(self.input_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Double precision."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._like.device

    def apply(self, x: Tensor) -> Tensor:
        """The products with a batch of arrays."""
        with torch.no_grad(), quiet():
            return torch.cat([self._forward(part) for part in x.split(AT_ONCE)])

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """The products of the transpose with a batch of arrays."""
        with quiet():
            return torch.cat([self._adjoint(part) for part in y.split(AT_ONCE)])

    def replay(self, value: Tensor) -> Tensor:
        """The target for one value of the source."""
        first = value if self._before is None else value * self._before
        values: dict[Node, Tensor] = {self.source: first}
        for node in self.program:
            given = [values.get(n) for n in node.inputs]
            if isinstance(node.rule, Slopes):
                assert given[0] is not None
                values[node] = node.rule.center * given[0]
                continue
            assert isinstance(node.rule, Linear)
            filled = [
                value.new_zeros(n.shape) if v is None else v
                for n, v in zip(node.inputs, given, strict=True)
            ]
            values[node] = node.rule.map(filled)
        parts = [
            values[t] if t in values else value.new_zeros(t.shape) for t in self.targets
        ]  # fmt: skip
        if len(parts) == 1:
            return parts[0] if self._after is None else parts[0] * self._after
        return torch.cat([part.reshape(-1) for part in parts])

    def _forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 and self._batched["forward"]:
            with contextlib.suppress(RuntimeError):
                return torch.func.vmap(self.replay)(x)
            self._batched["forward"] = False
        return torch.stack([self.replay(row) for row in x])

    def _adjoint(self, y: Tensor) -> Tensor:
        if self._graph is None:
            z = torch.zeros(
                self.input_shape, dtype=self.dtype, device=self.device, requires_grad=True
            )
            with torch.enable_grad():
                self._graph = z, self.replay(z)
        z, output = self._graph

        def product(y: Tensor, batched: bool) -> Tensor:
            return torch.autograd.grad(
                output, z, y, retain_graph=True, is_grads_batched=batched, materialize_grads=True
            )[0]

        if len(y) > 1 and self._batched["adjoint"]:
            with contextlib.suppress(RuntimeError):
                return product(y, True)
            self._batched["adjoint"] = False
        return torch.stack([product(row, False) for row in y])

    def norm(self) -> Norm:
        """An upper bound on the norm, by the cheapest way that gives the norm itself."""
        if not self.reaches:
            return Norm(0.0, "factors")
        if self._is_diagonal():
            # Each entry is at most one entry of the source, times a factor.
            ones = torch.ones(1, *self.input_shape, dtype=self.dtype, device=self.device)
            return Norm(float(self.apply(ones).abs().amax()), "factors")
        layer = self.layer()
        return norm_of(self if layer is None else layer)

    @property
    def reaches(self) -> bool:
        """Whether there is a path."""
        made = {self.source, *self.program}
        return any(target in made for target in self.targets)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for maps that differ in additions of other arrays only."""
        chain = self._chain
        shape = self.targets[0].shape if len(self.targets) == 1 else self.targets
        scaled = id(self._before), id(self._after)
        if chain is None:
            return self.source, self.targets, tuple(self.program), scaled
        steps = [node for node, scale in chain if scale is None or not bool((scale == 1).all())]
        return self.source, shape, tuple(steps), scaled

    @cached_property
    def _chain(self) -> list[tuple[Node, Tensor | None]] | None:
        """The operations, with their factors where they only multiply, if each reads one array."""
        last, chain = self.source, []
        for node in self.program:
            if [n for n in node.inputs if n is last] != [last] or self._reads(node) != 1:
                return None
            rule = node.rule
            scale = None
            if isinstance(rule, Slopes):
                scale = self._like.new_tensor(rule.center)
            elif isinstance(rule, Linear) and rule.scales is not None:
                scale = rule.scales[node.inputs.index(last)]
            chain.append((node, scale))
            last = node
        return chain if self.targets == (last,) else None

    def _reads(self, node: Node) -> int:
        made = {self.source, *self.program}
        return sum(n in made for n in node.inputs)

    def _is_diagonal(self) -> bool:
        return self._chain is not None and all(
            scale is not None or (isinstance(node.rule, Linear) and node.rule.moves)
            for node, scale in self._chain
        )

    def layer(self) -> ConvOperator | None:
        """The map as one layer with its inputs and outputs scaled; None if it is not one."""
        chain = self._chain or []
        layers = [_layer_of(node) for node, _ in chain]
        if sum(layer is not None for layer in layers) != 1:
            return None
        place = next(i for i, layer in enumerate(layers) if layer is not None)
        found = layers[place]
        assert found is not None
        entries = self._like.new_ones(self.source.shape)
        if self._before is not None:
            entries = entries * self._before
        for node, scale in chain[:place]:
            if scale is not None:
                entries = entries * scale
            elif _keeps_all(node):
                assert isinstance(node.rule, Linear)
                entries = node.rule.map([entries])
            else:
                return None
        op = scaled_channels(found.T, entries, (1, *found.input_shape))
        op = None if op is None else op.T
        for node, scale in chain[place + 1 :]:
            if op is None or (scale is None and not _keeps_all(node)):
                return None
            if scale is not None:
                op = scaled_channels(op, scale, node.shape)
        if op is None or self._after is None:
            return op
        return scaled_channels(op, self._after, self.targets[0].shape)


def _layer_of(node: Node) -> ConvOperator | None:
    return node.rule.layer if isinstance(node.rule, Linear) else None


def _keeps_all(node: Node) -> bool:
    """Whether an operation of one array moves all of its entries, and writes no other."""
    rule = node.rule
    sizes = {math.prod(node.shape), *(math.prod(n.shape) for n in node.inputs)}
    return isinstance(rule, Linear) and rule.moves and len(sizes) == 1


class SideBySide:
    """Linear maps of several arrays to one place, [T_1 s_1, T_2 s_2, ...], as one operator."""

    def __init__(self, maps: Sequence[LinearMap], factors: Sequence[float]) -> None:
        self._maps, self._factors = maps, factors
        self._sizes = [math.prod(m.input_shape) for m in maps]
        self.input_shape: tuple[int, ...] = (sum(self._sizes),)
        self.output_shape = maps[0].output_shape
        self.shape = (maps[0].shape[0], sum(self._sizes))
        self.dtype, self.device = maps[0].dtype, maps[0].device

    def apply(self, x: Tensor) -> Tensor:
        """The products with a batch of arrays."""
        parts = x.split(self._sizes, dim=1)
        total = x.new_zeros(len(x), *self.output_shape)
        for part, m, factor in zip(parts, self._maps, self._factors, strict=True):
            total += factor * m.apply(part.reshape(-1, *m.input_shape))
        return total

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """The products of the transpose with a batch of arrays."""
        pairs = zip(self._maps, self._factors, strict=True)
        return torch.cat([f * m.apply_adjoint(y).reshape(len(y), -1) for m, f in pairs], dim=1)

    def norm(self) -> Norm:
        """An upper bound on the norm."""
        return norm_of(self)


def norm_of(op: LinearOperatorLike | ConvOperator) -> Norm:
    """The upper end of the enclosure of an operator's norm, or a bound that is nearer."""
    small = not isinstance(op, ConvOperator) and min(op.shape) <= DENSE_SIDE
    method = "dense" if small else "auto"
    result = svds(op, 1, "LM", return_singular_vectors=False, method=method, tol=TOLERANCE)
    found = Norm(float(result.upper[0]), result.method)
    if isinstance(op, ConvOperator) and found.upper > (1 + WIDE) * float(result.s[0]):
        with contextlib.suppress(ValueError):  # too large
            bound = norm_bound(op)
            return Norm(bound, "norm_bound") if bound < found.upper else found
    return found


def scaled_channels(op: ConvOperator, scale: Tensor, shape: tuple[int, ...]) -> ConvOperator | None:
    """The layer with its output channels scaled; None if the factors differ within a channel.

    Parameters
    ----------
    op : ConvOperator
    scale : Tensor
        Of a shape that broadcasts with `shape`.
    shape : tuple of int
        (1, *op.output_shape), or another, for which there is no such layer.
    """
    if shape != (1, *op.output_shape):
        return None
    factors = scale.expand(shape).reshape(shape[1], -1)
    if not bool((factors == factors[:, :1]).all()):
        return None
    weight = scaled_outputs(op.weight, factors[:, 0], op.groups, op.transposed)
    return derived_operator(weight, op.geometry, op.groups, op.transposed)


def _program(source: Node, targets: tuple[Node, ...], expanded: frozenset[Node]) -> list[Node]:
    """The operations on the paths from the source to the targets, in their order."""
    back: dict[int, Node] = {}
    waiting = [t for t in targets if t is not source]
    while waiting:
        node = waiting.pop()
        if node.index <= source.index or node.index in back or not passes(node, expanded):
            continue
        back[node.index] = node
        waiting.extend(node.inputs)
    made, program = {source}, []
    for index in sorted(back):
        node = back[index]
        if any(n in made for n in node.inputs):
            made.add(node)
            program.append(node)
    return program
