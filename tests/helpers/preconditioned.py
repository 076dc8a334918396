"""Layers to precondition, and their singular values by NumPy."""

from __future__ import annotations

import copy
import warnings

import numpy as np
from torch import Tensor, nn

from convspectra.testing import naive_dense


def dense_values(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """All singular values by applying the layer to the identity, descending."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        matrix = naive_dense(copy.deepcopy(layer).double(), shape)
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False)


def everything(name: str, layer: nn.Module) -> bool:
    return not list(layer.children())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
