"""The model that a command line names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pytorch_quant.commands.checkpoints import load_state, read_checkpoint
from pytorch_quant.optional import require


@dataclass(frozen=True)
class Network:
    """A model as it was built.

    Attributes:
        model: In eval mode, on its device.
        transform: From a picture to a tensor as its weights were trained; None if unknown.
    """

    model: nn.Module
    transform: Callable[[Any], torch.Tensor] | None = None


def load_network(
    spec: str,
    arguments: Mapping[str, Any],
    weights: str | None = None,
    device: str = "cpu",
    *,
    any_weights: bool = False,
) -> Network:
    """Build the model.

    Args:
        spec: `module:function`, `file.py:function`, or the name of a torchvision model.
        arguments: Keywords of the function.
        weights: A checkpoint; of a torchvision model also the name of weights, or `"random"`.
        device: Where it is to be.
        any_weights: Weights come later or do not matter, so that none need be given.

    Raises:
        ImportError: the module, or torchvision, cannot be imported.
        OSError: a file cannot be read.
        RuntimeError: the weights do not fit, or there is no such device.
        TypeError: what the function returns is no module.
        ValueError: no such function or model, or weights that are needed and missing.
    """
    if ":" in spec:
        network = Network(_from_function(spec, arguments))
    else:
        network = _from_torchvision(spec, arguments, weights, any_weights)
    model = network.model
    is_file = weights is not None and (":" in spec or os.path.exists(weights))
    if weights is not None and is_file:
        checkpoint = read_checkpoint(weights)
        if checkpoint.placement is not None:
            raise ValueError(
                f"{weights} holds a quantized model; give the float one as --weights, or this file "
                "as --checkpoint, where the command has that"
            )
        load_state(model, checkpoint.state, weights)
    return Network(model.to(torch.device(device)).eval(), network.transform)


def _from_function(spec: str, arguments: Mapping[str, Any]) -> nn.Module:
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"model {spec!r}: give module:function or file.py:function")
    module = _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"model {spec!r}: {place} has no {name!r}{hint}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise TypeError(f"model {spec!r}: {name} is a {type(found).__name__}, no function")
        try:
            found = found(**arguments)
        except Exception as error:
            told = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RuntimeError(f"model {spec!r} could not be built: {told}") from error
    elif arguments:
        raise ValueError(f"model {spec!r} is a model, no function, and takes no --model-arg")
    if not isinstance(found, nn.Module):
        raise TypeError(f"model {spec!r} returned a {type(found).__name__}, no torch.nn.Module")
    return found


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        file = Path(place).resolve()
        if not file.is_file():
            raise FileNotFoundError(2, "no such file", place)
        description = importlib.util.spec_from_file_location(file.stem, file)
        assert description is not None and description.loader is not None
        module = importlib.util.module_from_spec(description)
        # As for a script: what stands beside it can be imported.
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
        sys.modules[file.stem] = module
        description.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        # `python -m` has it there already, the console script has not.
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.partition(".")[0] and error.name != place:
            raise
        raise ModuleNotFoundError(
            f"there is no module {place!r}, neither in the current folder nor installed; give "
            "module:function, file.py:function, or the name of a torchvision model",
            name=error.name,
        ) from error


def _from_torchvision(
    name: str, arguments: Mapping[str, Any], weights: str | None, any_weights: bool
) -> Network:
    models = require("torchvision").models
    if name not in models.list_models():
        near = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(
            f"torchvision has no model {name!r}; {hint}A model of your own is module:function or "
            "file.py:function"
        )
    if weights is None and not any_weights:
        raise ValueError(
            f"{name} comes without weights; give --weights FILE, the name of torchvision's own "
            "(--weights DEFAULT, which are downloaded), or --weights random"
        )
    if weights in (None, "random") or os.path.exists(str(weights)):
        return Network(models.get_model(name, weights=None, **arguments))
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(
            f"--weights {weights} is no file, and torchvision's weights of {name} are "
            f"{', '.join(known.__members__)}"
        )
    chosen = known[str(weights)]
    return Network(models.get_model(name, weights=chosen, **arguments), chosen.transforms())
