"""Real images that need no download: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pytorch_quant.optional import require

IMAGE_SIZE = 32
TEST_SHARE = 0.3


@dataclass(frozen=True)
class Split(Sequence):
    """Images and labels, cut into batches of a fixed order.

    Attributes:
        images: `(N, 1, 32, 32)` float32, zero mean and unit deviation over the training split.
        labels: `(N,)` int64.
        batch_size: Images in a batch.
    """

    images: Tensor
    labels: Tensor
    batch_size: int = 64

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.images[part], self.labels[part]

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch in random order; the last, short one is left out."""
        order = torch.randperm(len(self.images), generator=generator)
        for part in order.split(self.batch_size):
            if len(part) == self.batch_size:
                yield self.images[part], self.labels[part]


def load_digits() -> tuple[Split, Split]:
    """The training and the test split, drawn with a fixed seed.

    The 1,797 images of 8x8 pixels are the test set of Alpaydin and Kaynak, "Optical Recognition of
    Handwritten Digits", UCI Machine Learning Repository (1998); here upsampled to 32x32.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float()[:, None]
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    images, labels = images[order], labels[order]
    tests = int(len(images) * TEST_SHARE)
    train = images[tests:]
    images = (images - train.mean()) / train.std()
    return (
        Split(images[tests:].contiguous(), labels[tests:]),
        Split(images[:tests].contiguous(), labels[:tests]),
    )
