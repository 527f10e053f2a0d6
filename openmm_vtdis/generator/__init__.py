"""The class that users meet, its file, and many samples of it in one file."""

from openmm_vtdis.generator.generator import DiffusionBoltzmannGenerator

__all__ = ["DiffusionBoltzmannGenerator"]
