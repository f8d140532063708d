"""Calibration by several processes: one set of statistics, as if one process had seen all batches.

Three things keep the processes together. At the end of each stage all of them learn whether any
has failed (`agreeing`), so that none waits for one that has left. Their statistics are combined
entry by entry, as `Calibrator.reductions` says (`unite`). Where a forward pass itself is
collective, all run the same number of them (`pytorch_quant.ptq.lockstep`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytorch_quant import distributed
from pytorch_quant.calib import Calibrator, HistogramCalibrator
from pytorch_quant.calib.counting import coarsened
from pytorch_quant.calib.faults import raise_named
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.report import CalibrationReport

_KINDS = ("max", "sum", "first")


@dataclass
class Agreement:
    """What the processes tell each other at the end of a stage.

    Attributes:
        value: What this process tells; plain data.
        values: What each of them told, in the order of ranks, once the stage is over.
        alone: This process fails inside a collective forward pass, where it cannot tell.
    """

    value: Any = None
    values: list[Any] = field(default_factory=list)
    alone: bool = False


@contextmanager
def agreeing(together: bool) -> Iterator[Agreement]:
    """A stage that all processes finish, or that all of them leave by an error.

    An interrupt leaves alone: the process is about to end.

    Args:
        together: There are several processes; if false, only the value is passed on.

    Raises:
        RuntimeError: another process failed, naming its rank and its error, or has ended.
    """
    stage = Agreement()
    try:
        yield stage
    except BaseException as error:
        stage.values = [stage.value]
        if together and isinstance(error, Exception) and not stage.alone:
            # The error of this process matters more than that of a lost connection.
            with suppress(RuntimeError):
                told = distributed.gather_objects((_text(error), stage.value))
                stage.values = [value for _, value in told]
        raise
    stage.values = [stage.value]
    if not together:
        return
    try:
        told = distributed.gather_objects((None, stage.value))
    except RuntimeError as error:
        raise RuntimeError(
            f"another process has left the calibration ({error}); this one keeps the statistics "
            "that it has: save_calibration stores them, load_calibration merges those of all"
        ) from error
    stage.values = [value for _, value in told]
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text is not None]
    if failed:
        raise RuntimeError(
            f"calibration failed on another process ({'; '.join(failed)}); this one keeps the "
            "statistics that it has"
        )


def describe(collecting: dict[str, TensorQuantizer], **arguments: Any) -> dict[str, Any]:
    """What has to be the same in all processes before any batch: arguments and quantizers.

    Raises:
        TypeError: a calibrator whose statistics cannot be combined, naming the quantizer.
    """
    described: dict[str, Any] = {f"calibrate({key}=)": arguments[key] for key in arguments}
    for name, quantizer in collecting.items():
        calibrator = quantizer.calibrator
        kind = type(calibrator)
        if not isinstance(calibrator, Calibrator) or not _has_state(type(calibrator)):
            raise TypeError(
                f"{name}: the statistics of {kind.__name__} cannot be combined over processes; "
                "derive it from Calibrator and give it reductions, state() and load_state() for "
                "all that it collects, or calibrate with sync=False"
            )
        described[name] = {"calibrator": kind.__qualname__} | calibrator.settings()
    return described


def check_same(told: list[dict[str, Any]]) -> None:
    """Refuse processes that calibrate different things.

    Raises:
        ValueError: naming the first quantizer or argument that differs, and two ranks.
    """
    for rank, theirs in enumerate(told):
        for key in [*told[0], *theirs]:
            ours = told[0].get(key, "nothing of that name")
            found = theirs.get(key, "nothing of that name")
            if ours != found:
                raise ValueError(
                    f"{key} differs between processes: rank 0 has {ours}, rank {rank} has "
                    f"{found}; calibrate the same model in the same way everywhere, or use "
                    "sync=False"
                )


def start_once(collecting: dict[str, TensorQuantizer], accumulate: bool, together: bool) -> None:
    """Let statistics that all processes hold alike count once: only rank 0 goes on from them.

    The others go on from what they have added to them since, alone.

    Raises:
        RuntimeError: what was added cannot be told from what all hold, naming the quantizer.
    """
    for name, quantizer in collecting.items():
        calibrator = quantizer.calibrator
        if not isinstance(calibrator, Calibrator) or (united := calibrator.united_state()) is None:
            continue
        if not accumulate:
            calibrator.unmark_united()
        elif together and distributed.rank() > 0:
            added = _added(name, calibrator, united)
            # A new object: the one before comes back if no batch arrives.
            quantizer.calibrator = fresh = copy.copy(calibrator)
            fresh.reset()
            if added:
                fresh.load_state(added)
            fresh.unmark_united()


def _added(name: str, calibrator: Calibrator, united: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a process has added to statistics that all hold; empty for nothing.

    Sums are differences. A maximum stays as it is, since it may count twice.
    """
    state = dict(calibrator.state())
    failure = RuntimeError(
        f"{name}: what this process has collected alone cannot be told from what all processes "
        "hold together; calibrate with accumulate=False"
    )
    if {key: t.shape for key, t in state.items()} != {key: t.shape for key, t in united.items()}:
        raise failure
    if all(torch.equal(state[key], united[key]) for key in state):
        return {}
    if "exponent" in state and "counts" in united:
        shift = state["exponent"] - united["exponent"]
        united = united | {"counts": coarsened(united["counts"], shift)}
    for key, kind in calibrator.reductions.items():
        if kind == "sum" and key in state:
            state[key] = state[key] - united[key]
            if not state[key].is_floating_point() and bool((state[key] < 0).any()):
                raise failure
    return state


def take_first(quantizers: dict[str, TensorQuantizer], report: CalibrationReport) -> None:
    """Give every process, in place, the amax that rank 0 found; the report shows it.

    The same statistics give the same amax on like machines; unlike ones may round differently.

    Args:
        quantizers: Those to set, by name.
        report: Of this process; the same quantizers in all of them.
    """
    found = {row.name: row.amax for row in report.ranges if row.amax is not None}
    taken = {name: amax for name, amax in found.items() if name in quantizers}
    distributed.broadcast(list(taken.values()), 0)
    for name, amax in taken.items():
        quantizers[name].set_range(amax)


def unite(collecting: dict[str, TensorQuantizer]) -> None:
    """Give every process the statistics of all of them, also those that saw nothing.

    Maxima and ranges are exact, and so are integer sums. A mean of maxima sums floats in another
    order than one process would.

    Raises:
        CalibrationError: a bad batch was met on an accelerator, naming the quantizer.
        RuntimeError: the same on another process.
        ValueError: shapes or entries differ between processes, naming the quantizer.
    """
    states: dict[str, dict[str, Tensor]] = {}
    with agreeing(True) as stage:
        layout: dict[str, Any] = {}
        raise_named({name: quantizer.calibrator for name, quantizer in collecting.items()})
        for name, quantizer in collecting.items():
            calibrator = quantizer.calibrator
            assert calibrator is not None
            states[name] = calibrator.state()
            entries = {key: (tuple(t.shape), t.dtype) for key, t in states[name].items()}
            layout[name] = (entries, calibrator.best)
        stage.value = layout
    layouts: list[dict[str, Any]] = stage.values
    with agreeing(True):
        parts = {
            name: _Parts(quantizer, states[name], _agreed_layout(name, layouts, quantizer))
            for name, quantizer in collecting.items()
        }
    _reduce(parts, "max")
    for part in parts.values():
        part.widen()
    first = {name: _first(name, layouts) for name in collecting}
    for name, part in parts.items():
        part.clear_unless(first[name] == distributed.rank())
    _reduce(parts, "sum", "first")
    with agreeing(True):
        for name, part in parts.items():
            part.load()
            part.calibrator.best = next(filter(None, (held[name][1] for held in layouts)), None)


class _Parts:
    """The entries of the state of one calibrator, on their way to those of all processes."""

    def __init__(
        self, quantizer: TensorQuantizer, state: dict[str, Tensor], layout: dict[str, Any]
    ) -> None:
        assert quantizer.calibrator is not None
        self.calibrator = quantizer.calibrator
        self.kinds = {key: self.calibrator.reductions[key] for key in layout}
        self.entries = {}
        for key, (shape, dtype) in layout.items():
            if key in state:
                self.entries[key] = state[key].clone(memory_format=torch.contiguous_format)
            else:
                fill = _least(dtype) if self.kinds[key] == "max" else 0
                device = quantizer.buffer_device
                self.entries[key] = torch.full(shape, fill, dtype=dtype, device=device)
        self.exponent = self.entries.get("exponent")
        if self.exponent is not None:
            self.exponent = self.exponent.clone()

    def widen(self) -> None:
        """Bring the counts to the range that the processes have agreed on."""
        if isinstance(self.calibrator, HistogramCalibrator) and self.exponent is not None:
            common = self.entries["exponent"]
            # A process that saw nothing has no range of its own, and no counts.
            shift = (common - self.exponent.clamp(min=-(2**20))).clamp(min=0)
            self.entries["counts"] = coarsened(self.entries["counts"], shift)

    def clear_unless(self, first: bool) -> None:
        """Let only one process contribute to the sums of what is taken from the first."""
        if not first:
            for key, kind in self.kinds.items():
                if kind == "first":
                    self.entries[key] = torch.zeros_like(self.entries[key])

    def load(self) -> None:
        """Give the calibrator what all processes hold together."""
        if self.entries:
            self.calibrator.load_state(self.entries)
            self.calibrator.mark_united()


def _reduce(parts: dict[str, _Parts], *kinds: str) -> None:
    chosen = [
        part.entries[key]
        for part in parts.values()
        for key in part.entries
        if part.kinds[key] in kinds
    ]
    distributed.all_reduce(chosen, "max" if kinds == ("max",) else "sum")


def _agreed_layout(
    name: str, layouts: list[dict[str, Any]], quantizer: TensorQuantizer
) -> dict[str, Any]:
    """Entries with shapes and types, as the processes that have any hold them."""
    holder = _first(name, layouts)
    if holder is None:
        return {}
    entries = layouts[holder][name][0]
    known = quantizer.calibrator.reductions if quantizer.calibrator is not None else {}
    if missing := [key for key in entries if key not in known]:
        raise ValueError(
            f"{name}: the reductions of its calibrator do not say how {', '.join(missing)} of its "
            "state is combined; add them"
        )
    for rank, layout in enumerate(layouts):
        theirs = layout[name][0]
        if theirs and theirs != entries:
            differing = next(k for k in [*entries, *theirs] if entries.get(k) != theirs.get(k))
            raise ValueError(
                f"{name}: {differing} is {_shown(entries.get(differing))} on rank {holder} and "
                f"{_shown(theirs.get(differing))} on rank {rank}; the kept axis must have the "
                "same size everywhere: use axis=None, or batches of one shape"
            )
    return entries


def _shown(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if entry is None else f"{entry[1]} of shape {entry[0]}".removeprefix("torch.")


def _first(name: str, layouts: list[dict[str, Any]]) -> int | None:
    """The lowest rank that holds statistics for the quantizer."""
    return next((rank for rank, layout in enumerate(layouts) if layout[name][0]), None)


def _least(dtype: torch.dtype) -> float | int:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _has_state(kind: type[Calibrator]) -> bool:
    """Whether a class that collects in its own way also has its own state."""
    places = [
        next(i for i, base in enumerate(kind.__mro__) if method in vars(base))
        for method in ("state", "load_state", "collect")
    ]
    return max(places[:2]) <= places[2] and set(kind.reductions.values()) <= set(_KINDS)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
