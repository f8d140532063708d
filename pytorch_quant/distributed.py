"""Thin functions on torch.distributed that do nothing where one process runs alone.

All are collective on the default process group: every process calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Values in one collective operation: bounds the memory of the copy, 64 MiB of counts.
_BUCKET = 1 << 23


def world_size() -> int:
    """The number of processes; 1 without torch.distributed or an initialised process group."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _initialised() else 0


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of ranks; anything that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_numbers(value: int) -> list[int]:
    """The numbers of all processes, in the order of ranks."""
    if world_size() == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64, device=_device())
    theirs = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(theirs, mine)
    return torch.cat(theirs).tolist()


def broadcast_object(value: Any, source: int) -> Any:
    """The value of the process `source`; anything that can be pickled."""
    held = [value]
    if world_size() > 1:
        dist.broadcast_object_list(held, src=source)
    return held[0]


def all_reduce(tensors: Sequence[Tensor], op: Literal["max", "sum"]) -> None:
    """Combine each tensor with those of all processes, in place.

    Args:
        tensors: The same shapes and dtypes in all processes, any devices; contiguous.
        op: How.
    """
    if world_size() > 1:
        how = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        _in_buckets(tensors, lambda flat: dist.all_reduce(flat, how))


def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Overwrite each tensor by that of the process `source`.

    Args:
        tensors: The same shapes and dtypes in all processes, any devices; contiguous.
        source: A rank.
    """
    if world_size() > 1:
        _in_buckets(tensors, lambda flat: dist.broadcast(flat, source))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded over processes (a DTensor)."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def forward_communicates(model: nn.Module) -> bool:
    """Whether a forward pass is collective because the parameters are sharded (FSDP2).

    Raises:
        TypeError: the model is wrapped in FullyShardedDataParallel, whose flat parameters do not
            show the weights.
    """
    if world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "the weights of a model in FullyShardedDataParallel cannot be calibrated; shard it "
            "with torch.distributed.fsdp.fully_shard, or calibrate before wrapping"
        )
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def buffers_stay(model: nn.Module, *, agree: bool) -> Iterator[None]:
    """Keep DistributedDataParallel from broadcasting buffers in each forward pass in the block.

    Processes with fewer batches would leave the others waiting otherwise.

    Args:
        model: Is, or holds, modules in DistributedDataParallel; any other is left alone.
        agree: Broadcast the buffers once on entry, as the first forward pass would have done.
    """
    wrapped = []
    if world_size() > 1:
        kind = nn.parallel.DistributedDataParallel
        wrapped = [m for m in model.modules() if isinstance(m, kind)]
    syncing = [module for module in wrapped if module.will_sync_module_buffers()]
    try:
        for module in syncing:
            module.require_forward_param_sync = False
        if agree:
            buffers = [buffer for module in syncing for buffer in module.modules_buffers]
            dense = [buffer.contiguous() for buffer in buffers]
            broadcast(dense, 0)
            for buffer, value in zip(buffers, dense, strict=True):
                if value is not buffer:
                    buffer.data.copy_(value)
        yield
    finally:
        for module in syncing:
            module.require_forward_param_sync = True


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the tensors of collective operations have to be."""
    backend = str(dist.get_backend())
    # A group of several backends ("cpu:gloo,cuda:nccl", or none named) has one for the CPU.
    if any(name in backend for name in ("gloo", "mpi", "undefined")):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _in_buckets(tensors: Sequence[Tensor], operation: Callable[[Tensor], Any]) -> None:
    """Apply `operation`, which works in place, to few flat tensors instead of many."""
    device = _device()
    buckets: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor in tensors:
        if tensor.numel():
            same = buckets.setdefault(tensor.dtype, [[]])
            if sum(part.numel() for part in same[-1]) + tensor.numel() > _BUCKET:
                same.append([])
            same[-1].append(tensor.detach().view(-1))
    with torch.inference_mode(False), torch.no_grad():
        for parts in (bucket for same in buckets.values() for bucket in same if bucket):
            flat = torch.cat([part.to(device) for part in parts])
            operation(flat)
            pieces = flat.split([part.numel() for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece)
