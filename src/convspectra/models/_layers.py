"""The convolutions of a model, with the input size that each one sees."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convspectra.operator import CONVOLUTION_TYPES, LAYER_TYPES, ConvOperator

Predicate = Callable[[str, nn.Module], bool]
Selection: TypeAlias = str | Iterable[str] | Predicate
"""Layers by a shell-style pattern of their names, by several, or by a function (name, module)."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model at one input size.

    Attributes
    ----------
    name : str
        As in ``model.named_modules()``; a layer used at several sizes appears once for each.
    module : nn.Module
    input_size : tuple of int
        Spatial size of its input; () for ``nn.Linear``.
    """

    name: str
    module: nn.Module
    input_size: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name at its input size, which no other layer of the model has."""
        return f"{self.name}@{'x'.join(map(str, self.input_size))}"

    def operator(self) -> ConvOperator:
        """The layer as it stands now; a ValueError carries the layer's name."""
        try:
            return ConvOperator.from_module(self.module, self.input_size)
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from error

    def kind(self) -> Hashable:
        """Equal for layers that differ in their weights only."""
        op = self.operator()
        return op.weight.shape, op.geometry, op.groups, op.transposed, op.dtype, op.device


def is_convolution(name: str, module: nn.Module) -> bool:
    """The default choice of layers: every convolution, transposed or not."""
    return isinstance(module, CONVOLUTION_TYPES)


def selected(name: str, module: nn.Module, selection: Selection) -> bool:
    """Whether a selection includes a module; a pattern chooses among convolutions only.

    Raises
    ------
    ValueError
        For anything that is not a selection.
    """
    if callable(selection):
        return bool(selection(name, module))
    patterns: list[Any] = [selection]
    if isinstance(selection, Iterable) and not isinstance(selection, str):
        patterns = list(selection)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            "expected a selection of layers to be a name pattern, several of them, or a function "
            f"of (name, module), got {selection!r}"
        )
    named = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return named and isinstance(module, LAYER_TYPES)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel, whose names are shorter.

    Examples
    --------
    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextlib.contextmanager
def named(layer: Layer) -> Iterator[None]:
    """Put the name of the layer in front of what goes wrong inside."""
    label = f"layer {layer.name!r}"
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if not str(error).startswith(f"{label}: "):
            error.args = (": ".join([label, *map(str, error.args[:1])]), *error.args[1:])
        raise


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules and their names as they are without ``torch.compile`` of some of them."""
    for name, module in model.named_modules():
        if "_orig_mod" not in module._modules:
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def find_layers(
    model: nn.Module,
    example_input: Any,
    include: Selection = is_convolution,
    exclude: Selection = (),
) -> list[Layer]:
    """The layers that one forward pass uses, in the order in which it reaches them.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; its modes and buffers are left as they
        were.
    example_input : Tensor, or tuple of positional arguments
    include, exclude : str, iterable of str, or callable (name, module) -> bool
        Which modules to list: patterns like "layer1.*" match names of convolutions and linear
        layers.

    Raises
    ------
    ValueError
        If an included module is not one that `ConvOperator` knows, has a lazy or meta weight, gets
        its input by keyword, or is never reached; if no module is included; if the example input
        is not finite. The module is named.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    >>> [(layer.name, layer.input_size) for layer in find_layers(model, torch.zeros(1, 1, 8, 8))]
    [('0', (8, 8)), ('2', (6, 6))]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in inputs:
        if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point():
            continue
        if not value.isfinite().all():
            raise ValueError("expected a finite example_input, got NaN or Inf in it")
    # A generator would be used up by the first name.
    include, exclude = (
        tuple(selection) if isinstance(selection, Iterator) else selection
        for selection in (include, exclude)
    )
    chosen = {
        name: module
        for name, module in modules_of(model)
        if selected(name, module, include) and not selected(name, module, exclude)
    }
    if not chosen:
        raise ValueError(
            f"expected layers to include in {type(model).__name__}, got none; its convolutions are "
            f"{[name for name, module in modules_of(model) if is_convolution(name, module)]}"
        )
    for name, module in chosen.items():
        if not isinstance(module, LAYER_TYPES):
            names = ", ".join(f"nn.{t.__name__}" for t in LAYER_TYPES)
            raise ValueError(
                f"layer {name!r}: expected one of {names}, got {type(module).__name__}"
            )
    seen: dict[tuple[str, tuple[int, ...]], Layer] = {}

    def record(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        size = _spatial_size(name, module, arguments)
        seen.setdefault((name, size), Layer(name, module, size))

    hooks = [
        module.register_forward_pre_hook(functools.partial(_hook, record, name))
        for name, module in chosen.items()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    missed = sorted(set(chosen) - {name for name, _ in seen})
    if missed:
        raise ValueError(
            f"expected every included layer to be reached by the forward pass of example_input, "
            f"these were not: {missed}; exclude them or give another example"
        )
    for layer in seen.values():
        layer.operator()
    return list(seen.values())


def _hook(
    record: Callable[[str, nn.Module, tuple[Any, ...]], None],
    name: str,
    module: nn.Module,
    arguments: tuple[Any, ...],
) -> None:
    record(name, module, arguments)


def _spatial_size(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return ()
    if not arguments or not isinstance(arguments[0], Tensor):
        raise ValueError(f"layer {name!r}: expected its input as a positional tensor")
    ndim = len(module.kernel_size)  # type: ignore[arg-type]
    return tuple(arguments[0].shape[-ndim:])
