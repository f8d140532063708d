"""Constants behind Q and DQ: biases as floats, weights as signed codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.wiring import (
    Wiring,
    attribute,
    drop_unread,
    free_name,
    is_standard,
    names,
    read_instead,
)

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_BIASED = ("Conv", "ConvTranspose", "Gemm")
_FLOATS = {"float32", "float16", "bfloat16"}


def float_biases(graph: Any) -> int:
    """Store biases as the floats that their DQ computes: int32 codes, and any DQ on a bias."""
    wiring, taken = Wiring(graph), names(graph)
    replaced: dict[str, str] = {}
    for node in [n for n in graph.node if is_standard(n, _DQ)]:
        codes = _codes_of(wiring, node)
        if codes is None or not (codes.dtype == np.int32 or _only_bias(wiring, node.output[0])):
            continue
        value = _dequantized(wiring, node, codes)
        if value is None or node.output[0] in wiring.outputs | wiring.captured:
            continue
        name = node.input[0].removesuffix("_quantized")
        name = free_name(name if name != node.input[0] else f"{name}_float", taken)
        graph.initializer.append(_tensor(value, name))
        replaced[node.output[0]] = name
    read_instead(graph, replaced)
    drop_unread(graph, set(replaced))
    return len(replaced)


def _only_bias(wiring: Wiring, tensor: str) -> bool:
    uses = wiring.uses(tensor)
    return bool(uses) and all(is_standard(node, *_BIASED) and i == 2 for node, i in uses)


def store_codes(graph: Any) -> int:
    """Store each constant that goes through Q as its codes."""
    wiring, taken = Wiring(graph), names(graph)
    replaced: dict[str, str] = {}
    for node in [n for n in graph.node if is_standard(n, _Q)]:
        codes = _codes(wiring, node)
        if codes is None or node.output[0] in wiring.outputs | wiring.captured:
            continue
        root = node.input[0]
        while root in wiring.producers and wiring.producers[root].input:
            root = wiring.producers[root].input[0]
        name = free_name(f"{root}_quantized", taken)
        graph.initializer.append(_tensor(codes, name))
        replaced[node.output[0]] = name
    read_instead(graph, replaced)
    drop_unread(graph, set(replaced))
    return len(replaced)


def sign_weights(graph: Any) -> int:
    """Store uint8 codes of constants with zero point 128 as int8 with zero point 0.

    Codes of uint8 with zero point 0 become int8 where none is above 127.
    """
    wiring, taken = Wiring(graph), names(graph)
    stored: dict[tuple[str, int], str] = {}
    dropped: set[str] = set()
    changed = 0
    for node in [n for n in graph.node if is_standard(n, _DQ)]:
        codes, zero_point = wiring.value(node.input[0]), _zero_point(wiring, node)
        if codes is None or codes.dtype != np.uint8 or zero_point is None or not zero_point.size:
            continue
        shift = int(zero_point.reshape(-1)[0])
        highest = int(codes.max(initial=0))
        if bool((zero_point != shift).any()) or shift not in (0, 128) or highest - shift > 127:
            continue
        for index, value in ((0, codes), (2, zero_point)):
            key = (node.input[index], shift)
            if key not in stored:
                stored[key] = free_name(f"{node.input[index]}_int8", taken)
                signed = (value.astype(np.int16) - shift).astype(np.int8)
                graph.initializer.append(_tensor(signed, stored[key]))
            dropped.add(node.input[index])
            node.input[index] = stored[key]
        changed += 1
    drop_unread(graph, dropped)
    _keep_names(graph, {new: old for (old, _), new in stored.items()})
    return changed


def scale_zero_channels(graph: Any) -> int:
    """Give a weight channel whose scale is 0, so that all its values are 0, the largest scale.

    Its codes become 0. No runtime divides by 0 then, and the values are the same.
    """
    wiring, taken = Wiring(graph), names(graph)
    dropped: set[str] = set()
    changed = 0
    for node in [n for n in graph.node if is_standard(n, _DQ)]:
        codes, scale = _codes_of(wiring, node), wiring.value(node.input[1])
        zero_point = _zero_point(wiring, node)
        if codes is None or scale is None or zero_point is None or not (scale == 0).any():
            continue
        dead = _spread(node, (scale == 0).astype(np.float32), codes.shape)
        zeros = _spread(node, zero_point.astype(np.float32), codes.shape)
        if dead is None or zeros is None or not (np.isfinite(scale) & (scale >= 0)).all():
            continue
        value = np.where(dead > 0, zeros, codes.astype(np.float32)).astype(codes.dtype)
        largest = scale.max() if scale.max() > 0 else np.ones((), scale.dtype)
        raised = np.where(scale == 0, largest, scale).astype(scale.dtype)
        for index, array in ((0, value), (1, raised)):
            dropped.add(node.input[index])
            node.input[index] = free_name(f"{node.input[index]}_positive", taken)
            graph.initializer.append(_tensor(array, node.input[index]))
        changed += 1
    drop_unread(graph, dropped)
    return changed


def _keep_names(graph: Any, wanted: dict[str, str]) -> None:
    """Give tensors the names that they replaced, where those are free now."""
    taken = names(graph)
    renamed = {}
    for new, old in wanted.items():
        if old not in taken:
            renamed[new] = old
            taken.add(old)
    for constant in graph.initializer:
        constant.name = renamed.get(constant.name, constant.name)
    read_instead(graph, renamed)


def _tensor(value: np.ndarray, name: str) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)


def _codes_of(wiring: Wiring, dq: Any) -> np.ndarray | None:
    """The codes of a constant, stored or computed by a Q."""
    stored = wiring.value(dq.input[0])
    if stored is not None:
        return stored
    q = wiring.producers.get(dq.input[0])
    return _codes(wiring, q) if q is not None and is_standard(q, _Q) else None


def _zero_point(wiring: Wiring, node: Any) -> np.ndarray | None:
    """None where it is left out or no constant."""
    return wiring.value(node.input[2]) if len(node.input) > 2 else None


def _codes(wiring: Wiring, q: Any) -> np.ndarray | None:
    """What a Q makes of a constant; None where that is not known exactly.

    `q = saturate(round_half_even(x / scale) + zero_point)`, as ONNX defines QuantizeLinear.
    """
    x, scale = wiring.computed(q.input[0]), wiring.value(q.input[1])
    zero_point = _zero_point(wiring, q)
    if x is None or scale is None or zero_point is None:
        return None
    if x.dtype.name not in _FLOATS or scale.dtype.name not in _FLOATS:
        return None
    steps = _spread(q, scale.astype(np.float32), x.shape)
    zeros = _spread(q, zero_point.astype(np.float32), x.shape)
    if steps is None or zeros is None or not (np.isfinite(x).all() and (steps >= 0).all()):
        return None
    with np.errstate(all="ignore"):
        # A scale of 0 dequantizes every code to 0.
        q_real = np.where(steps > 0, x.astype(np.float32) / steps, np.float32(0))
    low, high, rounds = _range(zero_point.dtype)
    if rounds is None:
        return None
    return np.clip((np.rint(q_real) if rounds else q_real) + zeros, low, high).astype(
        zero_point.dtype
    )


def _range(dtype: np.dtype[Any]) -> tuple[float, float, bool | None]:
    """The lowest and highest code, and whether codes are whole; None where that is unknown."""
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max), True
    known = {"int4": (-8.0, 7.0, True), "uint4": (0.0, 15.0, True)}
    known["float8_e4m3fn"] = (-448.0, 448.0, False)
    return known.get(dtype.name, (0.0, 0.0, None))


def _dequantized(wiring: Wiring, dq: Any, codes: np.ndarray) -> np.ndarray | None:
    """`(q - zero_point) * scale` in the scale's type, as ONNX defines DequantizeLinear."""
    scale, zero_point = wiring.value(dq.input[1]), _zero_point(wiring, dq)
    if scale is None or scale.dtype != np.float32 or attribute(dq, "output_dtype", 1) != 1:
        return None
    steps = _spread(dq, scale, codes.shape)
    zeros = np.zeros((), np.float32) if zero_point is None else _spread(dq, zero_point, codes.shape)
    if steps is None or zeros is None:
        return None
    whole = codes.dtype.kind in "iu"
    shifted = codes.astype(np.int64) - zeros.astype(np.int64) if whole else codes
    return np.asarray(shifted.astype(np.float32) * steps, np.float32)


def _spread(node: Any, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Scales or zero points over a tensor; None where they do not fit it."""
    if values.size == 1:
        return values.reshape(())
    axis, rank = int(attribute(node, "axis", 1)), len(shape)
    if rank and -rank <= axis < rank:
        axis %= rank
        block = int(attribute(node, "block_size", 0))
        if values.ndim == 1 and not block and shape[axis] == values.size:
            return values.reshape([-1 if a == axis else 1 for a in range(rank)])
        if block and values.ndim == rank:
            spread = np.repeat(values, block, axis)
            spread = np.take(spread, range(min(shape[axis], spread.shape[axis])), axis)
            return spread if spread.shape == shape else None
    return None
