"""`cached_weights`: inside of it each weight is fake-quantized once.

What is kept lies in the quantizer of the weight, and is found again by the tensors that it was made
of: which objects they are, and where their values lie. Values that change in place leave no trace
that could be relied upon (`Tensor._version` stays as it is under fused optimizers and `.data`),
which is why there is no cache outside of the scope.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.blockwise import is_plain
from pytorch_quant.exporting import exporting, exporting_to_onnx
from pytorch_quant.nn.modes import weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer

# Scopes of several threads may hold the same quantizer.
_LOCK = threading.Lock()


class KeptWeights:
    """What one quantizer keeps while scopes hold it.

    Attributes:
        scopes: How many hold it.
        ready: The fake-quantized weight for compiled code, which cannot look for it.
    """

    def __init__(self) -> None:
        self.scopes = 0
        self.ready: Tensor | None = None
        self._values: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._drops = 0

    def drop(self) -> None:
        """Forget everything."""
        self._drops += 1
        self.ready = None
        self._values = {}

    def quantized(
        self, quantizer: TensorQuantizer, weight: Callable[[], Tensor], sources: tuple[Tensor, ...]
    ) -> Tensor:
        """The fake-quantized weight, kept if no gradient has to flow through it.

        Args:
            quantizer: Whose this is.
            weight: Makes what the quantizer shall see.
            sources: The tensors that it is made of.
        """
        if quantizer.training or quantizer._if_calib or _wants_gradient(quantizer, sources):
            return quantizer._process(weight())
        device = sources[0].device.type
        autocast = torch.is_autocast_enabled(device)
        if torch.compiler.is_compiling():
            ready = None if exporting() or autocast else self.ready
            return quantizer._process(weight()) if ready is None else ready
        if not self.scopes or exporting_to_onnx() or not is_plain(*sources):
            return quantizer._process(weight())
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
            value = quantizer._process(weight())
        if before == self._drops:
            # With the tensors themselves, as the id of one that is gone may be given again.
            self._values[key] = (held, value)
        return value

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model is in no scope."""

    def __reduce__(self) -> Any:
        return type(None), ()


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
    kept = getattr(quantizer, "_kept", None)
    if kept is None:
        return quantizer(weight())
    return kept.quantized(quantizer, weight, sources)


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
    held = list(weight_quantizers(model).items())
    entered = []
    try:
        for quantizer, weights in held:
            with _LOCK:
                kept = quantizer.__dict__.get("_kept")
                if kept is None:
                    kept = quantizer.__dict__["_kept"] = KeptWeights()
                kept.scopes += 1
                kept.drop()
            entered.append(quantizer)
            if len(weights) == 1 and isinstance(weights[0], nn.Parameter):
                kept.ready = _ready(quantizer, kept, weights[0])
        yield model
    finally:
        for quantizer in entered:
            with _LOCK:
                kept = quantizer.__dict__["_kept"]
                kept.scopes -= 1
                kept.drop()
                if not kept.scopes:
                    del quantizer.__dict__["_kept"]


def _ready(quantizer: TensorQuantizer, kept: KeptWeights, weight: Tensor) -> Tensor | None:
    if quantizer.training or quantizer._if_calib or quantizer.needs_amax:
        return None
    with torch.no_grad():
        return kept.quantized(quantizer, lambda: weight, (weight,))


def _wants_gradient(quantizer: TensorQuantizer, sources: tuple[Tensor, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(s.requires_grad for s in sources) or any(
        p.requires_grad for p in quantizer.parameters()
    )
