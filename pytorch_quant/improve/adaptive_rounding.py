"""Adaptive rounding of weights: up or down by what it does to the outputs, not by what is nearer.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pytorch_quant import distributed
from pytorch_quant.batches import Forward, call_model
from pytorch_quant.formats import IntFormat
from pytorch_quant.improve.layers import (
    check_alike,
    check_calibrated,
    chosen_layers,
    repeatable,
    several_processes,
    weighted_layers,
)
from pytorch_quant.improve.originals import original, original_parameters, remember
from pytorch_quant.improve.rounding import (
    LayerRounding,
    Rest,
    RoundingReport,
    Sample,
    Schedule,
    check_count,
    detached,
    learn_layer,
    wide_dtype,
)
from pytorch_quant.nn.modes import named_quantizers, preserved_modes
from pytorch_quant.ptq.sync import agreeing

__all__ = ["LayerRounding", "RoundingReport", "adaround"]

_MOST_BITS = 8


def adaround(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    iterations: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 0.01,
    warm_up: float = 0.2,
    beta: tuple[float, float] = (20, 2),
    regularization: float = 10.0,
    samples: int = 1024,
    layers: str | Iterable[str] | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    seed: int = 0,
    sync: bool = True,
) -> RoundingReport:
    """Change the weights of `model`, in place, to codes that are learned from its outputs.

    Each weight is rounded down or up, whichever keeps the output of its layer close to that in the
    float model (Nagel et al., ICML 2020). The layers follow one another in the order in which they
    run: inputs come from the model with the layers before already rounded and with quantized
    activations, targets from the float model. Outputs are compared before any activation function.
    Labels are not used.

    A weight becomes `scale * q` exactly, so that its own quantizer gives the learned codes `q`, and
    that quantizer is marked `fixed`: later calls of `calibrate` and `compute_amax` leave its amax.
    Copies and pickles keep the mark, a state_dict does not: it holds weights and amax, which give
    the same codes in the model it is loaded into until that is calibrated again. The float weights
    stay beside the layers, in main memory, so that `bias_correction` can measure against them; to
    try other settings, keep a copy of the model. Where learning does not lower the error on the
    samples, the layer is left as it was.

    All or nothing: if an error is raised, or the run is interrupted, no weight has changed. Modes,
    gradients, hooks and the global random state are as before in any case.

    Every batch is run once, and then twice for each layer (float and quantized) up to that layer,
    which bounds the memory to the samples of one layer; besides, a copy of the learned weights is
    kept. Half precision is learned in float32.

    In a torch.distributed process group every process calls this. The first one learns from its
    batches, those of the others are not used, and all get its weights layer by layer.

    Args:
        model: Quantized and calibrated.
        batches: Passed to the model as in `calibrate`; run through more than once. A few hundred
            to a thousand images do.
        iterations: Steps of Adam for each layer. 1,000 are quick; the paper takes 10,000.
        batch_size: Rows of a step.
        learning_rate: Of Adam, on the variables behind the rounding.
        warm_up: The share of the iterations before the regularizer sets in.
        beta: The exponent of the regularizer at the start and at the end.
        regularization: What a weight midway between two codes costs, in units of the layer's error
            with nearest rounding, averaged over the weights. From 3 to 30 it matters little.
        samples: At most this many rows are kept of the inputs of a layer, drawn from all batches.
            A row is an image for a convolution and a vector for a linear layer.
        layers: Names or globs of the layers to learn; all by default.
        forward: `forward(model, batch)` runs one batch.
        progress: Show a progress bar.
        seed: Decides which rows are drawn. It also stands in for the global random state in the
            meantime, so that a loader that shuffles does not make two runs differ.
        sync: Take the weights of the first process of the group; if false, each learns its own.

    Returns:
        A row for each layer, and the layers that were skipped with the reason.

    Raises:
        RuntimeError: quantizers that are not calibrated, naming them; a layer that sees inputs of
            other shapes in the quantized than in the float model, or that only the first pass
            over the batches reaches; a batch on another device than the model; or an error of
            another process.
        TypeError: `batches` is a tensor, no iterable or can be run through only once, or a batch
            is of a type that cannot be passed on.
        ValueError: no batches, no quantized layers, an unknown name in `layers`, an argument that
            is out of range, processes whose layers differ, or weights sharded over processes.
    """
    together = several_processes(model, sync, "adaround")
    learns = not together or distributed.rank() == 0
    with agreeing(together):
        schedule = Schedule(iterations, batch_size, learning_rate, warm_up, beta, regularization)
        check_count("samples", samples)
        batches = repeatable(batches, "adaround")
        chosen = chosen_layers(weighted_layers(model), layers)
        check_calibrated(model, "adaround")
        skipped = {name: why for name, layer in chosen.items() if (why := _obstacle(model, layer))}
    if together:
        check_alike({name: layer for name, layer in chosen.items() if name not in skipped})
    wanted = {name: layer for name, layer in chosen.items() if name not in skipped}
    rows = []
    # Not inference mode, whose tensors no gradient can pass.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        preserved_modes(model),
        distributed.buffers_stay(model, agree=together),
    ):
        torch.default_generator.manual_seed(seed)
        model.eval()
        for quantizer in named_quantizers(model).values():
            quantizer.disable_calib()
        run = _Runs(model, batches, forward or call_model)
        with agreeing(together) as stage:
            stage.value = run.survey(wanted) if learns else []
        order = stage.values[0]
        skipped |= {n: "the batches do not reach it" for n in wanted if n not in order}
        with tqdm(
            total=len(order) * iterations, desc="adaround", disable=not (progress and learns)
        ) as bar:
            for name in order:
                bar.set_postfix_str(name)
                layer = wanted[name]
                with agreeing(together) as stage:
                    if learns:
                        generator = torch.Generator().manual_seed(seed)
                        seen = run.samples(name, layer, samples, generator)
                        learned = learn_layer(name, layer, seen, schedule, generator, bar.update)
                        stage.value = _sendable(learned) if together else learned
                row, values = stage.values[0]
                rows.append(row)
                if values is not None:
                    run.rounded[layer] = values.to(layer.weight.device)
        # Only now: what was raised before has changed nothing.
        for layer, values in run.rounded.items():
            before = original(layer, "weight")
            layer.weight.copy_(values)
            layer._weight_quantizer.fixed = True
            remember(layer, "weight", before)
    return RoundingReport(rows, {name: skipped[name] for name in chosen if name in skipped})


def _sendable(learned: tuple[LayerRounding, Tensor | None]) -> tuple[LayerRounding, Tensor | None]:
    row, values = learned
    return row, None if values is None else values.cpu()


class _Reached(BaseException):
    """Ends a forward pass at the layer; no `except Exception` of the model catches it."""


class _Runs:
    """Runs the batches, and shows what reaches a layer.

    Attributes:
        rounded: New weights of the layers that are done, for the quantized runs.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], forward: Forward) -> None:
        self.model = model
        self.batches = batches
        self.forward = forward
        self.rounded: dict[Any, Tensor] = {}
        self.quantizers = list(named_quantizers(model).values())
        self.rows: dict[str, int] = {}
        # Calls of a layer in each batch; where they vary, no pass can end early.
        self.calls: dict[str, set[int]] = {}

    def survey(self, layers: dict[str, Any]) -> list[str]:
        """The names of `layers` that the batches reach, in the order in which they run.

        Raises:
            ValueError: there are no batches.
        """
        handles, now = [], dict.fromkeys(layers, 0)

        def watch(name: str) -> Any:
            def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                now[name] += 1
                rows = len(_as_rows(layer, _split(args, kwargs)[0]))
                self.rows[name] = self.rows.get(name, 0) + rows

            return hook

        seen = 0
        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
            with self._float():
                for batch in self.batches:
                    now.update(dict.fromkeys(layers, 0))
                    self.forward(self.model, batch)
                    seen += 1
                    for name, calls in now.items():
                        self.calls.setdefault(name, set()).add(calls)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ValueError("no batches to learn from: the loader is empty")
        return [name for name, rows in self.rows.items() if rows]

    def samples(self, name: str, layer: Any, most: int, generator: torch.Generator) -> list[Sample]:
        """At most `most` rows of what `layer` gets and should give, one sample for each shape.

        Raises:
            RuntimeError: the quantized model shows the layer other shapes than the float model,
                or the batches no longer reach the layer.
        """
        drawn = torch.randperm(self.rows[name], generator=generator)[:most].sort().values
        output, weight = detached(layer), layer.weight.detach().to(wide_dtype(layer.weight))
        parts: dict[str, list[Sample]] = {}
        start = 0
        for batch in self.batches:
            if start > int(drawn[-1]):
                break
            # Both runs take the same batch, because a loader may shuffle or augment.
            with self._float():
                real, end = self._inputs(name, layer, batch, drawn, start)
            with self._quantized():
                quantized, other_end = self._inputs(name, layer, batch, drawn, start)
            shapes = [[x.shape for x, _ in inputs] for inputs in (real, quantized)]
            if end != other_end or shapes[0] != shapes[1]:
                raise RuntimeError(
                    f"{name} gets inputs of {shapes[0]} in the float model and of {shapes[1]} in "
                    "the quantized one, so that there is nothing to compare; leave it out of "
                    "layers="
                )
            start = end
            for (x, rest), (x_hat, _) in zip(real, quantized, strict=True):
                with torch.autocast(x.device.type, enabled=False):
                    sample = Sample(x_hat, output(weight, x, rest), rest)
                parts.setdefault(repr((x.shape[1:], rest)), []).append(sample)
        if not parts:
            raise RuntimeError(
                f"{name} was reached in the first pass over the batches and not in a later one; "
                "pass batches that are the same each time"
            )
        return [
            Sample(
                torch.cat([sample.inputs for sample in same]),
                torch.cat([sample.targets for sample in same]),
                same[0].rest,
            )
            for same in parts.values()
        ]

    def _inputs(
        self, name: str, layer: Any, batch: Any, drawn: Tensor, start: int
    ) -> tuple[list[tuple[Tensor, Rest]], int]:
        """The drawn rows of what passes the layer's input quantizer, and the next row's number."""
        found: list[tuple[Tensor, Rest]] = []
        calls, row = 0, start
        last = max(self.calls[name]) if len(self.calls[name]) == 1 else None

        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls, row
            x, rest = _split(args, kwargs)
            x = _as_rows(layer, layer._input_quantizer(x))
            here = drawn[(drawn >= row) & (drawn < row + len(x))] - row
            if len(here):
                # Indexing copies, so that operations in place cannot reach it.
                found.append((x[here.to(x.device)].to(wide_dtype(layer.weight)), rest))
            calls, row = calls + 1, row + len(x)
            if calls == last:
                raise _Reached

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.forward(self.model, batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found, row

    @contextmanager
    def _float(self) -> Iterator[None]:
        with preserved_modes(self.model), original_parameters(self.model):
            for quantizer in self.quantizers:
                quantizer.disable()
            yield

    @contextmanager
    def _quantized(self) -> Iterator[None]:
        """The model with its new weights; pointers are swapped, nothing is copied."""
        before = {layer: layer.weight.data for layer in self.rounded}
        try:
            for layer, values in self.rounded.items():
                layer.weight.data = values
            yield
        finally:
            for layer, values in before.items():
                layer.weight.data = values


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Rest]:
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["input"], ((), {k: v for k, v in kwargs.items() if k != "input"})


def _as_rows(layer: Any, x: Tensor) -> Tensor:
    """`x` with one axis of rows first: `(N, C, ...)` for a convolution, `(N, C)` for a linear."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    return x[None] if x.dim() == layer.weight.dim() - 1 else x


def _obstacle(model: nn.Module, layer: Any) -> str | None:
    """Why the weight of `layer` cannot be learned; None if it can."""
    quantizer = layer._weight_quantizer
    weight = layer._parameters.get("weight")
    seen = [tensor for _, tensor in layer.weights_to_quantize()]
    if weight is None or len(seen) != 1 or seen[0] is not weight:
        return "its weight quantizer does not see a parameter as it is"
    if not quantizer.quantizes:
        return "its weight quantizer is disabled"
    if quantizer.dynamic or quantizer.learns:
        return "the range of its weight is not a constant"
    if quantizer.pre_quant_scale is not None:
        return "its weight quantizer has a pre_quant_scale"
    fmt = quantizer.format
    if not isinstance(fmt, IntFormat) or fmt.bits > _MOST_BITS:
        return f"its weight is {fmt.name}; integers of up to {_MOST_BITS} bits can be learned"
    sharing = [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
        and parameter.data_ptr() == weight.data_ptr()
        and module is not layer
    ]
    if sharing:
        return f"its weight is also {', '.join(sharing)}"
    return None
