"""A copy of a model to ask questions of: evaluation mode, one precision, nothing shared."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from convspectra.models import slow_attention, unwrapped


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy in evaluation mode, floating tensors in `dtype`, without gradients to weights.

    Tensors that are attributes of modules, neither parameters nor buffers, are converted too.
    ``torch.compile`` and (Distributed)DataParallel around the model are looked through.

    Raises
    ------
    ValueError
        If the model is not an ``nn.Module``, has weights without data (lazy, or on the meta device)
        or cannot be copied; the reason is given.

    Notes
    -----
    Memory: the model's own, twice that for a float32 model in float64.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(
                f"expected a model with data, got {name!r}, which has no shape yet; run one "
                "forward pass first"
            )
        if tensor.is_meta:
            raise ValueError(
                f"expected a model with data, got {name!r} on the meta device; load its weights "
                "first"
            )
    # Weights that a hook computes are no leaves of the graph: deepcopy refuses those.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        frozen = copy.deepcopy(model, computed)
    except RecursionError as error:
        raise ValueError(
            "expected modules whose nesting fits Python's recursion limit of "
            f"{sys.getrecursionlimit()}, got more; raise the limit with sys.setrecursionlimit"
        ) from error
    except Exception as error:
        raise ValueError(
            f"expected a model that can be copied, {type(model).__name__} cannot: {error}; remove "
            "what it holds besides tensors and modules"
        ) from error
    frozen = frozen.to(dtype=dtype).eval().requires_grad_(False)
    for module in frozen.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.detach().to(dtype)
    return frozen


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Copies of all tensors in a value, floating ones in `dtype`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(dtype if leaf.is_floating_point() else leaf.dtype, copy=True)

    return tree_map(convert, value)


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Products of a model as they are meant: no autocast, and the random state of before after it.

    Attention goes by its single operations: the fused ones have no second derivative.
    """
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(cuda),
        torch.autocast(device.type, enabled=False),
        slow_attention(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def floating_leaves(value: Any) -> list[Tensor]:
    """The floating tensors in the output of a model."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


@contextlib.contextmanager
def readable_errors(where: str) -> Iterator[None]:
    """Errors that PyTorch raises inside, as a ValueError that says in which pass."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"expected a {where} that runs, got {type(error).__name__}: {text}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word of what PyTorch's transforms do inside: they load scripts and batch by loops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        warnings.filterwarnings("ignore", ".torch.jit", DeprecationWarning)
        yield
