"""One name for every spelling of a torch function: `x + y`, `torch.add`, `x.add_` are "add"."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SPELLINGS = {
    "add": "iadd radd",
    "sub": "isub rsub subtract",
    "mul": "imul rmul multiply",
    "div": "truediv itruediv rtruediv rdiv idiv divide true_divide",
    "cat": "concat concatenate",
    "matmul": "rmatmul imatmul mm bmm mv addmm addmv addbmm baddbmm chain_matmul",
    "conv": "conv1d conv2d conv3d convolution",
    "conv_transpose": "conv_transpose1d conv_transpose2d conv_transpose3d",
    "clamp": "clip clamp_min clamp_max hardtanh relu6",
    "max_pool": "max_pool1d max_pool2d max_pool3d",
    "adaptive_max_pool": "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "avg_pool": "avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    "dropout": "dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
    "transpose": "T mT H mH t swapaxes swapdims adjoint",
    "split": "split_with_sizes unsafe_split tensor_split",
    "chunk": "unsafe_chunk",
    "interpolate": "upsample upsample_nearest upsample_bilinear",
    "permute": "movedim moveaxis",
    "view": "view_as",
    "reshape": "reshape_as",
    "expand": "expand_as",
}
_KINDS = {spelling: kind for kind, names in _SPELLINGS.items() for spelling in names.split()}

IDENTITIES = frozenset({"alias", "clone", "contiguous", "data", "detach", "dropout"})
"""Kinds whose result, in eval mode, has the values and the shape of their input."""

RESHAPES = frozenset(
    {"flatten", "ravel", "reshape", "squeeze", "unflatten", "unsqueeze", "view", "atleast_2d"}
)
"""Kinds that keep all values in their row-major order."""

MOVEMENTS = (
    IDENTITIES
    | RESHAPES
    | {"chunk", "expand", "getitem", "narrow", "permute", "select", "split", "transpose", "unbind"}
)
"""Kinds that move values and compute none."""

METADATA = frozenset(
    [
        "dense_dim",
        "dim",
        "dim_order",
        "element_size",
        "get_device",
        "has_names",
        "is_coalesced",
        "is_complex",
        "is_conj",
        "is_contiguous",
        "is_floating_point",
        "is_inference",
        "is_neg",
        "is_pinned",
        "is_same_size",
        "is_set_to",
        "is_shared",
        "is_signed",
        "layout",
        "ndimension",
        "nelement",
        "numel",
        "register_hook",
        "size",
        "sparse_dim",
        "storage_offset",
        "stride",
        "type",
        "len",
        "hash",
        "dir",
        "iter",
        "is_view",
        "set_grad_enabled",
    ]
)
"""Methods that ask for something other than values."""

_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "matmul", "pow", "mod")
)

COMPOSITES = (
    F.multi_head_attention_forward,
    F.softmin,
    F.gumbel_softmax,
    F.local_response_norm,
)
"""Python functions of torch that arrive as one call and hold several that matter."""


def op_kind(function: Callable) -> str:
    """The kind of a call of `function`: its canonical name, else its own.

    Underscores of in-place and special methods do not count, nor does the overload of an operator
    (`aten.add.Tensor`). ReLU6 and hardtanh are "clamp", whichever of them torch calls.
    """
    name = own_name(function)
    return _KINDS.get(name, name)


def own_name(function: Callable) -> str:
    """The name of a function without the underscores of in-place and special methods."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__"):
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    name = name.split(".")[0]
    return name.strip("_").removesuffix("_with_indices") or name


def writes_first(function: Callable) -> bool:
    """Whether a function writes its result to its first argument, as `x.add_(y)` and `x += y`."""
    name = getattr(function, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def is_one_of(function: Callable, functions: Iterable[Callable]) -> bool:
    """Whether `function` is, as an object, one of `functions`; also where Dynamo traces it."""
    # Dynamo has no names of functions, and its guards on sets of them can fail at once.
    for other in functions:  # noqa: SIM110
        if function is other:
            return True
    return False


def _spellings() -> dict[str, tuple[Callable, ...]]:
    places = (torch, Tensor, torch._C.TensorBase, F, torch._C._nn, torch.linalg, operator)
    kinds: dict[str, dict[Callable, None]] = {}
    for place in places:
        for function in vars(place).values():
            if isinstance(function, _FUNCTION_TYPES):
                kinds.setdefault(op_kind(function), {})[function] = None
    return {kind: tuple(functions) for kind, functions in kinds.items()}


_FUNCTION_TYPES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)

SPELLINGS = _spellings()
"""All functions of torch, of its tensors and of Python's operators by their kind.

Dynamo traces no names of functions. Code that it traces compares a function with these.
"""

WRITING = {kind: tuple(filter(writes_first, functions)) for kind, functions in SPELLINGS.items()}
"""Those of `SPELLINGS` that write to their first argument."""


def note_spelling(function: Callable) -> None:
    """Add a function that is not one of torch's own, such as `torch.ops.aten.add.Tensor`."""
    kind = op_kind(function)
    # Getters, such as that of `x.T`, and inner functions are other objects each time.
    passing = isinstance(function, types.MethodWrapperType)
    passing = passing or "<locals>" in getattr(function, "__qualname__", "")
    if passing or is_one_of(function, SPELLINGS.get(kind, ())):
        return
    SPELLINGS[kind] = (*SPELLINGS.get(kind, ()), function)
    if writes_first(function):
        WRITING[kind] = (*WRITING.get(kind, ()), function)


def dimensions(name: str) -> str:
    """`"1d"`, `"2d"` or `"3d"` of a function that has one form for each; `""` of any other."""
    return name[-2:] if name in _KINDS and name[-2:] in ("1d", "2d", "3d") else ""


def opened(function: Callable) -> Callable:
    """A composite that runs its inner calls where a mode sees them.

    Torch's Python functions hand themselves to the active mode as a whole before anything else, by
    asking `has_torch_function`. A copy whose question is always answered with no goes on to its
    body; torch itself is not changed.
    """

    def no(*_: Any) -> bool:
        return False

    assert isinstance(function, types.FunctionType)
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **dict.fromkeys(names, no)}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
