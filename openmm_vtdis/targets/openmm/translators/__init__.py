"""OpenMM's forces as batched torch, one translator each; importing this registers them all."""

from openmm_vtdis.targets.openmm.translators import bonded, custom, implicit, nonbonded

__all__ = ["bonded", "custom", "implicit", "nonbonded"]
