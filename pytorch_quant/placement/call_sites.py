"""Quantizing the operands of calls inside of a forward, while it runs.

A module with quantized calls runs inside a `CallFrame`, a mode that sees each torch function which
the forward calls, counts those of the kinds that matter, and hands the planned operands through
their quantizers. Its numbers are those of `pytorch_quant.dataflow`: the calls of other modules that
have frames of their own are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytorch_quant.batches import tensors_in
from pytorch_quant.nn.locate import calling_model, qualified_name
from pytorch_quant.op_kinds import COMPOSITES, op_kind, opened
from pytorch_quant.placement.attention import NAMES, attention, bound
from pytorch_quant.placement.plan import Operand

QUANTIZERS = "_call_quantizers"
"""The child of a module that holds the quantizers of its calls."""

_ATTENTION = "scaled_dot_product_attention"
_OPENED = {function: opened(function) for function in COMPOSITES}
_cached_kind = functools.lru_cache(4096)(op_kind)


@dataclass(frozen=True)
class CallSites:
    """What the forward of one module is expected to call.

    Attributes:
        counts: How many calls of each kind that holds a quantizer.
        quantized: The operands of a call, by kind and number, each with the key of its quantizer.
    """

    counts: dict[str, int] = field(default_factory=dict)
    quantized: dict[tuple[str, int], tuple[tuple[Operand, str], ...]] = field(default_factory=dict)


class CallQuantizers(nn.ModuleDict):
    """The quantizers of the calls of one module, by call and operand: `add_0_input1`."""

    def forward(self, *args: Any) -> Any:
        """What went in: a forward that runs all of its module's children runs this one too."""
        return args[0] if len(args) == 1 else args


def quantizer_key(call: str, operand: Operand) -> str:
    """The key of a quantizer: `add#0` and `(1,)` give `add_0_input1`."""
    first, *rest = operand
    words = [f"input{first}" if isinstance(first, int) else first, *map(str, rest)]
    return "_".join([call.replace("#", "_"), *words]).replace(".", "_")


def enclosing_frame() -> CallFrame | None:
    """The innermost frame that is running in this thread."""
    for index in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(index)
        if isinstance(mode, CallFrame):
            return mode
    return None


class CallFrame(TorchFunctionMode):
    """One run of a module's forward.

    Args:
        module: Whose forward runs.
        sites: What it is expected to call.

    Attributes:
        blind: How many modules with frames of their own are running inside of it.
        compiled: It is part of what is compiled, not a mode that is active around that.
    """

    def __init__(self, module: nn.Module, sites: CallSites) -> None:
        super().__init__()
        self.module = module
        self.sites = sites
        self.met = dict.fromkeys(sites.counts, 0)
        self.blind = 0
        self.compiled = torch.compiler.is_dynamo_compiling()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.blind:
            return func(*args, **kwargs)
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        # The compiler warns of caches that it looks through.
        kind = op_kind(func) if torch.compiler.is_compiling() else _cached_kind(func)
        if kind not in self.met or not _takes_floats(args, kwargs):
            return func(*args, **kwargs)
        number = self.met[kind]
        if number >= self.sites.counts[kind]:
            raise RuntimeError(self._too_many(kind))
        operands = self.sites.quantized.get((kind, number))
        if operands is None:
            result = func(*args, **kwargs)
        else:
            result = self._call_quantized(func, f"{kind}#{number}", args, kwargs, dict(operands))
        # Afterwards, as a call that raises is not recorded either.
        self.met[kind] = number + 1
        return result

    def finish(self) -> None:
        """Check, when the forward has returned, that every site was met.

        Raises:
            RuntimeError: fewer calls than were recorded.
        """
        for kind, expected in self.sites.counts.items():
            if self.met[kind] < expected:
                raise RuntimeError(self._too_few(kind))

    def _call_quantized(
        self,
        func: Callable,
        call: str,
        args: tuple,
        kwargs: dict[str, Any],
        operands: dict[Operand, str],
    ) -> Any:
        quantizers = getattr(self.module, QUANTIZERS)
        if call.startswith(_ATTENTION) and set(operands) != {("result",)}:
            result = self._attention(quantizers, args, kwargs, operands)
            return self._quantize_result(quantizers, call, result, operands)
        given, named = list(args), dict(kwargs)
        written = named.get("out") if ("result",) in operands else None
        if _writes_first(func) and (("result",) in operands or (0,) in operands):
            # Quantized values are new tensors: what they become has to be written back, and
            # autograd forbids writing to what a quantizer has seen.
            written = given[0]
            given[0] = written.clone()
        for operand, key in operands.items():
            if operand != ("result",):
                holder: Any = given if isinstance(operand[0], int) else named
                value = _at(holder, operand)
                if value is None:
                    raise RuntimeError(self._no_operand(call, operand))
                holder[operand[0]] = _put(holder[operand[0]], operand[1:], quantizers[key](value))
        result = self._quantize_result(quantizers, call, func(*given, **named), operands)
        if written is None or written is result:
            return result
        written.copy_(result)
        # The TorchScript exporter writes a copy as an Expand, which fusions do not look through.
        return result if torch.jit.is_tracing() else written

    def _quantize_result(
        self, quantizers: Any, call: str, result: Any, operands: dict[Operand, str]
    ) -> Any:
        key = operands.get(("result",))
        if key is None:
            return result
        if not isinstance(result, Tensor):
            raise RuntimeError(self._no_operand(call, ("result",)))
        return quantizers[key](result)

    def _attention(
        self, quantizers: Any, args: tuple, kwargs: dict[str, Any], operands: dict[Operand, str]
    ) -> Tensor:
        keys = {_attention_name(operand[0]): key for operand, key in operands.items()}

        def quantize(name: str, x: Tensor) -> Tensor:
            return quantizers[keys[name]](x) if name in keys else x

        return attention(quantize, **bound(args, kwargs))

    # Messages

    def _site(self, call: str) -> str:
        model = calling_model(self.module)
        return f"/{call}" if model is self.module else f"{qualified_name(self.module)}/{call}"

    def _too_many(self, kind: str) -> str:
        expected = self.sites.counts[kind]
        return (
            f"{self._site(f'{kind}#{expected}')}: {qualified_name(self.module)} makes more calls "
            f"of {kind!r} than the {expected} that were recorded, so it is not known which of "
            f"them are quantized; {_ADVICE}"
        )

    def _too_few(self, kind: str) -> str:
        met, expected = self.met[kind], self.sites.counts[kind]
        missed = [f"{k}#{n}" for k, n in self.sites.quantized if k == kind and n >= met]
        sites = ", ".join(self._site(call) for call in missed) or self._site(kind)
        return (
            f"{sites} not met: {qualified_name(self.module)} made {met} calls of {kind!r}, "
            f"{expected} were recorded; {_ADVICE}"
        )

    def _no_operand(self, call: str, operand: Operand) -> str:
        where = quantizer_key("", operand).strip("_")
        return f"{self._site(call)}: there is no tensor at {where}, which is quantized; {_ADVICE}"


_ADVICE = (
    "quantize() the model with example_inputs that take this path, or leave these calls float with "
    "a rule such as {'layer1.0/add#0': None}. If this happens in torch.export, pass strict=False"
)
_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "matmul", "pow", "mod")
)


def _writes_first(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _attention_name(name: int | str) -> str:
    return NAMES[name] if isinstance(name, int) else name


def _takes_floats(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors_in((args, kwargs)))


def _at(holder: Any, operand: Operand) -> Tensor | None:
    """The floating-point tensor at a place among the arguments, None if there is none."""
    value = holder
    for step in operand:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, (tuple, list)) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _put(value: Any, path: Operand, new: Tensor) -> Any:
    """`value` with the part at `path` replaced."""
    if not path:
        return new
    parts: Any = dict(value) if isinstance(value, dict) else list(value)
    parts[path[0]] = _put(parts[path[0]], path[1:], new)
    return tuple(parts) if isinstance(value, tuple) else parts
