"""Calibration statistics in files: to resume, to merge shards, to range again without a pass."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant.calib import Calibrator, HistogramCalibrator, MaxCalibrator
from pytorch_quant.calib.faults import raise_named
from pytorch_quant.files import written_aside
from pytorch_quant.nn.modes import named_quantizers, weight_quantizers
from pytorch_quant.nn.tensor_quantizer import TensorQuantizer
from pytorch_quant.ptq.ranges import takes_part

PathLike = str | os.PathLike[str]

_FORMAT = "pytorch_quant calibration statistics"
_VERSION = 1
_KINDS: dict[str, type[Calibrator]] = {"max": MaxCalibrator, "histogram": HistogramCalibrator}
# What a file says of each quantizer, besides `axis`, which may be None, an int or several.
_FIELDS: dict[str, Any] = {"kind": str, "unsigned": bool, "momentum": (int, float), "state": dict}
_HISTOGRAM_FIELDS: dict[str, Any] = {"num_bins": int, "skip_zeros": bool}


def save_calibration(model: nn.Module, path: PathLike) -> None:
    """Write the statistics of the quantizers of `model` to a file, for `load_calibration`.

    They are those of the activations; weights are read from the model again. The amax buffers are
    part of `state_dict()`, not of this file. The file holds plain tensors, numbers and texts, and
    is complete or not there at all.

    Args:
        model: Calibrated, also in part: an interrupted `calibrate` keeps what it has collected.
        path: The file to write; one that exists is replaced.

    Raises:
        CalibrationError: a bad batch was met on an accelerator, naming the quantizer. Saved again,
            the batches before it are written.
        OSError: the file cannot be written.
        TypeError: a calibrator of the user's own, naming the quantizer.
        ValueError: there are no statistics.
    """
    weights = weight_quantizers(model)
    entries = {}
    quantizers = named_quantizers(model)
    raise_named({name: q.calibrator for name, q in quantizers.items() if not weights.get(q)})
    for name, quantizer in quantizers.items():
        calibrator = quantizer.calibrator
        if calibrator is None or weights.get(quantizer):
            continue
        if type(calibrator) not in (MaxCalibrator, HistogramCalibrator):
            raise TypeError(f"{name} {_foreign(calibrator)}, which a file cannot hold")
        if state := calibrator.state():
            entries[name] = _entry(calibrator, state)
    if not entries:
        raise ValueError("no quantizer has statistics to save; run calibrate(model, batches) first")
    with written_aside(path) as aside:
        torch.save({"format": _FORMAT, "version": _VERSION, "quantizers": entries}, aside)


def load_calibration(
    model: nn.Module, paths: PathLike | Iterable[PathLike], *, accumulate: bool = False
) -> None:
    """Give the quantizers of `model`, in place, the statistics of files; their amax stays.

    Call `compute_amax(model, method)` afterwards for the amax, or `calibrate(..., accumulate=True)`
    to go on collecting. Statistics answer for any number of bits. Several files are merged, as of
    the shards of a data set: maxima and histograms exactly, whatever their ranges; the moving
    average becomes the mean of the two, weighted by batches. Everything is checked before anything
    changes.

    With several processes each one loads the same files; the statistics then count once.

    Args:
        model: Its quantizers have the names, axes and signs of those that were saved.
        paths: Files of `save_calibration`, one or several.
        accumulate: Merge with the statistics that are there instead of replacing them.

    Raises:
        CalibrationError: `accumulate`, and a bad batch was met on an accelerator.
        OSError: a file cannot be read.
        TypeError: a calibrator of the user's own, naming the quantizer.
        ValueError: no files, a file twice, one that `save_calibration` has not written or that a
            newer version has, quantizers that the model does not have, or statistics of another
            format, naming the quantizer.

    Warns:
        UserWarning: quantizers that the files do not hold, which keep what they have.
    """
    files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(p) for p in paths]
    if not files:
        raise ValueError("no files to load; give the path of at least one")
    twice = [str(path) for i, path in enumerate(files) if path.resolve() in _resolved(files[:i])]
    if twice:
        raise ValueError(f"{', '.join(twice)} would count twice; give each file once")
    quantizers = named_quantizers(model)
    merged: dict[str, Calibrator] = {}
    sources: dict[str, str] = {}
    if accumulate:
        raise_named({name: quantizer.calibrator for name, quantizer in quantizers.items()})
        for name, quantizer in quantizers.items():
            held: Any = quantizer.calibrator
            if type(held) in (MaxCalibrator, HistogramCalibrator) and held.seen:
                merged[name] = _calibrator_of(quantizer, _entry(held, held.state()))
                sources[name] = "the model"
    loaded: set[str] = set()
    for path in files:
        entries = _read(path)
        _check_names(entries, quantizers, path)
        loaded |= entries.keys()
        for name, entry in entries.items():
            _check_fits(name, quantizers[name], entry, path)
            try:
                calibrator = _calibrator_of(quantizers[name], entry)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name}: {error}; the file is damaged") from error
            if name in merged:
                _check_alike(name, merged[name], calibrator, sources[name], path)
                merged[name].merge(calibrator)
            else:
                merged[name], sources[name] = calibrator, str(path)
    for name in loaded:
        merged[name].mark_united()
        quantizers[name].calibrator = merged[name]
    weights = weight_quantizers(model)
    missing = [
        name
        for name, q in quantizers.items()
        if name not in loaded and takes_part(q) and not weights.get(q)
    ]
    if missing:
        warnings.warn(
            f"{len(missing)} quantizer(s) are not in {', '.join(map(str, files))} and keep what "
            f"they have: {', '.join(missing)}",
            stacklevel=2,
        )


def _entry(calibrator: Any, state: dict[str, Tensor]) -> dict[str, Any]:
    """A calibrator as plain values."""
    histogram = isinstance(calibrator, HistogramCalibrator)
    return calibrator.settings() | {
        "kind": "histogram" if histogram else "max",
        "momentum": calibrator.momentum,
        "best": calibrator.best,
        "state": {key: tensor.cpu() for key, tensor in state.items()},
    }


def _calibrator_of(quantizer: TensorQuantizer, entry: dict[str, Any]) -> Calibrator:
    """A calibrator for the quantizer, on its device, that holds an entry.

    Raises:
        RuntimeError, TypeError, ValueError: The entry is not a whole one.
    """
    settings = {"momentum": entry["momentum"]}
    if entry["kind"] == "histogram":
        settings |= {"num_bins": entry["num_bins"], "skip_zeros": entry["skip_zeros"]}
    kind = _KINDS[entry["kind"]]
    made = kind(quantizer.num_bits, entry["axis"], entry["unsigned"], **settings)
    # Checked on the CPU first: not every device has all types.
    made.load_state(entry["state"])
    if isinstance(made, HistogramCalibrator) and made.histogram is not None:
        channels, shape = made.histogram.channels, made.amax_shape or ()
        if channels != math.prod(shape):
            raise ValueError(f"counts of {channels} channels for maxima of shape {shape}")
    device = quantizer.buffer_device
    if device.type != "cpu":
        mps = device.type == "mps"
        made.load_state(
            {
                key: (t.float() if mps and t.dtype == torch.float64 else t).to(
                    quantizer.buffer_device
                )
                for key, t in entry["state"].items()
            }
        )
    made.best = entry["best"]
    return made


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file, by the names of the quantizers.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or one of a newer version.
    """
    data = path.read_bytes()
    told = f"{path} is no file of calibration statistics"
    advice = "give one that save_calibration has written"
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{told}, or a damaged one ({reason}); {advice}") from error
    if not isinstance(held, dict) or held.get("format") != _FORMAT:
        raise ValueError(f"{told}; {advice}. (A state_dict is loaded by load_state_dict)")
    version = held.get("version")
    if not isinstance(version, int) or version > _VERSION:
        raise ValueError(
            f"{path} has version {version} of the format, this is pytorch_quant for version "
            f"{_VERSION}; install a newer one"
        )
    entries = held.get("quantizers")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{told}: it names no quantizers; {advice}")
    for name, entry in entries.items():
        if problem := _problem(entry):
            raise ValueError(f"{path}: {name}: {problem}; the file is damaged, {advice}")
    return entries


def _problem(entry: Any) -> str | None:
    """What is wrong with an entry of a file."""
    if not isinstance(entry, dict):
        return "no entry"
    fields = _FIELDS | (_HISTOGRAM_FIELDS if entry.get("kind") == "histogram" else {})
    for field, kind in fields.items():
        if not isinstance(entry.get(field), kind):
            return f"{field} is {entry.get(field)!r}"
    if entry["kind"] not in _KINDS:
        return f"kind is {entry['kind']!r}"
    if "axis" not in entry or "best" not in entry:
        return "axis or best is missing"
    if not entry["state"] or not all(isinstance(t, Tensor) for t in entry["state"].values()):
        return "the state is not of tensors"
    return None


def _check_names(
    entries: dict[str, Any], quantizers: dict[str, TensorQuantizer], path: Path
) -> None:
    unknown = []
    for name in entries:
        if name not in quantizers:
            # Wrapping a model, as in DistributedDataParallel, puts a prefix before all names.
            near = [
                known
                for known in quantizers
                if known.endswith(f".{name}") or name.endswith(f".{known}")
            ]
            near = near or get_close_matches(name, quantizers, n=3)
            unknown.append(f"{name} (near: {', '.join(near)})" if near else name)
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} quantizer(s) that the model does not have: "
            f"{', '.join(unknown)}; load into the model that was saved, wrapped as it was"
        )


def _check_fits(name: str, quantizer: TensorQuantizer, entry: dict[str, Any], path: Path) -> None:
    calibrator = quantizer.calibrator
    if calibrator is None:
        raise ValueError(
            f"{name} has no calibrator, as it is dynamic, and {path} holds statistics for it; "
            "load into a model with the descriptors that were saved"
        )
    if type(calibrator) not in (MaxCalibrator, HistogramCalibrator):
        raise TypeError(f"{name} {_foreign(calibrator)}, which a file cannot fill")
    for field in ("axis", "unsigned"):
        mine = calibrator.settings()[field]
        if entry[field] != mine:
            raise ValueError(
                f"{name} has {field}={mine}, {path} holds statistics for {field}={entry[field]}; "
                "give the quantizer the descriptor that was saved, or calibrate again"
            )
    amax, largest = quantizer.amax, entry["state"].get("largest")
    if amax is None or largest is None or amax.numel() == 1:
        return
    if largest.shape != amax.shape:
        raise ValueError(
            f"{name} has an amax of shape {tuple(amax.shape)}, {path} holds statistics for one of "
            f"shape {tuple(largest.shape)}; load into a model with the layers that were saved"
        )


def _check_alike(name: str, mine: Any, theirs: Any, source: str, path: Path) -> None:
    for what, get in (
        ("calibrator", lambda c: type(c).__name__),
        ("num_bins", lambda c: c.settings().get("num_bins")),
        ("skip_zeros", lambda c: c.settings().get("skip_zeros")),
        ("shape", lambda c: c.amax_shape),
    ):
        if get(mine) != get(theirs):
            raise ValueError(
                f"{name}: {what} is {get(mine)} in {source} and {get(theirs)} in {path}; only "
                "statistics of one kind merge: collect both with the same settings and method, or "
                "load one of them"
            )


def _foreign(calibrator: Any) -> str:
    return f"has a {type(calibrator).__name__} of your own"


def _resolved(files: list[Path]) -> set[Path]:
    return {path.resolve() for path in files}
