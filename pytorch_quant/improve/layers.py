"""The layers that post-training improvement works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import filter as matching
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from pytorch_quant import distributed
from pytorch_quant.batches import Forward, call_model, count
from pytorch_quant.nn.mixins import QuantWeightMixin
from pytorch_quant.nn.modes import named_quantizers, preserved_modes
from pytorch_quant.ptq.sync import agreeing, check_same


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
            "quantize(model, example_inputs=...) on it, or quant_modules.initialize() before it "
            "is built"
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
        TypeError: it is an iterator, which is empty after one pass; a tensor, a mapping or a text,
            which is one batch or none; or nothing that can be run through.
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{who} runs through the batches more than once, and got a "
            f"{type(batches).__name__}, which is empty after one pass; pass a list or a loader"
        )
    one_batch = isinstance(batches, (Tensor, Mapping, str, bytes))
    if one_batch or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        got = repr(batches)
        if isinstance(batches, Tensor):
            got = f"one tensor of shape {tuple(batches.shape)}"
        elif one_batch or len(got) > 60:
            got = f"a {type(batches).__name__}"
        raise TypeError(
            f"{who}: batches is {got}; pass an iterable of batches, such as [tensor], a list or a "
            "loader"
        )
    return batches


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Leave inference mode, whose tensors no gradient can pass later; gradients stay on or off."""
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


def several_processes(model: nn.Module, sync: bool, who: str) -> bool:
    """Whether the processes of a group work on `model` together.

    Raises:
        TypeError: the model is wrapped in FullyShardedDataParallel.
        ValueError: its weights are sharded over processes.
    """
    if distributed.forward_communicates(model):
        raise ValueError(
            f"{who} cannot change weights that are sharded over processes; call it before "
            "fully_shard"
        )
    return sync and distributed.world_size() > 1


def check_alike(layers: dict[str, Any], **arguments: Any) -> None:
    """Refuse processes that work on different layers; collective.

    Raises:
        ValueError: naming the first layer or argument that differs, and two ranks.
    """
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    check_same(distributed.gather_objects(arguments | shapes))


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    description: str,
    *,
    quantized: bool,
    forward: Forward | None,
    progress: bool,
    together: bool = False,
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
        together: Every process runs its share of the batches, one or more have any.

    Raises:
        RuntimeError: another process failed, naming its rank and its error.
        ValueError: there are no batches.
    """
    progress = progress and not (together and distributed.rank())
    # Not inference mode: a model may keep tensors that it makes in its first forward pass.
    with (
        preserved_modes(model),
        distributed.buffers_stay(model, agree=together),
        torch.no_grad(),
        agreeing(together) as stage,
    ):
        stage.value = 0
        model.eval()
        for quantizer in named_quantizers(model).values():
            quantizer.disable_calib()
            if not quantized:
                quantizer.disable_quant()
                quantizer.disable_clip()
        for batch in tqdm(batches, desc=description, total=count(batches), disable=not progress):
            (forward or call_model)(model, batch)
            stage.value += 1
    if not any(stage.values):
        raise ValueError(f"{description}: no batches to run; the loader is empty")
