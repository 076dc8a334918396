"""ONNX models: options against ONNX's reference, constants, normalization, what is passed over."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch
from helpers.onnx_graphs import array, evaluated, model, one, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from convspectra.models._named_operators import NamedOperator
from convspectra.models.files import LoadError, load_operators


def loaded(folder, content, *shapes) -> list[NamedOperator]:
    return load_operators(saved(folder, content), shapes)[1]


def agrees(named: NamedOperator, content, shape: tuple[int, ...]) -> None:
    x = array(1, *shape, seed=5)
    assert named.skipped == ""
    found = named.operator.matvec(torch.from_numpy(x))
    expected = torch.from_numpy(evaluated(content, x).copy())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- options --------------------------------------------------------------------------------------


@st.composite
def conv_nodes(draw, transposed: bool):
    ndim = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=ndim, max_size=ndim))

    groups, (g, h) = draw(st.integers(1, 2)), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kernel, size = per_axis(1, 3), per_axis(5, 7)
    attributes = {"strides": per_axis(1, 3), "dilations": per_axis(1, 2), "group": groups}
    mode = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if transposed:
        same = mode.startswith("SAME")  # with an output_padding readers of ONNX disagree: below
        widest = [0 if same else s - 1 for s in attributes["strides"]]
        extra = [draw(st.integers(0, m)) for m in widest]
        attributes["output_padding"] = extra
    if mode != "NOTSET":
        attributes["auto_pad"] = mode
    elif draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * ndim)]
    shape = (groups * g, h, *kernel) if transposed else (groups * h, g, *kernel)
    return attributes, shape, (groups * g, *size)


@given(conv_nodes(transposed=False))
@settings(max_examples=60)
def test_conv_is_that_of_the_reference(tmp_path_factory, node):
    attributes, weight, shape = node
    content = one("Conv", array(*weight), shape, **attributes)
    (named,) = loaded(tmp_path_factory.getbasetemp(), content, shape)
    agrees(named, content, shape)


def torch_transposed(weight: torch.Tensor, x: torch.Tensor, attributes) -> torch.Tensor:
    """The full transposed convolution, cropped as the ONNX specification says."""
    ndim = weight.ndim - 2
    function = (
        torch.nn.functional.conv_transpose1d,
        torch.nn.functional.conv_transpose2d,
        torch.nn.functional.conv_transpose3d,
    )[ndim - 1]
    strides, dilations = attributes["strides"], attributes["dilations"]
    y = function(x, weight, stride=strides, dilation=dilations, groups=attributes["group"])
    extra = attributes["output_padding"]
    y = torch.nn.functional.pad(y, [p for e in reversed(extra) for p in (0, e)])
    mode = attributes.get("auto_pad", "NOTSET")
    for axis, s in enumerate(strides):
        full = y.shape[2 + axis]
        if mode.startswith("SAME"):
            total = full - x.shape[2 + axis] * s
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
            length = full - total
        else:
            pads = attributes.get("pads", [0] * 2 * ndim)
            before, length = pads[axis], full - pads[axis] - pads[axis + ndim]
        y = y.narrow(2 + axis, before, length)
    return y


@given(conv_nodes(transposed=True))
@settings(max_examples=60)
def test_transposed_conv_is_that_of_the_specification(tmp_path_factory, node):
    attributes, weight, shape = node
    kernel = weight[2:]
    content = one("ConvTranspose", array(*weight), shape, **attributes)
    (named,) = loaded(tmp_path_factory.getbasetemp(), content, shape)
    same = attributes.get("auto_pad", "").startswith("SAME")
    extra = zip(
        kernel,
        attributes["dilations"],
        attributes["strides"],
        attributes["output_padding"],
        strict=True,
    )
    if same and any(d * (k - 1) + 1 + e < s for k, d, s, e in extra):
        assert "negative" in named.skipped
        return
    x = torch.from_numpy(array(1, *shape, seed=5))
    expected = torch_transposed(torch.from_numpy(array(*weight)), x, attributes)
    torch.testing.assert_close(named.operator.matvec(x), expected, atol=1e-4, rtol=1e-4)


def test_a_size_on_which_readers_of_onnx_disagree(tmp_path):
    content = one(
        "ConvTranspose",
        array(1, 1, 4),
        (1, 5),
        strides=[2],
        auto_pad="SAME_UPPER",
        output_padding=[1],
    )
    (named,) = loaded(tmp_path, content, (1, 5))
    assert named.skipped == "ONNX infers an output of (11,), its attributes give (10,)"


@pytest.mark.parametrize(("mode", "before"), [("NOTSET", 1), ("SAME_UPPER", 0)])
def test_output_shape_of_a_transposed_conv(tmp_path, mode, before):
    content = one(
        "ConvTranspose", array(1, 1, 4), (1, 5), strides=[2], output_shape=[11], auto_pad=mode
    )
    (named,) = loaded(tmp_path, content, (1, 5))
    x = torch.from_numpy(array(1, 1, 5, seed=5))
    full = torch.nn.functional.conv_transpose1d(x, torch.from_numpy(array(1, 1, 4)), stride=2)
    torch.testing.assert_close(named.operator.matvec(x), full[..., before : before + 11])


@pytest.mark.parametrize("flipped", [0, 1])
def test_gemm(tmp_path, flipped):
    weight = array(2, 3) if flipped else array(3, 2)
    content = one("Gemm", weight, (3,), transB=flipped, alpha=0.5)
    (named,) = loaded(tmp_path, content, (3,))
    agrees(named, content, (3,))


def test_matmul_from_either_side(tmp_path):
    content = one("MatMul", array(3, 2), (3,))
    (right,) = loaded(tmp_path, content, (3,))
    agrees(right, content, (3,))
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    (left,) = loaded(tmp_path, model([node], {"w": array(2, 3)}, (3, 4)), (3, 4))
    assert torch.equal(left.operator.weight, torch.from_numpy(array(2, 3)))


# --- where the weight comes from ------------------------------------------------------------------


def constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def test_numbers_for_names_come_with_operator_and_position(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["12"]),
        helper.make_node("Relu", ["12"], ["13"]),
        helper.make_node("Conv", ["13", "v"], ["14"], name="7"),
        helper.make_node("Conv", ["14", "v"], ["y"], name="last"),
    ]
    content = model(nodes, {"w": array(3, 3, 3, 3), "v": array(3, 3, 3, 3)}, (3, 9, 9))
    names = [named.name for named in loaded(tmp_path, content, (3, 9, 9))]
    assert names == ["Conv@0 (12)", "Conv@1 (7)", "last"]


def test_layers_behind_an_unknown_operator(tmp_path):
    """The first has no size; the second has, for a Reshape says it."""
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], domain="com.example"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="first"),
        helper.make_node("Reshape", ["b", "r"], ["c"]),
        helper.make_node("Conv", ["c", "w"], ["y"], name="second"),
    ]
    content = model(nodes, {"w": array(3, 3, 3, 3), "r": np.array([1, 3, 5, 4])}, (3, 9, 9))
    content.opset_import.append(helper.make_opsetid("com.example", 1))
    first, second = loaded(tmp_path, content, (3, 9, 9))
    assert first.skipped == (
        "its input size could not be inferred past the Mystery node 'a' of the domain com.example; "
        "export without this operator"
    )
    assert second.operator.input_shape == (3, 5, 4)


@pytest.mark.parametrize("scales", [(), (3,)])
def test_quantized_weights_and_activations(tmp_path, scales):
    """Weights that are dequantized, of one scale or one for each filter; rounding commutes with
    padding."""
    rng = np.random.default_rng(0)
    integers = rng.integers(-99, 99, (3, 3, 3, 3)).astype(np.int8)
    scale = rng.random(scales).astype(np.float32) + 0.1
    nodes = [
        helper.make_node("Pad", ["x", "p"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("DequantizeLinear", ["b", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["q", "t"], ["w"], axis=0),
        helper.make_node("Conv", ["c", "w"], ["y"]),
    ]
    weights = {
        "p": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "q": integers,
        "t": scale,
    }
    (named,) = loaded(tmp_path, model(nodes, weights, (3, 6, 6)), (3, 6, 6))
    assert named.operator.geometry.padding == ((1, 0), (0, 2))
    expected = integers * scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(named.operator.weight, torch.from_numpy(expected))


def test_amounts_of_a_pad_that_are_computed_from_sizes(tmp_path):
    """Numbers without an axis stay numbers: one of one axis cannot be put beside another."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        constant("i", np.array(2)),
        helper.make_node("Gather", ["s", "i"], ["n"]),
        constant("four", np.array(4)),
        helper.make_node("Sub", ["four", "n"], ["d"]),  # 1
        constant("a", np.array([0])),
        helper.make_node("Unsqueeze", ["d", "a"], ["after"]),
        constant("before", np.array([0, 0, 0, 0, 0])),
        helper.make_node("Concat", ["before", "after"], ["p"], axis=0),
        helper.make_node("Pad", ["x", "p"], ["q"]),
        helper.make_node("Conv", ["q", "w"], ["y"]),
    ]
    content = model(nodes, {"w": array(2, 2, 3)}, (2, 3))
    (named,) = loaded(tmp_path, content, (2, 3))
    assert named.operator.geometry.padding == ((0, 1),)
    agrees(named, content, (2, 3))


@pytest.mark.parametrize(
    ("equation", "weight", "shape"),
    [
        ("bcl,ol->bco", (4, 3), (2, 3)),
        ("b c l , l o -> b o c", (3, 4), (2, 3)),
        ("bsd,dhk->bshk", (3, 2, 4), (5, 3)),
        ("bshk,hkd->bsd", (2, 4, 3), (5, 2, 4)),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_einsum_with_one_stored_factor(tmp_path, equation, weight, shape, left):
    if left:
        terms, _, result = equation.partition("->")
        equation = ",".join(terms.split(",")[::-1]) + "->" + result
    names = ["w", "x"] if left else ["x", "w"]
    nodes = [helper.make_node("Einsum", names, ["y"], equation=equation)]
    content = model(nodes, {"w": array(*weight)}, shape)
    (named,) = loaded(tmp_path, content, shape)
    x = array(1, *shape, seed=5)
    expected = torch.linalg.vector_norm(torch.from_numpy(evaluated(content, x).copy()))
    letters = equation.replace(" ", "")
    ours = letters.split("->")[0].split(",")[0 if left else 1]
    result = letters.split("->")[1]
    made = [weight[i] for i, letter in enumerate(ours) if letter in result]
    summed = [weight[i] for i, letter in enumerate(ours) if letter not in result]
    assert named.operator.shape == (int(np.prod(made)), int(np.prod(summed)))
    # Rows and columns are in the order of the weight's axes; here they end the input, too.
    y = torch.from_numpy(x).reshape(-1, named.operator.shape[1]) @ named.operator.weight.T
    torch.testing.assert_close(torch.linalg.vector_norm(y), expected)


def test_constant_identity_and_transpose_nodes_hold_weights(tmp_path):
    nodes = [
        constant("a", array(2, 3)),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "c"], ["y"]),
    ]
    content = model(nodes, {}, (3,))
    (named,) = loaded(tmp_path, content, (3,))
    agrees(named, content, (3,))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_floating_types(tmp_path, dtype):
    content = one("MatMul", array(2, 2), (2,))
    content.graph.initializer[0].CopyFrom(
        helper.make_tensor("w", dtype, [2, 2], [1.0, 2.0, 3.0, 4.0])
    )
    (named,) = loaded(tmp_path, content)
    assert named.operator.weight.flatten().tolist() == [1.0, 3.0, 2.0, 4.0]


def test_external_data_beside_the_model(tmp_path):
    content = one("Conv", array(2, 3, 3, 3), (3, 5, 5))
    path = tmp_path / "model.onnx"
    onnx.save_model(
        content, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    ((_, (named,))) = load_operators(path, [(3, 5, 5)])
    agrees(named, one("Conv", array(2, 3, 3, 3), (3, 5, 5)), (3, 5, 5))


# --- surroundings ---------------------------------------------------------------------------------


def normalized(*extra: onnx.NodeProto, **attributes) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node(
            "BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], name="bn", **attributes
        ),
        *extra,
    ]
    weights = {"w": array(2, 3, 3, 3), "s": array(2, seed=1), "b": np.zeros(2, np.float32)}
    weights |= {"m": np.zeros(2, np.float32), "v": np.exp(array(2, seed=2))}
    return model(nodes, weights, (3, 5, 5))


def test_batch_normalization_is_found(tmp_path):
    content = normalized(epsilon=0.1)
    (named,) = loaded(tmp_path, content, (3, 5, 5))
    assert named.batch_norm == "bn"
    x = array(1, 3, 5, 5, seed=5)
    found = named.operator.matvec(torch.from_numpy(x)) * named.scale.float()[:, None, None]
    torch.testing.assert_close(found, torch.from_numpy(evaluated(content, x).copy()))


def test_batch_normalization_that_is_not_alone(tmp_path):
    content = normalized(helper.make_node("Relu", ["c"], ["z"], name="relu"))
    (named,) = loaded(tmp_path, content, (3, 5, 5))
    assert (named.scale, named.batch_norm) == (None, "")
    assert named.notes == ("batch normalization bn is not alone to read it: relu too",)


def test_padding_before_is_noted(tmp_path):
    nodes = [
        helper.make_node("Pad", ["x", "p"], ["q"]),
        helper.make_node("Conv", ["q", "w"], ["y"]),
    ]
    weights = {"p": np.array([0, 0, 1, 0, 0, 1]), "w": array(2, 3, 3)}
    (named,) = loaded(tmp_path, model(nodes, weights, (3, 5)), (3, 5))
    assert (named.operator.input_shape, named.operator.geometry.padding) == ((3, 5), ((1, 1),))
    assert named.notes == ("its padding is that of a separate operation before it (Pad node q)",)


# --- what is passed over --------------------------------------------------------------------------


def branch(name: str) -> onnx.GraphProto:
    node = helper.make_node("Conv", ["x", "w"], [name], name=f"conv_{name}")
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [output])


def test_branches_are_listed(tmp_path):
    node = helper.make_node(
        "If", ["c"], ["y"], name="if", then_branch=branch("t"), else_branch=branch("e")
    )
    content = model([node], {"w": array(2, 3, 3)}, (3, 5))
    content.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    first, second = loaded(tmp_path, content, (3, 5))
    assert {first.name, second.name} == {"conv_t", "conv_e"}
    assert first.skipped == "it is inside a branch or loop, If node 'if'"


@pytest.mark.parametrize("condition", [True, False])
def test_the_branch_of_a_constant_condition_is_taken(tmp_path, condition):
    nodes = [
        helper.make_node("Not", ["c"], ["d"]),
        helper.make_node(
            "If", ["d"], ["z"], name="if", then_branch=branch("t"), else_branch=branch("e")
        ),
        helper.make_node("Conv", ["z", "v"], ["y"], name="after"),
    ]
    weights = {"c": np.array(not condition), "w": array(2, 3, 3), "v": array(4, 2, 1)}
    first, after = loaded(tmp_path, model(nodes, weights, (3, 5)), (3, 5))
    assert (first.name, after.name) == ("conv_t" if condition else "conv_e", "after")
    assert (first.skipped, after.skipped) == ("", "")
    assert after.operator.input_shape == (2, 3)


def behind(kind: str, axis: int | None) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """A weight that other constants make, and those."""
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    if kind == "DequantizeLinear":
        q = np.random.default_rng(0).integers(-100, 100, (2, 3, 3)).astype(np.int8)
        one = axis is None
        weights = {
            "q": q,
            "s": np.array(0.1 if one else [0.1, 0.2], np.float32),
            "z": np.array(3 if one else [3, -2], np.int8),
        }
        node = helper.make_node(kind, ["q", "s", "z"], ["w"], **({} if one else {"axis": axis}))
        return [node, conv], weights
    nodes = [
        helper.make_node("ReduceL2", ["v", "axes"], ["n"]),
        helper.make_node("Div", ["g", "n"], ["r"]),
        helper.make_node("Mul", ["v", "r"], ["w"]),
        conv,
    ]
    weights = {"v": array(2, 3, 3), "g": array(2, 1, 1, seed=1), "axes": np.array([1, 2])}
    return nodes, weights


@pytest.mark.parametrize(
    ("kind", "axis"), [("DequantizeLinear", None), ("DequantizeLinear", 0), ("weight_norm", None)]
)
def test_weights_that_constants_make(tmp_path, kind, axis):
    content = model(*behind(kind, axis), (3, 5))
    content.opset_import[0].version = 19
    (named,) = loaded(tmp_path, content, (3, 5))
    agrees(named, content, (3, 5))


@pytest.mark.parametrize("version", [10, 13, 18])
def test_dequantization_of_older_versions(tmp_path, version):
    content = model(*behind("DequantizeLinear", None), (3, 5))
    content.opset_import[0].version = version
    (named,) = loaded(tmp_path, content, (3, 5))
    expected = 0.1 * (behind("DequantizeLinear", None)[1]["q"].astype(np.float32) - 3)
    np.testing.assert_allclose(named.operator.weight.numpy(), expected, rtol=1e-6)


def test_constants_that_would_be_huge_are_not_made(tmp_path):
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    content = model(nodes, {"n": np.array([2**20, 2**20, 3])}, (3, 5))
    (named,) = loaded(tmp_path, content, (3, 5))
    assert "its result takes more than" in named.skipped


CONV_OF_W = helper.make_node("Conv", ["x", "w"], ["y"])
PASSED_OVER = [
    (
        [helper.make_node("RandomNormal", [], ["w"], shape=[2, 3, 3]), CONV_OF_W],
        "computed from the input",
    ),
    (
        [
            constant("c", np.ones((2, 3, 3), np.float32)),
            helper.make_node("Bernoulli", ["c"], ["w"]),
            CONV_OF_W,
        ],
        "comes from a Bernoulli node",
    ),
    ([helper.make_node("Conv", ["x", "x"], ["y"])], "computed from the input"),
    ([constant("w", np.ones((2, 3, 3), np.int8)), CONV_OF_W], "not of a floating type"),
    ([constant("w", np.full((2, 3, 3), np.nan, np.float32)), CONV_OF_W], "finite weight"),
    (
        [
            constant("w", array(2, 3, 3)),
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[-1, 1]),
        ],
        "negative",
    ),
    (
        [constant("w", array(2, 3, 3)), helper.make_node("ConvInteger", ["x", "w"], ["y"])],
        "quantized",
    ),
    (
        [
            constant("w", array(1, 2, 5)),
            constant("r", array(1, 2, 2)),
            helper.make_node("RNN", ["x", "w", "r"], ["y"], hidden_size=2),
        ],
        "a recurrence",
    ),
    (
        [
            constant("w", array(5, 2)),
            helper.make_node("Einsum", ["x", "w"], ["y"], equation="bcl,lo->bclo"),
        ],
        "Einsum of bcl,lo->bclo is no product with one stored matrix",
    ),
    (
        [constant("w", array(1, 5, 2)), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "batch of stored matrices",
    ),
    (
        [
            constant("w", array(2, 3, 3)),
            helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft"),
        ],
        "domain com.microsoft",
    ),
]


@pytest.mark.parametrize(("nodes", "reason"), PASSED_OVER)
def test_other_nodes_are_listed_with_a_reason(tmp_path, nodes, reason):
    (named,) = loaded(tmp_path, model(nodes, {}, (3, 5)), (3, 5))
    assert named.operator is None
    assert reason in named.skipped


def test_an_unknown_size(tmp_path):
    content = one("Conv", array(2, 3, 3), (3, "length"))
    (named,) = loaded(tmp_path, content)
    assert "input size could not be inferred" in named.skipped


def test_the_node_at_which_sizes_end_is_named(tmp_path):
    nodes = [
        helper.make_node("Own", ["x"], ["u"], name="own", domain="com.microsoft"),
        helper.make_node("Relu", ["u"], ["v"]),
        helper.make_node("Conv", ["v", "w"], ["y"]),
    ]
    (named,) = loaded(tmp_path, model(nodes, {"w": array(2, 3, 3)}, (3, 5)), (3, 5))
    assert "past the Own node 'own' of the domain com.microsoft; export" in named.skipped


def test_attention_and_tables_are_no_layers(tmp_path):
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["t"]),
        helper.make_node("Transpose", ["x"], ["u"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "u"], ["y"]),
    ]
    weights = {"w": array(4, 3), "i": np.array([0])}
    assert loaded(tmp_path, model(nodes, weights, (3, 5)), (3, 5)) == []


# --- hostile and broken files ---------------------------------------------------------------------

CONV = one("Conv", array(2, 3, 3, 3), (3, 5, 5))


def test_every_truncation_is_refused(tmp_path):
    data = CONV.SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(1, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(LoadError, match=r"model\.onnx: [^\n]+$"):
            load_operators(path, [(3, 5, 5)])


def test_dimensions_that_are_not_those_of_the_data(tmp_path):
    content = onnx.ModelProto()
    content.CopyFrom(CONV)
    content.graph.initializer[0].dims[:] = [2, 3, 3, 4]
    with pytest.raises(LoadError, match="not what its sizes say"):
        loaded(tmp_path, content, (3, 5, 5))
    content.graph.initializer[0].dims[:] = [2**20, 3, 2**20, 3]
    with pytest.raises(LoadError, match="more than the limit"):
        loaded(tmp_path, content, (3, 5, 5))


def test_cycles_and_missing_nodes(tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
    ]
    with pytest.raises(LoadError, match="a cycle or a missing node"):
        loaded(tmp_path, model(nodes, {}, (3,), output="b"), (3,))
    with pytest.raises(LoadError, match="nothing writes the output 'y'"):
        loaded(tmp_path, model([], {"w": array(1)}, (3,)), (3,))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", ""])
def test_external_data_elsewhere_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(216))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    content = onnx.ModelProto()
    content.CopyFrom(CONV)
    tensor = content.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(LoadError, match="outside the model's folder; refused"):
        loaded(folder, content, (3, 5, 5))


def test_input_shapes_that_do_not_fit(tmp_path):
    with pytest.raises(LoadError, match="takes 3 channels, its input has 5"):
        loaded(tmp_path, CONV, (5, 5, 3))
    with pytest.raises(LoadError, match="expected 3 sizes after the batch for the input 'x'"):
        loaded(tmp_path, CONV, (3, 5))
    with pytest.raises(LoadError, match="at most 1 input shapes"):
        loaded(tmp_path, CONV, (3, 5, 5), (3, 5, 5))


def calling(count: int, last: str) -> onnx.ModelProto:
    """A model whose functions f0, f1, ... call the next one twice, and the last one another."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("here", 1)]

    def function(name: str, callee: str) -> onnx.FunctionProto:
        calls = [helper.make_node(callee, [a], [b], domain="here") for a, b in ("xt", "ty")]
        return helper.make_function("here", name, ["x"], ["y"], calls, imports)

    content = model([helper.make_node("f0", ["x"], ["y"], domain="here")], {}, (3,))
    content.opset_import.extend(imports[1:])
    names = [f"f{i}" for i in range(count)]
    for name, callee in zip(names, [*names[1:], last], strict=True):
        content.functions.append(function(name, callee))
    identity = helper.make_node("Identity", ["x"], ["y"])
    content.functions.append(helper.make_function("here", "end", ["x"], ["y"], [identity], imports))
    return content


def test_functions_that_double_are_refused_before_they_are_written_out(tmp_path):
    path = saved(tmp_path, calling(28, "end"))
    assert path.stat().st_size < 4000
    with pytest.raises(LoadError, match=r"stand for more than 200,000 nodes"):
        load_operators(path, [(3,)])


def test_a_function_that_calls_itself_is_refused(tmp_path):
    with pytest.raises(LoadError, match=r"the function 'f\d' calls itself"):
        load_operators(saved(tmp_path, calling(5, "f2")), [(3,)])


def test_functions_within_reason_are_written_out(tmp_path):
    weight = array(4, 3)
    content = calling(8, "end")
    content.graph.node.append(helper.make_node("MatMul", ["y", "w"], ["z"]))
    content.graph.initializer.append(numpy_helper.from_array(weight.T.copy(), "w"))
    content.graph.output[0].name = "z"
    (target,) = load_operators(saved(tmp_path, content), [(3,)])[1]
    assert target.operator is not None
    torch.testing.assert_close(target.operator.to_dense(), torch.from_numpy(weight))


def test_external_data_that_is_a_pipe_is_refused(tmp_path):
    content = one("Gemm", array(3, 2), (3,))
    path = tmp_path / "model.onnx"
    onnx.save_model(
        content, str(path), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")  # nobody ever writes into it
    with pytest.raises(LoadError, match=r"w\.bin is not a file"):
        load_operators(path, [(3,)])
