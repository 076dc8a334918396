"""The weight and options of the convolution that an ``nn.Module`` is."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import _disable_current_modes

from convspectra.operator._own_forward import own_convolution

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
"""Methods that make the map; in a subclass that replaces one it may be another."""


def convolution_options(module: nn.Module, input_size: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Weight and options of an ``nn.ConvNd``, ``nn.ConvTransposeNd`` or ``nn.Linear``.

    Parameters
    ----------
    module : nn.Module
        Of a subclass with a forward pass of its own, the convolution that this pass applies, at
        this input size (Note [A forward pass of its own]).
    input_size : tuple of int, optional

    Raises
    ------
    ValueError
        For any other module; for a forward pass that cannot be followed; for a lazy module without
        a weight.
    """
    base = next((t for t in LAYER_TYPES if isinstance(module, t)), None)
    if base is None:
        names = ", ".join(f"nn.{t.__name__}" for t in LAYER_TYPES)
        kind = type(module)
        if "quantized" in kind.__module__:
            raise ValueError(
                f"expected a layer with floating weights, one of {names}, got the quantized "
                f"{kind.__module__}.{kind.__name__}; give the model from before its quantization"
            )
        raise ValueError(f"expected one of {names}, got {kind.__name__}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"expected a module with its weight in place, got the lazy {type(module).__name__}; "
            "run one forward pass first"
        )
    if has_own_forward(module):
        if _hook_now(module) is not None:
            module.weight = _weight_now(module)  # as the hook does before a forward pass
        return own_convolution(module, isinstance(module, _TRANSPOSED_TYPES), input_size)
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


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward pass of a layer is another than that of PyTorch's class."""
    base = next((t for t in LAYER_TYPES if isinstance(module, t)), None)
    return base is not None and any(
        getattr(type(module), method, None) is not getattr(base, method, None)
        for method in _FORWARD_METHODS
    )


def _weight_now(module: nn.Module) -> Tensor:
    """The weight; what a hook computes before a forward pass is computed again.

    Old-style ``weight_norm``, ``spectral_norm`` and pruning leave the weight of the last pass in
    the module, which is another one after an optimizer step or ``load_state_dict``.
    """
    hook = _hook_now(module)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    if isinstance(hook, BasePruningMethod):
        return cast("Tensor", hook.apply_mask(module))
    weight = cast("Tensor", module.weight)
    if hasattr(weight, "full_tensor"):  # in pieces on several ranks, all of which come here
        with _disable_current_modes():  # whoever watches the pass sees no operation of this
            return cast("Tensor", weight.full_tensor())
    return weight


def _hook_now(module: nn.Module) -> Any:
    """The hook that computes the weight before each forward pass, if there is one."""
    for hook in module._forward_pre_hooks.values():
        named = isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight"
        if named or (isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"):
            return hook
    return None
