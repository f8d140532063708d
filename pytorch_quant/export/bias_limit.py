"""Weight scales that leave room for the integer bias of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.recode import code_inputs
from pytorch_quant.export.wiring import Wiring, attribute, free_name, is_standard, names

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
# Half of int32, so that the sum of products has room beside the bias.
_LARGEST_BIAS_CODE = 2.0**30


def raise_small_scales(graph: Any) -> int:
    """Raise weight scales so small that a quantized bias would saturate, in place.

    ONNX Runtime codes the bias of a quantized layer in int32 with the step `s_x * s_w`. Where
    `|bias| > 2**30 * s_x * s_w`, as in a channel whose weights are nearly 0, `s_w` becomes
    `|bias| / (2**30 * s_x)`; what the weights of such a channel add is small beside its bias.

    Args:
        graph: An `onnx.GraphProto` whose weights are float initializers under Q/DQ pairs.

    Returns:
        The number of scales that were raised; a per-tensor scale counts once.
    """
    wiring = Wiring(graph)
    least: dict[str, np.ndarray] = {}
    for node in graph.node:
        found = _layer(wiring, node)
        if found is None:
            continue
        quantize, step, bias, axis = found
        scale = wiring.value(quantize.input[1])
        if scale is None:
            continue
        needed = np.abs(bias).astype(np.float64) / (_LARGEST_BIAS_CODE * step)
        if scale.ndim == 0 or scale.size == 1:
            needed = needed.max().reshape(scale.shape)
        elif axis != attribute(quantize, "axis", 1) or needed.size % scale.size:
            continue
        else:
            # The groups of a transposed convolution share the scales of its second axis.
            needed = needed.reshape(-1, scale.size).max(axis=0)
        tensor = quantize.output[0]
        least[tensor] = np.maximum(least.get(tensor, 0.0), needed)
    raised, taken = 0, names(graph)
    for tensor, needed in least.items():
        quantize = wiring.producers[tensor]
        scale = wiring.value(quantize.input[1])
        assert scale is not None
        low = scale.astype(np.float64) < needed
        if low.any():
            _write_scale(
                graph, wiring, quantize, np.where(low, _above(needed, scale), scale), taken
            )
            raised += int(low.sum())
    return raised


def _above(needed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`needed` in the type of the scales, rounded up."""
    near = needed.astype(scale.dtype)
    return np.where(near < needed, np.nextafter(near, scale.dtype.type(np.inf)), near)


def _layer(wiring: Wiring, node: Any) -> tuple[Any, float, np.ndarray, int] | None:
    """The Q of the weight, the input scale, the bias `(N,)` and the axis of output channels."""
    product, bias = node, None
    if is_standard(node, "Conv", "ConvTranspose", "Gemm") and len(node.input) > 2:
        bias = wiring.value(node.input[2])
    elif is_standard(node, "Add"):
        for index in (0, 1):
            made_by = wiring.producers.get(node.input[index])
            if made_by is not None and is_standard(made_by, "MatMul"):
                product, bias = made_by, wiring.value(node.input[1 - index])
    if bias is None or bias.dtype not in (np.float32, np.float16):
        return None
    quantize, step = _weight_quantizer(wiring, product), _input_scale(wiring, product.input[0])
    if quantize is None or step is None or not bias.size or bias.size != bias.shape[-1]:
        return None
    factor = 1.0
    if is_standard(product, "Gemm"):
        factor = attribute(product, "beta", 1.0) / (attribute(product, "alpha", 1.0) or 1.0)
    axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1 - attribute(product, "transB", 0)}
    return quantize, step, bias.reshape(-1) * factor, axis.get(product.op_type, 1)


def _weight_quantizer(wiring: Wiring, product: Any) -> Any:
    dequantize = wiring.producers.get(product.input[1])
    if dequantize is None or not is_standard(dequantize, _DQ):
        return None
    quantize = wiring.producers.get(dequantize.input[0])
    if quantize is None or not is_standard(quantize, _Q) or attribute(quantize, "block_size", 0):
        return None
    return quantize if quantize.input[0] in wiring.constants else None


def _input_scale(wiring: Wiring, tensor: str) -> float | None:
    node = wiring.producers.get(tensor)
    while node is not None and code_inputs(node):
        # Runtimes move the DequantizeLinear behind operators that only move values.
        node = wiring.producers.get(node.input[code_inputs(node)[0]])
    if node is None or not is_standard(node, _DQ):
        return None
    scale = wiring.value(node.input[1])
    return float(scale.reshape(())) if scale is not None and scale.size == 1 else None


def _write_scale(
    graph: Any, wiring: Wiring, quantize: Any, scale: np.ndarray, taken: set[str]
) -> None:
    import onnx

    old = quantize.input[1]
    pair = [quantize, *(node for node, _ in wiring.uses(quantize.output[0]))]
    shared = any(user not in pair for user, _ in wiring.uses(old)) or old in wiring.captured
    name = free_name(f"{old}_raised", taken) if shared else old
    tensor = onnx.numpy_helper.from_array(scale, name)
    if shared:
        graph.initializer.append(tensor)
    else:
        wiring.initializers[old].CopyFrom(tensor)
    for node in pair:
        node.input[1] = name
