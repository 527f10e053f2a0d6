"""Several processes at one task: their ranks, and communication between them.

Started by ``torchrun``, or by SLURM's ``srun``, a process finds its rank and their number in the
environment. Sampling needs no more than that (:mod:`~openmm_vtdis.generator.sharded`). Training
also sums gradients over all of them, through ``torch.distributed``: inside :func:`group`, or
wherever the caller has made a process group.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

from openmm_vtdis.core.forks import from_environment

_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")


def own_device(device: str) -> str:
    """Return the GPU of this process for "cuda", and any other name as it is."""
    local = next((os.environ[name] for name in _LOCAL if name in os.environ), None)
    if device != "cuda" or local is None:
        return device
    return f"cuda:{int(local) % max(torch.cuda.device_count(), 1)}"


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Make a process group of the processes that ``torchrun`` started; nothing for a single one.

    Raises
    ------
    ValueError
        If several processes were started by something else: each would do all of the work.
    """
    if from_environment()[1] == 1:
        yield
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"training: expected one process, or several that torchrun started, got "
            f"{from_environment()[1]} of another launcher"
        )
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def in_group() -> tuple[int, int]:
    """Rank and size (i, N) of the process group; (0, 1) without one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_group(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place, in one message."""
    if in_group()[1] == 1:
        return
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    flat = torch.cat([tensor.detach().flatten().to(dtype) for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(total.view_as(tensor))


def any_in_group(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any of the processes."""
    if in_group()[1] == 1:
        return flag
    number = torch.tensor(float(flag), device=device)
    distributed.all_reduce(number)
    return bool(number)


def all_alike(text: str, device: torch.device) -> bool:
    """Whether all processes have the same text."""
    if in_group()[1] == 1:
        return True
    number = torch.tensor([zlib.crc32(text.encode()), 0], dtype=torch.int64, device=device)
    number[1] = -number[0]
    distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
    return bool(number[0] == -number[1])


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give each tensor the values that process 0 has, in place."""
    if in_group()[1] > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)
