"""Which torch is running, which were tested, and which can do what older ones cannot."""

from __future__ import annotations

import re
import warnings

import torch

NEWEST_TESTED = (2, 15)
"""The newest torch that the whole test suite has run on; see docs/support.md."""


def parsed(version: str) -> tuple[int, int]:
    """`(2, 14)` of `2.14.1+cu130`; `(0, 0)` of what has no such form."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


LIMITS = (
    (
        "plain `torch.onnx.export(..., dynamo=True)` with `opset_version` below 18",
        (2, 9),
        "raises in torch, for float models as well; pass 18 or more, or `dynamo=False`",
    ),
    (
        "gradients of `fully_shard` (FSDP2) on the CPU, averaged over processes",
        (2, 9),
        "torch adds them up; divide the loss by the number of processes",
    ),
)
"""What torch itself cannot do before a version: what, the version, and what helps before it.

`tools/matrix.py` writes it into docs/support.md.
"""

TORCH = parsed(torch.__version__)
"""The torch that is running."""


def warn_of_untested(version: str = torch.__version__) -> None:
    """Warn where torch is newer than any that was tested.

    Args:
        version: That of torch.
    """
    if parsed(version) > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"torch {version} is newer than {tested}, the newest that pytorch_quant was tested "
            "with; docs/support.md lists what was tested, and how to run the tests on yours",
            UserWarning,
            stacklevel=2,
        )


def needs(what: str, version: tuple[int, int], instead: str) -> str:
    """The sentence for what the torch that is running cannot do.

    Args:
        what: Such as `an opset below 18`.
        version: The oldest torch that can.
        instead: What helps on the torch that is running.
    """
    return (
        f"{what} needs torch {version[0]}.{version[1]} or newer, and this is "
        f"{torch.__version__}; {instead}"
    )
