"""Families of reverse covariances, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import (
    COVARIANCES,
    Covariance,
    Fittable,
    Ranked,
    ReverseStep,
)
from openmm_vtdis.diffusion.covariance.constant import Block, ClassCovariance, Diagonal, Isotropic
from openmm_vtdis.diffusion.covariance.gaussians import MatrixScatter, Scatter
from openmm_vtdis.diffusion.covariance.low_rank import LowRank
from openmm_vtdis.diffusion.covariance.state_dependent import (
    Hessian,
    Pairwise,
    StateCovariance,
    Tweedie,
)
from openmm_vtdis.diffusion.covariance.time_network import TimeNetwork

__all__ = [
    "COVARIANCES",
    "Block",
    "ClassCovariance",
    "Covariance",
    "Diagonal",
    "Fittable",
    "Hessian",
    "Isotropic",
    "LowRank",
    "MatrixScatter",
    "Pairwise",
    "Ranked",
    "ReverseStep",
    "Scatter",
    "StateCovariance",
    "TimeNetwork",
    "Tweedie",
    "make_covariance",
]


def make_covariance(
    kind: str, space: Space, labels: Sequence[int], parameters: Tensor | None = None, **options: Any
) -> Covariance:
    """Make a family by name; "full" is "block" with every particle a class of its own."""
    checks.choice("covariance", kind, (*COVARIANCES, "full"))
    if kind == "full":
        kind, labels = "block", list(range(space.n_particles))
    if parameters is None:
        parameters = torch.zeros(1, 0, dtype=torch.float64)
    return COVARIANCES[kind](space, labels, parameters, **options)
