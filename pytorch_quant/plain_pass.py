"""A pass of the float function of a model: what it computes when nothing is quantized."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.batches import call_model, tensors_in
from pytorch_quant.nn.modes import named_quantizers, preserved_modes


@contextmanager
def plain_forward(model: nn.Module, *, quantized: bool = False) -> Iterator[None]:
    """Let `model` run in eval mode, unquantized and without gradients, and put everything back.

    That is: train/eval and the modes of quantizers, the values of buffers, the state of torch's
    random generators, and the fused attention of torch, whose parts cannot be seen. Compiled
    modules run eagerly.

    Args:
        model: What runs inside.
        quantized: Leave it to the modes of the quantizers whether they clip and quantize.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    compiler = sys.modules.get("torch._dynamo")
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(preserved_modes(model))
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        if compiler is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # An inference tensor does not tell whether it was written to.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        model.eval()
        for quantizer in named_quantizers(model).values():
            quantizer.disable_calib()
            if not quantized:
                quantizer.disable_quant()
                quantizer.disable_clip()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not buffer.is_inference():
                    buffer.copy_(before)


def plain_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors that the float function of `model` returns; inputs are left as they are."""
    with plain_forward(model):
        return [t.clone() for t in tensors_in(call_model(model, copy.deepcopy(example_inputs)))]


def same_outputs(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether outputs are the same up to what rounding may do, as far as they are real numbers."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return False
    for a, b in zip(expected, found, strict=True):
        if a.is_floating_point() and a.numel():
            # Loose: what is wrong shows at full size, and TF32 keeps three digits.
            share = 1e-1 if torch.finfo(a.dtype).bits < 32 else 1e-2
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            if float((a - b).abs().max()) > share * max(float(a.abs().max()), 1e-30):
                return False
    return True
