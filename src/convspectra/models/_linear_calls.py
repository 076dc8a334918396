"""The linear layers among PyTorch's operations: convolutions and products with a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CONVOLUTIONS = ("aten::convolution", "aten::_convolution")
"""Operations of ATen that every convolution ends in, transposed or not."""

_PRODUCTS = {  # operation: its two factors
    "aten::mm": ("self", "mat2"),
    "aten::addmm": ("mat1", "mat2"),
    "aten::mv": ("self", "vec"),
    "aten::addmv": ("mat", "vec"),
    "aten::bmm": ("self", "mat2"),
    "aten::baddbmm": ("batch1", "batch2"),
}
"""Matrix products of ATen, with the names of their two factors."""

ATTENTIONS = ("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd")
"""Operations that a trace without gradients has for attention and for a transformer's layer."""

_NORMALIZATIONS = (
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
)
"""Batch normalization as ATen calls it on various devices."""


@dataclass(frozen=True)
class LinearCall:
    """One linear layer as an operation applied it, with the options of `ConvOperator`."""

    type: str
    weight: Tensor
    input: Tensor
    input_size: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def named_arguments(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of an operation by the names of its schema, defaults included."""
    schema = func._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    given = {a.name: value for a, value in zip(schema, args, strict=False)}
    return {**defaults, **given, **kwargs}


def convolution_call(arguments: dict[str, Any]) -> LinearCall:
    """The layer behind ``aten.convolution``; an array without a batch is the operation's own."""
    x, weight = arguments["input"], arguments["weight"]
    ndim = weight.ndim - 2
    options = {
        name: _per_axis(arguments[name], ndim)
        for name in ("stride", "padding", "dilation", "output_padding")
    }
    transposed = arguments["transposed"]
    return LinearCall(
        f"Conv{'Transpose' if transposed else ''}{ndim}d",
        weight,
        x,
        tuple(x.shape[2:]),
        {**options, "groups": arguments["groups"], "transposed": transposed},
    )


def product_factors(name: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two factors of a matrix product; None for any other operation."""
    factors = _PRODUCTS.get(name)
    return None if factors is None else (arguments[factors[0]], arguments[factors[1]])


def product_call(left: Tensor, right: Tensor, weight_is_left: bool) -> LinearCall | None:
    """The linear layer of a product with one stored factor; None for a batch of matrices."""
    weight, x = (left, right) if weight_is_left else (right, left)
    if weight.ndim == 3 and (weight.shape[0] == 1 or weight.stride(0) == 0):
        weight = weight[0]
    if weight.ndim != 2:
        return None
    return LinearCall("Linear", weight if weight_is_left else weight.T, x)


def attention_weights(arguments: dict[str, Any]) -> list[Tensor]:
    """The weights of the linear layers in one of `ATTENTIONS`, in the order of their use."""
    names = ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2")
    return [arguments[name] for name in names if name in arguments]


def normalization_scale(name: str, arguments: dict[str, Any]) -> Tensor | None:
    """The factor of each channel in batch normalization with running statistics, float64."""
    if name not in _NORMALIZATIONS or arguments.get("training", False):
        return None
    variance, weight = arguments["running_var"], arguments["weight"]
    if variance is None:
        return None
    eps = arguments["eps"] if "eps" in arguments else arguments["epsilon"]
    scale: Tensor = (variance.detach().double() + eps).rsqrt()
    return scale if weight is None else scale * weight.detach().double()


def _per_axis(values: list[int], ndim: int) -> tuple[int, ...]:
    return tuple(values) * ndim if len(values) == 1 else tuple(values)
