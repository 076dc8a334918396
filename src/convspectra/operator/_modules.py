"""The weight and options of the convolution that an ``nn.Module`` is."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

CONVOLUTION_TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules that are a convolution, with one to three axes, the transposed ones last."""
LAYER_TYPES = (*CONVOLUTION_TYPES, nn.Linear)
"""Modules that are a matrix M."""
_TRANSPOSED_TYPES = CONVOLUTION_TYPES[3:]
"""The transposed ones of them."""
_FORWARD_METHODS = ("forward", "_conv_forward")
"""Methods that a subclass may not replace: the layer would be another map."""


def convolution_options(module: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Weight and options of an ``nn.ConvNd``, ``nn.ConvTransposeNd`` or ``nn.Linear``.

    Raises
    ------
    ValueError
        For any other module; for a subclass that overrides the forward pass, whose linear map need
        not be that of its weight; for a lazy module without a weight.
    """
    base = next((t for t in LAYER_TYPES if isinstance(module, t)), None)
    if base is None:
        names = ", ".join(f"nn.{t.__name__}" for t in LAYER_TYPES)
        raise ValueError(f"expected one of {names}, got {type(module).__name__}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"expected a module with its weight in place, got the lazy {type(module).__name__}; "
            "run one forward pass first"
        )
    for method in _FORWARD_METHODS:
        if getattr(type(module), method, None) is not getattr(base, method, None):
            raise ValueError(
                f"expected nn.{base.__name__} or a subclass with the same forward pass, got "
                f"{type(module).__name__}, which has a {method} of its own; give its effective "
                "weight and padding to ConvOperator"
            )
    weight = _weight_now(module)
    if isinstance(module, nn.Linear):
        return weight, {}
    conv = cast("nn.Conv2d | nn.ConvTranspose2d", module)
    return weight, {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
        "transposed": isinstance(module, _TRANSPOSED_TYPES),
        "output_padding": conv.output_padding,
    }


def _weight_now(module: nn.Module) -> Tensor:
    """The weight; what a hook computes before a forward pass is computed again.

    Old-style ``weight_norm``, ``spectral_norm`` and pruning leave the weight of the last pass in
    the module, which is another one after an optimizer step or ``load_state_dict``.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(module, do_power_iteration=False)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return cast("Tensor", hook.apply_mask(module))
    return cast("Tensor", module.weight)
