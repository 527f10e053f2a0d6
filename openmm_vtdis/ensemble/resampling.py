"""Systematic resampling by weights."""

from __future__ import annotations

import numpy as np
import torch

from openmm_vtdis.core.ess import Array
from openmm_vtdis.core.rng import Seed, make_rng


def systematic(weights: Array, n: int, seed: Seed) -> Array:
    """Draw n indices in proportion to normalised weights (m,), in random order.

    Systematic resampling: sample i appears floor(n W_i) or ceil(n W_i) times.
    """
    rng = make_rng(seed)
    offset = torch.rand((), generator=rng, dtype=torch.float64, device="cpu").item()
    cumulative = np.cumsum(weights)
    points = np.minimum((np.arange(n) + offset) / n, np.nextafter(1.0, 0.0))
    index = np.searchsorted(cumulative / cumulative[-1], points, side="right")
    order: Array = torch.randperm(n, generator=rng, device="cpu").numpy()
    return index[order]
