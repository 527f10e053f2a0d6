"""Random number generators: every stochastic call takes a ``seed`` and makes its rng here.

The same seed on the same machine gives the same result. ``seed=None`` draws a fresh seed from
torch's global rng, so that ``torch.manual_seed`` still governs a whole script; a
``torch.Generator`` is used as it is and advances.

Processes that share one task must not draw the same numbers. A forked process inherits its
parent's global rng, and all that ``torchrun`` or ``srun`` started may have been seeded alike: a
fresh seed is mixed with the rank of the process, and in a forked one with a number of its own. (A
process that was seeded again after the fork, as torch's data loaders are, keeps that seed.)
"""

from __future__ import annotations

import numbers

import numpy as np
import torch

from openmm_vtdis.core.forks import from_environment, this_fork

Seed = int | torch.Generator | None

_MANY = 2**32
"""Number of seeds: torch's rng on a CPU ignores higher bits."""


def make_rng(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a ``torch.Generator`` on ``device`` for an int seed, a ``torch.Generator`` or None.

    Raises
    ------
    ValueError
        If ``seed`` is none of these, is not in [0, 2**32), or is an rng on another device.
    """
    device = torch.device(device)
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(
                f"seed: expected a torch.Generator on {device.type}, got one on {seed.device.type}"
            )
        return seed
    if seed is None:
        seed = _fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < _MANY:
        raise ValueError(
            f"seed: expected an integer >= 0 and < 2**32, a torch.Generator or None, got {seed!r}"
        )
    rng = torch.Generator(device=device)
    rng.manual_seed(int(seed))
    return rng


def fork_entropy() -> list[int]:
    """A number that no other process has, if this one was forked; else none."""
    fork = this_fork()
    return [] if fork is None else [fork.entropy]


def _fresh_seed() -> int:
    """Draw a seed from torch's global rng, mixed with what sets this process apart."""
    drawn = int(torch.randint(0, _MANY, (), device="cpu", dtype=torch.int64).item())
    rank, size = from_environment()
    mixed = [drawn, rank] if size > 1 else [drawn]
    fork = this_fork()
    if fork is not None and torch.initial_seed() == fork.inherited_seed:
        mixed.append(fork.entropy)
    return drawn if len(mixed) == 1 else int(np.random.SeedSequence(mixed).generate_state(1)[0])
