"""One forward pass, watched: which linear layers it applies, to what, and what reads the result.

Note [Two views of a pass]: hooks see modules and dispatch sees operations. A module that
`ConvOperator` knows is taken whole from its hook, with its padding mode and its effective weight,
and the operations inside it are left out. Everything else is taken from the operations, so that a
convolution called as a function, in TorchScript or in an exported program is found as well.

Note [Stored or computed]: an operation whose arguments depend on the example input gives arrays
that depend on it; every other array is stored. Storages are known by their address, and each
operation says anew what its results are, so that an address may be used again.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from convspectra.models._gather import with_outer_padding
from convspectra.models._gradient_paths import Activation
from convspectra.models._linear_calls import (
    ATTENTIONS,
    CONVOLUTIONS,
    LinearCall,
    attention_weights,
    convolution_call,
    named_arguments,
    normalization_scale,
    product_call,
    product_factors,
)
from convspectra.models._moved_pixels import MovedPixels
from convspectra.models._selection import modules_of
from convspectra.models._signal_flow import SignalFlow
from convspectra.operator import (
    LAYER_TYPES,
    ConvOperator,
    convolution_options,
    has_own_forward,
)

_NOT_LINEAR: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "a recurrence is not a linear map of its input"),
    (nn.Bilinear, "it is linear in each of two inputs, not in one"),
    ((nn.Embedding, nn.EmbeddingBag), "a table that is looked up, not a map of an array"),
)
"""Modules with weights that are listed without an operator, and why."""

LAZY = "it is lazy and has no weight yet; run one forward pass first"
"""Reason for a module that gets its weight from a forward pass."""


@dataclass
class Reader:
    """Something that reads a layer's output: a batch normalization if it has a scale."""

    name: str
    scale: Tensor | None = None


@dataclass(eq=False)
class Use:
    """One application of a layer; `module` is set where it is one that was taken whole.

    `padding` is set where separate operations pad, too; `operator` contains it. `fed_by` has the
    mean square gain of a gradient from the input back to each layer before it.
    """

    name: str
    type: str
    operator: ConvOperator | None = None
    module: nn.Module | None = None
    input_size: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] | None = None
    padding_mode: str = "zeros"
    skipped: str = ""
    notes: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    fed_by: dict[Use, float] = field(default_factory=dict)
    activations: list[Activation] = field(default_factory=list)
    normalizations: list[str] = field(default_factory=list)
    reads_input: bool = False
    normalized: bool = False
    ends_branch: bool = False
    reads_concatenation: bool = False
    depth: int = 0


@dataclass(frozen=True)
class Frame:
    """A module whose forward pass is running.

    Attributes
    ----------
    name : str
    whole : bool
        Whether its operations are not looked at.
    layer : bool
        Whether it is a convolution or linear layer: what it applies has its name.
    before : int
        The number of uses before it.
    """

    name: str
    whole: bool
    layer: bool = False
    before: int = 0


class Recorder(TorchDispatchMode):
    """Collects the `uses` of layers while it is the active dispatch mode.

    Parameters
    ----------
    stored : dict of str to Tensor
        Parameters and buffers by their qualified names.
    lazy : mapping of str to str
        Names and types of modules without a weight, which are passed over.

    Notes
    -----
    Holds on to the output of every layer: memory is that of a forward pass with gradients.
    """

    supports_higher_order_operators = True  # torch.cond and the like

    def __init__(
        self, stored: dict[str, Tensor], lazy: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: list[Use] = []
        self.read: set[str] = set()
        self.reached: set[str] = set()
        self.taken: set[str] = set()
        self.frames: list[Frame] = []
        self._lazy = lazy
        self._views = {_view(t): name for name, t in reversed(stored.items()) if t.numel()}
        self._sources = {_storage(t): name for name, t in reversed(stored.items()) if t.numel()}
        self._stored = set(self._sources)
        self._dependent: set[int] = set()
        self._outputs: dict[int, tuple[Tensor, Use]] = {}
        self._pixels = MovedPixels(self._depends)
        self._last_pixels = MovedPixels(self._depends, restarts=True)
        self._counts: dict[str, int] = {}
        self.flow = SignalFlow()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note what it says of the layers."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # what is inside runs unseen
            result = func(*args, **kwargs)
            self._dependent.update(_storage(t) for t in _tensors(result))
            return result
        # In inference mode composite operations arrive whole.
        if func.name().startswith("aten::") and _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._note_readers(func, args, kwargs)
        self._note_added(func, _tensors((args, kwargs)))
        self.flow.note(func, args, kwargs, result)
        if not any(frame.whole for frame in self.frames):
            self._note_layer(func, args, kwargs, result)
        if func.namespace == "aten":
            where = self.frames[-1].name if self.frames else ""
            self._pixels.note(func, args, kwargs, result, where)
            self._last_pixels.note(func, args, kwargs, result, where)
        self._note_origin(func, _tensors((args, kwargs)), _tensors(result))
        return result

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """See the modules of a model too, besides the operations (Note [Two views of a pass])."""
        handles = []
        try:
            for name, module in modules_of(model):
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                before = functools.partial(self._enter, name)
                after = functools.partial(self._leave, name)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(
                    module.register_forward_hook(after, with_kwargs=True, always_call=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.reached.add(name)
        whole = name in self._lazy or _taken_whole(module)
        self.frames.append(Frame(name, whole, isinstance(module, LAYER_TYPES), len(self.uses)))

    def _leave(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not self.frames:  # what is called after an error that came before the module
            return
        *outside, frame = self.frames
        if output is not None and frame.whole and not any(outer.whole for outer in outside):
            self.taken.add(name)
            x: Any = args[0] if args else kwargs.get("input")
            reason = LAZY if name in self._lazy else not_linear(module)
            if isinstance(module, nn.Embedding) and not any(map(self._depends, _tensors(x))):
                pass  # positions: a constant that is added, not a layer
            elif reason:
                kind = self._lazy.get(name, type(module).__name__)
                self.add(Use(name, kind, skipped=reason))
            elif isinstance(module, nn.MultiheadAttention):
                for use in _attention_uses(name, module):
                    self.add(use)
            else:
                self.add(self._module_use(name, module, x, output), output, x)
        elif frame.layer and len(inside := self.uses[frame.before :]) == 1:
            # Its own forward pass is one convolution.
            inside[0].module, inside[0].type = module, type(module).__name__
        self.frames.pop()

    def _module_use(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> Use:
        weight, options = convolution_options(module)
        ndim = weight.ndim - 2
        size = tuple(x.shape[x.ndim - ndim :])
        use = Use(name, type(module).__name__, module=module, input_size=size)
        try:
            op = ConvOperator(weight.detach(), size, **options)
            if options.get("transposed"):
                op = _with_output_size(op, size, options, output)
            self._set_operator(use, op, x)
        except ValueError as error:
            use.skipped = str(error)
        return use

    def _set_operator(self, use: Use, op: ConvOperator, x: Tensor) -> None:
        use.operator, note = with_outer_padding(
            op, self._pixels.gather(x), lambda: self._last_pixels.gather(x)
        )
        if use.operator is not op:
            padded = use.operator.geometry
            use.input_size = padded.input_size
            use.padding, use.padding_mode = padded.padding, padded.padding_mode
        if note:
            use.notes.append(note)

    def depend(self, value: Any) -> None:
        """Take the arrays in an example input as what everything else may depend on."""
        self._dependent.update(_storage(t) for t in _tensors(value))
        self.flow.start(value)

    def add(self, use: Use, output: object = None, x: object = None) -> None:
        """Put a use on the list with its input, and watch who reads its output."""
        self.uses.append(use)
        self.flow.begin(use, x)
        self.flow.end(use, output)
        if isinstance(output, Tensor):
            self._outputs[id(output)] = (output, use)

    def returned(self, value: Any) -> None:
        """The model's own output counts as read."""
        self._read_by(Reader("the model's output"), _tensors(value))
        self.flow.returned(value)

    def _read_by(self, reader: Reader, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self._outputs:
                self._outputs[id(tensor)][1].readers.append(reader)

    def _note_readers(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = _tensors((args, kwargs))
        if not any(id(t) in self._outputs for t in tensors):
            return
        name = func._schema.name
        arguments = named_arguments(func, args, kwargs)
        scale = normalization_scale(name, arguments)
        label = self.frames[-1].name if self.frames else ""
        if scale is not None:
            label = self._owner(arguments["running_var"], label)
        self._read_by(Reader(label or name.removeprefix("aten::"), scale), tensors)

    def _note_added(self, func: torch._ops.OpOverload, tensors: list[Tensor]) -> None:
        """Parameters that are added or put beside, as embeddings of positions: no layer."""
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        added = name in ("add", "sub", "cat", "stack") or "scaled_dot_product" in name
        if added and any(map(self._depends, tensors)):
            for t in tensors:
                source = self._views.get(_view(t)) or self._sources.get(_storage(t))
                if source is not None and not self._depends(t):
                    self.read.add(source)

    def _note_layer(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        name = func._schema.name
        if name in ATTENTIONS:
            for weight in attention_weights(named_arguments(func, args, kwargs)):
                for use in self._attention_call(weight) or [
                    _linear_use(self._label(weight, "Linear"), weight)
                ]:
                    self.add(use)
        elif name in CONVOLUTIONS:
            call = convolution_call(named_arguments(func, args, kwargs))
            self.add(self._call_use(call, self._depends(call.weight)), result, call.input)
        elif (factors := product_factors(name, named_arguments(func, args, kwargs))) is not None:
            left, right = (self._is_weight(factor) for factor in factors)
            if left == right:  # a product of two arrays, or part of a weight's computation
                return
            call_or_none = product_call(*factors, weight_is_left=left)
            if call_or_none is not None:
                uses = self._attention_call(call_or_none.weight)
                for use in uses:
                    self.add(use)
                if not uses:
                    self.add(self._call_use(call_or_none, False), result, call_or_none.input)
            else:
                label = self._label(factors[0] if left else factors[1], "Linear")
                reason = "a product with a batch of stored matrices is not supported"
                self.add(Use(label, "Linear", skipped=reason))
        elif func.namespace != "aten" and any(w in name for w in ("conv", "linear")):
            reason = f"{name} is not an operation of PyTorch's floating layers"
            self.add(Use(self._label(None, "Linear"), name, skipped=reason))

    def _call_use(self, call: LinearCall, computed: bool) -> Use:
        use = Use(self._label(call.weight, call.type), call.type, input_size=call.input_size)
        if computed:
            use.skipped = "its weight is computed from the input"
            return use
        source = self._sources.get(_storage(call.weight))
        if source is not None and _view(call.weight) not in self._views:
            if _storage(call.weight) not in self._stored:
                use.notes.append(f"its weight is computed from {_without_parametrizations(source)}")
            else:
                use.notes.append(f"its weight is a part of {source}")
                if source.endswith(use.name):
                    use.name += _rows(call.weight)
        try:
            weight = call.weight.detach()
            op = ConvOperator(weight, call.input_size, **_padding_of(call))
            self._set_operator(use, op, call.input)
        except ValueError as error:
            use.skipped = str(error)
        return use

    def _attention_call(self, weight: Tensor) -> list[Use]:
        """The maps in a product with the packed weight of an attention, or with a part of it."""
        name = self._sources.get(_storage(weight), "")
        size = weight.shape[1]
        packed = name.rpartition(".")[2] == "in_proj_weight" and _storage(weight) in self._stored
        if not packed or weight.stride() != (size, 1) or len(weight) % size:
            return []
        self.read.add(name)
        first = weight.storage_offset() // size**2
        parts = ("query", "key", "value")[first : first + len(weight) // size]
        prefix = name.removesuffix("in_proj_weight")
        return [
            _linear_use(f"{prefix}{part}", block)
            for part, block in zip(parts, weight.split(size), strict=False)
        ]

    def _is_weight(self, tensor: Tensor) -> bool:
        return not self._depends(tensor)

    def _depends(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._dependent

    def _label(self, weight: Tensor | None, kind: str) -> str:
        """The qualified name of a weight's module; the running module's, or a number, without."""
        owner = "" if weight is None else self._owner(weight, "")
        if self.frames and self.frames[-1].layer:
            owner = self.frames[-1].name or owner
        if owner:
            return owner
        stem = ".".join(
            part for part in (self.frames[-1].name if self.frames else "", kind.lower()) if part
        )
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}_{self._counts[stem]}"

    def _owner(self, tensor: Tensor, default: str) -> str:
        name = self._views.get(_view(tensor)) or self._sources.get(_storage(tensor))
        if name is None:
            return default
        self.read.add(name)
        if ".parametrizations." in f".{name}":
            return _without_parametrizations(name).rpartition(".")[0] or default
        owner, _, last = name.rpartition(".")
        plain = last in ("weight", "running_var", "weight_v", "weight_orig")
        return owner if plain and owner else name

    def _note_origin(
        self, func: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if func._schema.name.startswith(
            "aten::lift"
        ):  # made out of sight, at an address used again
            for key in {_storage(t) for t in inputs} - self._stored:
                self._dependent.discard(key)
                self._sources.pop(key, None)
        dependent = any(self._depends(t) for t in inputs)
        if func._schema.is_mutable and dependent:
            outputs = outputs + [t for t in inputs[:1] if not self._depends(t)]
        read = [_storage(t) for t in inputs]
        names = (self._sources.get(key) for key in read)
        source = next((name for name in names if name is not None), None)
        for tensor in outputs:
            key = _storage(tensor)
            if dependent:
                self._dependent.add(key)
                self._sources.pop(key, None)
                continue
            self._dependent.discard(key)
            if source is not None and key in read:
                self._sources.setdefault(key, source)
            elif source is not None:  # the address may have been that of another array
                self._sources[key] = source
            elif tensor.numel():
                self._sources.pop(key, None)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and, of a frozen TorchScript module, constants by name."""
    every = (*model.named_parameters(), *model.named_buffers())
    stored = {name: tensor for name, tensor in every if not is_lazy(tensor)}
    if isinstance(model, torch.jit.ScriptModule):
        stored.update(_script_constants(model))
    return stored


def _without_parametrizations(name: str) -> str:
    """The name of the parameter that a tensor of its parametrization stands for.

    Examples
    --------
    >>> _without_parametrizations("net.0.parametrizations.weight.original0")
    'net.0.weight'
    """
    module, _, rest = f".{name}".partition(".parametrizations.")
    return f"{module}.{rest.partition('.')[0]}".strip(".")


def is_lazy(tensor: Tensor) -> bool:
    """Whether a parameter or buffer has no shape yet."""
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _taken_whole(module: nn.Module) -> bool:
    """Whether a module's operations need no look: it is known, or known not to be linear."""
    if not_linear(module):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return type(module).forward is nn.MultiheadAttention.forward
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return isinstance(module, LAYER_TYPES) and not lazy and not has_own_forward(module)


def not_linear(module: nn.Module) -> str:
    """Why a module is no linear map of its input; "" where nothing is known against it."""
    return next((reason for kind, reason in _NOT_LINEAR if isinstance(module, kind)), "")


def _attention_uses(name: str, module: nn.MultiheadAttention) -> Iterator[Use]:
    """The three maps into attention and the one out of it."""
    if module.in_proj_weight is None:
        into = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        into = module.in_proj_weight.chunk(3)
    weights = dict(zip(("query", "key", "value"), into, strict=True))
    for part, weight in {**weights, "out_proj": module.out_proj.weight}.items():
        yield _linear_use(f"{name}.{part}".lstrip("."), weight)


def _linear_use(name: str, weight: Tensor) -> Use:
    use = Use(name, "Linear")
    try:
        use.operator = ConvOperator(weight.detach(), ())
    except ValueError as error:
        use.skipped = str(error)
    return use


def _rows(weight: Tensor) -> str:
    """Which rows of a stored array a weight is, as an index; where it begins, if it is no rows."""
    start, size = weight.storage_offset(), math.prod(weight.shape[1:])
    if weight.is_contiguous() and start % size == 0:
        return f"[{start // size}:{start // size + len(weight)}]"
    return f"[from {start}]"


def _script_constants(model: torch.jit.ScriptModule) -> Iterator[tuple[str, Tensor]]:
    graph: Any = model.inlined_graph  # kept alive: its nodes do not keep it
    for node in graph.findAllNodes("prim::Constant"):
        value = node.output()
        tensor = value.toIValue() if value.type().kind() == "TensorType" else None
        if isinstance(tensor, Tensor) and tensor.ndim > 1 and not value.debugName().isdigit():
            yield value.debugName().removeprefix("self."), tensor


def _with_output_size(
    op: ConvOperator, size: tuple[int, ...], options: dict[str, Any], output: Tensor
) -> ConvOperator:
    """The transposed layer as called, perhaps with an ``output_size``."""
    spatial = op.output_shape[1:]
    actual = tuple(output.shape[output.ndim - len(spatial) :])
    if actual == spatial:
        return op
    extra = tuple(
        p + n - m for p, n, m in zip(options["output_padding"], actual, spatial, strict=True)
    )
    return ConvOperator(op.weight, size, **{**options, "output_padding": extra})


def _padding_of(call: LinearCall) -> dict[str, Any]:
    return call.options if call.input_size else {}


def _is_composite(func: torch._ops.OpOverload) -> bool:
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return id(tensor)  # sparse, or in pieces on several ranks: there is no one address
    return tensor.untyped_storage().data_ptr()


def _view(tensor: Tensor) -> tuple[int, int, int]:
    offset = tensor.storage_offset() if tensor.layout is torch.strided else 0
    return _storage(tensor), int(offset), tensor.numel()
