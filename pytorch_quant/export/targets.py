"""What each runtime takes, and what is worth knowing about the machine."""

from __future__ import annotations

import difflib
from pathlib import Path

from pytorch_quant.formats import IntFormat
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

TARGETS = ("tensorrt", "onnxruntime", "openvino")

UINT8_TARGETS = ("onnxruntime", "openvino")
"""Runtimes whose x86 kernels multiply uint8 activations by int8 weights."""

_VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}
_CPU_INFO = Path("/proc/cpuinfo")

_NO_VNNI = (
    "this CPU has no VNNI instructions, without which ONNX Runtime adds pairs of products in 16 "
    "bits that may saturate; run with the session option session.x64quantprecision=1, or quantize "
    "weights to 7 bits"
)


def check_target(target: str) -> None:
    """Raise for a runtime that is not known.

    Raises:
        ValueError: with the name that was probably meant.
    """
    if target not in TARGETS:
        near = difflib.get_close_matches(str(target), TARGETS, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}{guess}")


def refusal(quantizer: TensorQuantizer, target: str) -> tuple[str, str] | None:
    """Why the runtime cannot run an enabled quantizer.

    Returns:
        A word for such quantizers, and the reason with what to do; None if it can.
    """
    if target != "tensorrt":
        return None
    if quantizer.dynamic:
        return (
            "dynamic",
            "TensorRT reads no DynamicQuantizeLinear (R12) and has no other ONNX form for ranges "
            'taken at run time. Export with target="onnxruntime" or "openvino", or calibrate '
            "static quantizers",
        )
    size = quantizer.block_size
    fmt = quantizer.format
    int4 = size is not None and isinstance(fmt, IntFormat) and fmt.bits <= 4
    if int4 and size not in (64, 128):
        return (
            "block",
            f"TensorRT takes INT4 in blocks of 64 or 128 (F2), not {size}; use "
            "QuantDescriptor(4, axis=1, block_size=64), or another target",
        )
    if quantizer.unsigned and isinstance(quantizer.format, IntFormat):
        return (
            "unsigned",
            'TensorRT has no uint8 (R6). Export with target="onnxruntime" or "openvino", or '
            'quantize the model with placement="tensorrt"',
        )
    return None


def machine_notes(target: str) -> tuple[str, ...]:
    """What to know before running a file of this target on this machine."""
    return (_NO_VNNI,) if target == "onnxruntime" and has_vnni() is False else ()


def has_vnni() -> bool | None:
    """Whether this x86 CPU sums products of bytes in 32 bits; None where that is not known."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), None)
    return None if flags is None else bool(_VNNI_FLAGS & set(flags.split()))
