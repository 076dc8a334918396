"""Surroundings of a call that must not change its numbers: gradients off, ``torch.compile``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
"""The arguments of a function."""
T = TypeVar("T")
"""The result of a function."""


def with_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function differentiate under ``torch.no_grad`` and ``torch.inference_mode``, too.

    Examples
    --------
    >>> @with_gradients
    ... def slope(x):
    ...     x = x.clone().requires_grad_()
    ...     return torch.autograd.grad(x.square().sum(), x)[0]
    >>> with torch.inference_mode():
    ...     slope(torch.ones(()))
    tensor(2.)
    """

    @wraps(function)
    def differentiating(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return differentiating


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep ``torch.compile`` of a caller out of a function: the graph breaks before and after it.

    Tracing through an eigensolver takes seconds, and its loops depend on numbers anyhow. Gradients
    flow through as usual. The compiler is not imported where nobody uses it.
    """
    kept_out: list[Callable[P, T]] = []

    @wraps(function)
    def running(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not kept_out:
            kept_out.append(torch.compiler.disable(function))
        return kept_out[0](*args, **kwargs)

    return running
