"""Quantizing the operands of calls inside of a forward, while it runs.

A module with quantized calls runs inside a `CallFrame`, a mode that sees each torch function which
the forward calls, counts those of the kinds that matter, and hands the planned operands through
their quantizers. Its numbers are those of `pytorch_quant.dataflow`: the calls of other modules that
have frames of their own are not counted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from pytorch_quant.batches import tensors_in
from pytorch_quant.nn.locate import calling_model, qualified_name
from pytorch_quant.op_kinds import (
    COMPOSITES,
    SPELLINGS,
    WRITING,
    is_one_of,
    op_kind,
    opened,
    writes_first,
)
from pytorch_quant.placement.attention import NAMES, attention, bound
from pytorch_quant.placement.plan import Operand

QUANTIZERS = "_call_quantizers"
"""The child of a module that holds the quantizers of its calls."""

_ATTENTION = "scaled_dot_product_attention"
_OPENED = {function: opened(function) for function in COMPOSITES}
_cached_kind = functools.lru_cache(4096)(op_kind)

Line = tuple[tuple[str, int], ...]
"""Where in the code a call stands: functions from the inside out, each with an instruction."""


@dataclass(frozen=True)
class CallSites:
    """What the forward of one module is expected to call.

    Attributes:
        counts: How many calls of each kind that holds a quantizer.
        quantized: The operands of a call, by kind and number, each with the key of its quantizer.
        lines: Where the quantized calls stand, from the first run in eval mode.
    """

    counts: dict[str, int] = field(default_factory=dict)
    quantized: dict[tuple[str, int], tuple[tuple[Operand, str], ...]] = field(default_factory=dict)
    lines: dict[tuple[str, int], Line] = field(default_factory=dict, compare=False)


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
        self._lines: dict[tuple[str, int], Line] = {}
        # The first run in eval mode stores lines, those in training are compared with them.
        self._looks = module.training == bool(sites.lines)
        self._grad_mode, self._hooks = False, None
        if not torch.compiler.is_compiling():
            self._grad_mode, self._hooks = torch.is_grad_enabled(), _saved_tensors_hooks()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            # Written in Python, with a super() that Dynamo of torch 2.8 does not trace.
            func = torch.unflatten
        if self.blind:
            return func(*args, **kwargs)
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        kind = self._kind(func)
        if kind is None or not _takes_floats(args, kwargs):
            return func(*args, **kwargs)
        number = self.met[kind]
        if number >= self.sites.counts[kind]:
            if torch.compiler.is_compiling() or not self._may_follow(kind, _line()):
                raise RuntimeError(self._too_many(kind))
            return func(*args, **kwargs)
        operands = self.sites.quantized.get((kind, number))
        if operands is None:
            result = func(*args, **kwargs)
        else:
            if not (self.compiled or torch.compiler.is_compiling()):
                if self._is_recomputed():
                    raise RuntimeError(self._recomputed(f"{kind}#{number}"))
                if self._looks:
                    self._lines[kind, number] = _line()
            result = self._call_quantized(func, f"{kind}#{number}", args, kwargs, dict(operands))
        # Afterwards, as a call that raises is not recorded either.
        self.met[kind] = number + 1
        return result

    def _kind(self, func: Callable) -> str | None:
        """The kind of a call that is counted; None for all others."""
        if not torch.compiler.is_dynamo_compiling():
            kind = _cached_kind(func)
            return kind if kind in self.met else None
        for kind in self.met:
            if is_one_of(func, SPELLINGS.get(kind, ())):
                return kind
        return None

    def finish(self) -> None:
        """Check, when the forward has returned, that every site was met.

        Raises:
            RuntimeError: fewer calls than were recorded.
        """
        for kind, expected in self.sites.counts.items():
            if self.met[kind] < expected:
                raise RuntimeError(self._too_few(kind))
        if not self.module.training and self._lines:
            self.sites.lines.update(self._lines)

    def _may_follow(self, kind: str, line: Line) -> bool:
        """Whether a call beyond those that were recorded is one of training alone.

        It is if each quantized call of its kind was found where it stands in eval mode, which a
        further call before one of them would have moved.
        """
        wanted = {call: at for call, at in self.sites.lines.items() if call[0] == kind}
        found = {call: at for call, at in self._lines.items() if call[0] == kind}
        quantized = {call for call in self.sites.quantized if call[0] == kind}
        return (
            self.module.training
            and found.keys() == quantized
            and found == wanted
            and line not in found.values()
        )

    def _is_recomputed(self) -> bool:
        """Whether a part of this forward is running that the backward pass will run again."""
        hooks = _saved_tensors_hooks()
        if hooks is not None and hooks != self._hooks:
            return getattr(hooks[0], "__module__", "") == CheckpointFunction.__module__
        if torch.is_grad_enabled() or not self._grad_mode:
            return False
        return any(code is CheckpointFunction.forward.__code__ for code, _ in _stack())

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
        rewrites = ("result",) in operands or (0,) in operands
        if rewrites and _writes_first(func, call.partition("#")[0]):
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
            f"them are quantized; {self._advice(kind)}"
        )

    def _too_few(self, kind: str) -> str:
        met, expected = self.met[kind], self.sites.counts[kind]
        missed = [f"{k}#{n}" for k, n in self.sites.quantized if k == kind and n >= met]
        sites = ", ".join(self._site(call) for call in missed) or self._site(kind)
        return (
            f"{sites} not met: {qualified_name(self.module)} made {met} calls of {kind!r}, "
            f"{expected} were recorded; {self._advice(kind)}"
        )

    def _no_operand(self, call: str, operand: Operand) -> str:
        where = quantizer_key("", operand).strip("_")
        return (
            f"{self._site(call)}: there is no tensor at {where}, which is quantized; "
            f"{self._advice(call.partition('#')[0])}"
        )

    def _recomputed(self, call: str) -> str:
        return (
            f"{self._site(call)} is in a part of the forward of {qualified_name(self.module)} that "
            "torch.utils.checkpoint runs again in the backward pass, where it would not be "
            "quantized; checkpoint the whole module instead, or one inside of it as "
            f"checkpoint(self.block, x), or leave the call float with the rule "
            f"{{{self._site(call)!r}: None}}"
        )

    def _advice(self, kind: str) -> str:
        rules = {self._site(f"{k}#{n}"): None for k, n in self.sites.quantized if k == kind}
        return (
            "quantize() records in eval mode what its example_inputs make the model do: give it "
            "inputs that take this path, or, for a path of training alone, leave the quantized "
            f"calls float with the rules {rules}. If this happens in torch.export, pass "
            "strict=False"
        )


def _saved_tensors_hooks() -> Any:
    # The argument: also while something is traced.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _stack() -> list[tuple[CodeType, int]]:
    """The functions that are running between the start of a forward and a call in it.

    Innermost first, each with the instruction that it has come to.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _FRAMES:
        # Hooks change the way through the call of a module.
        if frame.f_globals.get("__name__") not in (__name__, nn.Module.__module__):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found


def _line() -> Line:
    return tuple((code.co_name, at) for code, at in _stack())


# Where a frame is entered.
_FRAMES = "pytorch_quant.placement.frames"


def _writes_first(function: Callable, kind: str) -> bool:
    if torch.compiler.is_dynamo_compiling():
        return is_one_of(function, WRITING.get(kind, ()))
    return writes_first(function)


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
