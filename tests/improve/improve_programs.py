"""What each of two processes does for test_improve_processes.py: run with rank and folder."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from pytorch_quant import QuantDescriptor, adaround, bias_correction, calibrate, smooth_quant
from pytorch_quant.nn import QuantLinear


def network():
    torch.manual_seed(0)
    four_bits = QuantDescriptor(4, axis=0)
    return nn.Sequential(
        QuantLinear(12, 16, quant_desc_weight=four_bits),
        nn.ReLU(),
        QuantLinear(16, 4, quant_desc_weight=four_bits),
    )


def images(rank):
    """The processes have outliers in other channels, and other means."""
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(16, 12, generator=generator) + 0.3 * rank for _ in range(3 - rank)]
    for x in batches:
        x[:, 2 + rank] *= 50
    return batches


def held(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=40),
    )
    batches, found = images(rank), {}
    model = network()
    report = smooth_quant(model, batches, progress=False)
    found["smooth"] = held(model), str(report)
    model = network()
    calibrate(model, batches, progress=False)
    report = adaround(model, batches, iterations=50, progress=False)
    found["adaround"] = held(model), str(report)
    report = bias_correction(model, batches, progress=False)
    found["bias"] = held(model), str(report)
    for empty in (smooth_quant, bias_correction):
        report = empty(model, batches if rank else [], progress=False)
        found[f"{empty.__name__} without batches"] = held(model), str(report)
    try:
        bias_correction(model, None if rank else batches, progress=False)
    except (RuntimeError, TypeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    # One process by itself: it must not wait for the other.
    if rank:
        smooth_quant(network(), batches, progress=False, sync=False)
        bias_correction(model, batches, progress=False, sync=False)
        adaround(model, batches, iterations=2, progress=False, sync=False)
    torch.save(found, f"{folder}/result{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
