"""The onnx package's own cases of QuantizeLinear and DequantizeLinear, by our functional forms."""

import importlib
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case import node as node_cases

from pytorch_quant.axes import to_groups
from pytorch_quant.fake_quant import dequantize, dynamic_quantize, quantize_to_codes
from pytorch_quant.formats import FloatFormat, IntFormat

pytestmark = pytest.mark.filterwarnings("ignore")

_T = onnx.TensorProto
FORMATS = {
    _T.INT8: IntFormat(8),
    _T.UINT8: IntFormat(8, signed=False),
    _T.INT16: IntFormat(16),
    _T.UINT16: IntFormat(16, signed=False),
    _T.INT4: IntFormat(4),
    _T.UINT4: IntFormat(4, signed=False),
    _T.FLOAT8E4M3FN: FloatFormat(4, 3),
    _T.FLOAT4E2M1: FloatFormat(2, 1),
}
# All that have zero point 0, and the one whose uint8 codes are int8 codes plus 128.
QUANTIZE = {"", "_e4m3fn", "_float4e2m1", "_blocked_symmetric"}
DEQUANTIZE = {"_e4m3fn", "_e4m3fn_float16", "_e4m3fn_zero_point", "_float4e2m1"}


def cases(op):
    """By name without that of the operator. Its module registers them as it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"{node_cases.__name__}.{op.lower()}")
    found = [c for c in node_cases._NodeTestCases if c.model.graph.node[0].op_type == op]
    return {c.name.removeprefix(f"test_{op.lower()}"): c for c in found}


def array(value):
    return onnx.numpy_helper.to_array(value) if isinstance(value, _T) else np.asarray(value)


def data(case):
    inputs, outputs = case.data_sets[0]
    node = case.model.graph.node[0]
    return [array(v) for v in inputs], [array(v) for v in outputs], node


def attribute(node, name, default):
    return next((a.i for a in node.attribute if a.name == name), default)


def spread(values, x, node):
    """A scale or zero point in the shape that broadcasts against `x`."""
    values = torch.from_numpy(values.astype(np.float32))
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if block:
        return values.repeat_interleave(block, axis)
    if not values.dim():
        return values
    return values.reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])


def fits(zero_point, kind):
    return not zero_point.any() or (kind == _T.UINT8 and bool((zero_point == 128).all()))


def supported(op):
    found = {}
    for name, case in cases(op).items():
        (x, scale, *rest), (y,), node = data(case)
        codes_type = (
            case.model.graph.output[0] if op == "QuantizeLinear" else case.model.graph.input[0]
        )
        kind = codes_type.type.tensor_type.elem_type
        zero_point = rest[0].astype(np.float32) if rest else np.zeros(())
        if kind in FORMATS and fits(zero_point, kind):
            found[name] = (x, scale, zero_point, y, node, kind)
    return found


def test_quantize_linear():
    found = supported("QuantizeLinear")
    assert set(found) == QUANTIZE
    for name, (x, scale, zero_point, y, node, kind) in found.items():
        shift = float(zero_point.max())
        fmt = IntFormat(8) if shift else FORMATS[kind]
        codes = quantize_to_codes(torch.from_numpy(x), spread(scale, x, node), fmt) + shift
        np.testing.assert_array_equal(codes, y.astype(np.float32), err_msg=name)


def test_dequantize_linear():
    found = supported("DequantizeLinear")
    assert set(found) >= DEQUANTIZE
    for name, (q, scale, zero_point, y, node, _) in found.items():
        codes = torch.from_numpy(q.astype(np.float32)) - float(zero_point.max())
        values = dequantize(codes, spread(scale, q, node)).numpy().astype(y.dtype)
        np.testing.assert_array_equal(values, y, err_msg=name)


def test_dynamic_quantize_linear():
    found = cases("DynamicQuantizeLinear")
    assert len(found) >= 3
    checked = 0
    for name, case in found.items():
        if name.endswith("_expanded"):
            continue
        (x,), expected, _ = data(case)
        for value, reference in zip(dynamic_quantize(torch.from_numpy(x)), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-6, err_msg=name)
        checked += 1
    assert checked == 3


def test_blocks_are_those_of_the_operator():
    """`block_size` entries of `axis` in a row share a scale, as `axes.to_groups` cuts them."""
    x, scale, _, y, node, kind = supported("QuantizeLinear")["_blocked_symmetric"]
    axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    rows = to_groups(torch.from_numpy(x), axis, size)
    steps = torch.from_numpy(scale.reshape(-1, 1))
    expected = to_groups(torch.from_numpy(y.astype(np.float32)), axis, size)
    np.testing.assert_array_equal(quantize_to_codes(rows, steps, FORMATS[kind]), expected)
