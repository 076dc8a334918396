"""The map from one place of a model to another, as a function of one tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convspectra.models import Arguments
from convspectra.network._frozen import converted, floating_leaves, frozen_copy

Selector = Callable[[Any], Tensor]


class Segment:
    """A frozen copy of a model between the input of one module and the output of another.

    Parameters
    ----------
    model : nn.Module
    inputs : Arguments
        Arguments of one sample, the first with a batch axis of 1.
    start, end : str, optional
        Names of modules, each called once; the model's own input and output without them.
    select : callable, optional
        From the output at the end to the tensor that is meant.
    dtype : torch.dtype

    Raises
    ------
    ValueError
        For a place that does not exist or is passed more than once, an input that is not floating
        or not finite, or an output of several tensors without `select`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Arguments,
        start: str | None,
        end: str | None,
        select: Selector | None,
        dtype: torch.dtype,
    ) -> None:
        self._model = frozen_copy(model, dtype)
        self._dtype = dtype
        self._inputs = inputs.changed(self._converted)
        self._start, self._end = (self._module("start", start), self._module("end", end))
        self._names = {"start": start, "end": end}
        self._select = select

    def __call__(self, z: Tensor) -> Tensor:
        """The output for one value of the tensor at the start."""
        return self.selected(self._run(z, None))

    @property
    def model(self) -> nn.Module:
        """The frozen copy."""
        return self._model

    @property
    def inputs(self) -> Arguments:
        """The arguments, converted."""
        return self._inputs

    def input(self) -> Tensor:
        """The tensor at the start, by one run of the model."""
        if self._start is None:
            return self._checked_input(self._inputs.first, "the model")
        seen: list[Any] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Arguments(args, kwargs).first)

        with _hook(self._start.register_forward_pre_hook(record, with_kwargs=True)):
            self._inputs.changed(self._converted).run(self._model)
        name = self._names["start"]
        _check_calls("start", name, len(seen))
        return self._checked_input(seen[0], f"start={name!r}").clone()

    def selected(self, output: Any) -> Tensor:
        """The tensor of an output that is meant."""
        if self._select is not None:
            chosen = self._select(output)
            if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
                raise ValueError(
                    "expected select(output) to be a floating tensor, got "
                    f"{getattr(chosen, 'dtype', type(chosen).__name__)}"
                )
            return chosen
        leaves = floating_leaves(output)
        if len(leaves) == 1:
            return leaves[0]
        kinds = [str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in tree_leaves(output)]
        raise ValueError(
            f"expected an output with one floating tensor in it, got {type(output).__name__} of "
            f"{kinds}; say which one, for example with select=lambda output: output[0]"
        )

    def outputs(self, z: Tensor) -> list[tuple[str, Tensor]]:
        """The floating tensors that each module gives, by its name, in the order of the pass."""
        seen: list[tuple[str, Tensor]] = []
        self._run(z, seen)
        return seen

    def _run(self, z: Tensor, seen: list[tuple[str, Tensor]] | None) -> Any:
        inputs = self._inputs.changed(self._converted)
        # The model may write into its input.
        z = z.clone()
        at_end: list[Any] = []

        def replace(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = Arguments(args, kwargs).with_first(z)
            return call.args, call.kwargs

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            at_end.append(output)

        with contextlib.ExitStack() as stack:
            if self._start is None:
                inputs = inputs.with_first(z)
            else:
                hook = self._start.register_forward_pre_hook(replace, with_kwargs=True)
                stack.enter_context(_hook(hook))
            if self._end is not None:
                stack.enter_context(_hook(self._end.register_forward_hook(record)))
            if seen is not None:
                stack.enter_context(_watched(self._model, seen))
            output = inputs.run(self._model)
        if self._end is None:
            return output
        _check_calls("end", self._names["end"], len(at_end))
        return at_end[0]

    def _converted(self, value: Any) -> Any:
        return converted(value, self._dtype)

    def _module(self, role: str, name: str | None) -> nn.Module | None:
        if name is None:
            return None
        modules = dict(self._model.named_modules())
        if name not in modules:
            raise ValueError(
                f"expected {role} to be the name of a module of {type(self._model).__name__}, got "
                f"{name!r}; it has {[known for known in modules if known]}"
            )
        return modules[name]

    def _checked_input(self, z: Any, place: str) -> Tensor:
        if not isinstance(z, Tensor):
            raise ValueError(
                f"expected {place} to get a tensor as its first argument, got {type(z).__name__}"
            )
        if not z.is_floating_point():
            raise ValueError(
                f"expected a floating input of {place}, got {z.dtype}, in which nothing is "
                "differentiable; name the module after the embedding with start="
            )
        if z.numel() == 0 or not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"expected a finite input of {place}, got the shape {tuple(z.shape)}"
                + (", which is empty" if z.numel() == 0 else " with NaN or Inf in it")
            )
        return z


def _check_calls(role: str, name: str | None, calls: int) -> None:
    if calls != 1:
        raise ValueError(
            f"expected the forward pass to call {role}={name!r} once, it did so {calls} times"
        )


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _watched(model: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():

            def record(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
                label = name or type(m).__name__
                seen.extend((label, leaf) for leaf in floating_leaves(output))

            stack.enter_context(_hook(module.register_forward_hook(record)))
        yield
