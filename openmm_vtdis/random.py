"""Random streams: every stochastic call of the package takes ``seed`` and makes its generator here.

The same seed on the same machine gives the same result. ``seed=None`` draws a fresh seed from
torch's global generator, so that ``torch.manual_seed`` still governs a whole script; a
``torch.Generator`` is used as it is and advances.
"""

from __future__ import annotations

import numbers

import torch

Seed = int | torch.Generator | None

_MANY = 2**32
"""Seeds: torch's generator on a CPU ignores higher bits."""


def make_generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a ``torch.Generator`` on ``device`` for an int seed, a generator or None.

    Raises
    ------
    ValueError
        If ``seed`` is none of these, is not in [0, 2**32), or is a generator on another device.
    """
    device = torch.device(device)
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(
                f"seed: expected a torch.Generator on {device.type}, got one on {seed.device.type}"
            )
        return seed
    if seed is None:
        seed = int(torch.randint(0, _MANY, ()).item())
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < _MANY:
        raise ValueError(
            f"seed: expected an integer >= 0 and < 2**32, a torch.Generator or None, got {seed!r}"
        )
    generator = torch.Generator(device=device)
    generator.manual_seed(int(seed))
    return generator
