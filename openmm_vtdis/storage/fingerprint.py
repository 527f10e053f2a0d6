"""Identities: digests of what must be the same for two things to be the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*parts: str | Tensor) -> str:
    """SHA-256 of texts and of the shapes and bytes of tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
        else:
            found.update(str(tuple(part.shape)).encode())
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(content.numpy().tobytes())
    return found.hexdigest()


def stream_of(generator: torch.Generator, n: int, batch_size: int) -> str:
    """What tells the random numbers that a generator will give, and the run that takes them."""
    return f"{digest(generator.get_state())[:16]}/{n}/{batch_size}"
