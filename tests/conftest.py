"""Fixtures and settings that all tests share, and how a run is spread over the cores.

torch is imported where it is used: the process that only hands out tests starts without it.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
from pathlib import Path

import pytest
from contract_lane import CONTRACT
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")

TESTS = Path(__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# A worker grows to 2 GB.
MOST_WORKERS = 8
# So many files are done before a worker has imported torch and all tests.
FEW_FILES = 3

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of workers beside each other would wait for the same cores. Set before torch is
    # imported, and for the processes that tests start.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """No workers for a few files or for `-k`, which are done before workers have started."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    files = [Path(argument.partition("::")[0]).is_file() for argument in config.args]
    if config.option.keyword or (all(files) and len(files) <= FEW_FILES):
        return 0
    return 0 if CORES == 1 else min(CORES, MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the contract lane; workers begin with the files that hold slow tests."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in CONTRACT:
            item.add_marker(pytest.mark.contract)
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish():
    """What is imported by now stays; each full collection would go through all of it."""
    gc.collect()
    gc.freeze()


def _keep_torchlib(registration):
    """torch reads its table of ONNX functions anew for each export, which takes half of its time.

    An export gets a copy, as it may add functions. Those of torchvision are in the table only
    where that is imported.
    """
    read, kept = registration.ONNXRegistry.from_torchlib, {}

    def from_torchlib(*arguments, **options):
        key = arguments, *options.items(), "torchvision" in sys.modules
        if key not in kept:
            kept[key] = read(*arguments, **options)
        registry = copy.copy(kept[key])
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


@pytest.fixture(autouse=True)
def _torchlib_read_once():
    # Not imported for this: with onnxscript it takes a second, and few tests export.
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(registration, "ONNXRegistry", None)
    if hasattr(registry, "from_torchlib") and not hasattr(registration, "_kept_by_tests"):
        registration._kept_by_tests = True
        _keep_torchlib(registration)


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that this machine has."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
