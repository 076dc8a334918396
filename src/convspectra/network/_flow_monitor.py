"""Gradient norms by layer during training, every few steps, from the backward pass that runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models import unwrapped
from convspectra.operator import LAYER_TYPES


class GradientFlowMonitor:
    """Norms of the gradients at every layer's output and weight, every so many steps of training.

    Parameters
    ----------
    model : nn.Module
        Its convolutions and linear layers get a hook each, which `remove` takes off again.
    every : int
        Steps from one record to the next; the first step is recorded.

    Attributes
    ----------
    every : int
    count : int
        Steps so far.

    Raises
    ------
    ValueError
        If `every` is no integer of at least 1, the model is none, or it has fewer than two layers.

    Notes
    -----
    The gradients are those of the training step itself: of a batch, or of all batches that are
    accumulated in a step, as of one array. Cost: on a recorded step one reading of each gradient at
    an output and a weight, and one copy of a few numbers from the device; on the others one look at
    a flag for each layer: 1.1% of a step with ``every=10`` (docs/measurements.md). Layers
    inside ``torch.compile`` are not watched: their weights are. A layer that is called several
    times in a step has one norm of all its gradients.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> parts = [p for _ in range(4) for p in (torch.nn.Linear(8, 8), torch.nn.Tanh())]
    >>> model = torch.nn.Sequential(*parts, torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> monitor = GradientFlowMonitor(model, every=10)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 8)).square().mean().backward()
    ...     values = monitor.step()
    ...     if values:  # every 10th time
    ...         print(len(values), values["flow/first_over_last"] < 1)
    ...     optimizer.step()
    11 True
    11 True
    """

    def __init__(self, model: nn.Module, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"expected every to be an integer of at least 1, got {every!r}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        self.every = every
        self.count = 0
        self._layers = {
            name: module
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, LAYER_TYPES)
        }
        if len(self._layers) < 2:
            raise ValueError(f"expected a model with at least two layers, got {list(self._layers)}")
        self._norms: dict[str, list[Tensor]] = {}  # in the order of the forward pass
        self._hooks = [
            module.register_forward_hook(self._watcher(name))
            for name, module in self._layers.items()
        ]

    def step(self, loss_scale: float = 1.0) -> dict[str, float]:
        """Count a step; after the backward pass and before gradients are set to zero.

        Parameters
        ----------
        loss_scale : float
            What the loss was multiplied by, as a gradient scaler does; the gradients of the weights
            are taken as divided by it already.

        Returns
        -------
        dict of str to float
            Empty except at every so many steps: ``flow/first_over_last``, the gradient at the
            output of the first layer over that of the last one except the head;
            ``flow/<layer>/gradient`` at its output and ``flow/<layer>/weight_gradient``. A layer
            that no gradient reached is left out.
        """
        recorded = self._recording
        self.count += 1
        if not recorded:
            return {}
        parts = {f"{name}/gradient": norms for name, norms in self._norms.items() if norms}
        order = list(parts)
        for name, module in self._layers.items():
            # The weight itself, or what a parametrization computes it from.
            gradients = [p.grad for p in module.parameters() if p.grad is not None and p.ndim > 1]
            if gradients:
                parts[f"{name}/weight_gradient"] = [_norm(gradient) for gradient in gradients]
        self._norms = {}
        if not parts:
            return {}
        # Everything in one copy: each would wait for the device.
        together = torch.stack([norm for norms in parts.values() for norm in norms]).tolist()
        numbers = iter(together)
        found = {key: math.hypot(*(next(numbers) for _ in norms)) for key, norms in parts.items()}
        for key in order:
            found[key] /= loss_scale
        values = {}
        if len(order) > 1:
            first, last = found[order[0]], found[order[-2] if len(order) > 2 else order[0]]
            if last > 0 and math.isfinite(first / last):
                values["flow/first_over_last"] = first / last
        return values | {f"flow/{key}": value for key, value in found.items()}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._norms = {}

    @property
    def _recording(self) -> bool:
        return self.count % self.every == 0

    def _watcher(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if not self._recording or torch.compiler.is_compiling():
                return
            if isinstance(output, Tensor) and output.requires_grad and module.training:
                norms = self._norms.setdefault(name, [])
                output.register_hook(lambda gradient: norms.append(_norm(gradient)))

        return watch


def _norm(gradient: Tensor) -> Tensor:
    """The norm of an array, in float32 at least."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
