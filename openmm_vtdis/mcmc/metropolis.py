"""The Metropolis-Hastings acceptance step, shared by all proposals."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    """Decide which proposals are accepted, each with probability min(1, exp(log_ratio)).

    Parameters
    ----------
    log_ratio
        Log of the Hastings ratio, of any shape; -inf or NaN is never accepted.
    uniform
        Random numbers in (0, 1], of the same shape.
    """
    return uniform.log() < log_ratio


def accepted_one(log_ratio: float, uniform: float) -> bool:
    """Decide whether one proposal is accepted."""
    pair = (
        torch.tensor(value, dtype=torch.float64, device="cpu") for value in (log_ratio, uniform)
    )
    return bool(accepted(*pair))
