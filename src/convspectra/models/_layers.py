"""The convolutions of a model, with the input size that each one sees."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from convspectra.models._example import example_arguments
from convspectra.models._forward_pass import check_has_data, evaluated, recorded_pass
from convspectra.models._selection import Selection, is_convolution, modules_of, selected
from convspectra.operator import (
    LAYER_TYPES,
    ConvOperator,
    convolution_options,
    has_own_forward,
)


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
    padding : tuple of (int, int), optional
        With that of separate operations before it, which belongs to the layer, on each axis; None
        if the module pads alone.
    padding_mode : str
        Of that padding.
    """

    name: str
    module: nn.Module
    input_size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | None = None
    padding_mode: str = "zeros"

    @property
    def key(self) -> str:
        """Its name at its input size, which no other layer of the model has."""
        return f"{self.name}@{'x'.join(map(str, self.input_size))}"

    def operator(self, input_size: tuple[int, ...] | None = None) -> ConvOperator:
        """The layer as it stands now, at its own input size or another.

        Raises
        ------
        ValueError
            As `ConvOperator.from_module`, with the layer's name.
        """
        size = self.input_size if input_size is None else input_size
        try:
            weight, options = convolution_options(self.module, size)
            # At another size a forward pass of its own may pad in another way.
            elsewhere = input_size is not None and has_own_forward(self.module)
            if self.padding is not None and not elsewhere:
                options |= {"padding": self.padding, "padding_mode": self.padding_mode}
            return ConvOperator(weight, size, **options)
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from error

    def kind(self) -> Hashable:
        """Equal for layers that differ in their weights only."""
        op = self.operator()
        return op.weight.shape, op.geometry, op.groups, op.transposed, op.dtype, op.device


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
        were. Lazy modules get their weights.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
    include, exclude : str, iterable of str, or callable (name, module) -> bool
        Which modules to list: patterns like "layer1.*" match names of convolutions and linear
        layers.

    Raises
    ------
    ValueError
        If an included module is not one that `ConvOperator` knows, has a lazy or meta weight, or is
        never reached; if no module is included; if the example input is not finite. The module is
        named.

    Notes
    -----
    Cost: one forward pass. Memory: the output of every layer at once.

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
    for value in example_arguments(example_input).tensors():
        if value.is_meta or not value.is_floating_point():
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
    check_has_data(model)
    for name, module in chosen.items():
        if not isinstance(module, LAYER_TYPES):
            names = ", ".join(f"nn.{t.__name__}" for t in LAYER_TYPES)
            raise ValueError(
                f"layer {name!r}: expected one of {names}, got {type(module).__name__}"
            )
    with evaluated(model):
        recorder = recorded_pass(model, example_input)
    seen: dict[tuple[str, tuple[int, ...]], Layer] = {}
    for use in recorder.uses:
        if use.module is not None and use.name in chosen:
            layer = Layer(use.name, use.module, use.input_size, use.padding, use.padding_mode)
            seen.setdefault((layer.name, layer.input_size), layer)
    reached = recorder.reached & set(chosen)
    missed = sorted(set(chosen) - reached)
    if missed:
        raise ValueError(
            f"expected every included layer to be reached by the forward pass of example_input, "
            f"these were not: {missed}; exclude them or give another example"
        )
    for name in sorted(reached - {name for name, _ in seen}):
        if not has_own_forward(chosen[name]):
            Layer(name, chosen[name], ()).operator()  # says why it could not be taken
        raise ValueError(
            f"layer {name!r}: the forward pass of {type(chosen[name]).__name__} is its own, and "
            "not one convolution at every call; exclude the layer"
        )
    for layer in seen.values():
        layer.operator()
    return list(seen.values())
