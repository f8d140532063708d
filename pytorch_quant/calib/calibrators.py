"""Calibrators: what a quantizer collects over the batches, and the amax it makes of that."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_quant.axes import Axis, canonical_axis, kept_axes, reduce_amax, reduced_axes
from pytorch_quant.calib.histogram import WORKING_TYPES, Histogram, bad_values, flat_as_stored
from pytorch_quant.calib.search import entropy_amax, mse_amax, percentile_amax
from pytorch_quant.formats import make_format

METHODS = ("max", "percentile", "mse", "entropy")
# Fields of pickled calibrators of pytorch_quantization that mean the same here.
_EARLIER_OPTIONS = ("_track_amax", "_num_bins", "_skip_zeros", "_torch_hist")


class Calibrator:
    """Statistics of the values that a quantizer meets; a subclass says which.

    On the CPU bad values raise at once. On an accelerator that would stop the device for every
    batch: there the first bad batch and all later ones are left out, and `compute_amax` raises,
    once; asked again, it answers from the batches before.

    Args:
        num_bits: Integer width 2 to 16, or a floating-point pair such as `(4, 3)`.
        axis: The kept axis or axes; None is per tensor.
        unsigned: Negative values are an error.

    Raises:
        TypeError: `num_bits` or `axis` is of the wrong kind.
        ValueError: no such number format.
    """

    # Device types on which reading a value back costs nothing.
    _host_types = ("cpu",)

    def __init__(
        self, num_bits: int | tuple[int, int] = 8, axis: Axis = None, unsigned: bool = False
    ) -> None:
        self._set_target(num_bits, axis, unsigned)
        self.reset()

    def _set_target(self, num_bits: int | tuple[int, int], axis: Axis, unsigned: bool) -> None:
        self._format = make_format(num_bits, unsigned)
        self._num_bits = tuple(num_bits) if isinstance(num_bits, (tuple, list)) else num_bits
        self._axis = canonical_axis(axis)
        self._unsigned = unsigned

    def retarget(self, num_bits: int | tuple[int, int], axis: Axis, unsigned: bool) -> None:
        """Serve a quantizer whose fields have changed.

        Statistics answer for any number of bits and are kept; another axis or sign needs others,
        and they are forgotten.

        Raises:
            TypeError, ValueError: As in the constructor.
        """
        same = self._axis == canonical_axis(axis) and self._unsigned == unsigned
        self._set_target(num_bits, axis, unsigned)
        if not same:
            self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._batches = 0
        self._device: torch.device | None = None
        self._shape: tuple[int, ...] | None = None
        # Of the first bad batch on an accelerator: finite, least value, number of the batch.
        self._fault: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        """Add a batch of values to the statistics. An empty tensor adds nothing.

        Args:
            x: Any shape that has the kept axis, any dtype; values count as float32.

        Raises:
            CalibrationError: NaN or Inf, or negative values for an unsigned quantizer (on the
                CPU). Nothing of this batch is collected, all earlier statistics are kept.
            RuntimeError: the kept axis changed its size, or the device changed.
            ValueError: `x` does not have the kept axis.
        """
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach()
            if x.dtype not in WORKING_TYPES:
                x = x.float()
            if x.numel() == 0:
                return
            if self._axis is None:
                x = flat_as_stored(x)
            maximum = reduce_amax(x, self._axis).float()
            self._check_same(x.device, tuple(maximum.shape))
            valid = self._check_values(x, maximum)
            self._device, self._shape = x.device, tuple(maximum.shape)
            self._add(x, maximum, valid)
            self._batches += 1

    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The amax of the statistics so far.

        Returns:
            float32, real units, `()` per tensor, else 1 in all axes but the kept ones; None if no
            values were seen.
        """
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle; one of pytorch_quantization lacks most of the fields."""
        if "_format" in state:
            self.__dict__.update(state)
            return
        self.__dict__.update({k: state[k] for k in _EARLIER_OPTIONS if k in state})
        self._set_target(state["_num_bits"], state["_axis"], state["_unsigned"])
        self.reset()
        self._take_over(state)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Take the statistics out of the state of an earlier program."""
        raise NotImplementedError

    def __repr__(self) -> str:
        fields = f"num_bits={self._num_bits}, axis={self._axis}, unsigned={self._unsigned}"
        return f"{type(self).__name__}({fields})"

    def _add(self, x: Tensor, maximum: Tensor, valid: Tensor | None) -> None:
        raise NotImplementedError

    def _check_same(self, device: torch.device, shape: tuple[int, ...]) -> None:
        if self._device not in (None, device):
            raise RuntimeError(
                f"the device changed between batches, from {self._device} to {device}; collect "
                "on one device, or reset the calibrator"
            )
        if self._shape not in (None, shape):
            raise RuntimeError(
                f"the amax shape changed between batches, from {self._shape} to {shape}; axis "
                f"{self._axis} must keep its size: use axis=None, or reset the calibrator"
            )

    def _check_values(self, x: Tensor, maximum: Tensor) -> Tensor | None:
        finite = maximum.isfinite().all()
        least = x.amin().float() if self._unsigned else maximum.new_zeros(())
        if x.device.type in self._host_types:
            if not finite:
                bad = x.numel() - int(x.isfinite().sum())
                raise bad_values(False, f"in {bad} of {x.numel()} values")
            if least < 0:
                raise bad_values(True, f"with minimum {float(least):.6g}")
            return None
        fault = torch.stack([finite.float(), least, torch.full_like(least, self._batches)])
        if self._fault is not None:
            fault = torch.where(_is_good(self._fault), fault, self._fault)
        self._fault = fault
        return _is_good(fault)

    def _raise_deferred(self) -> None:
        """Raise for a bad batch that was met on an accelerator, once."""
        fault, self._fault = self._fault, None
        if fault is not None and not _is_good(fault):
            finite, least, batch = fault.tolist()
            where = f"with minimum {least:.6g} " if finite else ""
            where += f"in batch {batch:.0f} (counted from 0), all later ones left out too"
            raise bad_values(bool(finite), where)


class MaxCalibrator(Calibrator):
    """Keeps the largest magnitude, per tensor or per channel.

    Args:
        num_bits, axis, unsigned: As in `Calibrator`.
        track_amax: Keep the maximum of every batch in `amaxs` too.

    Raises:
        TypeError, ValueError: As in `Calibrator`.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: Axis = None,
        unsigned: bool = False,
        track_amax: bool = False,
    ) -> None:
        self._track_amax = track_amax
        super().__init__(num_bits, axis, unsigned)

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._calib_amax: Tensor | None = None
        self._tracked: list[Tensor] = []

    @property
    def amaxs(self) -> list[np.ndarray]:
        """The amax of every batch, oldest first; empty without `track_amax`."""
        return [a.cpu().numpy().copy() for a in self._tracked if bool((a >= 0).all())]

    def compute_amax(self, method: str = "max", **options: Any) -> Tensor | None:
        """The largest magnitude so far.

        Args:
            method: `"max"`; no other can be answered from maxima.
            **options: None exist.

        Raises:
            CalibrationError: a bad batch was met on an accelerator.
            TypeError: an option was given.
            ValueError: another method.
        """
        if method != "max":
            raise ValueError(
                f"only maxima were collected, which cannot answer method={method!r}; collect with "
                'a HistogramCalibrator (calib_method="histogram" in the descriptor)'
            )
        if options:
            raise TypeError(f'method="max" takes no options, got {", ".join(sorted(options))}')
        self._raise_deferred()
        if self._calib_amax is None or bool((self._calib_amax < 0).any()):
            return None
        with torch.inference_mode(False):
            return self._calib_amax.clone()

    def _add(self, x: Tensor, maximum: Tensor, valid: Tensor | None) -> None:
        old = self._calib_amax
        new = maximum if old is None else torch.maximum(old, maximum)
        if valid is not None:
            # -1 stands for nothing seen.
            nothing = torch.full_like(new, -1.0)
            new = torch.where(valid, new, nothing if old is None else old)
            maximum = torch.where(valid, maximum, nothing)
        self._calib_amax = new
        if self._track_amax:
            self._tracked.append(maximum)

    def _take_over(self, state: dict[str, Any]) -> None:
        amax = state.get("_calib_amax")
        if amax is not None:
            self._calib_amax = torch.as_tensor(amax, dtype=torch.float32)
            self._device, self._shape = self._calib_amax.device, tuple(self._calib_amax.shape)
        self._tracked = [torch.as_tensor(a) for a in state.get("_amaxs") or ()]


class HistogramCalibrator(Calibrator):
    """Keeps a histogram of magnitudes, per tensor or per channel, which answers every method.

    Args:
        num_bits, axis, unsigned: As in `Calibrator`.
        num_bins: Bins of each histogram.
        grow_method, torch_hist: Without effect; the range always grows by doubling.
        skip_zeros: Do not count exact zeros.

    Attributes:
        histogram: The statistics; None before any values.

    Raises:
        TypeError, ValueError: As in `Calibrator`, or `num_bins` is out of range.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: Axis = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
    ) -> None:
        self._num_bins = Histogram(num_bins).bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        super().__init__(num_bits, axis, unsigned)

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self.histogram: Histogram | None = None

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
            self.histogram = Histogram.from_bins(self.histogram.counts[0], edges, self._num_bins)

    def compute_amax(
        self, method: str, *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99
    ) -> Tensor | None:
        """The amax that a method finds in the histogram; see `pytorch_quant.calib.search`.

        The statistics are kept, for other methods. Options of other methods have no effect.

        Args:
            method: `"max"`, `"percentile"`, `"mse"` or `"entropy"`.
            stride: Bins between the candidates of `mse` and `entropy`.
            start_bin: The least candidate of `mse` and `entropy`, in bins.
            percentile: In percent, 0 to 100.

        Raises:
            CalibrationError: a bad batch was met on an accelerator.
            ValueError: an unknown method, or an option out of range.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; use {', '.join(map(repr, METHODS))}")
        self._raise_deferred()
        histogram = self.histogram
        if histogram is None or int(histogram.seen) == 0:
            return None
        with torch.inference_mode(False):
            counts, width, amax = histogram.counts, histogram.width, histogram.maximum.clone()
            if method == "percentile":
                amax = percentile_amax(counts, width, percentile, maximum=amax)
            elif method != "max":
                search = partial(mse_amax if method == "mse" else entropy_amax, counts, width)
                amax = search(self._format, start_bin=start_bin, stride=stride, maximum=amax)
            return amax.reshape(self._shape or ())

    def _take_over(self, state: dict[str, Any]) -> None:
        counts, edges = state.get("_calib_hist"), state.get("_calib_bin_edges")
        if counts is not None and edges is not None:
            self.histogram = Histogram.from_bins(counts, edges, self._num_bins)
            self.histogram.skip_zeros = self._skip_zeros
            self._device, self._shape = self.histogram.counts.device, ()

    def _flat(self, rows: Tensor) -> Tensor:
        return rows[0] if self._axis is None else rows

    def _add(self, x: Tensor, maximum: Tensor, valid: Tensor | None) -> None:
        size = self._num_bins, maximum.numel()
        if self.histogram is None:
            self.histogram = Histogram(*size, skip_zeros=self._skip_zeros, device=x.device)
        if self._axis is not None:
            order = kept_axes(self._axis, x.dim()) + reduced_axes(self._axis, x.dim())
            x = x.permute(order).reshape(size[1], -1)
        self.histogram.update(x, maximum=maximum, valid=valid)


def _is_good(fault: Tensor) -> Tensor:
    """Whether a batch was finite and, where that matters, free of negative values."""
    return (fault[0] > 0) & (fault[1] >= 0)
