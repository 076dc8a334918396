"""Arguments of one call of a model, from an example input as people have it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convspectra.text import sizes

_NARROW = (torch.bfloat16, torch.float16)
"""Types of weights that a float32 example does not go with."""


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of a model.

    Attributes
    ----------
    args : tuple
    kwargs : dict of str to Any

    Examples
    --------
    >>> example_arguments({"x": 1.0, "y": torch.zeros(2)}).first
    1.0
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: Callable[..., Any]) -> Any:
        """The output of the model; what its forward pass raises is left as it is."""
        return model(*self.args, **self.kwargs)

    @property
    def first(self) -> Any:
        """The first argument, which a Jacobian is taken in; None if there is none."""
        return next(iter((*self.args, *self.kwargs.values())), None)

    def with_first(self, value: Any) -> Arguments:
        """The same arguments, except the first."""
        if self.args:
            return replace(self, args=(value, *self.args[1:]))
        name = next(iter(self.kwargs))
        return replace(self, kwargs={**self.kwargs, name: value})

    def changed(self, change: Callable[[Any], Any]) -> Arguments:
        """The arguments after a change of the tuple and of the dictionary."""
        return Arguments(change(self.args), change(self.kwargs))

    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        shown = [sizes(t.shape) for t in tree_leaves(self.args) if isinstance(t, Tensor)]
        for name, value in self.kwargs.items():
            shapes = [sizes(t.shape) for t in tree_leaves(value) if isinstance(t, Tensor)]
            shown += [f"{name}={'+'.join(shapes)}"] * bool(shapes)
        return ", ".join(shown)


def example_arguments(example_input: Any) -> Arguments:
    """The arguments that an example input stands for.

    Parameters
    ----------
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
        A mapping, such as what a processor or tokenizer returns (``BatchFeature``,
        ``BatchEncoding``), is for ``model(**example_input)``. `Arguments` are left as they are.

    Raises
    ------
    ValueError
        For sizes or arrays instead of tensors, or keys that are no names of arguments.
    """
    if isinstance(example_input, Arguments):
        return example_input
    if isinstance(example_input, Mapping):
        odd = [key for key in example_input if not isinstance(key, str)]
        if odd or not example_input:
            found = f"the key {odd[0]!r}" if odd else "an empty one"
            raise ValueError(
                f"expected a mapping of argument names to tensors, got {found}; "
                'give one such as {"pixel_values": x}, for model(**example)'
            )
        call = Arguments((), dict(example_input))
    elif isinstance(example_input, tuple):
        call = Arguments(example_input, {})
    else:
        call = Arguments((example_input,), {})
    leaves = tree_leaves((call.args, call.kwargs))
    if leaves and not any(_may_be_input(leaf) for leaf in leaves):
        numbers = [leaf for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)]
        shape = ", ".join(map(str, (1, *numbers))) if numbers else "1, 3, 224, 224"
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves))
        raise ValueError(
            f"expected a tensor as the example input, got {kinds}; pass a tensor, such as "
            f"torch.zeros({shape}), a tuple of positional arguments or a dict of keyword arguments"
        )
    return call


def run_example(model: nn.Module, call: Arguments) -> Any:
    """The output of a model at an example, with words for what is commonly amiss with it.

    Raises
    ------
    ValueError
        If the model takes other arguments, has weights of bfloat16 or float16 and cannot run on
        the example's type, or is nested too deeply. What else the forward pass raises is left as
        it is.
    """
    _check_arguments(model, call)
    try:
        return call.run(model)
    except RecursionError as error:
        raise ValueError(
            "expected modules whose nesting fits Python's recursion limit of "
            f"{sys.getrecursionlimit()}, got more, or a forward pass without an end; raise the "
            "limit with sys.setrecursionlimit"
        ) from error
    except RuntimeError as error:
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        given = {t.dtype for t in call.tensors() if t.is_floating_point()}
        if given - floating and floating & set(_NARROW):
            weights, example = (", ".join(sorted(map(str, s))) for s in (floating, given))
            wanted = next(dtype for dtype in _NARROW if dtype in floating)
            raise ValueError(
                f"expected an example input of the type of the model's weights, {weights}, got "
                f"{example}; pass x.to({wanted}), or model.float()"
            ) from error
        raise


def _check_arguments(model: nn.Module, call: Arguments) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # TorchScript has none
        return
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        kind = type(model).__name__
        names = list(signature.parameters)
        got = f"{len(call.args)} by position" if call.args else f"{list(call.kwargs)} by name"
        advice = "give a tuple of them in order, or a dict by name"
        only = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        if call.args and only:
            advice = f'give a dict, such as {{"{only[0]}": x}}, for model(**example)'
        raise ValueError(
            f"expected the arguments of {kind}.forward, {names}, got {got} ({error}); {advice}"
        ) from error


def _may_be_input(leaf: Any) -> bool:
    """Whether a model may take it alone: no number, and no array of another library."""
    number = leaf is None or isinstance(leaf, (bool, int, float))
    return not (number or type(leaf).__module__ == "numpy")
