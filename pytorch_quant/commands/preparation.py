"""From a float model to a placed and calibrated one, and back from a checkpoint."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.commands.arguments import DEFAULT_TARGET
from pytorch_quant.commands.checkpoints import load_state, read_checkpoint
from pytorch_quant.commands.networks import load_network
from pytorch_quant.commands.outcome import UsageError
from pytorch_quant.commands.rule_files import read_rules, resolved
from pytorch_quant.commands.samples import Batches, check_fit, check_labelled, forward, open_data
from pytorch_quant.fold import fold_batchnorm
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.placement.plan import LeftFloat
from pytorch_quant.ptq import CalibrationReport, calibrate
from pytorch_quant.ptq.options import check_options
from pytorch_quant.quantization import placement_plan, quantize

Rules = Mapping[str, "str | None"]


def check_method(options: argparse.Namespace) -> None:
    """Refuse options that the calibration method does not have, before any work is done."""
    check_options(options.method, dict(options.method_option))


def fold(model: nn.Module, example: Any, *, keep_batchnorm: bool) -> None:
    """Fold the batch norms of a float model, in place; of one with quantizers they stay."""
    if not keep_batchnorm and not named_quantizers(model):
        fold_batchnorm(model, example)


def place(
    model: nn.Module, rules: Rules, target: str, example: Any, *, keep_batchnorm: bool
) -> tuple[dict[str, Any] | None, list[LeftFloat]]:
    """Put quantizers into a float model, in place; one that has its own is left as it is.

    Args:
        model: With its batch norms folded, or not.
        rules: As a file has them.
        target: The runtime.
        example: Inputs of the model.
        keep_batchnorm: Whether they were not folded.

    Returns:
        What `restore` needs, None for a model with quantizers of its own; and what stays float.

    Raises:
        ValueError: rules that do not hold, or for a model with quantizers of its own.
    """
    if named_quantizers(model):
        if rules:
            raise ValueError(
                f"{type(model).__name__} holds quantizers already, so that --rules have nothing to "
                "place; leave them out, or start from a float model"
            )
        return None, []
    keys = resolved(rules, model)
    left = placement_plan(model, example, keys, target).left
    quantize(model, keys, example_inputs=example, placement=target)
    placement = {
        "placement": target,
        "rules": dict(rules),
        "keep_batchnorm": keep_batchnorm,
        "inputs": _form(example),
    }
    return placement, left


def calibrated(
    options: argparse.Namespace, model: nn.Module, batches: Batches
) -> CalibrationReport:
    """Calibrate, in place, as the options say."""
    return calibrate(
        model,
        batches,
        options.method,
        forward=forward,
        progress=not options.quiet,
        weight_method=options.weight_method,
        **dict(options.method_option),
    )


def restore(model: nn.Module, path: str) -> dict[str, Any] | None:
    """Give a float model the placement and the ranges of a checkpoint, in place.

    Returns:
        How it was placed; None for a model with quantizers of its own.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: its entries do not fit the model.
        ValueError: it is no checkpoint, or one that does not say how the model was placed.
    """
    checkpoint = read_checkpoint(path)
    placement = checkpoint.placement
    if placement is None:
        if not named_quantizers(model):
            raise ValueError(
                f"{path} does not say how the model was placed, and {type(model).__name__} has no "
                "quantizers; give a file of `pytorch-quant quantize`, or a function that returns "
                "the quantized model"
            )
    elif named_quantizers(model):
        raise ValueError(
            f"{path} is for a float model, and {type(model).__name__} holds quantizers already"
        )
    else:
        device = next(iter(model.parameters())).device
        example = example_of(placement, device=device)
        try:
            with torch.inference_mode():
                forward(model, (example,))
        except Exception as error:
            raise ValueError(
                f"{path} was made of a model with other inputs than {type(model).__name__} has: "
                f"{type(error).__name__}: {error}"
            ) from error
        keep = bool(placement["keep_batchnorm"])
        fold(model, example, keep_batchnorm=keep)
        place(model, placement["rules"], placement["placement"], example, keep_batchnorm=keep)
    load_state(model, checkpoint.state, path)
    model.eval()
    return placement


@dataclass(frozen=True)
class Ready:
    """A quantized and calibrated model with data.

    Attributes:
        model: The model.
        batches: The data.
        rules: What it was placed by, as a file has them.
        target: What it was placed for.
        float_model: It before it was placed, where that was asked for and is known.
    """

    model: nn.Module
    batches: Batches
    rules: Rules
    target: str
    float_model: nn.Module | None


def ready(
    options: argparse.Namespace, *, keep_float: bool = False, labelled: bool = False
) -> Ready:
    """The model that the options name: from a quantized checkpoint, else calibrated on the data.

    Args:
        options: Those of `add_ready`.
        keep_float: Copy the float model, where there is one.
        labelled: Whether the data has to have labels.

    Raises:
        UsageError: a checkpoint, and options that it leaves nothing to do for.
        Exception: whatever the steps raise.
    """
    fresh = options.checkpoint is None
    if not fresh:
        _check_nothing_else(options)
    check_method(options)
    rules: Rules = {} if options.rules is None else read_rules(options.rules)
    target = options.target or DEFAULT_TARGET
    network = load_network(
        options.model,
        dict(options.model_arg),
        options.weights,
        options.device,
        any_weights=not fresh,
    )
    model, original = network.model, None
    batches = open_data(options, model, network.transform)
    if labelled:
        check_labelled(batches)
    check_fit(model, batches, options.data)
    keep_float = keep_float and not named_quantizers(model)
    if fresh:
        example, keep = batches.example(), options.keep_batchnorm
        fold(model, example, keep_batchnorm=keep)
        if keep_float:
            original = copy.deepcopy(model)
        place(model, rules, target, example, keep_batchnorm=keep)
        calibrated(options, model, batches)
    else:
        if keep_float:
            original = copy.deepcopy(model)
        placement = restore(model, options.checkpoint)
        if original is not None and placement is not None:
            example = example_of(placement, device=options.device)
            fold(original, example, keep_batchnorm=bool(placement["keep_batchnorm"]))
            state = model.state_dict()
            original.load_state_dict({name: state[name] for name in original.state_dict()})
        if placement is not None:
            rules, target = placement["rules"], placement["placement"]
    return Ready(model, batches, rules, target, original)


def _check_nothing_else(options: argparse.Namespace) -> None:
    given = {
        "--weights": options.weights is not None,
        "--rules": options.rules is not None,
        "--method": options.method != "max",
        "--method-option": bool(options.method_option),
        "--weight-method": options.weight_method != "max",
        "--keep-batchnorm": options.keep_batchnorm,
        "--target": options.target is not None,
    }
    wrong = [name for name, present in given.items() if present]
    if wrong:
        raise UsageError(
            f"a --checkpoint is placed and calibrated already; leave out {', '.join(wrong)}"
        )


def example_of(
    placement: Mapping[str, Any], *, batch: int | None = None, device: Any = "cpu"
) -> Any:
    """Random inputs of the form that a placement was made with.

    Args:
        placement: Of a checkpoint.
        batch: How many samples; by default as many as then.
        device: Where they go.
    """
    generator = torch.Generator().manual_seed(0)

    def made(form: Mapping[str, Any]) -> Tensor:
        shape = list(form["shape"]) if batch is None else [batch, *form["shape"][1:]]
        dtype = getattr(torch, form["dtype"])
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(device, dtype)
        low, high = form["bounds"]
        return torch.randint(low, high + 1, shape, generator=generator).to(device, dtype)

    inputs = placement["inputs"]
    if "keywords" in inputs:
        return {name: made(form) for name, form in inputs["keywords"].items()}
    return made(inputs["tensor"])


def some(inputs: Any, count: int) -> Any:
    """So many samples of the inputs of a batch, repeated where there are fewer."""
    if isinstance(inputs, Mapping):
        return {name: some(tensor, count) for name, tensor in inputs.items()}
    repeats = -(-count // len(inputs))
    return inputs.repeat(repeats, *[1] * (inputs.dim() - 1))[:count]


def as_arguments(inputs: Any) -> Any:
    """Inputs as `export_onnx` and `verify_onnx` take them, on the CPU."""
    if isinstance(inputs, Mapping):
        return ({name: tensor.cpu() for name, tensor in inputs.items()},)
    return inputs.cpu()


def _form(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        return {"keywords": {name: _form(tensor)["tensor"] for name, tensor in inputs.items()}}
    bounds = [0, 0]
    if not inputs.is_floating_point():
        bounds = [int(inputs.min()), int(inputs.max())]
    dtype = str(inputs.dtype).removeprefix("torch.")
    return {"tensor": {"shape": list(inputs.shape), "dtype": dtype, "bounds": bounds}}
