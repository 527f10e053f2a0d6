"""A trained generator inside other packages: an openmmtools move, an OpenMM force."""

from __future__ import annotations

from openmm_vtdis.interop.openmmtools import DiffusionMove
from openmm_vtdis.interop.score_force import score_force

__all__ = ["DiffusionMove", "score_force"]
