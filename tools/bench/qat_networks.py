"""The network, its data and its options that the benchmarks of inference and training share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import qat_peers
import torch
from run_options import add_options
from timing import Case, Row, Seconds, bounded, interleaved, quartiles, ratios
from torch import nn

from pytorch_quant import calibrate, quantize
from pytorch_quant.models import BasicBlock, ResNet, resnet18

FLOAT, LAYERS, EVERYWHERE = "float", "layers", "everywhere"

RowsOf = Callable[[dict[str, Any], "Work", str], list[Row]]


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark has, and `--batch-size` and `--bfloat16`."""
    add_options(parser, rounds=9)
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: 8)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="under autocast, with channels-last images"
    )


class Work:
    """What is measured.

    Args:
        args: The command line.

    Attributes:
        args: The command line.
        images: The batch.
        targets: Its labels.
        what: The network and the batch, for the table.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pixels = 32 if args.quick else 224
        layout = torch.channels_last if args.bfloat16 else torch.contiguous_format
        images = torch.randn(args.batch_size, 3, pixels, pixels)
        self.images = images.to(args.device, memory_format=layout)
        self.targets = torch.randint(0, 10, (args.batch_size,), device=args.device)
        name = "a small ResNet" if args.quick else "ResNet-18"
        self.what = f"{name}, batch {args.batch_size} of {pixels}x{pixels}"
        if args.bfloat16:
            self.what += ", bfloat16, channels-last"

    def models(self) -> dict[str, nn.Module]:
        """The same network in float and fake-quantized, the latter calibrated, by name."""
        plain, layers, everywhere = map(self._network, (FLOAT, LAYERS, EVERYWHERE))
        for model in (layers, everywhere):
            model.load_state_dict(plain.state_dict(), strict=False)
            calibrate(model.eval(), [self.images], progress=False)
        peers = {} if self.args.quick else qat_peers.quantized_models(plain.eval(), self.images)
        ours = {"pytorch_quant": layers, "pytorch_quant with its additions": everywhere}
        return {"float": plain, **ours, **peers}

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where it was asked for."""
        if self.args.bfloat16:
            return torch.autocast(self.args.device, torch.bfloat16)
        return nullcontext()

    def interleaved(self, cases: Sequence[Case], title: str) -> dict[str, list[Seconds]]:
        """Time the cases in turns."""
        seconds = 1e-4 if self.args.quick or self.args.device == "cpu" else 0.2
        return interleaved(
            cases, self.args.rounds, device=self.args.device, least_seconds=seconds, title=title
        )

    def _network(self, kind: str) -> nn.Module:
        model = network(kind, None if self.args.quick else resnet18)
        layout = torch.channels_last if self.args.bfloat16 else torch.contiguous_format
        return model.to(self.args.device, memory_format=layout)


def network(kind: str, make: Callable[..., nn.Module] | None) -> nn.Module:
    """A network to compare.

    Args:
        kind: `FLOAT`, `LAYERS` with quantizers in its layers, as other toolkits have them, or
            `EVERYWHERE` with those at its residual additions and its pooling too.
        make: A ResNet of `pytorch_quant.models`; None for a small one.
    """
    everywhere = kind == EVERYWHERE
    if make is None:
        model: nn.Module = ResNet(
            BasicBlock, [1, 1, 1, 1], 10, quantize=everywhere, small_input=True, width=8
        )
    else:
        model = make(quantize=everywhere)
    return quantize(model, placement="none") if kind == LAYERS else model


def measure(args: argparse.Namespace, mode: str, rows_of: RowsOf) -> list[Row]:
    """The rows of the eager models, and of the compiled ones where `--compile` asks for them.

    Args:
        args: The command line.
        mode: `"eval"` or `"train"`.
        rows_of: Given the models, the work, and a prefix for names.
    """
    work = Work(args)
    models = {name: getattr(model, mode)() for name, model in work.models().items()}
    rows = rows_of(models, work, "")
    if args.compile:
        compiled = {
            name: torch.compile(models[name], fullgraph=True) for name in ("float", "pytorch_quant")
        }
        rows += rows_of(compiled, work, "compiled ")
    return rows


def against_float(
    times: dict[str, list[Seconds]], prefix: str, what: str, limit: float, scope: str = ""
) -> list[Row]:
    """The time of the float model, and every other one against it; ours has to stay in `limit`.

    Args:
        times: By model.
        prefix: For names.
        what: What is timed, in words.
        limit: The ratio that is claimed.
        scope: In words, what ours runs in.
    """
    base = "float"
    spread = quartiles([t.done * 1000 for t in times[base]])
    rows = [Row(f"{prefix}{base} {what}", f"{spread:.1f} ms")]
    for name in times:
        if name == base:
            continue
        spread = quartiles(ratios(times[name], times[base]))
        least = min(t.done for t in times[name]) / min(t.done for t in times[base])
        measured = f"{spread:.3f}, of the least times {least:.3f}"
        if name == "pytorch_quant":
            title = f"{prefix}{name}{scope} / {prefix}{base}"
            rows.append(bounded(title, spread.median, limit, measured))
        else:
            rows.append(Row(f"{prefix}{name} / {prefix}{base}", measured))
    return rows
