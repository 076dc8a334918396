"""The convolutions of a model, with the input size that each one sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.modules import CONVOLUTION_TYPES, LAYER_TYPES
from convspectra.operator import ConvOperator

Predicate = Callable[[str, nn.Module], bool]


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


def find_layers(
    model: nn.Module, example_input: Any, include: Predicate = is_convolution
) -> list[Layer]:
    """The layers that one forward pass uses, in the order in which it reaches them.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; its modes and buffers are left as they
        were.
    example_input : Tensor, or tuple of positional arguments
    include : callable (name, module) -> bool
        Which modules to list.

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
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError("expected a finite example_input, got NaN or Inf in it")
    chosen = {name: module for name, module in model.named_modules() if include(name, module)}
    if not chosen:
        raise ValueError(
            f"expected layers to include in {type(model).__name__}, got none; its convolutions are "
            f"{[name for name, module in model.named_modules() if is_convolution(name, module)]}"
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
