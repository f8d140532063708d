"""What each of two processes does for test_qat_processes.py: run with rank, rendezvous, result."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from qat_models import images, labels, network, ranges
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pytorch_quant import qat
from pytorch_quant.versions import TORCH

STEPS = 3
SHARDED_MEANS = (2, 9)


def prepared(kind):
    model = qat.freeze_batchnorm(network())
    if kind == "moving":
        qat.update_ranges(model, 0.5)
    elif kind != "frozen":
        qat.learn_ranges(model, kind)
    return model


def batch(step, rank=None):
    x, y = images(8, seed=step) * (1 + step), labels(8, seed=step)
    return (x, y) if rank is None else (x[rank::2], y[rank::2])


def fit(model, parameters, rank=None, share=1.0):
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        (cross_entropy(model(x), y) * share).backward()
        optimizer.step()


def saved(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def alone(kind):
    model = prepared(kind)
    fit(model, qat.parameter_groups(model, lr=1e-2, range_lr=1e-3))
    return saved(model)


def data_parallel(rank):
    found = {}
    for kind in ("frozen", "lsq", "pact", "moving"):
        model = prepared(kind)
        groups = qat.parameter_groups(model, lr=1e-2, range_lr=1e-3)
        fit(DistributedDataParallel(model), groups, rank)
        found[kind] = saved(model), alone(kind) if kind != "moving" else alone_moving()
    return found


def alone_moving():
    model = network()
    qat.update_ranges(model, 0.5, sync=False)
    qat.freeze_batchnorm(model)
    fit(model, qat.parameter_groups(model, lr=1e-2, range_lr=1e-3))
    return saved(model)


def schedules(rank):
    """Ranges that freeze while DistributedDataParallel waits for their gradients."""
    model = network()
    schedule = qat.QATSchedule(model, 4, ranges="lsq", freeze_ranges_at=0.5)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(qat.parameter_groups(wrapped, lr=1e-2, range_lr=1e-3), momentum=0.9)
    seen = []
    for step in range(4):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        schedule.step(optimizer)
        seen.append(ranges(model))
    return seen


def errors():
    found = []
    wrapped = DistributedDataParallel(prepared("lsq"))
    for call in (
        lambda: qat.freeze_ranges(wrapped),
        lambda: qat.learn_ranges(DistributedDataParallel(network())),
        lambda: qat.Teacher(wrapped),
        lambda: qat.learn_ranges(fully_shard(network())),
    ):
        try:
            call()
            found.append("")
        except (RuntimeError, TypeError) as error:
            found.append(str(error))
    return found


def sharded(rank):
    found = {}
    for kind in ("frozen", "lsq"):
        model = prepared(kind)
        for layer in (model[0], model[3], model[5]):
            fully_shard(layer)
        fully_shard(model)
        groups = qat.parameter_groups(model, lr=1e-2, range_lr=1e-3)
        # On the CPU, fully_shard of an older torch adds up gradients instead of averaging them.
        fit(model, groups, rank, share=0.5 if TORCH < SHARDED_MEANS else 1.0)
        state = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            for name, value in model.state_dict().items()
        }
        plain = network(calibrated=False)
        plain.load_state_dict(state)
        shown = repr(model[0]._input_quantizer)
        same = torch.allclose(plain.eval()(images()), model.eval()(images()), atol=1e-6)
        qat.check_finite(model)
        amax = model[0]._weight_quantizer.amax.clone()
        model[0]._weight_quantizer.amax = amax * 2
        doubled = torch.equal(model[0]._weight_quantizer.amax, amax * 2)
        found[kind] = saved(plain), alone(kind), same, shown, doubled
    return found


def main():
    rank, rendezvous, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save(
        {
            "data_parallel": data_parallel(rank),
            "schedules": schedules(rank),
            "errors": errors(),
            "sharded": sharded(rank),
        },
        result,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
