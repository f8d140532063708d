"""`cached_weights`: inside of it each weight is fake-quantized once.

A handler that intercepts the quantizer of the weight keeps it, and finds it again by the tensors
that it was made of: which objects they are, and where their values lie. Values that change in place
leave no trace that could be relied upon (`Tensor._version` stays as it is under fused optimizers
and `.data`), which is why there is no cache outside of the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.blockwise import is_plain
from pytorch_quant.exporting import exporting, exporting_to_onnx
from pytorch_quant.nn.modes import weight_quantizers
from pytorch_quant.nn.quantizer.interception import Proceed
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer


class KeptWeights:
    """What one scope keeps of one quantizer, which it intercepts.

    Attributes:
        quantizer: Whose weights these are.
        ready: The fake-quantized weight for compiled code, which cannot look for it.
    """

    def __init__(self, quantizer: TensorQuantizer) -> None:
        self.quantizer = quantizer
        self.ready: Tensor | None = None
        self._values: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._drops = 0

    def quantizer_changed(self) -> None:
        """Forget everything."""
        self._drops += 1
        self.ready = None
        self._values = {}

    def __call__(self, x: Tensor, proceed: Proceed) -> Tensor:
        """The handler of the quantizer."""
        return self.quantized(lambda: x, (x,), proceed)

    def quantized(
        self, weight: Callable[[], Tensor], sources: tuple[Tensor, ...], proceed: Proceed
    ) -> Tensor:
        """The fake-quantized weight, kept if no gradient has to flow through it.

        Args:
            weight: Makes what the quantizer shall see.
            sources: The tensors that it is made of.
            proceed: Quantizes it.
        """
        quantizer = self.quantizer
        if quantizer.training or quantizer.collects or _wants_gradient(quantizer, sources):
            return proceed(weight())
        device = sources[0].device.type
        autocast = torch.is_autocast_enabled(device)
        if torch.compiler.is_compiling():
            ready = None if exporting() or autocast else self.ready
            return proceed(weight()) if ready is None else ready
        if exporting_to_onnx() or not is_plain(*sources):
            return proceed(weight())
        # Walking over modules takes longer than the rest, and a range that is learned has them.
        buffers = quantizer.buffers() if quantizer._modules else quantizer._buffers.values()
        held = (*sources, *(b for b in buffers if b is not None and b.numel()))
        key = (autocast, torch.get_autocast_dtype(device) if autocast else None)
        key += tuple((id(t), t.data_ptr(), t.dtype, t.shape) for t in held)  # type: ignore[assignment]
        found = self._values.get(key)
        if found is not None:
            return found[1]
        before = self._drops
        # A tensor of inference mode could not be used where the input needs a gradient.
        with torch.inference_mode(False), torch.no_grad():
            value = proceed(weight())
        if before == self._drops:
            # With the tensors themselves, as the id of one that is gone may be given again.
            self._values[key] = (held, value)
        return value

    def prepare(self, weight: Tensor) -> None:
        """Quantize the weight for compiled code."""
        quantizer = self.quantizer
        if not (quantizer.training or quantizer.collects or quantizer.needs_amax):
            with torch.no_grad():
                self.ready = quantizer.forward(weight)


def quantized_weight(
    quantizer: TensorQuantizer, weight: Callable[[], Tensor], *sources: Tensor
) -> Tensor:
    """A weight that a layer computes, fake-quantized; inside of `cached_weights` once.

    Args:
        quantizer: The quantizer of the weight.
        weight: Computes it.
        *sources: The tensors that it is computed of.
    """
    # A program may have put another module in the place of the quantizer.
    handlers = getattr(quantizer, "_handlers", ())
    if not handlers or not isinstance(handlers[-1], KeptWeights):
        return quantizer(weight())
    return handlers[-1].quantized(weight, sources, quantizer._within(handlers[:-1]))


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Fake-quantize each weight of `model` once, and use the result until the scope ends.

    Around a loop over batches::

        model.eval()
        with torch.no_grad(), cached_weights(model):
            for batch in batches:
                model(batch)

    Weights and ranges must not change inside of the scope. Entering and leaving it drops what was
    kept; so do `train()`, `eval()`, `load_state_dict`, `to()` and the like, and whatever is set on
    a quantizer. What is written into a weight itself (by an optimizer, or through `.data`) is not
    seen until the next scope.

    In training mode, or where a gradient flows to the weight, nothing is kept and every call
    quantizes anew. The same holds in an export and under the transforms of `torch.func`. Compiled
    code uses what was quantized when the scope was entered, and is compiled once more for that.

    The memory is that of one more copy of the quantized weights, while the scope lasts. Scopes may
    be nested, held by several threads, and entered for several models that share layers; a copy of
    the model is in no scope.

    Args:
        model: Holds quantized layers; a compiled model as well.

    Yields:
        `model`.
    """
    with ExitStack() as scopes:
        for quantizer, weights in weight_quantizers(model).items():
            kept = KeptWeights(quantizer)
            scopes.enter_context(quantizer.intercepted(kept))
            if len(weights) == 1 and isinstance(weights[0], nn.Parameter):
                kept.prepare(weights[0])
        yield model


def _wants_gradient(quantizer: TensorQuantizer, sources: tuple[Tensor, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(s.requires_grad for s in sources) or any(
        p.requires_grad for p in quantizer.parameters()
    )
