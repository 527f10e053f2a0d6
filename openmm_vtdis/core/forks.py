"""Forked processes: how to notice one, and why it must compute with one thread.

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
    """Identity of a forked process.

    Attributes
    ----------
    entropy
        A number that no other process has.
    inherited_seed
        Seed of torch's global random number generator at the fork.
    """

    entropy: int
    inherited_seed: int


_FORK: Fork | None = None


def this_fork() -> Fork | None:
    """The fork that made this process; None in a process that was not forked."""
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
    """Rank and number of processes (i, N); (0, 1) if there is only this one."""
    for rank, size in _NAMES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
