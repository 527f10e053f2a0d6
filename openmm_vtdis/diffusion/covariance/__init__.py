"""Families of reverse covariances, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import (
    Covariance,
    Energy,
    Fittable,
    MatrixScatter,
    Posterior,
    Ranked,
    ReverseStep,
    Scatter,
)
from openmm_vtdis.diffusion.covariance.constant import Block, ClassCovariance, Diagonal, Isotropic
from openmm_vtdis.diffusion.covariance.low_rank import LowRank
from openmm_vtdis.diffusion.covariance.time_network import TimeNetwork
from openmm_vtdis.diffusion.covariance.tweedie import Tweedie
from openmm_vtdis.diffusion.posteriors.hessian import Hessian
from openmm_vtdis.diffusion.posteriors.pairwise import Pairwise

__all__ = [
    "FAMILIES",
    "Block",
    "ClassCovariance",
    "Covariance",
    "Diagonal",
    "Energy",
    "Fittable",
    "Hessian",
    "Isotropic",
    "LowRank",
    "MatrixScatter",
    "Pairwise",
    "Posterior",
    "Ranked",
    "ReverseStep",
    "Scatter",
    "TimeNetwork",
    "Tweedie",
    "make_covariance",
]

_ALL = (Isotropic, Diagonal, Block, LowRank, TimeNetwork, Tweedie, Hessian, Pairwise)
FAMILIES: dict[str, type[Covariance]] = {cls.kind: cls for cls in _ALL}
"""Families by name, for :func:`make_covariance` and archives."""


def make_covariance(
    kind: str, space: Space, labels: Sequence[int], parameters: Tensor | None = None, **options: Any
) -> Covariance:
    """Make a family by name; "full" is "block" with every particle a class of its own."""
    checks.choice("covariance", kind, (*FAMILIES, "full"))
    if kind == "full":
        kind, labels = "block", range(space.n_particles)  # type: ignore[assignment]
    if parameters is None:
        parameters = torch.zeros(1, 0, dtype=torch.float64)
    return FAMILIES[kind](space, labels, parameters, **options)
