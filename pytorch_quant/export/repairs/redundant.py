"""Q and DQ nodes that compute nothing that is not there already."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytorch_quant.export.recode import code_inputs
from pytorch_quant.export.wiring import Wiring, attribute, drop_unread, is_standard, read_instead

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
# Rounding keeps order, so that what picks or moves values may as well come in front of it.
_ONE_OUTPUT = ("Relu", "Dropout")


def drop_requantized(graph: Any) -> int:
    """Drop each Q that codes what a DQ of equal grid has just decoded: the codes are there.

    `round((q * s) / s) = q` in float32 for codes of 8 bits, as the relative error of each of the
    two operations is at most 2**-24 and `abs(q) * 2**-23 < 0.5`.
    """
    wiring = Wiring(graph)
    replaced: dict[str, str] = {}
    for q in [n for n in graph.node if is_standard(n, _Q)]:
        dq = wiring.producers.get(q.input[0])
        if dq is None or not is_standard(dq, _DQ) or q.output[0] in wiring.outputs:
            continue
        if _equal_grids(wiring, dq, q) and q.output[0] not in wiring.captured:
            replaced[q.output[0]] = dq.input[0]
    read_instead(graph, replaced)
    drop_unread(graph, set(replaced))
    return len(replaced)


def drop_before_moves(graph: Any) -> int:
    """Drop each pair whose values are only moved or picked and then go into Q of its own grid.

    Pooling the maximum, reshaping and a symmetric Relu commute with rounding to the grid, so that
    the later Q makes the same codes of the values that were not rounded before.
    """
    dropped = 0
    while True:
        wiring = Wiring(graph)
        q = next((n for n in graph.node if is_standard(n, _Q) and _is_early(wiring, n)), None)
        if q is None:
            return dropped
        dq = wiring.uses(q.output[0])[0][0]
        read_instead(graph, {dq.output[0]: q.input[0]})
        drop_unread(graph, {dq.output[0]})
        dropped += 1


def _is_early(wiring: Wiring, q: Any) -> bool:
    if q.input[0] in wiring.constants or not wiring.sole_use(q.output[0]):
        return False
    dq = wiring.uses(q.output[0])[0][0]
    if not is_standard(dq, _DQ) or not _equal_grids(wiring, q, dq):
        return False
    pending, moved = [dq.output[0]], 0
    while pending:
        tensor = pending.pop()
        if tensor in wiring.outputs | wiring.captured or not wiring.uses(tensor):
            return False
        for node, index in wiring.uses(tensor):
            if is_standard(node, _Q) and index == 0 and tensor != dq.output[0]:
                if not _equal_grids(wiring, q, node):
                    return False
            elif index == 0 and _commutes(wiring, q, node):
                moved += 1
                pending += list(node.output)
            else:
                return False
    return moved > 0


def _commutes(wiring: Wiring, q: Any, node: Any) -> bool:
    if is_standard(node, *_ONE_OUTPUT):
        # 0 has to lie on the grid, as its zero point is a code; a second output is a mask.
        return len(node.output) == 1 and wiring.value(q.input[1]).size == 1  # type: ignore[union-attr]
    single = code_inputs(node) == [0] and not is_standard(node, "Concat")
    return single and (len(node.output) == 1 or is_standard(node, "Split"))


def _equal_grids(wiring: Wiring, one: Any, other: Any) -> bool:
    """Whether two per-tensor nodes have equal scales and zero points of one type of 8 bits."""
    kinds = []
    for node in (one, other):
        scale = wiring.value(node.input[1])
        zero_point = wiring.value(node.input[2]) if len(node.input) > 2 else None
        if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
            return False
        # Codes beyond 8 bits, half precision and denormal numbers need not come back.
        plain = scale.dtype == np.float32 and 1e-30 < float(scale.reshape(())) < 1e30
        if not plain or zero_point.dtype.itemsize != 1 or zero_point.dtype.kind not in "iu":
            return False
        if attribute(node, "output_dtype", 0) not in (0, wiring.held(node.input[2]).data_type, 1):
            return False
        kinds.append((scale.tobytes(), zero_point.dtype, int(zero_point.reshape(()))))
    return kinds[0] == kinds[1]
