"""Two models side by side, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.analysis.comparison import ModelComparison, TensorDifference, WeightDifference
from pytorch_quant.analysis.noise import Noise, to_db
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
    come back as they were. Weights of `b` are taken as its quantizers give them: those of layers,
    recurrent ones with them, and parameters that a quantized call reads; a weight that a layer
    computes of its parameters, as torch's parametrizations do, is not. The outputs of all modules
    of `a` are held in memory meanwhile.

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

    with plain_forward(a, quantized=True), _watched(a, keep):
        run(a, copied(batch))
    readers: dict[int, TensorQuantizer] = {}
    with plain_forward(b, quantized=True), _watched(b, compare), _parameters_seen(b, readers):
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
    weights, missing, extra = _weights(a, b, readers)
    return ModelComparison(
        rows,
        weights,
        [name for name in kinds if name in ran_a - ran_b] + missing,
        [name for name, _ in b.named_modules() if name in ran_b - ran_a] + extra,
    )


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


@contextmanager
def _parameters_seen(model: nn.Module, readers: dict[int, TensorQuantizer]) -> Iterator[None]:
    """Note which active quantizer each parameter comes to, by the id of the parameter."""

    def hook(quantizer: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], nn.Parameter):
            assert isinstance(quantizer, TensorQuantizer)
            readers.setdefault(id(args[0]), quantizer)

    handles = []
    try:
        for quantizer in named_quantizers(model).values():
            if is_active(quantizer):
                handles.append(quantizer.register_forward_pre_hook(hook))
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
        return math.nan, 0.0, math.nan
    a, b = a.detach(), b.detach().to(a.device)
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return to_db(0.0), 0.0, 1.0
    noise = Noise()
    noise.add(x, y)
    largest = float(torch.where(same, 0.0, (y - x).abs()).max())
    # As for the SQNR, entries that are not finite in the first tensor do not count.
    real = torch.isfinite(x)
    x, y = x[real], y[real]
    if not noise.values:
        return noise.db, largest, math.nan
    lengths = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(y))
    return noise.db, largest, float(x @ y) / lengths if lengths else 0.0


def _row(
    key: Key, kind: str, shape: tuple[int, ...], found: tuple[float, float, float] | str
) -> TensorDifference:
    nan = float("nan")
    if isinstance(found, str):
        return TensorDifference(key[0], kind, key[1], key[2], shape, nan, nan, nan, found)
    return TensorDifference(key[0], kind, key[1], key[2], shape, *found)


def _quantized_weights(
    model: nn.Module, readers: Mapping[int, TensorQuantizer]
) -> dict[int, tuple[TensorQuantizer, Tensor]]:
    """The quantizer of each parameter, and what it makes of it, by the id of the parameter."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    found = {key: (q, q(parameters[key])) for key, q in readers.items() if key in parameters}
    for module in model.modules():
        if not isinstance(module, QuantMixin):
            continue
        for index, (quantizer, weight) in enumerate(module.weights_to_quantize()):
            if not is_active(quantizer):
                continue
            sources = [weight]
            if isinstance(module, nn.RNNBase):
                sources = module.all_weights[index][:2]
            elif isinstance(module, nn.RNNCellBase):
                sources = [module.weight_ih, module.weight_hh]
            # A recurrent layer quantizes `[W_ih, W_hh]` as one.
            parts = quantizer(weight).split([source.shape[-1] for source in sources], -1)
            for source, part in zip(sources, parts, strict=True):
                found[id(source)] = quantizer, part
    return found


def _weights(
    a: nn.Module, b: nn.Module, readers: Mapping[int, TensorQuantizer]
) -> tuple[list[WeightDifference], list[str], list[str]]:
    theirs = dict(b.named_parameters(remove_duplicate=False))
    inside = tuple(
        f"{name}." for name, module in b.named_modules() if isinstance(module, TensorQuantizer)
    )
    rows, missing = [], []
    with plain_forward(b, quantized=True):
        quantized = _quantized_weights(b, readers)
        for name, before in a.named_parameters():
            held = theirs.get(name)
            if held is None:
                if not name.startswith(inside or ("\0",)):
                    missing.append(name)
                continue
            own, after = quantized.get(id(held), (None, held))
            found = _difference(before, after)
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
