"""One forward pass as a graph of the arrays that depend on the input.

Note [Writes in place]. A storage is written to through any of its views. Each write makes a new
state of the storage, which knows what was written where; an array that is read after a write to its
storage through another array is a view of the newest state. So the graph has no writes.

Note [The same graph for every input]. Operations are taken as they are applied at one input. A
bound for all inputs needs that none of them is chosen by the values of an array: whatever takes a
number out of one that depends on the input is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convspectra.models import Arguments
from convspectra.network._lipschitz_rules import (
    Call,
    Linear,
    LinearMap,
    Refused,
    Rule,
    Slopes,
    rule_of,
)

_TAKES_NUMBERS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique")
"""Operations whose result, or its shape, a model may choose its next operation by."""
_MAKES_NEW = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros",
              "new_ones", "new_full", "new_empty_strided")  # fmt: skip
"""Operations that read the shape of an array only."""
_SEVERAL = ("split", "split_with_sizes", "unbind", "chunk")
"""Operations that give a list of arrays, each linear."""
_LEAVES = ("tolist", "numpy", "__array__", "data_ptr")
"""Methods of a tensor that take it out of PyTorch."""
_WRITES = "it writes into an array that it is given"
"""The reason for results that are written elsewhere."""
_WITHOUT_GRADIENT = (
    "it runs without gradients, in torch.no_grad() or in a function with a backward of its own: "
    "the derivative that gradients see may be another one"
)
"""The reason for operations that gradients do not see."""
_ELEMENTWISE: tuple[tuple[type[nn.Module], Slopes], ...] = (
    (nn.Softsign, Slopes(0.0, 1.0)),
    (nn.Tanhshrink, Slopes(0.0, 1.0)),
)
"""Activations that PyTorch puts together from several operations."""


@dataclass(eq=False)
class Node:
    """An array that depends on the input.

    Attributes
    ----------
    index : int
        Place in the pass.
    operation : str
        What made it, as ATen calls it; "input" for the input.
    module : str
        Name of the module that was running, or of the weight of an operation outside of any.
    kind : str
        Type of that module.
    shape : tuple of int
    inputs : tuple of Node
    rule : rule of the operation
    """

    index: int
    operation: str
    module: str
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[Node, ...]
    rule: Rule

    @property
    def place(self) -> str:
        """Where it was made, in words."""
        where = f"module {self.module!r} ({self.kind})" if self.module else "the model's forward"
        return f"operation {self.operation!r} in {where}"


@dataclass
class _State:
    """A storage after a write: `node` stands at `layout` (size, stride, offset), else `before`."""

    node: Node | None
    layout: tuple[Any, ...]
    before: _State | None = None
    version: int = 0
    flat: list[Node | None] = field(default_factory=list)


class Tape(TorchDispatchMode):
    """Collects the `nodes` of a pass while it is the active dispatch mode.

    Parameters
    ----------
    x : Tensor
        The input, of which no other array shares the storage.
    names : dict of int to str
        Names of weights by the address of their storage.
    """

    supports_higher_order_operators = True  # to refuse them by name

    def __init__(self, x: Tensor, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._constants: list[tuple[Tensor, int, str]] = []
        self._kept: list[Tensor] = []
        self.nodes: list[Node] = []
        self.frames: list[tuple[str, nn.Module]] = []
        self._names = names
        self._known: dict[int, tuple[Tensor, Node, int]] = {}
        self._states: dict[int, _State] = {}
        self._silent = 0
        self._label = ("", "")
        self._remember(x, self._add("input", x.shape, (), Linear(lambda values: values[0])))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note what it makes of the input."""
        kwargs = kwargs or {}
        if self._silent:
            return func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = {id(t): node for t in given if (node := self.node(t)) is not None}
        self._label = self._place(given)
        plain = isinstance(func, torch._ops.OpOverload)
        name = func._schema.name.split("::")[-1] if plain else str(func)
        if sources and (name in _TAKES_NUMBERS or not plain):
            raise ValueError(
                f"expected operations that do not depend on the values of the input, got {name!r} "
                f"in {self._where()}: the bound is to hold for every input; take this choice out"
            )
        result = func(*args, **kwargs)
        if sources and name not in _MAKES_NEW:
            self._note(func, name, args, kwargs, sources, result)
        return result

    def node(self, t: Tensor) -> Node | None:
        """The node of an array as it is now; None for one that does not depend on the input."""
        state = self._states.get(_address(t)) if t.numel() else None
        if state is None:
            return None
        known = self._known.get(id(t))
        if known is not None and known[2] == state.version:
            return known[1]
        flat = self._flat(state, t)
        if flat is None:
            return None
        places = _places(flat.shape[0], _layout(t), t.device)
        rule = Linear(lambda values: values[0][places].reshape(t.shape))
        node = self._add("as_strided", t.shape, (flat,), rule)
        self._known[id(t)] = (t, node, state.version)
        return node

    def enter(self, name: str, module: nn.Module) -> None:
        """A module begins."""
        self.frames.append((name, module))
        self._silent += _slopes(module) is not None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module ends; one that is an activation as a whole becomes one node."""
        slopes = _slopes(module)
        if slopes is not None:
            self._silent -= 1
            source = self.node(args[0]) if args and isinstance(args[0], Tensor) else None
            if source is not None and not self._silent:
                name = type(module).__name__.lower()
                self._label = self._place([])
                self._remember(output, self._add(name, output.shape, (source,), slopes))
        self.frames.pop()

    def _note(
        self,
        func: torch._ops.OpOverload,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: dict[int, Node],
        result: Any,
    ) -> None:
        schema = func._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        arguments |= {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        written: list[Any] = [
            arguments[a.name]
            for a in schema
            if a.alias_info is not None and a.alias_info.is_write and arguments[a.name] is not None
        ]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        tensors = tree_leaves(arguments)
        order = tuple(sources[id(t)] for t in tensors if isinstance(t, Tensor) and id(t) in sources)
        into = name.endswith("_") and bool(written) and isinstance(written[0], Tensor)
        into = into and written[0] is arguments.get("self")
        base = name[:-1] if into else name
        if into and base in ("zero", "fill") and list(sources) == [id(written[0])]:
            self._write(written[0], None)
            return
        others = [t for t in tree_leaves(written[1:] if into else written) if isinstance(t, Tensor)]
        for t in others:
            self._write(t, self._add(base, t.shape, order, Refused(_WRITES)))
        self._constants += [
            (t, t._version, base)
            for t in tensors
            if isinstance(t, Tensor) and id(t) not in sources and all(t is not w for w in written)
        ]
        refused = any(isinstance(node.rule, Refused) for node in order)
        for i, t in enumerate(results):
            if not t.numel() or any(t is other for other in others):
                continue
            if refused:
                rule: Rule = Refused("it reads what has no bound")
            elif not torch.is_grad_enabled():
                rule = Refused(_WITHOUT_GRADIENT)
            else:
                rule = _rule(func, base, arguments, sources, results, i)
            self._record(t, base, order, rule, into and t is written[0])

    def check_constants(self) -> None:
        """Raise a ValueError if an array was read as a constant and written to afterwards."""
        for t, version, name in self._constants:
            if t._version != version:
                raise ValueError(
                    f"expected constants to stay as they are, got one of shape {tuple(t.shape)}, "
                    f"read by operation {name!r}, that is written to later in the same pass"
                )

    def _record(
        self, t: Tensor, name: str, inputs: tuple[Node, ...], rule: Rule, into: bool
    ) -> None:
        node = self._add(name, t.shape, inputs, rule)
        if into:
            self._write(t, node)
        else:
            self._remember(t, node)

    def _add(self, name: str, shape: torch.Size, inputs: tuple[Node, ...], rule: Rule) -> Node:
        module, kind = self._label
        node = Node(len(self.nodes), name, module, kind, tuple(shape), inputs, rule)
        self.nodes.append(node)
        return node

    def _remember(self, t: Tensor, node: Node) -> None:
        state = self._states.setdefault(_address(t), _State(node, _layout(t)))
        self._known[id(t)] = (t, node, state.version)

    def _write(self, t: Tensor, node: Node | None) -> None:
        before = self._states.get(_address(t))
        version = 0 if before is None else before.version + 1
        self._states[_address(t)] = _State(node, _layout(t), before, version)
        self._kept.append(t)  # so that its address is not used again
        if node is None:
            self._known.pop(id(t), None)
        else:
            self._known[id(t)] = (t, node, version)

    def _flat(self, state: _State, t: Tensor) -> Node | None:
        """All of a storage as one flat array; None if it does not depend on the input."""
        if not state.flat:
            under = None if state.before is None else self._flat(state.before, t)
            inputs = tuple(n for n in (under, state.node) if n is not None)
            length = t.untyped_storage().nbytes() // t.element_size()
            node = None
            if inputs:
                rule = Linear(_scattered(length, under is not None, state, t.device))
                refused = [n for n in inputs if isinstance(n.rule, Refused)]
                node = self._add(
                    "as_strided_scatter",
                    torch.Size([length]),
                    inputs,
                    Refused("it reads what has no bound") if refused else rule,
                )
            state.flat.append(node)
        return state.flat[0]

    def _place(self, tensors: list[Tensor]) -> tuple[str, str]:
        if self.frames and self.frames[-1][0]:
            name, module = self.frames[-1]
            return name, type(module).__name__
        names = [self._names[_address(t)] for t in tensors if _address(t) in self._names]
        return (names[0], "weight") if names else ("", "")

    def _where(self) -> str:
        module, kind = self._label
        return f"module {module!r} ({kind})" if module else "the model's forward"


class _StaysInside(TorchFunctionMode):
    """Refuses to take an array that depends on the input out of PyTorch."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES and isinstance(args[0], Tensor) and self._tape.node(args[0]) is not None:
            raise ValueError(
                f"expected operations that do not depend on the values of the input, got "
                f"Tensor.{name}: the bound is to hold for every input; take this choice out"
            )
        return func(*args, **(kwargs or {}))


def traced(
    model: nn.Module, inputs: Arguments, select: Callable[[Any], Tensor]
) -> tuple[Node, Node]:
    """The graph of a frozen model, by the nodes of its input and of its output.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode and float64; hooks are added for the pass.
    inputs : Arguments
        The first is what the graph is of.
    select : callable
        From the model's output to the tensor that is meant.

    Raises
    ------
    ValueError
        For a choice by values of the input, an output that does not depend on it, or one that
        depends on it by an operation without a bound: the operation and its module are named.

    Notes
    -----
    Cost: one pass. Memory: all arrays of the pass.
    """
    x = inputs.first.clone(memory_format=torch.contiguous_format)
    stored = (*model.named_parameters(), *model.named_buffers())
    tape = Tape(x, {_address(t): name for name, t in reversed(stored) if t.numel()})
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            stack.enter_context(_watched(tape, name, module))
        stack.enter_context(torch.enable_grad())  # and nothing here has a gradient
        stack.enter_context(_StaysInside(tape))
        stack.enter_context(tape)
        output = select(inputs.with_first(x).run(model))
        end = tape.node(output)
        tape.check_constants()
    if end is None:
        raise ValueError("expected an output that depends on the input, got one that does not")
    for node in ancestors(end):
        if isinstance(node.rule, Refused):
            raise ValueError(
                f"expected operations with a Lipschitz bound, got {node.place}: {node.rule.reason}"
            )
    return tape.nodes[0], end


def ancestors(end: Node) -> list[Node]:
    """All nodes that one depends on, and itself, in the order of the pass."""
    found: dict[int, Node] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node.index not in found:
            found[node.index] = node
            waiting.extend(node.inputs)
    return [found[index] for index in sorted(found)]


@contextlib.contextmanager
def _watched(tape: Tape, name: str, module: nn.Module) -> Iterator[None]:
    def before(module: nn.Module, args: Any) -> None:
        tape.enter(name, module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        tape.leave(module, args, output)

    handles = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rule(
    func: torch._ops.OpOverload,
    name: str,
    arguments: dict[str, Any],
    sources: dict[int, Node],
    results: list[Tensor],
    i: int,
) -> Rule:
    """The rule of the i-th result."""
    several = name in _SEVERAL
    if several or i == 0:
        functional = _Item(func, i) if several else _functional(func, name)
        return rule_of(Call(functional, name, arguments, lambda t: id(t) in sources, results[i:]))
    return Refused("no bound is known for this result of it")


def _functional(func: torch._ops.OpOverload, name: str) -> Any:
    """The operation that gives what this one writes in place."""
    if not func._schema.name.endswith("_"):
        return func
    packet = getattr(getattr(torch.ops, func.namespace), name, None)
    return func if packet is None else getattr(packet, func._overloadname, func)


class _Item:
    """One of the several results of an operation."""

    def __init__(self, func: torch._ops.OpOverload, i: int) -> None:
        self._func, self._i, self.tags = func, i, func.tags

    def __call__(self, /, **arguments: Any) -> Tensor:
        return self._func(**arguments)[self._i]


def _slopes(module: nn.Module) -> Slopes | None:
    return next((slopes for kind, slopes in _ELEMENTWISE if type(module) is kind), None)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _layout(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), tuple(t.stride()), t.storage_offset()


def _places(length: int, layout: tuple[Any, ...], device: torch.device) -> Tensor:
    """The places of an array's entries in its storage, one after another.

    Indices, since the adjoint of `as_strided` is wrong in a batch.
    """
    return torch.arange(length, device=device).as_strided(*layout).reshape(-1)


def _scattered(length: int, under: bool, state: _State, device: torch.device) -> LinearMap:
    places, written = _places(length, state.layout, device), state.node is not None

    def apply(values: Sequence[Tensor]) -> Tensor:
        first = values[0]
        base = first if under else first.new_zeros(length)
        new = values[-1].reshape(-1) if written else first.new_zeros(len(places))
        return base.scatter(0, places, new)

    return apply
