"""Batches from a folder of images or from arrays."""

from __future__ import annotations

import argparse
import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pytorch_quant.commands.pictures import Pictures, preparation

LABELS = "labels"


@dataclass(frozen=True)
class Batches:
    """Batches that can be run through again and again, in the same order.

    Attributes:
        loader: Gives `(inputs, labels)` or `(inputs,)`.
        labelled: Which of them.
        count: How many samples.
        classes: How many classes the data names; None without names.
        device: Where tensors go.
    """

    loader: Any
    labelled: bool
    count: int
    classes: int | None
    device: str

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.loader:
            yield tuple(_moved(part, self.device) for part in batch)

    def example(self) -> Any:
        """The inputs of the first batch."""
        return next(iter(self))[0]


def forward(model: nn.Module, batch: tuple[Any, ...]) -> Any:
    """Run the inputs of a batch."""
    inputs = batch[0]
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def open_data(
    options: argparse.Namespace,
    model: nn.Module,
    transform: Callable[[Any], Tensor] | None,
    *,
    path: str | None = None,
    count: int | None = None,
) -> Batches:
    """Open the data that the options name.

    Args:
        options: Those of `add_data`.
        model: Arrays have to fit the arguments of its `forward`.
        transform: From a picture to a tensor, as the weights were trained; options overrule it.
        path: Instead of `--data`.
        count: Instead of `--samples`.

    Raises:
        ImportError: Pillow is not installed.
        OSError: it is not there, or cannot be read.
        ValueError: no images, or arrays that do not fit.
    """
    place = Path(options.data if path is None else path)
    dataset: Any
    if place.is_dir():
        dataset = Pictures(place, preparation(options, transform))
    elif place.suffix == ".npz":
        dataset = _Arrays(place, model)
    elif place.exists():
        raise ValueError(f"{place} is neither a folder of images nor an .npz file")
    else:
        raise FileNotFoundError(2, "no such file or folder", str(place))
    # Sorted by class, the first ones would be of one class.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed))
    wanted = options.samples if count is None else count
    chosen = order[:wanted].tolist()
    loader = DataLoader(
        Subset(dataset, chosen),
        options.batch_size,
        num_workers=options.workers,
        collate_fn=_collated,
    )
    return Batches(loader, dataset.labelled, len(chosen), dataset.classes, options.device)


def check_fit(model: nn.Module, batches: Batches, path: str) -> None:
    """Run the first batch.

    Raises:
        ValueError: the model cannot run on it; says what it holds.
    """
    inputs = batches.example()
    try:
        with torch.inference_mode():
            forward(model, (inputs,))
    except Exception as error:
        given = inputs.items() if isinstance(inputs, Mapping) else [("", inputs)]
        shown = ", ".join(
            f"{name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}".strip()
            for name, x in given
        )
        raise ValueError(
            f"{type(model).__name__} cannot run on a batch of {path}, {shown}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_labelled(batches: Batches) -> None:
    """Raise ValueError where the data has no labels."""
    if not batches.labelled:
        raise ValueError(
            "accuracy and loss need labels: a subfolder for each class, or an array named "
            f"{LABELS!r} in the .npz file"
        )


def cross_entropy(batches: Batches) -> Callable[[Any, Tensor], Tensor]:
    """The mean cross entropy of logits and labels; raises ValueError where they do not fit."""

    def loss(logits: Any, labels: Tensor) -> Tensor:
        _check_logits(logits, labels, batches.classes)
        return nn.functional.cross_entropy(logits, labels)

    return loss


def _check_logits(logits: Any, labels: Tensor, folders: int | None) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("accuracy and loss need a model that returns logits of shape (N, classes)")
    classes = logits.shape[1]
    if folders not in (None, classes) or int(labels.max()) >= classes:
        raise ValueError(
            f"the data has {folders or int(labels.max()) + 1} classes and the model {classes} "
            "logits; label k is the k-th class folder by name"
        )


def top1(model: nn.Module, batches: Batches, *, name: str, progress: bool) -> float:
    """The share of samples whose largest logit is that of the label, in percent.

    Raises:
        ValueError: no labels, or labels and logits that do not belong together.
    """
    from tqdm import tqdm

    right = 0
    check_labelled(batches)
    model.eval()
    with torch.inference_mode():
        for inputs, labels in tqdm(batches, desc=f"accuracy ({name})", disable=not progress):
            logits = forward(model, (inputs,))
            _check_logits(logits, labels, batches.classes)
            right += int((logits.argmax(1) == labels).sum())
    return 100 * right / batches.count


class _Arrays(Dataset):
    """The arrays of an `.npz` file, a sample for each entry of their first dimension."""

    classes = None

    def __init__(self, path: Path, model: nn.Module) -> None:
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds a single array; write it with np.savez")
            with file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from error
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise ValueError(
                f"{path}: all arrays need the same number of samples, at least one; got {lengths}"
            )
        self.labels = arrays.pop(LABELS, None)
        self.labelled = self.labels is not None
        if self.labelled and (self.labels.ndim != 1 or self.labels.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: {LABELS!r} must be whole numbers of shape (N,), got "
                f"{self.labels.dtype} {self.labels.shape}"
            )
        if self.labelled and self.labels.min() < 0:
            raise ValueError(f"{path}: {LABELS!r} count from 0, got {self.labels.min()}")
        if not arrays:
            raise ValueError(f"{path} holds labels and no inputs")
        if len(arrays) > 1:
            _check_names(path, list(arrays), model)
        self.arrays = {name: _tensor(path, name, array) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        inputs: Any = {name: tensor[index] for name, tensor in self.arrays.items()}
        if len(inputs) == 1:
            (inputs,) = inputs.values()
        return (inputs, int(self.labels[index])) if self.labels is not None else (inputs,)


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    try:
        # NumPy makes float64 unasked; models are float32.
        return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name!r} cannot be a tensor: {error}") from error


def _check_names(path: Path, names: list[str], model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise ValueError(
            f"{path}: with several arrays each is an argument of forward, which has no "
            f"{', '.join(unknown)}; its arguments are {', '.join(parameters)}"
        )


def _collated(samples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    parts: list[Any] = []
    for column in zip(*samples, strict=True):
        first = column[0]
        if isinstance(first, Mapping):
            parts.append({name: torch.stack([s[name] for s in column]) for name in first})
        elif isinstance(first, Tensor):
            parts.append(torch.stack(column))
        else:
            parts.append(torch.tensor(column))
    return tuple(parts)


def _moved(part: Any, device: str) -> Any:
    if isinstance(part, Mapping):
        return {name: tensor.to(device) for name, tensor in part.items()}
    return part.to(device)
