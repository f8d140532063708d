"""Training and evaluation loops of the demonstration."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from pytorch_quant.demo.digits import Split


def train(
    model: nn.Module, data: Split, epochs: int, learning_rate: float, description: str
) -> None:
    """Train `model` in place with AdamW and a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    steps = epochs * (len(data.images) // data.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    with tqdm(total=steps, desc=description) as bar:
        for _ in range(epochs):
            for images, labels in data.shuffled(generator):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def predict(model: nn.Module, data: Split, description: str) -> torch.Tensor:
    """The predicted class of every image, shape `(N,)`."""
    model.eval()
    batches = tqdm(data, desc=description, leave=False)
    return torch.cat([model(images).argmax(1) for images, _ in batches])


def top1(predicted: torch.Tensor, data: Split) -> float:
    """The share of right predictions, in percent."""
    return 100.0 * (predicted == data.labels).float().mean().item()
