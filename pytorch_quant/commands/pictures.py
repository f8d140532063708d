"""A folder of images as tensors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pytorch_quant.optional import require

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Means and deviations of ImageNet's training images, which most classifiers are trained with.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Pictures(Dataset):
    """Images in subfolders, one a class, numbered by name; or images without labels.

    Args:
        folder: The folder.
        transform: From a picture of Pillow in RGB to a tensor.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: no images, or subfolders beside loose ones.
    """

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor]) -> None:
        self._image = require("PIL.Image")
        self._transform = transform
        loose = [path for path in sorted(folder.iterdir()) if _is_image(path)]
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        found = [(path, [p for p in sorted(path.rglob("*")) if _is_image(p)]) for path in inner]
        kept = [(path, images) for path, images in found if images]
        if loose and kept:
            raise ValueError(
                f"{folder} holds images beside folders of images ({kept[0][0].name}, ...); give a "
                "folder of either"
            )
        if not loose and not kept:
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(_ENDINGS))})")
        if kept and not any(path == image.parent for path, images in kept for image in images):
            raise ValueError(
                f"{folder} holds folders of class folders ({', '.join(p.name for p, _ in kept)}); "
                f"give one of them, such as {kept[0][0]}"
            )
        empty = [path.name for path, images in found if not images]
        if kept and empty:
            # Left out it would shift the numbers of the classes behind it.
            raise ValueError(f"{folder}: the class folder {empty[0]} holds no images")
        self.labelled = bool(kept)
        self.classes = len(kept) if kept else None
        self.items: list[tuple[Path, int | None]] = [(path, None) for path in loose]
        self.items += [(p, label) for label, (_, images) in enumerate(kept) for p in images]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path, label = self.items[index]
        try:
            with self._image.open(path) as picture:
                pixels = picture.convert("RGB")
        except Exception as error:
            # Not all that decoders raise is an OSError.
            raise ValueError(f"{path} is no image that can be read: {error}") from error
        tensor = self._transform(pixels)
        return (tensor,) if label is None else (tensor, label)


def preparation(
    options: argparse.Namespace, transform: Callable[[Any], Tensor] | None
) -> Callable[[Any], Tensor]:
    """How pictures become tensors: as the options say, else as the weights do, else as usual."""
    own = (options.image_size, options.resize, options.mean, options.std)
    if transform is not None and all(value is None for value in own):
        return transform
    size = options.image_size or 224
    return _Preparation(
        options.resize or max(size, round(size * 256 / 224)),
        size,
        options.mean or _MEAN,
        options.std or _STD,
    )


class _Preparation:
    """Shorter side to `resize` (bilinear), center crop, pixels in 0..1, normalized."""

    def __init__(
        self, resize: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        if resize < size:
            raise ValueError(f"--resize {resize} is smaller than --image-size {size}")
        self._resize, self._size = resize, size
        self._mean, self._std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, picture: Any) -> Tensor:
        width, height = picture.size
        short = min(width, height)
        width, height = (int(self._resize * side / short) for side in (width, height))
        if (width, height) != picture.size:
            picture = picture.resize((width, height), require("PIL.Image").Resampling.BILINEAR)
        left, top = round((width - self._size) / 2), round((height - self._size) / 2)
        picture = picture.crop((left, top, left + self._size, top + self._size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and path.is_file()
