"""Dynamic quantization of two language models, an LSTM and a Transformer: no calibration data.

    python examples/dynamic_lstm.py
    python examples/dynamic_lstm.py --smoke     # seconds: smaller models, trained less

Weights become int8; each activation gets its range when it is met, from its own values. This is for
models whose time goes into loading weights. Both models predict the next word of sentences that a
small grammar makes, and run in ONNX Runtime afterwards, where a dynamic LSTM is one operator.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import pytorch_quant as pq

WORDS = 200
LENGTH = 32


def sentences(count: int, seed: int) -> Tensor:
    """Words `(count, LENGTH + 1)`: four may follow the two before, one of them likely."""
    followers = torch.randint(WORDS, (WORDS, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    chance = torch.tensor([0.7, 0.1, 0.1, 0.1])
    for t in range(2, LENGTH + 1):
        choice = torch.multinomial(chance, count, replacement=True, generator=generator)
        text[:, t] = followers[(text[:, t - 1] + (text[:, t - 2] % 2)) % WORDS, choice]
    return text


class LstmModel(nn.Module):
    """Two layers of an LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Logits `(N, T, WORDS)` of the words that follow `words`, `(N, T)`."""
        return self.head(self.lstm(self.embedding(words))[0])


class TransformerModel(nn.Module):
    """Two layers of a Transformer encoder that do not see what comes later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, WORDS)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """Logits `(N, T, WORDS)` of the words that follow `words`, `(N, T)`."""
        x = self.embedding(words) + self.position
        return self.head(self.encoder(x, self.mask, is_causal=True))


def train(model: nn.Module, text: Tensor, epochs: int, description: str) -> None:
    """Predict each next word."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * (len(text) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc=description):
        batch = text[torch.arange(32 * step, 32 * step + 32) % len(text)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def perplexity(logits: Tensor, text: Tensor) -> float:
    """The exponential of the mean cross entropy: from how many words the model has to guess."""
    return float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).exp())


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", type=Path, default=Path("runs/dynamic_lstm"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="smaller models, trained less")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    width, epochs = (64, 3) if args.smoke else (192, 5)
    text, unseen = sentences(512 if args.smoke else 2048, seed=1), sentences(64, seed=2)
    words = unseen[:, :-1]
    varying = ({0: torch.export.Dim.DYNAMIC},)

    # "" asks for all of the model, also for recurrent layers, which are float otherwise. Products
    # of two activations hold no weights, and stay float.
    lstm = {"": pq.INT8_DYNAMIC}
    transformer = {"*": pq.INT8_DYNAMIC, "*/scaled_dot_product_attention#*": None}
    todo = [("LSTM", LstmModel, lstm), ("Transformer", TransformerModel, transformer)]
    rows, latency = [], []
    for name, build, rules in todo:
        model = build(width)
        train(model, text, epochs, f"train {name}")
        int8 = copy.deepcopy(model)
        pq.quantize(int8, rules, example_inputs=words[:2], placement="onnxruntime")
        pq.calibrate(int8, [words[:2]])  # ranges of weights; activations keep none
        files = [args.output / f"{name.lower()}_{kind}.onnx" for kind in ("float32", "int8")]
        logits = []
        for network, file in zip((model, int8), files, strict=True):
            report = pq.export_onnx(
                network, words[:2], file, target="onnxruntime", dynamic_shapes=varying
            )
            logits.append(pq.load(file, "onnxruntime")(words))
            rows.append((file.stem, perplexity(logits[-1], unseen), report.size))
        with torch.inference_mode():
            simulated = int8(words)
        noise = float((logits[1] - logits[0]).norm() / logits[0].norm())
        apart = float((logits[1] - simulated).norm() / simulated.norm())
        print(f"{name}: int8 differs from float by {noise:.2%}, from its simulation by {apart:.3%}")
        latency.append(pq.compare_latency(files, rounds=50, shapes={"words": (1, LENGTH)}))

    print(f"\n{'file in ONNX Runtime':<24}{'perplexity':>12}{'KB':>10}\n{'-' * 46}")
    print("\n".join(f"{name:<24}{value:>12.3f}{size / 1e3:>10.0f}" for name, value, size in rows))
    print("", *latency, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
