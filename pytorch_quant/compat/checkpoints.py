"""Loading checkpoints, where a pickle runs code only if the user says so."""

from __future__ import annotations

import functools
import os
import pickle
from typing import Any, BinaryIO

import torch


def load_checkpoint(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    weights_only: bool = True,
    map_location: Any = "cpu",
) -> Any:
    """Load what `torch.save` wrote.

    Args:
        path: A file, or its path.
        weights_only: Accept tensors and plain Python values only. A whole model
            (`torch.save({"model": model})`) is more than that: loading it runs code that the file
            names, so pass False for files that you trust, and only for those.
        map_location: Where tensors go, as in `torch.load`.

    Returns:
        The object that was saved.

    Raises:
        pickle.UnpicklingError: the file holds more than tensors and plain values.
        ModuleNotFoundError: it holds classes of a package that cannot be imported.
        OSError: it cannot be read.
        RuntimeError: it is damaged.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise
        raise _refusal("pass weights_only=False to load_checkpoint", error) from error
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("pytorch_quantization"):
            raise
        raise ModuleNotFoundError(
            f"{error}: the file holds classes of pytorch_quantization; call "
            "pytorch_quant.install_as_pytorch_quantization() before loading it",
            name=error.name,
        ) from error


def patch_torch_load(trust_pickles: bool) -> None:
    """Let `torch.load` without `weights_only` follow the switch of `run-compat`.

    Args:
        trust_pickles: Load any pickle; otherwise a refusal names the switch.
    """
    original = torch.load

    @functools.wraps(original)
    def load(*args: Any, weights_only: bool | None = None, **kwargs: Any) -> Any:
        if weights_only is not None:
            return original(*args, weights_only=weights_only, **kwargs)
        if trust_pickles:
            return original(*args, weights_only=False, **kwargs)
        try:
            return original(*args, **kwargs)
        except pickle.UnpicklingError as error:
            raise _refusal("run it with run-compat --trust-pickles", error) from error

    torch.load = load
    torch.serialization.load = load
    if trust_pickles:
        # Processes that the script starts have torch's own switch for the same.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def _refusal(advice: str, error: Exception) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        "the file is a pickle of more than tensors and plain values, and loading it would run code "
        f"that it names. If you trust it, {advice}. torch says: {str(error).strip()}"
    )
