"""What a process that was forked must know: that it is one, and that it is alone.

Threads do not cross a fork. Torch's, if the parent had used them, are waited for in vain by the
first computation that wants more than one; torch's own data loaders therefore compute with one
thread in their workers, and so does this package in a forked process.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fork:
    """What a forked process knows of itself.

    Attributes
    ----------
    entropy
        A number that no other process has.
    inherited_seed
        Of torch's global generator when it was forked.
    """

    entropy: int
    inherited_seed: int


_FORK: Fork | None = None


def this_fork() -> Fork | None:
    """None in a process that was not forked."""
    return _FORK


def use_one_thread() -> None:
    """Have torch compute with one thread if this process was forked."""
    if _FORK is not None and torch.get_num_threads() > 1:
        logger.info("a forked process: torch computes with one thread, since others stayed behind")
        torch.set_num_threads(1)


def _note() -> None:
    global _FORK
    _FORK = Fork(int.from_bytes(os.urandom(8)), torch.initial_seed())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def from_environment() -> tuple[int, int]:
    """(i, N): this is process i of N; (0, 1) where nobody has started several."""
    for rank, size in _NAMES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
