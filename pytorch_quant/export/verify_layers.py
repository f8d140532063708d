"""Each layer of a file, fed torch's own tensors, beside what torch makes of them.

Errors do not add up this way: whatever differs is wrong in the layer where it differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytorch_quant.export.cut_graph import CutGraph, bodies
from pytorch_quant.export.qdq_sites import Site, layer_of
from pytorch_quant.export.simulation import QuantizerCall
from pytorch_quant.export.verify_report import compare

# Rounding of sums, as a share of the largest value.
_SHARE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9}
_FLOAT_SHARE = 1e-4
# How close to a tie a value lies, in steps, whose code may differ.
_TIE = 1e-3
# Roundings of `x / scale` and `q * scale` to a half-precision type, in steps, at the largest code.
_HALF_STEP_ERROR = {torch.float16: 0.13, torch.bfloat16: 0.55}
# Half of a step of an 8-bit weight, as a share of the largest.
_HALF_WEIGHT_SHARE = 4e-3


@dataclass(frozen=True)
class Difference:
    """A tensor of the file that is not torch's.

    Attributes:
        site: The Q/DQ pair it belongs to; None for a graph output.
        tensor: Its name.
        problem: What is wrong.
        expected: What torch has there; None for codes and weights, whose layer is known.
    """

    site: Site | None
    tensor: str
    problem: str
    expected: Tensor | None = None


@dataclass
class LayerChecks:
    """What the comparison of all layers found.

    Attributes:
        first: The first difference in the order of the graph.
        ties: Number of codes a step apart on a tie.
        good_outputs: Whether each graph output agrees.
    """

    first: Difference | None = None
    ties: int = 0
    good_outputs: dict[str, bool] | None = None


def check_layers(
    model: Any, cut: CutGraph, sites: list[Site], outputs: dict[str, Tensor], min_sqnr: float
) -> LayerChecks:
    """Compare every quantized tensor, every weight and every part between them.

    Args:
        model: The `onnx.ModelProto` that was cut.
        cut: Evaluated.
        sites: The pairs it is cut at.
        outputs: What torch has for each graph output.
        min_sqnr: dB, for parts that hold quantizers of their own and therefore make steps.
    """
    checks = LayerChecks(good_outputs={})
    order = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    found: list[tuple[float, Difference]] = []
    for site in sites:
        if not site.weight and site.source in cut.tensors:
            problem = _part_problem(cut, site.source, site.call.x, min_sqnr)
            if problem:
                place = order.get(site.source, -1)
                found.append((place, Difference(site, site.source, problem, site.call.x)))
        for made in site.made:
            value = cut.tensors[made]
            ties, problem = _weight(value, site.call) if site.weight else _codes(value, site.call)
            checks.ties += ties
            if problem:
                found.append((order[made], Difference(site, made, problem)))
    for name, expected in outputs.items():
        problem = _part_problem(cut, name, expected, min_sqnr) if name in order else ""
        assert checks.good_outputs is not None
        checks.good_outputs[name] = not problem
        if problem:
            found.append((order[name], Difference(None, name, problem, expected)))
    if found:
        checks.first = min(found, key=lambda item: item[0])[1]
    return checks


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors of one size are the same up to the rounding of sums."""
    if found.numel() != expected.numel():
        return False
    found = found.reshape(expected.shape)
    if not expected.is_floating_point():
        return torch.equal(found.to(expected.dtype), expected)
    share = _SHARE.get(expected.dtype, _FLOAT_SHARE)
    finite = expected[expected.isfinite()].double().abs()
    limit = share * float(finite.max()) if finite.numel() else 0.0
    return compare(expected, found)[0] <= max(limit, 1e-30)


def _part_problem(cut: CutGraph, name: str, expected: Tensor, min_sqnr: float) -> str:
    """What is wrong with a tensor that is computed from torch's own; `""` if nothing is."""
    found = cut.tensors[name]
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, torch has {tuple(expected.shape)}"
    if agrees(found, expected):
        return ""
    error, _, sqnr = compare(expected, found)
    if sqnr >= min_sqnr and any(map(_rough, cut.part(name))):
        return ""
    largest = float(expected.double().abs().max())
    return f"computed from torch's own tensors, it differs by {error:.3g} of {largest:.3g}"


def makes_steps(node: Any) -> bool:
    """Whether a node rounds to codes or computes with them, other than in a Q/DQ pair."""
    steps = node.op_type in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
    return steps or node.domain not in ("", "ai.onnx")


def _rough(node: Any) -> bool:
    return makes_steps(node) or node.op_type == "QuantizeLinear" or bool(bodies(node))


def _codes(made: Tensor, call: QuantizerCall) -> tuple[int, str]:
    """Number of codes a step apart on a tie, and what is wrong with the others."""
    if made.shape != call.y.shape:
        return 0, f"shape {tuple(made.shape)}, torch has {tuple(call.y.shape)}"
    if call.scale is None:
        return 0, "" if agrees(made, call.y) else "other values than torch has"
    scale = torch.where(call.scale > 0, call.scale, 1.0).double()
    x, torchs, files = (t.double() / scale for t in (call.x, call.y, made))
    difference = (files - torchs).abs()
    precise = call.y.dtype in (torch.float32, torch.float64)
    slack = _HALF_STEP_ERROR.get(call.y.dtype, _TIE)
    step = _step(call, torch.maximum(files.abs(), torchs.abs()))
    apart = ~(difference <= slack * step) & ~(call.y.isnan() & made.isnan())
    from_tie = (x - (files + torchs) / 2).abs()
    tie = apart & ((difference - step).abs() <= slack * step)
    tie &= from_tie <= (_TIE + (0 if precise else slack)) * step
    wrong = apart & ~tie
    count = int(wrong.sum())
    if not count:
        return int(tie.sum()), ""
    most = float(difference.nan_to_num(torch.inf)[wrong].max())
    return int(tie.sum()), (
        f"{count} of {wrong.numel()} codes differ, by up to {most:.3g} steps, for torch's own input"
    )


def _step(call: QuantizerCall, codes: Tensor) -> Tensor:
    """The distance of neighbouring codes: 1, or what the exponent says for E4M3."""
    if not call.floating:
        return torch.ones_like(codes)
    # E4M3 has 3 bits of mantissa, and its smallest normal number is 2**-6 (OCP FP8).
    return 2.0 ** (codes.clamp(min=2.0**-6).log2().floor() - 3)


def _weight(made: Tensor, call: QuantizerCall) -> tuple[int, str]:
    """As `_codes`, for a weight that may be stored transposed."""
    candidates = [call.y] + ([call.y.mT] if call.y.dim() >= 2 else [])
    fitting = [y for y in candidates if y.shape == made.shape]
    if not fitting:
        return 0, f"shape {tuple(made.shape)}, torch has {tuple(call.y.shape)}"
    difference = min(((made.double() - y.double()).abs() for y in fitting), key=torch.max)
    # A runtime's int32 bias asks for larger scales in channels that are next to nothing.
    share = 1e-5 if call.y.dtype == torch.float32 else _HALF_WEIGHT_SHARE
    wrong = int((~(difference <= share * float(call.y.double().abs().max()))).sum())
    if not wrong:
        return 0, ""
    return 0, (
        f"{wrong} of {made.numel()} values of the stored weight differ from torch's, by up to "
        f"{float(difference.max()):.3g}"
    )


def layer_of_difference(difference: Difference) -> str:
    """The layer of codes or of a weight."""
    return layer_of(difference.site.name) if difference.site is not None else ""
