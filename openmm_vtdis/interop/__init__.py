"""A trained generator inside other packages: an openmmtools move, an OpenMM force."""

from __future__ import annotations

from openmm_vtdis.interop.force import score_force
from openmm_vtdis.interop.mcmc import DiffusionMove

__all__ = ["DiffusionMove", "score_force"]
