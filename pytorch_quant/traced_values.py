"""The values of parameters and buffers while an exporter traces the module that holds them.

`torch.export` traces with fake tensors, which have a shape and no values. Each of them stands for a
tensor of the module, and the mode that made it knows for which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def value_behind(tensor: Tensor) -> Tensor | None:
    """The tensor that a fake one was made of; the tensor itself if it is not fake.

    None where there is none: for what the traced code computes, and while Dynamo traces.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    if not isinstance(tensor, FakeTensor):
        return tensor
    if tensor.constant is not None:
        return tensor.constant
    try:
        converter = tensor.fake_mode.fake_tensor_converter.meta_converter
        for real, key in converter.describer.lookup_tensor.items():
            if converter.tensor_memo.get(key) is tensor:
                return None if real.is_meta or isinstance(real, FakeTensor) else real
    except AttributeError:
        # A torch that keeps them elsewhere; the caller has another way.
        pass
    return None


@contextmanager
def with_values(module: nn.Module) -> Iterator[bool]:
    """Give a module its own parameters and buffers back while an exporter traces it.

    Inside of the block nothing is traced.

    Yields:
        Whether all of them have values; if not, they are left as they are.
    """
    if torch.compiler.is_dynamo_compiling():
        yield False
        return
    fields = [f for inner in module.modules() for f in (inner._parameters, inner._buffers)]
    before = [dict(tensors) for tensors in fields]
    values = [
        {name: None if t is None else value_behind(t) for name, t in tensors.items()}
        for tensors in before
    ]
    known = all(
        value is not None or before[i][name] is None
        for i, tensors in enumerate(values)
        for name, value in tensors.items()
    )
    if not known:
        yield False
        return
    for tensors, real in zip(fields, values, strict=True):
        tensors.update(real)  # type: ignore[arg-type]
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            yield True
    finally:
        for tensors, traced in zip(fields, before, strict=True):
            tensors.update(traced)  # type: ignore[arg-type]
