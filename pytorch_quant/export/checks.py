"""What has to be true of a model before it is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytorch_quant.batches import copied
from pytorch_quant.export.targets import refusal
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer, uncalibrated_error
from pytorch_quant.plain_pass import plain_forward
from pytorch_quant.qdq import check_exportable


def check_quantizers(model: nn.Module, args: tuple[Any, ...], target: str = "tensorrt") -> None:
    """Raise where an enabled quantizer cannot become a Q/DQ pair, naming all of them.

    Those that the export does not meet, such as in a head for training alone, may be in any state.
    Only where some quantizer has a problem, a forward pass is run to find out which are met.

    Args:
        model: The model.
        args: The arguments of the export.
        target: The runtime that the file is for.

    Raises:
        RuntimeError: quantizers without an amax that are not declared dynamic.
        ValueError: an amax that is NaN or infinite, an activation amax of 0, a format that ONNX
            has no Q/DQ form for, or quantizers that the target cannot run.
    """
    active = {n: q for n, q in named_quantizers(model).items() if q.quantizes}
    uncalibrated = [name for name, quantizer in active.items() if quantizer.needs_amax]
    weights = weight_quantizers(model)
    problems = {n: _problem(q, q in weights) for n, q in active.items() if n not in uncalibrated}
    refusals = {n: refusal(q, target) for n, q in active.items()}
    if not (uncalibrated or any(problems.values()) or any(refusals.values())):
        return
    met = _met(model, args)
    uncalibrated = [name for name in uncalibrated if active[name] in met]
    if uncalibrated:
        raise uncalibrated_error(uncalibrated)
    found = [f"{n}: {problem}" for n, problem in problems.items() if problem and active[n] in met]
    refused: dict[tuple[str, str], list[str]] = {}
    for name, reason in refusals.items():
        if reason and active[name] in met:
            refused.setdefault(reason, []).append(name)
    found += [
        f"target={target!r} and {len(names)} {word} quantizer(s): {', '.join(names)}. {reason}"
        for (word, reason), names in refused.items()
    ]
    if found:
        raise ValueError("; ".join(found))


def _met(model: nn.Module, args: tuple[Any, ...]) -> set[nn.Module]:
    """The quantizers that a forward pass in eval mode runs."""
    met: set[nn.Module] = set()
    # As the exporter takes them.
    named = dict(args[-1]) if args and isinstance(args[-1], dict) else {}
    given = args[:-1] if args and isinstance(args[-1], dict) else args
    hooks = [
        quantizer.register_forward_pre_hook(lambda quantizer, _: met.add(quantizer))
        for quantizer in named_quantizers(model).values()
    ]
    # A recurrent layer without active quantizers, as here, leaves them out and calls torch's own.
    hooks += [
        layer.register_forward_pre_hook(
            lambda layer, _: met.update(named_quantizers(layer).values())
        )
        for layer in model.modules()
        if hasattr(layer, "_input_quantizers")
    ]
    try:
        with plain_forward(model):
            model(*copied(given), **copied(named))
    finally:
        for hook in hooks:
            hook.remove()
    return met


def _problem(quantizer: TensorQuantizer, is_weight: bool) -> str | None:
    amax = quantizer.amax
    if amax is not None and not bool(torch.isfinite(amax).all()):
        return "amax is not finite; calibrate it again, or disable() it"
    if amax is not None and not is_weight and bool((amax == 0).any()):
        return (
            "amax is 0, so every value would become 0; its calibration batches held zeros alone. "
            "Calibrate with real inputs, or disable() it"
        )
    if not quantizer.fake_quant:
        return "integer codes (fake_quant=False) cannot be exported"
    if quantizer.block_size is not None and not is_weight:
        return "a block quantizer has a form for weights alone; use axis=None for this activation"
    if not quantizer.dynamic:
        try:
            check_exportable(quantizer.format, quantizer.axis)
        except ValueError as error:
            return str(error)
    return None


# The operator sets whose QuantizeLinear or DynamicQuantizeLinear brought them; bfloat16 came to
# Conv with 22.
_FLOORS = {
    "per-tensor": 10,
    "dynamic": 11,
    "per-channel": 13,
    "FP8": 19,
    "float16": 19,
    "blocks": 21,
    "bfloat16": 22,
}
_TORCHSCRIPT = "the TorchScript exporter (dynamo=False)"
_LOWEST = 18
# torch.onnx's limit for the TorchScript exporter.
_HIGHEST_OF_TORCHSCRIPT = 20
_DEFAULT = 20


def choose_opset(model: nn.Module, opset: int | None, *, dynamo: bool = True) -> int:
    """The operator set to ask the exporter for.

    By default it is 20, as torch has it from 2.9 on, or what the model needs above that.

    Args:
        model: Its parameters and quantizers decide what the file has to hold.
        opset: What the user asked for.
        dynamo: For the current exporter, else the TorchScript one.

    Raises:
        TypeError: `opset` is no whole number.
        ValueError: an operator set that cannot hold the model, or that the exporter does not
            write; float64.
    """
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise TypeError(f"opset is a whole number such as 20, got {opset!r}")
    kinds = _kinds(model)
    if "float64" in kinds:
        raise ValueError("QuantizeLinear takes no float64; export model.float()")
    floors = {kind: _FLOORS[kind] for kind in kinds if kind in _FLOORS}
    least = max(floors.values(), default=0)
    if not dynamo and least > _HIGHEST_OF_TORCHSCRIPT:
        kind = max(floors, key=lambda k: floors[k])
        raise ValueError(
            f"{kind} needs opset {least}, and {_TORCHSCRIPT} ends at {_HIGHEST_OF_TORCHSCRIPT}; "
            "use dynamo=True"
        )
    if opset is None:
        return max(least, _DEFAULT)
    if dynamo and opset < _LOWEST:
        raise ValueError(
            f"opset={opset} is below {_LOWEST}, the lowest that the exporter writes; leave it out, "
            "or use dynamo=False for an older one"
        )
    if not dynamo and opset > _HIGHEST_OF_TORCHSCRIPT:
        raise ValueError(
            f"opset={opset} is above {_HIGHEST_OF_TORCHSCRIPT}, where {_TORCHSCRIPT} ends; leave "
            "it out, or use dynamo=True"
        )
    highest = _highest_of_onnx()
    if opset > highest:
        raise ValueError(
            f"opset={opset} is above {highest}, the highest that the installed onnx knows; leave "
            "it out, or update onnx"
        )
    for kind, floor in sorted(floors.items()):
        if opset < floor:
            raise ValueError(
                f"opset={opset} is too low for a model in {kind}; use opset={floor} or higher, or "
                "leave it out"
            )
    return opset


def _kinds(model: nn.Module) -> set[str]:
    """What there is in a model that needs an operator set: dtypes, and kinds of quantizers."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    for quantizer in named_quantizers(model).values():
        if not quantizer.quantizes:
            continue
        if quantizer.block_size is not None:
            kinds.add("blocks")
        elif quantizer.dynamic:
            kinds.add("dynamic")
        else:
            per_channel = quantizer.amax is not None and quantizer.amax.numel() > 1
            kinds.add("per-channel" if per_channel else "per-tensor")
        if quantizer.num_bits == (4, 3):
            kinds.add("FP8")
    return kinds


def _highest_of_onnx() -> int:
    import onnx

    return int(onnx.defs.onnx_opset_version())
