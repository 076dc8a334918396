"""Arguments that the public functions accept: one place for the checks that several of them make.

Every message says what was expected, what was given and, where it is not plain, what to do.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convspectra.operator._linear_operator import LinearOperatorLike

FLOATING_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The real types that PyTorch has convolutions for."""


def check_weight(weight: Tensor) -> None:
    """Raise a ValueError unless the weight is a finite, real floating (h, g, *kernel)."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"expected weight to be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATING_TYPES or weight.layout != torch.strided:
        raise ValueError(
            f"expected a dense weight of a real floating type, got {weight.dtype} "
            f"({weight.layout}); convert it, for example with weight.double()"
        )
    if not 2 <= weight.ndim <= 5:
        raise ValueError(
            "expected a weight of shape (h, g / groups, *kernel) with at most 3 kernel axes, "
            f"got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"expected a weight with entries, got the shape {tuple(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError("expected a weight with data, got one on the meta device")
    check_finite_weight(bool(torch.isfinite(weight).all()))


def tensor_of(name: str, value: Any, like: Tensor | None = None) -> Any:
    """A NumPy array as a tensor of its own, of the type and device of another; the rest as it is.

    Raises
    ------
    ValueError
        For an array of a type that PyTorch does not have, or that cannot be cast to that of `like`.
    """
    if not isinstance(value, np.ndarray):
        return value
    kinds = "f" if like is None else "fiub"
    if value.dtype.kind not in kinds or value.dtype.itemsize > 8:
        raise ValueError(f"expected {name} of a real floating type, got {value.dtype}")
    native = np.array(value, dtype=value.dtype.newbyteorder("="))
    if like is None:
        return torch.tensor(native, device="cpu")
    return torch.tensor(native, dtype=like.dtype, device=like.device)


def check_finite_weight(finite: bool) -> None:
    """Raise a ValueError unless the weight is known to be finite."""
    if not finite:
        raise ValueError("expected a finite weight, got NaN or Inf in it")


def check_groups(weight: Tensor, groups: int) -> None:
    """Raise a ValueError unless the groups are a positive integer that divides the channels."""
    if isinstance(groups, bool) or not isinstance(groups, Integral) or groups < 1:
        raise ValueError(f"expected groups to be a positive integer, got {groups!r}")
    if weight.shape[0] % groups:
        raise ValueError(
            f"expected the {weight.shape[0]} channels of weight.shape[0] to be divisible by "
            f"groups, got groups={groups}"
        )
    if weight.ndim == 2 and groups != 1:
        raise ValueError(f"expected groups=1 for a linear layer's weight, got {groups}")


def check_array(name: str, x: Tensor, shape: tuple[int, ...], *, like: Tensor) -> None:
    """Raise unless x is finite, (*shape) or (b, *shape), typed and placed as `like`."""
    batched = isinstance(x, Tensor) and x.ndim == len(shape) + 1 and x.shape[0] > 0
    if not isinstance(x, Tensor) or tuple(x.shape[int(batched) :]) != shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        batch = f"(b, {', '.join(map(str, shape))})"
        raise ValueError(f"expected {name} of shape {shape} or {batch}, got {got}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"expected {name} of {like.dtype} on {like.device} like the weight, got "
            f"{x.dtype} on {x.device}; convert one of them"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"expected finite {name}, got NaN or Inf in it")


def check_positive_integer(name: str, value: object) -> None:
    """Raise a ValueError unless the value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be a positive integer, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {choices}, got {value!r}")


def check_type(name: str, value: object, expected: type) -> None:
    """Raise a ValueError unless the value is of the expected type."""
    if not isinstance(value, expected):
        raise ValueError(f"expected {name} to be a {expected.__name__}, got {type(value).__name__}")


def check_gain(gain: object) -> None:
    """Raise a ValueError unless the gain is a finite number above 0."""
    check_positive_number("gain", gain)


def check_positive_number(name: str, value: object) -> None:
    """Raise a ValueError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"expected {name} to be a finite number above 0, got {value!r}")


def check_band(lower: float, upper: float) -> None:
    """Raise a ValueError unless ``0 <= lower <= upper``, both finite or `upper` infinite."""
    for name, value in (("lower", lower), ("upper", upper)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"expected {name} to be a number, got {value!r}")
    if not 0 <= lower <= upper:
        raise ValueError(f"expected 0 <= lower <= upper, got lower={lower!r}, upper={upper!r}")


def check_operator(name: str, value: object) -> None:
    """Raise a ValueError unless the value has the products of a linear operator."""
    if not isinstance(value, LinearOperatorLike):
        raise ValueError(
            f"expected {name} to be a ConvOperator, a JacobianOperator or an object with the "
            f"products of LinearOperatorLike, got {type(value).__name__}"
        )
