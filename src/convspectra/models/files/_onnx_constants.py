"""Values of an ONNX graph that depend on stored tensors only, by ONNX's reference evaluator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]

FOLDED = frozenset(
    """Abs Add And Cast CastLike Ceil Clip Concat ConstantOfShape DequantizeLinear Div Einsum Equal
    Exp Expand Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity
    Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range
    Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Size Slice
    Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze Where Xor""".split()  # noqa: SIM905
)
"""Operators of ONNX's own domain without state, chance or subgraphs."""


class FoldingError(Exception):
    """A constant that cannot be evaluated; the message says why."""


def evaluated(
    node: NodeProto, inputs: Mapping[str, Array], opset: int, max_bytes: int
) -> dict[str, Array]:
    """The outputs of one node.

    Parameters
    ----------
    node : NodeProto
        Of an operator in `FOLDED`.
    inputs : mapping of str to array
        A value for each of its inputs.
    opset : int
        Version of ONNX's own domain.
    max_bytes : int
        Largest output.

    Raises
    ------
    FoldingError
        If it has no value for these inputs, or sizes of the outputs are not known beforehand or
        above the limit.
    """
    given = {name: inputs[name] for name in node.input if name}
    names = [name for name in node.output if name]
    try:
        model = _single_node(node, given, names, opset)
        for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
            kind = value.type.tensor_type
            dims = kind.shape.dim
            if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
                raise FoldingError("the size of its result is not known")
            if 8 * math.prod(d.dim_value for d in dims) > max_bytes:
                raise FoldingError(f"its result takes more than {max_bytes} bytes")
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(names, {})
    except FoldingError:
        raise
    except Exception as error:  # anything may be wrong with a hostile node
        raise FoldingError(f"{node.op_type} has no value ({type(error).__name__})") from error
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def _single_node(
    node: NodeProto, given: Mapping[str, Array], names: list[str], opset: int
) -> ModelProto:
    graph = helper.make_graph(
        [node],
        "one",
        [],
        [onnx.ValueInfoProto(name=name) for name in names],
        [numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in given.items()],
    )
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        opset = max(opset, 19)  # the first that the evaluator has; earlier ones say the same
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
