"""Where the pixels of each array in a forward pass come from (Note [The gather before a layer])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from convspectra.models._gather import Gather

_PADDINGS = {
    "constant_pad_nd",
    *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)),
}
"""Operations of ATen that put something around their input."""

_COPIES = {"cat", "copy", "flip", "index", "index_select", "roll", "slice"} | {
    "slice_scatter",
    "select_scatter",
}
"""Operations that may read a pixel twice, or not at all, or in another order."""

_REARRANGEMENTS = set(
    """alias channel_shuffle clone contiguous detach expand permute pixel_shuffle pixel_unshuffle
    repeat reshape select split split_with_sizes squeeze stack t transpose unbind unsqueeze view
    _unsafe_view _to_copy lift_fresh lift_fresh_copy unfold""".split()  # noqa: SIM905
)
"""Operations that keep every pixel, except `select` and `split`; they never start a table."""

_POINTWISE = set(
    """abs add celu clamp clamp_max clamp_min cos div elu exp gelu hardsigmoid hardswish hardtanh
    leaky_relu log_sigmoid mish mul neg pow relu relu6 rsub selu sigmoid silu sin softplus sub tanh
    threshold""".split()  # noqa: SIM905
)
"""Functions of each entry, with numbers for their other arguments; "relu_" is found here too."""

_FACTORIES = set(
    """empty empty_like empty_strided empty_permuted full full_like new_empty new_empty_strided
    new_full new_ones new_zeros ones ones_like zeros zeros_like""".split()  # noqa: SIM905
)
"""Operations that make an array without reading one, into which pixels may be copied."""

_WORDS = {"slice_scatter": "copy", "select_scatter": "copy", "copy_": "copy"}

"""Operations by the names that a note gives them."""

View = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass
class _Storage:
    """Facts about the memory behind arrays that share it.

    Attributes
    ----------
    reference : StorageWeakRef
        Ends when the memory is given back.
    origin : object
        Equal for arrays whose pixels come from the same array; None if they come from none.
    views : dict
        Indices of each array in it; they share memory as the arrays do.
    by : tuple of str
        What padded or copied.
    constant : bool
        Whether something else than 0 was written.
    """

    reference: StorageWeakRef
    origin: object | None
    views: dict[View, Tensor] = field(default_factory=dict)
    by: tuple[str, ...] = ()
    constant: bool = False


class MovedPixels:
    """The `Gather` of every array, kept up with each operation of a pass.

    Parameters
    ----------
    depends : callable
        Whether an array depends on the example input.

    Notes
    -----
    Only operations that pad or copy start a table; memory is 8 bytes for each entry of an array
    that comes of one, while that array lives.
    """

    def __init__(self, depends: Callable[[Tensor], bool]) -> None:
        self._depends = depends
        self._storages: dict[int, _Storage] = {}

    def gather(self, x: object) -> Gather | None:
        """The pixels of an array; None where nothing moved its pixels."""
        if not isinstance(x, Tensor):
            return None
        storage, index = self._known(x)
        if storage is None or index is None or storage.origin is None or not storage.by:
            return None
        return Gather(index.numpy(), ", ".join(storage.by), storage.constant)

    def note(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        where: str = "",
    ) -> None:
        """Follow one operation, after it ran; `where` is the module that it ran in."""
        name = func._schema.name.removeprefix("aten::")
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not (outputs and args and all(t.layout is torch.strided for t in outputs)):
            return
        if any(
            isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer))
            for t in tree_leaves((args, result))
        ):
            return
        plain = name.removesuffix("_")
        label = "pad" if name in _PADDINGS else _WORDS.get(name, name)
        label += f" in {where}" if where else ""
        if name in _FACTORIES:
            self._forget(outputs)
            self._made(outputs[0], name)
        elif name == "copy_":
            self._copied(args[0], args[1], label)
        elif name in _PADDINGS | _COPIES | _REARRANGEMENTS:
            self._moved(func, name, args, kwargs, outputs, label)
        elif plain in _POINTWISE:
            self._mapped(func, args, kwargs, outputs[0])
        elif func._schema.is_mutable or not func.is_view:
            self._forget(outputs)

    def _moved(
        self,
        func: torch._ops.OpOverload,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        label: str,
    ) -> None:
        count = 2 if name.endswith("_scatter") else 1
        if name == "copy":  # its first argument gives a shape only
            args = (args[1], args[0].shape)
        moving = [t for t in tree_leaves(args[:count]) if isinstance(t, Tensor)]
        starts = name in _PADDINGS or (name in _COPIES and _reaches_pixels(name, args, moving))
        sources = self._sources(moving, starts)
        if sources is None:
            if not func.is_view:
                self._forget(outputs)
            return
        indices, found, constant = sources
        rest = [_replaced(a, indices) for a in args[:count]]
        args = tree_map_only(Tensor, Tensor.cpu, args[count:])
        if name == "constant_pad_nd":
            constant = constant or (len(args) > 1 and bool(args[1]))
            index = torch.constant_pad_nd(rest[0], args[0])
        elif name == "copy":
            index = rest[0].expand(args[0]).clone()
        elif name in ("view", "_unsafe_view"):
            index = rest[0].reshape(args[0])
        elif name in ("_to_copy", "clone", "contiguous", "lift_fresh_copy"):
            index = rest[0].clone()
        else:
            index = func(*rest, *args, **kwargs)
        by = tuple(dict.fromkeys(b for storage in found for b in storage.by))
        if name not in _REARRANGEMENTS and name != "slice" and label not in by:
            by = (*by, label)
        origin = next((storage.origin for storage in found if storage.origin is not None), None)
        every = [t for t in tree_leaves(index) if isinstance(t, Tensor)]
        if func.is_view:
            base = found[0]
            shared = {t.untyped_storage().data_ptr() for t in base.views.values()}
            if not all(t.untyped_storage().data_ptr() in shared for t in every):
                self._forget(outputs)
                return
            for output, entry in zip(outputs, every, strict=True):
                base.views[_view(output)] = entry
            return
        self._forget(outputs)
        for output, entry in zip(outputs, every, strict=True):
            self._put(output, entry.contiguous(), origin, by, constant)

    def _sources(
        self, moving: list[Tensor], starts: bool
    ) -> tuple[dict[int, Tensor], list[_Storage], bool] | None:
        """Indices of the arrays that are moved, by ``id``, and whether some constant is not 0.

        None if the arrays come from several.
        """
        indices: dict[int, Tensor] = {}
        found: list[_Storage] = []
        unknown: list[Tensor] = []
        constant = False
        for t in moving:
            storage, index = self._known(t)
            if storage is not None and index is not None:
                indices[id(t)] = index
                found.append(storage)
            elif self._depends(t):
                unknown.append(t)
            else:
                indices[id(t)] = torch.zeros(t.shape, dtype=torch.float64, device="cpu")
                constant = constant or bool(t.any())
        origins = {id(storage.origin) for storage in found if storage.origin is not None}
        if unknown:
            if origins or not starts or len({(_address(t), _view(t)) for t in unknown}) > 1:
                return None
            storage, index = self._rooted(unknown[0])
            found.append(storage)
            indices.update({id(t): index for t in unknown})
        constant = constant or any(storage.constant for storage in found)
        return (indices, found, constant) if len(origins) <= 1 and found else None

    def _copied(self, target: Tensor, source: Tensor, label: str) -> None:
        storage, index = self._known(target)
        if storage is None:
            return
        if index is None:
            self._forget([target])
        elif not self._depends(source) and self._known(source)[0] is None:
            index.zero_()
            storage.constant = storage.constant or bool(source.any())
        elif (sources := self._sources([source], starts=True)) is None:
            self._forget([target])
        else:
            indices, (found,), constant = sources
            if None not in (storage.origin, found.origin) and storage.origin is not found.origin:
                self._forget([target])
                return
            index.copy_(indices[id(source)])
            storage.origin = storage.origin if found.origin is None else found.origin
            storage.by = tuple(dict.fromkeys((*storage.by, *found.by, label)))
            storage.constant = storage.constant or constant

    def _mapped(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        """A function of each entry commutes with moving them; what 0 becomes may be a constant.

        The function of the array that the pixels come from is another array: a new origin.
        """
        x = args[0]
        storage, index = self._known(x) if isinstance(x, Tensor) else (None, None)
        others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
        if (
            storage is None
            or index is None
            or any(t.numel() > 1 or self._depends(t) for t in others)
        ):
            self._forget([output])
            return
        zero = func(torch.zeros(1, dtype=x.dtype, device=x.device), *args[1:], **kwargs)
        constant = storage.constant or bool(zero != 0)
        if _address(output) != _address(x):
            self._forget([output])
            self._put(output, index, object(), storage.by, constant)
        elif x.numel() * x.element_size() < x.untyped_storage().nbytes():
            self._forget([x])  # a part was changed, the rest was not
        else:
            storage.origin, storage.constant = object(), constant

    def _made(self, output: Tensor, name: str) -> None:
        """An array that was just made, into which others may be copied."""
        if output.ndim > 2 and output.is_floating_point():
            index = torch.zeros(output.shape, dtype=torch.float64, device="cpu")
            filled = "zeros" not in name and "empty" not in name
            self._put(output, index, None, (), filled)

    def _rooted(self, x: Tensor) -> tuple[_Storage, Tensor]:
        index = torch.arange(1, x.numel() + 1, dtype=torch.float64, device="cpu").reshape(x.shape)
        self._forget([x])
        return self._put(x, index, object(), (), False), index

    def _put(
        self, x: Tensor, index: Tensor, origin: object | None, by: tuple[str, ...], constant: bool
    ) -> _Storage:
        for address in [a for a, s in self._storages.items() if s.reference.expired()]:
            del self._storages[address]
        reference = StorageWeakRef(x.untyped_storage())
        storage = _Storage(reference, origin, {_view(x): index}, by, constant)
        self._storages[_address(x)] = storage
        return storage

    def _known(self, x: Tensor) -> tuple[_Storage | None, Tensor | None]:
        if x.layout is not torch.strided:
            return None, None
        storage = self._storages.get(_address(x))
        if storage is None or storage.reference.expired():
            return None, None
        return storage, storage.views.get(_view(x))

    def _forget(self, tensors: list[Tensor]) -> None:
        for t in tensors:
            self._storages.pop(_address(t), None)


def _replaced(value: Any, indices: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return indices[id(value)]
    return [indices[id(t)] for t in value] if isinstance(value, (list, tuple)) else value


def _reaches_pixels(name: str, args: tuple[Any, ...], moving: list[Tensor]) -> bool:
    """Whether an operation changes what stands along an axis of space, as far as can be told."""
    ndim = moving[0].ndim if moving else 0
    if ndim < 3:
        return False
    if name in ("slice", "cat", "index_select", "slice_scatter", "select_scatter"):
        place = {"slice": 1, "cat": 1, "index_select": 1}.get(name, 2)
        dim = args[place] if len(args) > place else 0
        return bool(isinstance(dim, int) and dim % ndim >= min(2, ndim - 2))
    return True


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _view(x: Tensor) -> View:
    return int(x.storage_offset()), tuple(x.shape), x.stride()
