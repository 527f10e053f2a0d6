"""Unit conventions, and the only unit constants of the package.

=====================  ==========================================================
quantity               unit inside the package
=====================  ==========================================================
length                 nm
energy                 kJ/mol at the OpenMM boundary, kT (reduced) everywhere else
temperature            K
force                  kT/nm
=====================  ==========================================================

The reduced energy of a configuration x is u(x) = U(x) / kT, a pure number.
"""

from __future__ import annotations

from openmm import unit

GAS_CONSTANT: float = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
"""Molar gas constant R = k_B N_A in kJ/mol/K."""


def kelvin(temperature: unit.Quantity | float) -> float:
    """Return ``temperature`` in kelvin; a bare number is taken to be kelvin already."""
    if unit.is_quantity(temperature):
        return float(temperature.value_in_unit(unit.kelvin))  # type: ignore[union-attr]
    return float(temperature)


def thermal_energy(temperature: unit.Quantity | float) -> float:
    """Return kT in kJ/mol for a temperature (Quantity or kelvin)."""
    return GAS_CONSTANT * kelvin(temperature)


def temperature_for(thermal_energy_kj_per_mol: float) -> float:
    """Return the temperature in kelvin at which kT has the given value in kJ/mol."""
    return thermal_energy_kj_per_mol / GAS_CONSTANT


def nanometers(positions: object) -> object:
    """Strip a length unit (of a Quantity, or of a list of them); pass bare arrays through."""
    if isinstance(positions, list | tuple) and any(map(unit.is_quantity, positions)):
        return [nanometers(frame) for frame in positions]
    if unit.is_quantity(positions):
        if not positions.unit.is_compatible(unit.nanometer):  # type: ignore[attr-defined]
            raise ValueError(f"expected a length, got a Quantity in {positions.unit}")  # type: ignore[attr-defined]
        return positions.value_in_unit(unit.nanometer)  # type: ignore[attr-defined]
    return positions
