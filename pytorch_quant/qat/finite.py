"""Where a training has gone wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_quant.nn.modes import named_quantizers


def check_finite(model: nn.Module, loss: Tensor | float | None = None) -> None:
    """Raise where the loss or a range has become NaN or infinite, naming the quantizer.

    It reads one number back from the device where all is well: call it every so many steps. Under
    FSDP2 all processes call it.

    Args:
        model: Holds `TensorQuantizer` modules.
        loss: The loss, any shape; None to look at the ranges alone.

    Raises:
        FloatingPointError: naming the quantizers whose ranges are not finite; where all are, the
            parameters that are not, and the quantizer with the largest range.
    """
    ranges: dict[str, Tensor] = {}
    for name, quantizer in named_quantizers(model).items():
        amax = quantizer.amax
        if amax is not None and not quantizer.disabled:
            ranges[name] = amax.detach().max()
    good = [torch.isfinite(value).all() for value in ranges.values()]
    if loss is not None:
        loss = torch.as_tensor(loss).detach()
        good.append(torch.isfinite(loss).all())
    if not good or bool(torch.stack([flag.to(good[0].device) for flag in good]).all()):
        return
    raise FloatingPointError(_explained(model, ranges, loss))


def _explained(model: nn.Module, ranges: dict[str, Tensor], loss: Tensor | None) -> str:
    values = {name: float(value) for name, value in ranges.items()}
    bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    words = []
    if loss is not None and not bool(torch.isfinite(loss).all()):
        words.append(f"the loss is {float(loss.reshape(-1)[~torch.isfinite(loss).reshape(-1)][0])}")
    if bad:
        words.append(f"the range of {bad[0]} is {values[bad[0]]}")
        if len(bad) > 1:
            words.append(f"and so are {len(bad) - 1} more: {', '.join(bad[1:])}")
    else:
        broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            words.append(f"not finite: {', '.join(broken)}")
        if values:
            largest = max(values, key=lambda name: values[name])
            words.append(f"all ranges are finite, the largest is {largest}: {values[largest]:.6g}")
    advice = (
        "Go back to the last checkpoint, lower the learning rate of the ranges "
        "(parameter_groups(range_lr=)) or clip gradients"
    )
    return f"{'; '.join(words)}. {advice}"
