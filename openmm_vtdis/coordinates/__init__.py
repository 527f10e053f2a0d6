"""Coordinates: maps between positions in nm and what a model diffuses."""

from openmm_vtdis.coordinates.base import (
    COORDINATES,
    Configurations,
    Coordinates,
    check_coordinates_of,
)
from openmm_vtdis.coordinates.cartesian import Cartesian
from openmm_vtdis.coordinates.energy import Energy, ModelEnergy, TorchEnergy, as_energy

__all__ = [
    "COORDINATES",
    "Cartesian",
    "Configurations",
    "Coordinates",
    "Energy",
    "ModelEnergy",
    "TorchEnergy",
    "as_energy",
    "check_coordinates_of",
]
