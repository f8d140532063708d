"""Quantizers in models that `torch.compile` has compiled."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pytorch_quant.versions import TORCH

# The torch whose compiler shows the text of an error that the traced code raises.
_SHOWS_ERRORS = (2, 9)

# A constant, because the compiler shows it, and cannot follow the search for a name.
COMPILED_CALIBRATION = (
    "a quantizer of a compiled model is collecting statistics, which compiled code cannot do. Call "
    "calibrate(model, batches), which runs a compiled model uncompiled; in a loop of your own, run "
    "the model that was given to torch.compile, or the compiled one inside "
    '`with torch.compiler.set_stance("force_eager"):`, until disable_calib()'
)


def refuse_calibration() -> None:
    """Have the compiler leave the code that it traces as it is written, or say why it cannot.

    Raises:
        RuntimeError: for the compiler, which shows it where one graph is wanted.
    """
    if TORCH < _SHOWS_ERRORS:
        torch._dynamo.skip_frame(msg=COMPILED_CALIBRATION)
    else:
        raise RuntimeError(COMPILED_CALIBRATION)


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which compiled models run as they are written.

    What was compiled is kept, and used again afterwards.
    """
    # Where the compiler was never loaded, nothing is compiled; loading it takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Torch 2.12 wonders why a model with fullgraph=True is not compiled.
        warnings.filterwarnings("ignore", message=".*found no compiled frames")
        yield


def left_alone(function: Callable) -> Callable:
    """`function`, not compiled where the compiler has given up on what calls it."""
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function)
