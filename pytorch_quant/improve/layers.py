"""The layers that post-training improvement works on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import filter as matching
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from pytorch_quant.batches import Forward, call_model, count
from pytorch_quant.nn.mixins import QuantWeightMixin
from pytorch_quant.nn.modes import named_quantizers, preserved_modes


def weighted_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized convolutions and linear layers of `model`, by qualified name, each once.

    Raises:
        ValueError: there are none.
    """
    found = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightMixin) and isinstance(module, (_ConvNd, nn.Linear))
    }
    if not found:
        raise ValueError(
            "the model has no quantized convolution or linear layer; call "
            "quant_modules.initialize() before it is built"
        )
    return found


def chosen_layers(found: dict[str, Any], layers: str | Iterable[str] | None) -> dict[str, Any]:
    """Those of the `found` layers that one of the names or patterns (`*`, `?`) matches.

    Raises:
        ValueError: a name or pattern matches none; near names are given.
    """
    if layers is None:
        return found
    names: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        matched = [pattern] if pattern in found else matching(found, pattern)
        if not matched:
            near = get_close_matches(pattern, found, n=3, cutoff=0.3) or list(found)[:3]
            raise ValueError(
                f"layers: {pattern!r} matches no quantized convolution or linear layer; near "
                f"names: {', '.join(near)}"
            )
        names.update(matched)
    return {name: layer for name, layer in found.items() if name in names}


def check_calibrated(model: nn.Module, who: str) -> None:
    """Refuse a model whose quantizers would range themselves.

    Raises:
        RuntimeError: naming the quantizers without a range.
    """
    missing = [name for name, q in named_quantizers(model).items() if q.needs_amax]
    if missing:
        raise RuntimeError(
            f"{who} on {len(missing)} uncalibrated quantizer(s): {', '.join(missing)}. "
            "Run calibrate(model, batches) first, or disable() them"
        )


def repeatable(batches: Iterable[Any], who: str) -> Iterable[Any]:
    """`batches`, once it is sure that it can be run through more than once.

    Raises:
        TypeError: it is an iterator, which is empty after one pass.
    """
    if iter(batches) is batches:
        raise TypeError(
            f"{who} runs through the batches more than once, and got a "
            f"{type(batches).__name__}, which is empty after one pass; pass a list or a loader"
        )
    return batches


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    description: str,
    *,
    quantized: bool,
    forward: Forward | None,
    progress: bool,
) -> None:
    """Run every batch in eval mode and without gradients; every mode comes back.

    Args:
        model: What to run.
        batches: As in `calibrate`.
        description: Stands beside the progress bar.
        quantized: Quantize as the modes of the quantizers say; otherwise none of them does. No
            quantizer collects statistics.
        forward: `forward(model, batch)` runs one batch instead of the usual rule.
        progress: Show a progress bar.

    Raises:
        ValueError: there are no batches.
    """
    seen = 0
    # Not inference mode: a model may keep tensors that it makes in its first forward pass.
    with preserved_modes(model), torch.no_grad():
        model.eval()
        for quantizer in named_quantizers(model).values():
            quantizer.disable_calib()
            if not quantized:
                quantizer.disable_quant()
                quantizer.disable_clip()
        for batch in tqdm(batches, desc=description, total=count(batches), disable=not progress):
            (forward or call_model)(model, batch)
            seen += 1
    if not seen:
        raise ValueError(f"{description}: no batches to run; the loader is empty")
