"""Memory that is freed after a step and needed again in the next.

The C library of Linux gives freed memory back to the system from a certain size on, and gets it
again page by page, each filled with zeros: a network of some megabytes of tensors then spends a
third of its time on that. The size follows the largest block that was ever freed, up to 32 MiB
(``man mallopt``, M_MMAP_THRESHOLD), of which twice as much is kept.
"""

from __future__ import annotations

import functools

import torch

_LARGEST = 32 * 2**20 - 2 * 4096
"""Largest block in bytes that raises the limit, less two pages for what an allocator adds."""


@functools.cache
def keep_freed_memory() -> None:
    """Have this process keep up to 64 MiB of what it frees, on Linux with glibc.

    One block of the largest size that counts is made and freed, once. It is never written to, and
    so takes no memory itself. Other allocators take no notice.
    """
    torch.UntypedStorage(_LARGEST, device="cpu")


def batch_size(device: torch.device, n_particles: int, n_hidden: int) -> int:
    """Batch size for which a tensor of edges has 4 MB, or 1/64 of a GPU's memory."""
    gpu = device.type == "cuda"
    budget = torch.cuda.get_device_properties(device).total_memory / 64 if gpu else 4e6
    return int(min(max(budget / (4.0 * n_particles**2 * n_hidden), 8), 65_536))
