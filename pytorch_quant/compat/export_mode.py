"""The export mode of the old package, which is none here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Stand around `torch.onnx.export`, as existing programs have it.

    A quantized model exports without it: a quantizer sees that an exporter is running, so there is
    no mode that could stay on after an exception.
    """
    yield
