"""Two models side by side, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.analysis.comparison import ModelComparison, TensorDifference, WeightDifference
from pytorch_quant.analysis.noise import squares, to_db
from pytorch_quant.analysis.sites import is_active, kind_of, unwrapped
from pytorch_quant.batches import Forward, call_model, copied
from pytorch_quant.nn.mixins import QuantMixin
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.placement.call_sites import CallQuantizers
from pytorch_quant.plain_pass import plain_forward

Key = tuple[str, int, str]


def compare_models(
    a: nn.Module, b: nn.Module, batch: Any, *, forward: Forward | None = None
) -> ModelComparison:
    """Compare what two models make of one batch, module by module, and their weights.

    Meant for a float model `a` and its quantized form `b`. Modules are matched by their qualified
    names, and the calls of one that runs several times by their order; quantizers are passed over.
    Both run once, in eval mode and without gradients, each with its quantizers as they are, and
    come back as they were. Weights of `b` are taken as its weight quantizers give them. The outputs
    of all modules of `a` are held in memory meanwhile.

    Args:
        a: A model.
        b: Another one with the same names of modules.
        batch: Passed to each as in `calibrate`.
        forward: `forward(model, batch)` runs the batch.

    Returns:
        A row for each tensor and each quantized or changed weight.

    Raises:
        RuntimeError: a batch on another device than a model.
        TypeError: a model is no module, or the batch cannot be passed on.
        ValueError: the models have no module in common that ran.
        Exception: whatever the models raise.
    """
    for model in (a, b):
        if not isinstance(model, nn.Module):
            raise TypeError(f"compare_models takes two modules, got {type(model).__name__}")
    a, b = unwrapped(a), unwrapped(b)
    run = forward or call_model
    held: dict[Key, Tensor] = {}
    order: list[Key] = []

    def keep(key: Key, tensor: Tensor) -> None:
        # What follows may write to it in place.
        held[key] = tensor.clone()
        order.append(key)

    met: dict[Key, tuple[float, float, float] | str] = {}

    def compare(key: Key, tensor: Tensor) -> None:
        met[key] = _difference(held[key], tensor) if key in held else ""

    with _as_it_is(a), _watched(a, keep):
        run(a, copied(batch))
    with _as_it_is(b), _watched(b, compare):
        run(b, copied(batch))
    kinds = {name: kind_of(module) for name, module in a.named_modules()}
    rows = [
        _row(key, kinds[key[0]], tuple(held[key].shape), met[key]) for key in order if key in met
    ]
    if not rows:
        raise ValueError(
            "the two models have no module of the same name that returned a tensor; compare a "
            "model with a quantized copy of it"
        )
    ran_a, ran_b = ({key[0] for key in keys} for keys in (held, met))
    weights, missing, extra = _weights(a, b)
    return ModelComparison(
        rows,
        weights,
        [name for name in kinds if name in ran_a - ran_b] + missing,
        [name for name, _ in b.named_modules() if name in ran_b - ran_a] + extra,
    )


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, with quantizers as they are, but for calibration."""
    quantizers = named_quantizers(model).values()
    modes = [(q, q._if_quant, q._if_clip) for q in quantizers]
    with plain_forward(model):
        for quantizer, quants, clips in modes:
            quantizer._if_quant, quantizer._if_clip = quants, clips
        yield


@contextmanager
def _watched(model: nn.Module, see: Callable[[Key, Tensor], None]) -> Iterator[None]:
    calls: dict[str, int] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = calls.get(name, 0)
            calls[name] = call + 1
            # A frame around counts the calls of the model, not those of this hook.
            with torch._C.DisableTorchFunction():
                for path, tensor in _paths(output):
                    see((name, call, path), tensor)

        return hook

    try:
        for name, module in model.named_modules():
            inside = isinstance(module, (TensorQuantizer, CallQuantizers))
            if not (inside or isinstance(module, torch.jit.ScriptModule)):
                handles.append(module.register_forward_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _paths(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in an output, each with its place."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _paths(item, f"{path}[{index}]")
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from _paths(getattr(value, name), f"{path}.{name}")


def _difference(a: Tensor, b: Tensor) -> tuple[float, float, float] | str:
    """SQNR, largest difference and cosine; a text where there are none."""
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}"
    if not a.numel():
        return 0.0, 0.0, 1.0
    a, b = a.detach(), b.detach().to(a.device)
    signal, noise = squares(a, b)
    ratio = 0.0 if noise == 0 else noise / signal if signal else float("inf")
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    same = (x == y) | (x.isnan() & y.isnan())
    largest = float(torch.where(same, 0.0, (y - x).abs()).max())
    lengths = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(y))
    if bool(same.all()):
        return to_db(0.0), 0.0, 1.0
    return to_db(ratio), largest, float(x @ y) / lengths if lengths else 0.0


def _row(
    key: Key, kind: str, shape: tuple[int, ...], found: tuple[float, float, float] | str
) -> TensorDifference:
    nan = float("nan")
    if isinstance(found, str):
        return TensorDifference(key[0], kind, key[1], key[2], shape, nan, nan, nan, found)
    return TensorDifference(key[0], kind, key[1], key[2], shape, *found)


def _weights(a: nn.Module, b: nn.Module) -> tuple[list[WeightDifference], list[str], list[str]]:
    theirs = dict(b.named_parameters(remove_duplicate=False))
    inside = tuple(
        f"{name}." for name, module in b.named_modules() if isinstance(module, TensorQuantizer)
    )
    quantizers: dict[int, TensorQuantizer] = {}
    for module in b.modules():
        if isinstance(module, QuantMixin):
            for quantizer, weight in module.weights_to_quantize():
                if is_active(quantizer):
                    quantizers[id(weight)] = quantizer
    rows, missing = [], []
    with _as_it_is(b):
        for name, before in a.named_parameters():
            after = theirs.get(name)
            if after is None:
                if not name.startswith(inside or ("\0",)):
                    missing.append(name)
                continue
            own = quantizers.get(id(after))
            found = _difference(before, after if own is None else own(after))
            if isinstance(found, str):
                nan = float("nan")
                rows.append(WeightDifference(name, _format(own), nan, nan, found))
            elif own is not None or found[1] != 0:
                rows.append(WeightDifference(name, _format(own), found[0], found[1]))
    mine = dict(a.named_parameters(remove_duplicate=False))
    extra = [n for n in theirs if n not in mine and not n.startswith(inside or ("\0",))]
    return rows, missing, extra


def _format(quantizer: TensorQuantizer | None) -> str:
    return "float" if quantizer is None else quantizer.format.name
