"""Small ONNX models for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    shape: tuple[int | str, ...],
    output: str = "y",
) -> onnx.ModelProto:
    """A model of the input "x", (batch, *shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        ir_version=9,
    )


def one(kind: str, weight: np.ndarray, shape: tuple[int, ...], **attributes) -> onnx.ModelProto:
    """A model of one node with the weight as its second input."""
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer", **attributes)
    return model([node], {"w": weight}, shape)


def saved(folder: Path, content: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(content.SerializeToString())
    return path


def evaluated(content: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """ONNX's own reference implementation."""
    return ReferenceEvaluator(content).run(None, {"x": x})[0]
