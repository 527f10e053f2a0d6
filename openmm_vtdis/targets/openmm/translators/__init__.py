"""Translators of OpenMM's forces to batched torch; importing this module registers them all."""

from openmm_vtdis.targets.openmm.translators import bonded, custom, implicit, nonbonded

__all__ = ["bonded", "custom", "implicit", "nonbonded"]
