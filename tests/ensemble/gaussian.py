"""Samples of a wide Gaussian, weighted for a narrow one: log Z, ESS and moments are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from openmm_vtdis.ensemble import WeightedEnsemble

M, D, SCALE = 2, 3, 1.2
DIM = M * D
LOG_Z = 0.5 * DIM * math.log(2.0 * math.pi)
ESS = (math.sqrt(2.0 * SCALE**2 - 1.0) / SCALE**2) ** DIM


def gaussian_log_weights(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target exp(-|x|^2 / 2), proposal N(0, SCALE^2): log weights and reduced energies."""
    u = 0.5 * (x**2).sum(axis=(1, 2))
    log_p = -u / SCALE**2 - DIM * math.log(SCALE) - LOG_Z
    return -u - log_p, u


def gaussian(n: int, seed: int, **fields: Any) -> WeightedEnsemble:
    x = SCALE * np.random.default_rng(seed).normal(size=(n, M, D))
    return WeightedEnsemble(x, *gaussian_log_weights(x), **fields)


def squared(x: np.ndarray) -> np.ndarray:
    return (x**2).sum(axis=(1, 2))


class Spring:
    """u = k |x|^2 / 2, infinite beyond |x|^2 = cutoff; no temperature."""

    def __init__(self, k: float, cutoff: float = math.inf) -> None:
        self.k, self.cutoff = k, cutoff

    def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
        square = x.square().sum(dim=(1, 2))
        return torch.where(square > self.cutoff, math.inf, 0.5 * self.k * square)
