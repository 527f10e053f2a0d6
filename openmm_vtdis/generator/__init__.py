"""The generator class that users meet, its archive, and sampling in shards."""

from openmm_vtdis.generator.generator import DiffusionBoltzmannGenerator

__all__ = ["DiffusionBoltzmannGenerator"]
