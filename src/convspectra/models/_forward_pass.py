"""A forward pass of an example input under the recorder, which leaves the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from convspectra.models._example import example_arguments, run_example
from convspectra.models._recorder import Recorder, is_lazy, stored_tensors
from convspectra.models._signal_flow import LayerFlow, layer_flows


def recorded_pass(
    model: nn.Module, example_input: Any, lazy: Mapping[str, str] = MappingProxyType({})
) -> Recorder:
    """One forward pass, watched, without gradients and in the mode that the model is in.

    Parameters
    ----------
    model : nn.Module
        TorchScript and exported programs too.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
    lazy : mapping of str to str
        Names and types of modules without a weight, which are passed over.
    """
    call = example_arguments(example_input)
    recorder = Recorder(stored_tensors(model), lazy)
    recorder.depend((call.args, call.kwargs))
    with recorder.hooked(model), torch.no_grad(), slow_attention(), recorder:
        output = run_example(model, call)
    recorder.returned(output)
    return recorder


def signal_flow(model: nn.Module, example_input: Any) -> dict[str, LayerFlow]:
    """Surroundings of every layer of a model in one forward pass, by the layers' names.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; left as it was.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> flows = signal_flow(model, torch.zeros(1, 1, 8, 8))
    >>> flows["0"].activation, flows["0"].feeds, flows["3"].fed_by
    (Activation(name='relu', slope=0.0), ('3',), ('0',))
    """
    with evaluated(model):
        return layer_flows(recorded_pass(model, example_input).uses)


def check_has_data(model: nn.Module) -> None:
    """Raise a ValueError for a model with parameters or buffers on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and not is_lazy(tensor):
            raise ValueError(
                f"expected a model with data, got {name!r} on the meta device; load its weights "
                "first"
            )


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the modes and buffers of before afterwards."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if not (buffer is not None and is_lazy(buffer))
    ]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            if buffer is not None and value is not None:
                buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Attention by its single operations: the fused ones call no module."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
