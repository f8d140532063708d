import numpy as np
import onnx
import onnx_runs
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytorch_quant.export.recode import to_signed, to_unsigned

INT8, UINT8 = np.int8(0), np.uint8(128)
X = np.random.default_rng(0).normal(scale=3, size=(2, 4, 6, 6)).astype(np.float32)
# Ties, both ends of the range and far outside.
X.reshape(-1)[:8] = [0.25, 0.75, -0.25, 63.5, -64, 1e6, -1e6, 0]


def graph(nodes, constants, outputs=("y",), kind=TensorProto.FLOAT, x=X):
    infos = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    held = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = helper.make_graph(nodes, "g", inputs, infos, held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def pair(*layout, zero_point=INT8, read="codes", **constants):
    nodes = [helper.make_node("QuantizeLinear", ["x", "a.scale", "a.zero_point"], ["q"])]
    nodes += layout
    nodes.append(helper.make_node("DequantizeLinear", [read, "a.scale", "a.zero_point"], ["y"]))
    constants = {"a.scale": np.float32(0.5), "a.zero_point": zero_point, **constants}
    return graph(nodes, constants)


def kinds(model):
    held = {c.name: c for c in model.graph.initializer}
    return {
        node.op_type[0]: onnx.TensorProto.DataType.Name(held[node.input[2]].data_type)
        for node in model.graph.node
        if node.op_type.endswith("Linear")
    }


def same_outputs(model, change, x=X):
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    before = onnx_runs.run(model, x)
    count = change(model.graph)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    for a, b in zip(before, onnx_runs.run(model, x), strict=True):
        np.testing.assert_array_equal(a, b)
    return count


def node(op, *inputs, outputs=("codes",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


LAYOUT = {
    "reshape": ([node("Reshape", "q", "shape")], {"shape": np.array([8, 36])}),
    "transpose": ([node("Transpose", "q", perm=[0, 2, 3, 1])], {}),
    "flatten": ([node("Flatten", "q")], {}),
    "maxpool": ([node("MaxPool", "q", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "concat": ([node("Concat", "q", "q", axis=1)], {}),
    "gather": ([node("Gather", "q", "at", axis=1)], {"at": np.array([2, 0])}),
    "chain": (
        [node("Identity", "q", outputs=["i"]), node("Squeeze", "i", "axes")],
        {"axes": np.array([], np.int64)},
    ),
    "resize": (
        [node("Resize", "q", "", "sizes", mode="nearest")],
        {"sizes": np.array([1, 1, 2, 2], np.float32)},
    ),
    "pad": ([node("Pad", "q", "pads", mode="edge")], {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
}
LAYOUT["chain"][0][1].input.pop()


@pytest.mark.parametrize("name", LAYOUT)
def test_codes_that_are_moved(name):
    nodes, constants = LAYOUT[name]
    model = pair(*nodes, **constants)
    assert same_outputs(model, to_unsigned) == 1
    assert kinds(model) == {"Q": "UINT8", "D": "UINT8"}
    assert {c.name for c in model.graph.initializer} == {"a.scale", "a.zero_point", *constants}
    assert same_outputs(model, to_signed) == 1
    assert kinds(model) == {"Q": "INT8", "D": "INT8"}


ALONE = {
    "pad with 0": ([node("Pad", "q", "pads")], {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "arithmetic": ([node("Abs", "q")], {}),
    "a second reader": ([node("Identity", "q"), node("Sign", "q", outputs=["s"])], {}),
    "codes as index": (
        [node("Gather", "q", "q64"), node("Cast", "q", outputs=["q64"], to=TensorProto.INT64)][
            ::-1
        ],
        {},
    ),
    "a constant beside them": (
        [node("Concat", "q", "more", axis=0)],
        {"more": np.zeros(X.shape, np.int8)},
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_codes_that_something_else_reads_stay(name):
    nodes, constants = ALONE[name]
    model = pair(*nodes, **constants)
    before = model.SerializeToString()
    assert to_unsigned(model.graph) == 0
    assert model.SerializeToString() == before


def test_codes_as_graph_output_stay():
    nodes = pair(node("Identity", "q")).graph.node
    constants = {"a.scale": np.float32(0.5), "a.zero_point": INT8}
    model = graph(nodes, constants, ("codes",), TensorProto.INT8)
    assert to_unsigned(model.graph) == 0


@pytest.mark.parametrize("zero_point", [np.int8(1), np.uint8(0), np.uint8(127), np.int16(0)])
def test_other_zero_points_stay(zero_point):
    model = pair(node("Identity", "q"), zero_point=zero_point)
    assert to_unsigned(model.graph) == to_signed(model.graph) == 0


def test_tensors_that_are_joined_change_together():
    def joined(second):
        nodes = [
            node("QuantizeLinear", "x", "s", "z1", outputs=["q1"]),
            node("QuantizeLinear", "x", "s", "z2", outputs=["q2"]),
            node("Concat", "q1", "q2", axis=1),
            node("Split", "codes", outputs=["l", "r"], num_outputs=2),
            node("DequantizeLinear", "l", "s", "z1", outputs=["y"]),
            node("DequantizeLinear", "r", "s", "z2", outputs=["z"]),
        ]
        constants = {"s": np.float32(0.5), "z1": INT8, "z2": np.int8(second)}
        return graph(nodes, constants, ("y", "z"))

    assert same_outputs(joined(0), to_unsigned) == 2
    assert same_outputs(joined(1), to_unsigned) == 0


def shared(weight_nodes, **more):
    """An activation and a weight whose pairs share one zero point."""
    nodes = [
        node("QuantizeLinear", "x", "a.scale", "zero", outputs=["q"]),
        node("DequantizeLinear", "q", "a.scale", "zero", outputs=["d"]),
        *weight_nodes,
        node("Conv", "d", "w", outputs=["y"]),
    ]
    return graph(
        nodes, {"a.scale": np.float32(0.5), "zero": INT8, "w.scale": np.float32(1), **more}
    )


WEIGHTS = {
    "codes": (
        [node("DequantizeLinear", "wq", "w.scale", "zero", outputs=["w"])],
        {"wq": np.arange(-16, 16, dtype=np.int8).reshape(8, 4, 1, 1)},
    ),
    "float": (
        [
            node("Neg", "wf", outputs=["wn"]),
            node("QuantizeLinear", "wn", "w.scale", "zero", outputs=["wq"]),
            node("DequantizeLinear", "wq", "w.scale", "zero", outputs=["w"]),
        ],
        {"wf": np.arange(-16, 16, dtype=np.float32).reshape(8, 4, 1, 1)},
    ),
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_stay_signed_where_a_zero_point_is_shared(form):
    nodes, constants = WEIGHTS[form]
    model = shared(nodes, **constants)
    assert same_outputs(model, to_unsigned) == 1
    held = {c.name: c for c in model.graph.initializer}
    assert [n.input[2] for n in model.graph.node[:2]] == ["a.zero_point"] * 2
    assert held["a.zero_point"].data_type == TensorProto.UINT8
    assert held["zero"].data_type == TensorProto.INT8


def test_one_zero_point_of_several_activations_changes_once():
    nodes = [
        node("QuantizeLinear", "x", "s", "z", outputs=["q1"]),
        node("DequantizeLinear", "q1", "s", "z", outputs=["d1"]),
        node("Neg", "d1", outputs=["n"]),
        node("QuantizeLinear", "n", "s", "z", outputs=["q2"]),
        node("DequantizeLinear", "q2", "s", "z", outputs=["y"]),
    ]
    model = graph(nodes, {"s": np.float32(0.5), "z": INT8})
    assert same_outputs(model, to_unsigned) == 2
    assert {c.name for c in model.graph.initializer} == {"s", "z"}


def test_per_channel_and_absent_zero_points():
    scale = np.array([0.5, 0.25, 0.125, 1], np.float32)
    nodes = [
        node("QuantizeLinear", "x", "s", outputs=["q"], axis=1, output_dtype=TensorProto.INT8),
        node("DequantizeLinear", "q", "s", outputs=["y"], axis=1),
    ]
    model = graph(nodes, {"s": scale})
    assert same_outputs(model, to_unsigned) == 1
    assert kinds(model) == {"Q": "UINT8", "D": "UINT8"}
    zero_points = [numpy_helper.to_array(c) for c in model.graph.initializer[1:]]
    np.testing.assert_array_equal(zero_points, [np.full(4, 128, np.uint8)])
    without = graph(
        [node("QuantizeLinear", "x", "s", outputs=["q"], axis=1), nodes[1]], {"s": scale}
    )
    assert to_unsigned(without.graph) == to_signed(without.graph) == 0


def test_zero_points_of_constant_nodes_and_of_bodies():
    def with_body(reads):
        constant = helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(INT8))
        info = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
        inner = helper.make_graph(
            [node("DequantizeLinear", reads, "s", "z", outputs=["b"])], "body", [], info
        )
        nodes = [
            constant,
            node("QuantizeLinear", "x", "s", "z", outputs=["q"]),
            node("DequantizeLinear", "q", "s", "z", outputs=["d"]),
            node("If", "yes", outputs=["i"], then_branch=inner, else_branch=inner),
            node("Add", "d", "i", outputs=["y"]),
        ]
        held = {"s": np.float32(0.5), "yes": np.array(True), "c": np.int8(3)}
        return graph(nodes, held)

    model = with_body("c")
    assert same_outputs(model, to_unsigned) == 1
    assert model.graph.node[0].output == ["z"]
    assert to_unsigned(with_body("q").graph) == 0


def test_types_that_are_written_down_follow():
    model = pair(node("Identity", "q"))
    for name in ("q", "codes"):
        info = helper.make_tensor_value_info(name, TensorProto.INT8, X.shape)
        model.graph.value_info.append(info)
    assert same_outputs(model, to_unsigned) == 1
    assert {i.type.tensor_type.elem_type for i in model.graph.value_info} == {TensorProto.UINT8}
