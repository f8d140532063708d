"""Ranges as parameters, and the groups in which an optimizer takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pytorch_quant.distributed import whole
from pytorch_quant.learned_range import RANGE_METHODS, RangeMethod
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.qat.selection import chosen, wrappers

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def learn_ranges(
    model: nn.Module,
    method: RangeMethod = "lsq",
    *,
    activations: bool = True,
    weights: bool = True,
) -> list[str]:
    """Make the ranges of a calibrated model trainable, in place.

    Each amax becomes the parameter `_amax` of its quantizer, per tensor or per channel as it was
    calibrated, and starts at its value: outputs do not change. Make the optimizer afterwards, as
    with `parameter_groups`, and wrap the model for several processes afterwards. A checkpoint has
    the same keys and shapes as before, so that it loads into models with and without learned
    ranges.

    Calibrating again starts the ranges anew, as does setting `quantizer.amax`. A second call
    changes the method and keeps the ranges. Quantizers made with `QuantDescriptor(learn_amax=True)`
    learn by their clip already and stay as they are; those that are disabled, dynamic or fixed by
    their descriptor do, too. A range of 0, of a channel of zeros, starts as the largest of its
    tensor.

    Args:
        model: Calibrated, or loaded with its ranges.
        method: `lsq`, learned step sizes (Esser et al. 2020); `pact`, learned clipping (Choi et al.
            2018); see `pytorch_quant.learned_range` for the formulas.
        activations: Those of activations.
        weights: Those of weights.

    Returns:
        The names of the quantizers that learn.

    Raises:
        RuntimeError: quantizers without a range, naming them; or a model that is wrapped in
            DistributedDataParallel or sharded by `fully_shard` already, which would not take
            notice of new parameters. Nothing is changed then.
        ValueError: an unknown method, or nothing to learn.
    """
    if method not in RANGE_METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(RANGE_METHODS)}")
    found, of_weights = chosen(model, activations, weights, "learn_ranges")
    found = {name: q for name, q in found.items() if not q.learns_by_clip}
    new = {name: q for name, q in found.items() if q.learned_range is None}
    starts = {name: _start(q.amax) for name, q in new.items()}
    missing = [name for name, start in starts.items() if start is None]
    if missing:
        raise RuntimeError(
            f"learn_ranges: {len(missing)} quantizer(s) have no range above 0 to start from: "
            f"{', '.join(missing)}; call calibrate(model, batches) first, or disable() those that "
            "no batch reaches"
        )
    around = wrappers(model) if new else []
    if around:
        raise RuntimeError(
            f"learn_ranges makes parameters that {around[0]} would not know of; call it before "
            "the model is wrapped"
        )
    for name, quantizer in found.items():
        start = starts.get(name)
        if start is not None:
            quantizer.set_range(start)
        quantizer.learn_range(method, weight=quantizer in of_weights)
    return list(found)


def stop_learning(model: nn.Module) -> nn.Module:
    """Make learned ranges buffers again, at the values that they have, in place.

    For what comes after training and does not take learned ranges, such as `fold_batchnorm`. An
    export does not need it. Ranges that are learned by a clip stay.

    Returns:
        `model`.

    Raises:
        RuntimeError: the model is wrapped for several processes, which would miss the parameters.
    """
    learning = [q for q in named_quantizers(model).values() if q.learned_range is not None]
    around = wrappers(model) if learning else []
    if around:
        raise RuntimeError(
            f"stop_learning takes parameters away from {around[0]}; load the state_dict into a "
            "model that is not wrapped"
        )
    for quantizer in learning:
        quantizer.stop_learning_range()
    return model


def range_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned ranges of `model` by parameter name, also those of clips."""
    held = {
        id(parameter)
        for quantizer in named_quantizers(model).values()
        for parameter in quantizer.parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) in held}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    range_lr: float | None = None,
    range_weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer, in which no range decays.

    Weight decay would pull a range to 0 whatever the loss says of it. PACT is an exception: its
    authors regularize the range, for which there is `range_weight_decay`.

    Args:
        model: Its ranges are parameters already, see `learn_ranges`.
        lr: The learning rate of all but the ranges.
        weight_decay: That of weights.
        range_lr: The learning rate of the ranges; by default `lr`.
        range_weight_decay: The weight decay of the ranges.
        decay_norm_and_bias: Let the affine parameters of norms, and biases, decay, too.

    Returns:
        Up to three groups, with the names `weights`, `norm_and_bias` and `ranges`; every
        parameter of the model is in one.
    """
    ranges = {id(p) for p in range_parameters(model).values()}
    norms = {
        id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)
    }
    sorted_in: dict[str, list[nn.Parameter]] = {"weights": [], "norm_and_bias": [], "ranges": []}
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2].startswith("bias")
        plain = id(parameter) not in norms and not bias
        kind = "weights" if plain or decay_norm_and_bias else "norm_and_bias"
        sorted_in["ranges" if id(parameter) in ranges else kind].append(parameter)
    rates = {"ranges": lr if range_lr is None else range_lr}
    decays = {"weights": weight_decay, "ranges": range_weight_decay}
    return [
        {
            "params": parameters,
            "name": name,
            "lr": rates.get(name, lr),
            "weight_decay": decays.get(name, 0.0),
        }
        for name, parameters in sorted_in.items()
        if parameters
    ]


def _start(amax: Tensor | None) -> Tensor | None:
    """Where a range starts: as calibrated, with those of channels of zeros as the largest one."""
    if amax is None:
        return None
    amax = whole(amax).detach()
    largest = amax.max()
    if not bool(torch.isfinite(amax).all() & (largest > 0)):
        return None
    return torch.where(amax > 0, amax, largest)
