"""What each of two processes does for test_distributed.py: run with rank, rendezvous and result."""

import contextlib
import io
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from own_calibrators import Least, Sums
from torch import nn

from pytorch_quant import QuantDescriptor, calibrate, compute_amax
from pytorch_quant import nn as quant_nn
from pytorch_quant.calib import observation
from pytorch_quant.nn.modes import named_quantizers
from pytorch_quant.ptq import ranges
from pytorch_quant.ptq.storage import load_calibration, save_calibration

METHODS = ("max", "mean_max", "moving_max", "percentile", "mse", "entropy", "lp", "best")
RANK = 0
FOLDER = "."


def network(per_channel=True):
    torch.manual_seed(0)
    desc = QuantDescriptor(axis=1) if per_channel else QuantDescriptor()
    model = nn.Sequential(
        quant_nn.QuantConv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        quant_nn.QuantConv2d(4, 6, 3, quant_desc_input=desc),
        nn.Flatten(),
        quant_nn.QuantLinear(24, 3),
    )
    model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    return model


def images():
    """Later batches are larger, so that the ranges of the processes differ."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 1, 6, 6, generator=generator) * 1.7**i for i in range(5)]


def mine(batches, cut=3):
    return batches[:cut] if RANK == 0 else batches[cut:]


def run(model, batches, method="mse", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(model, batches, method, progress=False, **options)


def amax(model):
    return {
        name.removeprefix("module."): q.amax.clone() for name, q in named_quantizers(model).items()
    }


def alone(method, **options):
    model = network()
    run(model, images(), method, sync=False, **options)
    return amax(model)


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def methods():
    found = {}
    for method in METHODS:
        model, wanted = network(), network()
        report = run(model, mine(images()), method)
        # The moving average is that of the first process.
        own = images()[:3] if method == "moving_max" else images()
        run(wanted, own, method, sync=False)
        rows = {row.name: row for row in report.ranges}
        found[method] = {
            "amax": amax(model),
            "wanted": amax(wanted),
            "batches": report.batches,
            "shown": {name: rows[name].method for name in rows},
            "reported": {name: rows[name].amax for name in rows},
            "seen": rows["0._input_quantizer"].seen,
        }
    return found


def other_methods_later():
    model, wanted = network(), network()
    run(model, mine(images()), "mse")
    run(wanted, images(), "mse", sync=False)
    found = []
    for method in ("entropy", "percentile", "max"):
        # Only one process asks: this must not wait for the other.
        if RANK == 1:
            compute_amax(model, method)
            compute_amax(wanted, method)
        found.append((amax(model), amax(wanted)))
    return found


def a_rank_without_batches():
    found = []
    for cut in (0, 5):
        model = network()
        report = run(model, mine(images(), cut), "entropy")
        found.append((amax(model), report.batches))
    return found, alone("entropy")


def no_batches_anywhere():
    run(model := network(), mine(images()), "mse")
    held, error = amax(model), error_of(run, model, [])
    compute_amax(model, "mse")
    return error, held, amax(model)


def accumulate():
    """The union of the first pass must not count once for each process."""
    first, second = images()[:3], images()[3:]
    model = network()
    run(model, mine(first, 1))
    run(model, mine(second, 1), accumulate=True)
    seen = {n: q.calibrator.seen for n, q in named_quantizers(model).items() if "_input" in n}
    loaded = network()
    run(loaded, mine(first, 1))
    save_calibration(loaded, f"{FOLDER}/held{RANK}")
    loaded = network()
    load_calibration(loaded, f"{FOLDER}/held{RANK}")
    run(loaded, mine(second, 1), accumulate=True)
    # What was collected alone is of this process, and counts.
    local = network()
    run(local, mine(first, 1), sync=False)
    run(local, mine(second, 1), accumulate=True)
    return amax(model), seen, amax(loaded), amax(local), alone("mse")


def accumulate_alone():
    """What each process adds alone to the union counts, and the union once."""
    found = {}
    for method in ("mse", "mean_max"):
        model = network()
        run(model, mine(images()[:2], 1), method)
        run(model, mine(images()[2:4], 1), method, accumulate=True, sync=False)
        run(model, mine(images()[4:], 0), method, accumulate=True)
        seen = {n: q.calibrator.seen for n, q in named_quantizers(model).items() if "_input" in n}
        found[method] = amax(model), seen, alone(method)
    return found


def accumulate_after_best():
    model = network()
    run(model, mine(images()), "best")
    inputs = {n: q for n, q in named_quantizers(model).items() if "_input" in n}
    best = {n: q.calibrator.best for n, q in inputs.items()}
    run(model, mine(images()), "mse", accumulate=True)
    return best, {n: q.calibrator.best for n, q in inputs.items()}


class Broken(Exception):
    pass


def failing(batches):
    yield batches[0]
    if RANK == 1:
        raise Broken("the disk is full")
    yield from batches[1:]


def a_failing_rank():
    model = network()
    error = error_of(run, model, failing(mine(images())))
    compute_amax(model, "max")
    kept = model[0]._input_quantizer.amax.item()
    run(model, mine(images()))
    return error, kept, amax(model), alone("mse")


def nan_on_one_rank():
    batches = images()
    batches[4][0, 0, 0, 0] = torch.nan
    return error_of(run, network(), mine(batches))


def nan_at_the_end():
    """As on an accelerator, where a bad batch shows when the statistics are read."""
    batches = images()
    batches[4][0, 0, 0, 0] = torch.nan
    held, observation.HOST_TYPES = observation.HOST_TYPES, ()
    try:
        return error_of(run, network(), mine(batches))
    finally:
        observation.HOST_TYPES = held


def wrong_on_one_rank():
    found = [error_of(run, network(), mine(images()), "mse" if RANK else "lp")]
    found.append(error_of(run, network(), mine(images()), "msee" if RANK else "mse"))
    model = network()
    if RANK:
        model[3]._input_quantizer.axis = None
    found.append(error_of(run, model, mine(images())))
    found.append(error_of(run, network()[: 6 - RANK], mine(images())))
    lines = nn.Sequential(quant_nn.QuantLinear(4, 4, quant_desc_input=QuantDescriptor(axis=0)))
    found.append(error_of(run, lines, [torch.ones(2 + RANK, 4)]))
    return found


def own_calibrators():
    model = network()
    model[5]._input_quantizer._calibrator = Least()
    refused = error_of(run, model, mine(images()))
    lines = nn.Sequential(quant_nn.QuantLinear(4, 4))
    batches = [torch.full((1, 4), 3.0 + RANK)]
    found = []
    lines[0]._input_quantizer._calibrator = Sums()
    for again in (False, True, False):
        run(lines, batches, accumulate=again)
        found.append(lines[0]._input_quantizer.amax.item())
    run(lines, batches, sync=False)
    run(lines, batches, accumulate=True)
    found.append(lines[0]._input_quantizer.amax.item())
    for sync in (False, True):
        run(lines, batches, accumulate=True, sync=sync)
    found.append(lines[0]._input_quantizer.amax.item())
    return refused, found


def without_sync():
    """Only one process calibrates: it must not wait for the other."""
    if RANK == 0:
        return None
    run(model := network(), images()[:2], sync=False)
    return model[0]._input_quantizer.amax.item()


def unlike_machines():
    """The search of the second process rounds differently."""
    model = network()
    model[5]._input_quantizer = quant_nn.TensorQuantizer(QuantDescriptor(learn_amax=True))
    held = ranges.compute_together
    if RANK:
        ranges.compute_together = lambda *args, **kwargs: [
            None if a is None else a * 1.5 for a in held(*args, **kwargs)
        ]
    try:
        report = run(model, mine(images()))
    finally:
        ranges.compute_together = held
    reported = {row.name: row.amax for row in report.ranges if "_input" in row.name}
    inputs = {name: value for name, value in amax(model).items() if "_input" in name}
    return inputs, reported


def progress():
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        calibrate(network(), mine(images()), "best")
    return shown.getvalue()


def data_parallel():
    found = {}
    for name, cut in (("uneven", 4), ("none", 5)):
        inner = network()
        if RANK:
            # Each process has running statistics of its own after training.
            inner[1].running_mean += 1.0
        model = nn.parallel.DistributedDataParallel(inner)
        if RANK:
            inner[1].running_mean += 1.0
        run(model, mine(images(), cut))
        found[name] = amax(model)
    found["buffers"] = model.will_sync_module_buffers()
    found["names"] = list(named_quantizers(model))
    found["trains"] = model(images()[0]).sum().backward() is None
    if RANK:
        run(model, images()[:1], sync=False)
    return found, alone("mse")


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[3], model[5]):
        fully_shard(layer)
    return fully_shard(model)


def fsdp():
    found = {}
    for name, cut, method in (
        ("uneven", 4, "mse"),
        ("none", 5, "mse"),
        ("none on the first", 0, "mse"),
        ("best", 4, "best"),
    ):
        model, wanted = sharded(network()), network()
        # Two batches would sample a stand-in of the second process.
        options = {"sample_batches": 2} if method == "best" else {}
        report = run(model, mine(images(), cut), method, **options)
        run(wanted, images(), method, sync=False, **options)
        found[name] = amax(model), amax(wanted), report.batches
    x = images()[0]
    with torch.no_grad():
        found["outputs"] = model.eval()(x), wanted.eval()(x)
    compute_amax(model, "entropy", weight_method="mse")
    compute_amax(wanted, "entropy", weight_method="mse")
    found["later"] = amax(model), amax(wanted)
    found["alone"] = error_of(run, model, images(), sync=False)
    return found


def fsdp_failures():
    batches = images()
    batches[4][0, 0, 0, 0] = torch.nan
    model = sharded(network())
    found = [error_of(run, model, mine(batches))]
    compute_amax(model, "max")
    kept = model[0]._input_quantizer.amax.item()
    found.append(error_of(run, model, failing(mine(images()))))
    run(model, mine(images()))
    return found, kept, amax(model), alone("mse")


def an_interrupt_of_one_rank():
    """The last program: the second process leaves."""

    def interrupted():
        yield from mine(images(), 2)[:2]
        if RANK == 1:
            raise KeyboardInterrupt

    model = network()
    try:
        error = error_of(run, model, interrupted())
    except KeyboardInterrupt:
        error = "KeyboardInterrupt"
        save_calibration(model, f"{FOLDER}/interrupted")
        dist.destroy_process_group()
        return error, None, None
    save_calibration(model, f"{FOLDER}/kept")
    merged = network()
    load_calibration(merged, [f"{FOLDER}/kept", f"{FOLDER}/interrupted"])
    compute_amax(merged, "mse")
    wanted = network()
    run(wanted, images()[:4], sync=False)
    return error, amax(merged), amax(wanted)


def main(rank, rendezvous, result, folder):
    global RANK, FOLDER
    RANK, FOLDER = int(rank), folder
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=RANK,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for program in PROGRAMS:
        found[program.__name__] = program()
        torch.save(found, result)


PROGRAMS = (
    methods,
    other_methods_later,
    a_rank_without_batches,
    no_batches_anywhere,
    accumulate,
    accumulate_alone,
    accumulate_after_best,
    a_failing_rank,
    nan_on_one_rank,
    nan_at_the_end,
    wrong_on_one_rank,
    own_calibrators,
    without_sync,
    unlike_machines,
    progress,
    data_parallel,
    fsdp,
    fsdp_failures,
    an_interrupt_of_one_rank,
)

if __name__ == "__main__":
    main(*sys.argv[1:])
