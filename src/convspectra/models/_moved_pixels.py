"""Where the pixels of each array in a forward pass come from (Note [The gather before a layer])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from convspectra.models._gather import Gather, entrywise_labels

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

_UNTAGGED = set(
    """_native_batch_norm_legit_no_training _prelu_kernel add celu div hardswish hardtanh leaky_relu
    log_sigmoid_forward masked_fill mul prelu relu relu6 rrelu selu silu sub where""".split()  # noqa: SIM905
)
"""Functions of each entry that PyTorch does not mark as such, here or in place; "relu_" is found
here too, and a factor for each channel counts as one.
"""

_EDITS = set(
    """index_copy index_add index_fill index_put index_reduce masked_scatter scatter scatter_add
    scatter_reduce""".split()  # noqa: SIM905
)
"""Operations that change some entries of their first argument; "index_put_" is found here too."""

_FACTORIES = set(
    """empty empty_like empty_strided empty_permuted full full_like new_empty new_empty_strided
    new_full new_ones new_zeros ones ones_like zeros zeros_like""".split()  # noqa: SIM905
)
"""Operations that make an array without reading one, into which pixels may be copied."""

_WORDS = dict.fromkeys(
    "copy_ fill_ index_put index_put_ select_scatter slice_scatter zero_".split(),  # noqa: SIM905
    "copy",
)
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


@dataclass(frozen=True)
class _Part:
    """One argument of a function of each entry.

    Attributes
    ----------
    index : Tensor
        A number for the pixel, or the constant, at each entry of the result.
    follows : bool
        Whether it depends on the example input.
    exact : bool
        Whether its zeros are the number 0.
    """

    index: Tensor
    follows: bool
    exact: bool


class MovedPixels:
    """The `Gather` of every array, kept up with each operation of a pass.

    Parameters
    ----------
    depends : callable
        Whether an array depends on the example input.
    restarts : bool
        Whether an operation that pads what was padded already starts a table anew.

    Notes
    -----
    Only operations that pad or copy start a table; memory is 8 bytes for each entry of an array
    that comes of one, while that array lives.
    """

    def __init__(self, depends: Callable[[Tensor], bool], restarts: bool = False) -> None:
        self._depends = depends
        self._restarts = restarts
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
        outputs = _only(result)
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
        elif name in ("copy_", "fill_", "zero_"):
            source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
            self._written(args[0], source, label)
        elif name in _PADDINGS | _COPIES | _REARRANGEMENTS:
            self._moved(func, name, args, kwargs, outputs, label)
        elif torch.Tag.pointwise in func.tags or plain in _UNTAGGED:
            self._mapped(func, plain, args, kwargs, outputs[0])
        elif plain == "index_put" and self._put_at(args, outputs[0], label):
            pass
        elif plain in _EDITS:
            self._edited(args[0], outputs[0], label)
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
        moving = _only(args[:count])
        starts = name in _PADDINGS or (name in _COPIES and _reaches_pixels(name, args, moving))
        if self._restarts and name in _PADDINGS and self.gather(moving[0]) is not None:
            self._rooted(moving[0])
        sources = self._sources(moving, starts)
        if sources is None:
            if not func.is_view:
                self._forget(outputs)
            return
        indices, found, constant, origin = sources
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
        every = _only(index)
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
    ) -> tuple[dict[int, Tensor], list[_Storage], bool, object | None] | None:
        """Indices of the arrays that are moved, by ``id``, whether some constant is not 0, and
        where the pixels come from.

        None if no pixel was moved before, and none is now.
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
        several = len({(_address(t), _view(t)) for t in unknown}) > 1
        beside = indices or not several  # constants, or another copy of the same
        if unknown and not (starts and beside) and not any(s.by for s in found):
            return None
        for t in unknown:
            storage, index = self._known(t)  # the same array may be there twice
            if storage is None or index is None:
                storage, index = self._rooted(t)
            found.append(storage)
            indices[id(t)] = index
        if not found:
            return None
        constant = constant or any(storage.constant for storage in found)
        origins = {id(s.origin): s.origin for s in found if s.origin is not None}
        origin = next(iter(origins.values()), None)
        if len(origins) > 1:
            origin, most = object(), max(int(index.max()) for index in indices.values())
            for t in moving:
                storage, index = self._known(t)
                if storage is not None and index is not None and storage.origin is not None:
                    place = list(origins).index(id(storage.origin))
                    indices[id(t)] = torch.where(index > 0, index + place * most, index)
        return indices, found, constant, origin

    def _written(self, target: Tensor, source: Tensor | None, label: str) -> None:
        """Entries take the values of others, or one number, which they have already."""
        storage, index = self._known(target)
        if storage is None:
            return
        if index is None:
            self._lost(target)
        elif source is None or not (self._depends(source) or self._known(source)[0]):
            index.zero_()
            storage.constant = storage.constant or bool(target.any())
            storage.by = storage.by and tuple(dict.fromkeys((*storage.by, label)))
        elif (sources := self._sources([source], starts=True)) is None:
            self._lost(target)
        else:
            indices, (found,), constant, _ = sources
            labels = indices[id(source)]
            if None not in (storage.origin, found.origin) and storage.origin is not found.origin:
                most = int(_whole(index).max())
                labels = torch.where(labels > 0, labels + most, labels)
                storage.origin = object()
            elif storage.origin is None:
                storage.origin = found.origin
            index.copy_(labels)
            storage.by = tuple(dict.fromkeys((*storage.by, *found.by, label)))
            storage.constant = storage.constant or constant

    def _put_at(self, args: tuple[Any, ...], output: Tensor, label: str) -> bool:
        """A constant is written at entries that are known; whether that is so."""
        x, places, values = args[:3]
        storage, index = self._known(x)
        if storage is None or index is None or any(map(self._depends, (*_only(places), values))):
            return False
        if len(args) > 3 and args[3]:  # accumulate
            return False
        inside = _address(x) == _address(output)
        index = index if inside else index.clone()
        indices = [None if t is None else t.cpu() for t in places]
        torch.ops.aten.index_put_(index, indices, index.new_zeros(()))
        by = storage.by and tuple(dict.fromkeys((*storage.by, label)))
        constant = storage.constant or bool(values.any())
        if inside:
            storage.by, storage.constant = by, constant
        else:
            self._forget([output])
            self._put(output, index, storage.origin, by, constant)
        return True

    def _edited(self, x: Tensor, output: Tensor, label: str) -> None:
        """Some entries of a padded array are changed, one cannot say which."""
        storage, _ = self._known(x)
        if storage is None or not storage.by:
            self._forget([output])
        elif _address(x) == _address(output):
            storage.by = tuple(dict.fromkeys((*storage.by, label)))
            self._lost(x)
        else:
            by = tuple(dict.fromkeys((*storage.by, label)))
            self._put(output, _one_pixel(output.shape), object(), by, False)

    def _lost(self, x: Tensor) -> None:
        """A padded array is one no longer, or not as anybody could say: no layer pads like it."""
        storage, _ = self._known(x)
        if storage is None or not storage.by:
            self._forget([x])
            return
        for index in storage.views.values():
            _whole(index).fill_(1)

    def _mapped(
        self,
        func: torch._ops.OpOverload,
        plain: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        """A function of each entry commutes with moving them; what 0 becomes may be a constant.

        The function of the array that the pixels come from is another array: a new origin. Of
        several arrays, entries are copies where they are in all (`entrywise_labels`).
        """
        tensors = _only((args, kwargs))
        found = [storage for storage in map(self._padded, tensors) if storage is not None]
        inside = _address(output) == _address(args[0]) if isinstance(args[0], Tensor) else False
        if not found or (inside and self._padded(args[0]) is None):
            self._forget([output])
            return
        by = tuple(dict.fromkeys(b for storage in found for b in storage.by))
        try:
            parts = [self._part(t, output) for t in tensors if t.numel() > 1 or self._depends(t)]
        except RuntimeError:  # of shapes that are not put beside each other entry by entry
            self._edited(args[0], output, plain)
            return
        tables = [part.index for part in parts if part.follows]
        zero = _zeros(plain, parts)
        same = all(torch.equal(tables[0], table) for table in tables[1:])
        if same and len(tables) == len(parts):
            labels: Tensor | None = tables[0]
        else:
            found_labels = entrywise_labels([part.index.numpy() for part in parts], zero.numpy())
            labels = None if found_labels is None else torch.from_numpy(found_labels).double()
        constant = bool(output.detach().cpu()[zero].any())
        if not inside:
            self._forget([output])
            if labels is not None:
                self._put(output, labels.clone(), object(), by, constant)
            return
        storage, index = self._known(args[0])
        if storage is None or index is None or not self._set_part(index, labels):
            self._forget([output])
            return
        storage.origin, storage.by = object(), by
        whole = output.numel() * output.element_size() >= output.untyped_storage().nbytes()
        storage.constant = constant or (storage.constant and not whole)

    def _padded(self, x: Any) -> _Storage | None:
        """The storage of an array whose pixels were moved."""
        storage, index = self._known(x) if isinstance(x, Tensor) else (None, None)
        return None if storage is None or index is None or not storage.by else storage

    def _part(self, x: Tensor, output: Tensor) -> _Part:
        """The pixels or constants at each entry of an argument, in the shape of the result."""
        storage, index = self._known(x)
        follows = self._depends(x)
        if storage is None or index is None:
            index = torch.arange(1, x.numel() + 1, dtype=torch.float64, device="cpu")
            if not follows:
                values = x.detach().cpu().reshape(-1)
                index = torch.unique(values, return_inverse=True)[1].double()
            index = index.reshape(x.shape)
        if index.ndim == 1 and output.ndim > 2 and index.numel() == output.shape[1]:
            index = index.reshape(-1, *(1,) * (output.ndim - 2))  # one number for each channel
        exact = storage is not None and not storage.constant
        return _Part(index.expand(output.shape), follows, exact)

    @staticmethod
    def _set_part(index: Tensor, labels: Tensor | None) -> bool:
        """Put labels at some entries of a table; whether it is one of moved pixels still."""
        whole = _whole(index)
        inside, second = torch.zeros_like(whole, dtype=torch.bool), torch.zeros_like(whole)
        place = (index.shape, index.stride(), index.storage_offset())
        inside.as_strided(*place).fill_(True)
        if labels is None:
            labels = torch.arange(1, index.numel() + 1, dtype=torch.float64, device="cpu")
        second.as_strided(*place).copy_(labels.reshape(index.shape))
        zero = torch.where(inside, second == 0, whole == 0)
        found = entrywise_labels([whole.numpy(), second.numpy()], zero.numpy())
        if found is not None:
            whole.copy_(torch.from_numpy(found))
        return found is not None

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


def _only(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


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


def _zeros(plain: str, parts: list[_Part]) -> Tensor:
    """Where the function of each entry does not depend on the pixels."""
    masks = [part.index == 0 for part in parts if part.follows]
    zero = torch.stack(masks).all(0)
    factors = parts if plain == "mul" else parts[:1] if plain == "div" else []
    for part in factors:  # 0 times anything
        if part.follows and part.exact:
            zero = zero | (part.index == 0)
    return zero


def _whole(index: Tensor) -> Tensor:
    """The memory behind a table, in one axis."""
    return torch.empty(0, dtype=index.dtype, device="cpu").set_(index.untyped_storage())


def _one_pixel(shape: torch.Size) -> Tensor:
    """A table that no padding has: one pixel everywhere."""
    return torch.ones(shape, dtype=torch.float64, device="cpu")


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _view(x: Tensor) -> View:
    return int(x.storage_offset()), tuple(x.shape), x.stride()
