"""The calibrators: what a quantizer collects over the batches, and the amax it makes of that."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pytorch_quant.axes import Axis
from pytorch_quant.calib.calibrator import Calibrator
from pytorch_quant.calib.counting import RangedCounts
from pytorch_quant.calib.faults import earliest_fault
from pytorch_quant.calib.histogram import Histogram
from pytorch_quant.calib.maxima import MOMENTUM, Maxima
from pytorch_quant.calib.methods import MAXIMA_METHODS, METHODS, SEARCH_METHODS, search_amax
from pytorch_quant.calib.observation import Observation
from pytorch_quant.calib.search import check_percentile


class MaxCalibrator(Calibrator):
    """Keeps the largest magnitude of the batches, per tensor or per channel.

    Args:
        num_bits, axis, unsigned: As in `Calibrator`.
        track_amax: Keep the maximum of every batch in `amaxs` too.
        momentum: As in `Calibrator`.

    Raises:
        TypeError, ValueError: As in `Calibrator`.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: Axis = None,
        unsigned: bool = False,
        track_amax: bool = False,
        *,
        momentum: float = MOMENTUM,
    ) -> None:
        self._track_amax = track_amax
        super().__init__(num_bits, axis, unsigned, momentum=momentum)

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._tracked: list[Tensor] = []

    def snapshot(self) -> Callable[[], None]:
        """See `Calibrator.snapshot`."""
        restore, tracked = super().snapshot(), self._tracked
        count = len(tracked)

        def restore_all() -> None:
            restore()
            del tracked[count:]

        return restore_all

    @property
    def amaxs(self) -> list[np.ndarray]:
        """The amax of every batch, oldest first; empty without `track_amax`."""
        return [a.cpu().numpy().copy() for a in self._tracked if bool((a >= 0).all())]

    @property
    def _calib_amax(self) -> Tensor | None:
        return None if self._maxima is None else self._maxima.largest

    @_calib_amax.setter
    def _calib_amax(self, amax: Any) -> None:
        if amax is None:
            self.reset()
            return
        amax = torch.as_tensor(amax, dtype=torch.float32)
        self._maxima = Maxima(tuple(amax.shape), amax.device)
        self._maxima.update(amax, amax.numel())

    def compute_amax(self, method: str = "max", **options: Any) -> Tensor | None:
        """The amax of the largest magnitudes so far.

        Args:
            method: `"max"`, `"mean_max"` or `"moving_max"`; no other can be answered from maxima.
            **options: None exist.

        Raises:
            CalibrationError: a bad batch was met on an accelerator.
            TypeError: an option was given.
            ValueError: another method.
        """
        if method not in MAXIMA_METHODS:
            raise ValueError(
                f"only maxima were collected, which cannot answer method={method!r}; collect with "
                'a HistogramCalibrator (calib_method="histogram" in the descriptor)'
            )
        if options:
            raise TypeError(f'method="{method}" takes no options, got {", ".join(sorted(options))}')
        return _amax_of_maxima(self, method)

    def _add(self, x: Tensor, observation: Observation, valid: Tensor | None) -> None:
        if self._track_amax:
            # -1 stands for a batch that was left out.
            maximum = observation.maximum
            self._tracked.append(maximum if valid is None else torch.where(valid, maximum, -1.0))

    def _take_over(self, state: dict[str, Any]) -> None:
        self._calib_amax = state.get("_calib_amax")
        self._tracked = [torch.as_tensor(a) for a in state.get("_amaxs") or ()]


class HistogramCalibrator(Calibrator):
    """Keeps a histogram of magnitudes, per tensor or per channel, which answers every method.

    Args:
        num_bits, axis, unsigned: As in `Calibrator`.
        num_bins: Bins of each histogram.
        grow_method, torch_hist: Without effect; the range always grows by doubling.
        skip_zeros: Do not count exact zeros.
        momentum: As in `Calibrator`.

    Raises:
        TypeError, ValueError: As in `Calibrator`, or `num_bins` is out of range.
    """

    reductions: ClassVar[dict[str, str]] = Calibrator.reductions | {
        "counts": "sum",
        "exponent": "max",
        "maximum": "max",
        "counted": "sum",
    }

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: Axis = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
        *,
        momentum: float = MOMENTUM,
    ) -> None:
        self._num_bins = Histogram(num_bins).bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        super().__init__(num_bits, axis, unsigned, momentum=momentum)

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._histogram: Histogram | None = None
        self._waiting: RangedCounts | None = None

    @property
    def histogram(self) -> Histogram | None:
        """The statistics; None before any values."""
        waiting = self._waiting
        if waiting is not None:
            assert self._histogram is not None and waiting.counts is not None
            settled = copy.copy(self._histogram)
            settled.add(
                waiting.counts[None],
                torch.tensor([waiting.exponent]),
                torch.tensor([waiting.magnitude]),
                waiting.numel,
            )
            # One statement without a call: an interrupt comes before or after it.
            self._histogram, self._waiting = settled, None
        return self._histogram

    @histogram.setter
    def histogram(self, histogram: Histogram | None) -> None:
        self._histogram, self._waiting = histogram, None

    def settings(self) -> dict[str, Any]:
        """See `Calibrator.settings`."""
        own = {"num_bins": self._num_bins, "skip_zeros": bool(self._skip_zeros)}
        return super().settings() | own

    def merge(self, other: Any) -> None:
        """See `Calibrator.merge`."""
        super().merge(other)
        assert self.histogram is not None
        self.histogram.merge(other.histogram)

    def share_above(self, amax: Tensor) -> float | None:
        """See `Calibrator.share_above`."""
        if self.histogram is None:
            return super().share_above(amax)
        return self.histogram.share_above(amax.reshape(-1))

    @property
    def _bins(self) -> int:  # type: ignore[override]
        return self._num_bins

    @property
    def _calib_hist(self) -> Tensor | None:
        return None if self.histogram is None else self._flat(self.histogram.counts)

    @_calib_hist.setter
    def _calib_hist(self, counts: Any) -> None:
        if counts is None:
            self.reset()
            return
        if self.histogram is None:
            raise ValueError("counts without a range; collect a batch first")
        present = self.histogram.counts
        given = torch.as_tensor(counts).to(present.device).round().long()
        if given.numel() != present.numel():
            raise ValueError(
                f"{given.numel()} counts for {present.numel()} bins; keep the number of bins"
            )
        self.histogram.counts = given.reshape(present.shape).clone()
        self.histogram.seen = given.sum()

    @property
    def _calib_bin_edges(self) -> Tensor | None:
        return None if self.histogram is None else self._flat(self.histogram.edges)

    @_calib_bin_edges.setter
    def _calib_bin_edges(self, edges: Any) -> None:
        if edges is None:
            self.reset()
        elif self.histogram is None or self.histogram.channels != 1:
            raise ValueError("edges without counts per tensor; collect a batch first")
        else:
            self._take_bins(self.histogram.counts[0], edges)

    def compute_amax(
        self,
        method: str,
        *,
        stride: int = 1,
        start_bin: int = 128,
        percentile: float = 99.99,
        p: float = 2.4,
    ) -> Tensor | None:
        """The amax that a method finds in the histogram; see `pytorch_quant.calib.methods`.

        The statistics are kept, for other methods. Options of other methods have no effect.

        Args:
            method: One of `pytorch_quant.calib.methods.METHODS`.
            stride: Bins between the candidates of `mse`, `entropy` and `lp`.
            start_bin: The least candidate of `mse`, `entropy` and `lp`, in bins.
            percentile: In percent, 0 to 100.
            p: The power of the error that `lp` minimises.

        Raises:
            CalibrationError: a bad batch was met on an accelerator.
            TypeError: `percentile` is no number.
            ValueError: an unknown method, an option out of range, or `best` without a search.
        """
        given = {"stride": stride, "start_bin": start_bin, "percentile": percentile, "p": p}
        return compute_together([self], method, **given)[0]

    def state(self) -> dict[str, Tensor]:
        """The statistics as plain tensors; see `Calibrator.state`."""
        state = super().state()
        if self.histogram is not None:
            held = self.histogram.state()
            held["counted"] = held.pop("seen")
            held.pop("skip_zeros")
            state |= held
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace the statistics by the result of `state`; see `Calibrator.load_state`.

        Raises:
            ValueError: the state is not that of such a calibrator.
        """
        histogram = None
        if state:
            fields = ("counts", "exponent", "maximum")
            held: dict[str, Tensor] = {k: state[k] for k in fields if k in state}
            if "counted" in state:
                held["seen"] = state["counted"]
            histogram = Histogram.from_state(held)
            histogram.skip_zeros = self._skip_zeros
            if histogram.bins != self._num_bins:
                raise ValueError(
                    f"statistics of {histogram.bins} bins for a calibrator of {self._num_bins}"
                )
        super().load_state(state)
        self.histogram = histogram

    def _take_over(self, state: dict[str, Any]) -> None:
        counts, edges = state.get("_calib_hist"), state.get("_calib_bin_edges")
        if counts is not None and edges is not None:
            self._take_bins(counts, edges)

    def _take_bins(self, counts: Any, edges: Any) -> None:
        histogram = Histogram.from_bins(counts, edges, self._num_bins)
        histogram.skip_zeros = self._skip_zeros
        self._maxima = Maxima((), histogram.counts.device)
        self._maxima.update(histogram.maximum.reshape(()), int(histogram.seen))
        self.histogram = histogram

    def _flat(self, rows: Tensor) -> Tensor:
        return rows[0] if self._axis is None else rows

    def _add(self, x: Tensor, observation: Observation, valid: Tensor | None) -> None:
        channels = math.prod(observation.shape)
        if self._histogram is None:
            self.histogram = Histogram(
                self._num_bins, channels, skip_zeros=self._skip_zeros, device=x.device
            )
        counted = observation.host_counts(self._num_bins)
        if counted is not None and not self._skip_zeros:
            # Small tensors are slow amid a forward pass: as few as can be, until somebody looks.
            self._waiting = counted if self._waiting is None else self._waiting.plus(counted)
            return
        assert self.histogram is not None
        counts, exponent = observation.counts(x, self._num_bins)
        zeros = None
        if self._skip_zeros:
            rows = observation.rows(x)
            zeros = rows.shape[1] - rows.count_nonzero(dim=1)
        maximum = observation.maximum.reshape(-1)
        if valid is not None:
            maximum = torch.where(valid, maximum, 0.0)
            exponent = torch.where(valid, exponent, self.histogram.exponent)
        self.histogram.add(counts, exponent, maximum, observation.numel, zeros=zeros, valid=valid)


def compute_together(
    calibrators: Sequence[MaxCalibrator | HistogramCalibrator], method: str, **options: Any
) -> list[Tensor | None]:
    """The amax of each of many calibrators: one search for all of them.

    Args:
        calibrators: Of either kind; those without a histogram answer by their maxima only.
        method: One of `pytorch_quant.calib.methods.METHODS`.
        **options: Those of `HistogramCalibrator.compute_amax`.

    Returns:
        float32, real units, in the order of the calibrators; None where no values were seen.

    Raises:
        CalibrationError: a bad batch was met on an accelerator.
        TypeError: `percentile` is no number.
        ValueError: an unknown method, an option out of range, statistics that cannot answer.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use {', '.join(map(repr, METHODS))}")
    check_percentile(options.get("percentile", 100))
    if found := earliest_fault(calibrators):
        raise found[1]
    answers: list[Tensor | None] = [None] * len(calibrators)
    searched: dict[str, list[int]] = {}
    for i, calibrator in enumerate(calibrators):
        wanted = method
        if method == "best" and calibrator.seen:
            if calibrator.best is None:
                raise ValueError('no best method was searched; run calibrate(..., method="best")')
            wanted = calibrator.best
        if wanted in SEARCH_METHODS and isinstance(calibrator, HistogramCalibrator):
            searched.setdefault(wanted, []).append(i)
        elif wanted != "best":
            answers[i] = _amax_of_maxima(calibrator, wanted)
    for wanted, members in searched.items():
        held: list[tuple[int, Histogram]] = []
        for i in members:
            histogram = getattr(calibrators[i], "histogram", None)
            if histogram is not None and int(histogram.seen):
                held.append((i, histogram))
        formats = [calibrators[i]._format for i, _ in held]
        searched_amax = search_amax([h for _, h in held], formats, wanted, **options)
        for (i, _), amax in zip(held, searched_amax, strict=True):
            answers[i] = amax.reshape(calibrators[i].amax_shape or ())
    return answers


def _amax_of_maxima(calibrator: Calibrator, method: str) -> Tensor | None:
    calibrator._raise_deferred()
    if not calibrator.seen:
        return None
    assert calibrator._maxima is not None
    if method not in MAXIMA_METHODS:
        raise ValueError(f"only maxima were collected, which cannot answer method={method!r}")
    with torch.inference_mode(False):
        return calibrator._maxima.amax(method)
