"""Checkpoints that commands read and write: tensors and plain values, never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.files import written_aside

_HOLDERS = ("model", "state_dict", "model_state_dict")
# What DistributedDataParallel, DataParallel and torch.compile put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: The state_dict.
        placement: How `quantize` placed the model, with `placement`, `rules`, `keep_batchnorm` and
            `inputs`; None in files of others.
    """

    state: dict[str, Tensor]
    placement: dict[str, Any] | None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a state_dict, or a dict that holds one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is not None:
            raise
        # A file that is cut off makes the reader seek to where nothing is.
        raise ValueError(f"{path} is no checkpoint, or damaged: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: it is damaged, or holds a "
            "pickled model, which is not loaded since that runs code of the file; save "
            "model.state_dict()"
        ) from error
    except Exception as error:
        # A damaged file makes the reader raise whatever it stumbles over.
        told = f"{type(error).__name__} {error}".rstrip()
        raise ValueError(f"{path} is no checkpoint, or damaged: {told}") from error
    placement = None
    if isinstance(found, Mapping):
        placement = found.get("placement")
        for key in _HOLDERS:
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
    tensors = isinstance(found, Mapping) and any(isinstance(v, Tensor) for v in found.values())
    if not tensors:
        raise ValueError(f"{path} holds no state_dict, neither itself nor as {', '.join(_HOLDERS)}")
    state = dict(found)
    for prefix in _PREFIXES:
        if all(str(name).startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Checkpoint(state, placement)


def load_state(model: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Load a state_dict, or raise RuntimeError that says in one line what does not fit."""
    own = model.state_dict()
    # A quantizer without a range yet has no entry for it.
    missing = [name for name in own if name not in state]
    foreign = [n for n in state if n not in own and not n.endswith(("_amax", "_pre_quant_scale"))]
    ranges = [n for n in state if n not in own and n not in foreign]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if isinstance(state.get(name), Tensor)
        and isinstance(own[name], Tensor)
        and state[name].shape != own[name].shape
        and not name.endswith("_amax")
    ]
    problems = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("not in the model", foreign),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise RuntimeError(
            f"{path} does not fit {type(model).__name__}; entries {'; '.join(problems)}"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        if not ranges:
            raise
        raise RuntimeError(
            f"{path} has ranges of quantizers ({ranges[0]}, ...) that {type(model).__name__} does "
            "not have; give a quantized checkpoint as --checkpoint, with the model that it was "
            "made of"
        ) from error


def write_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, placement: dict[str, Any] | None
) -> None:
    """Write the state_dict of a quantized model and how it was placed, whole or not at all."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    with written_aside(path) as aside:
        torch.save({"model": state, "placement": placement}, aside)
