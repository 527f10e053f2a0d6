"""Requirements on a System to be a target, checked when the target is built.

The diffusion lives on the zero-CoM subspace, and its kernels are equivariant under rotations. So a
System's energy must not notice translations and rotations; with identical particles it must not
notice permutations either. This is *measured*: random configurations are moved at random and the
energy of every force is compared with itself, so that the message names the force to blame.

Where real positions are given, the configurations are these, perturbed: some potentials are not
defined for any others. The same configurations compare a batched translation with OpenMM, and a
second look at them shows whether an energy depends on anything but positions.
"""

from __future__ import annotations

import logging

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.core.derivatives import differentiation, gradients, leaf_of
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import random_rotations
from openmm_vtdis.targets.base import same_energy
from openmm_vtdis.targets.binding import check_bonds
from openmm_vtdis.targets.openmm.probing import N_GROUPS, SEED, ForceProbe
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy, pad
from openmm_vtdis.topology import check_is_topology, check_storable
from openmm_vtdis.topology.graph import mass_of

logger = logging.getLogger(__name__)

_AGREEMENT_TOLERANCE = 1e-9
_SMALLEST_ENERGY = 1e-6
_FORCE_TOLERANCE = 1e-6
"""Tolerances of energies, relative to their size or in kT, and of forces, whose derivatives lose
some digits."""
_MASS_TOLERANCE = 0.1
"""Tolerance of masses in dalton: force fields round."""


def check_structure(system: openmm.System, topology: app.Topology | None) -> None:
    """Refuse Systems whose configurations do not fill the zero-CoM subspace.

    Raises
    ------
    ValueError
        For fewer than two particles, constraints, virtual sites, periodic boundaries, or a topology
        of another size.
    """
    check_is_topology(topology)
    n = system.getNumParticles()
    if n < 2:
        raise ValueError(f"system: expected at least 2 particles, got {n}")
    if system.getNumConstraints():
        raise ValueError(
            f"system: expected no constraints, got {system.getNumConstraints()}; "
            "build the System with constraints=None (and rigidWater=False)"
        )
    massless = [i for i in range(n) if not system.getParticleMass(i)._value > 0.0]
    virtual = [i for i in range(n) if system.isVirtualSite(i)]
    if virtual:
        raise ValueError(
            f"system: expected no virtual sites, got {len(virtual)} (the first is particle "
            f"{virtual[0]}); use a model without them"
        )
    for force in system.getForces():
        if "Barostat" in type(force).__name__:
            raise ValueError(
                f"system: expected a System of constant volume, got a {type(force).__name__}; "
                "remove it"
            )
        if type(force).__name__ == "DrudeForce":
            raise ValueError(
                "system: expected a model without Drude particles, got a DrudeForce; "
                "use a force field that is not polarisable"
            )
    if massless:
        raise ValueError(
            f"system: expected particles with a mass, got {len(massless)} without (the first is "
            f"particle {massless[0]}), which OpenMM never moves; give them one"
        )
    if system.usesPeriodicBoundaryConditions():
        raise ValueError(
            "system: expected a system without periodic boundaries, got a periodic one; "
            "build it with nonbondedMethod=NoCutoff or CutoffNonPeriodic"
        )
    if topology is not None:
        check_storable(topology)
    if topology is not None and topology.getNumAtoms() != n:
        raise ValueError(
            f"topology: expected {n} atoms like the System, got {topology.getNumAtoms()}; "
            "give the topology that the System was built from"
        )
    if topology is not None:
        check_bonds(system, topology)
        _check_masses(system, topology)


def _check_masses(system: openmm.System, topology: app.Topology) -> None:
    """Refuse a topology whose elements have the masses of the System, but in another order.

    Any other masses are no contradiction: configurations do not see them.
    """
    elements = [atom.element for atom in topology.atoms()]
    if None in elements:
        return
    expected, found = (
        np.array([mass.value_in_unit(unit.dalton) for mass in masses])
        for masses in (
            [mass_of(element) * unit.dalton for element in elements],
            [system.getParticleMass(k) for k in range(len(elements))],
        )
    )
    wrong = np.flatnonzero(np.abs(expected - found) > _MASS_TOLERANCE)
    if len(wrong) and np.all(np.abs(np.sort(expected) - np.sort(found)) < _MASS_TOLERANCE):
        first = int(wrong[0])
        raise ValueError(
            f"topology: expected the atoms in the order of the System, got {len(wrong)} whose "
            f"elements have other masses, the first at index {first}: {elements[first].symbol}, "
            f"where the System has {found[first]:.3f} Da; give the topology that the System was "
            "built from"
        )


def check_invariance(probe: ForceProbe, x: Tensor, thermal_energy: float) -> None:
    """Check that no force notices a rotation or a translation.

    Parameters
    ----------
    probe
        Energies of the System's forces.
    x
        Configurations (S, M, D), nm, D = 2 (rotated in the plane) or 3.
    thermal_energy
        kT in kJ/mol: the scale on which a change counts.
    """
    rng = make_rng(SEED + 1)
    before = probe.energies(pad(x))
    _check_finite(probe, before)
    _check_repeatable(probe, x, before, thermal_energy)
    n_dims = x.shape[2]
    shift = torch.randn(len(x), 1, n_dims, generator=rng, dtype=torch.float64)
    motions = {
        "translation": x + shift * x.square().mean().sqrt(),
        "rotation": x @ random_rotations(len(x), n_dims, rng),
    }
    for motion, moved in motions.items():
        offender = _largest_change(probe, before, moved, thermal_energy)
        if offender is not None:
            name, change = offender
            raise ValueError(
                f"system: expected an energy that is invariant under {motion}, got {name}, whose "
                f"energy changes by {change:.3g} kJ/mol; remove it, or express it through "
                "distances between particles"
            )


def check_identical(probe: ForceProbe, x: Tensor, thermal_energy: float) -> None:
    """Check that no force notices a permutation of the particles; x (S, M, D) nm."""
    rng = make_rng(SEED + 2)
    before = probe.energies(pad(x))
    permuted = torch.stack([frame[torch.randperm(x.shape[1], generator=rng)] for frame in x])
    offender = _largest_change(probe, before, permuted, thermal_energy)
    if offender is not None:
        name, change = offender
        raise ValueError(
            "topology: expected identical particles when topology is None, but the particles are "
            f"not identical: give a topology ({name} changes by {change:.3g} kJ/mol when "
            "particles are exchanged)"
        )


def disagreement(
    batched: BatchedEnergy, probe: ForceProbe, x: Tensor, thermal_energy: float
) -> str | None:
    """Compare a batched translation with OpenMM on x (S, M, D) nm: None, or what differs.

    They are compared force by force, so that a small one does not hide behind a large one.
    """
    x = pad(x)
    expected = probe.energies(x)
    found = torch.zeros_like(expected)
    for k, row in enumerate(batched.energies(x).detach()):
        found[min(k, N_GROUPS - 1)] += row
    difference = (found - expected).abs()
    scale = _AGREEMENT_TOLERANCE * expected.abs() + _SMALLEST_ENERGY * thermal_energy
    comparable = torch.isfinite(expected)
    if not bool((difference <= scale)[comparable].all()):
        excess = torch.where(comparable, difference / scale, 0.0).nan_to_num(torch.inf)
        k, b = divmod(int(excess.argmax()), expected.shape[1])
        return (
            f"{probe.names[k]}: the batched energy is {float(found[k, b]):.9g} kJ/mol where "
            f"OpenMM's is {float(expected[k, b]):.9g}"
        )
    _, expected_f = probe.energy_and_force(x)
    _, f = batched.energy_and_force(x)
    difference = (f - expected_f).abs().amax(dim=(1, 2))
    scale = _FORCE_TOLERANCE * (expected_f.abs().amax(dim=(1, 2)) + thermal_energy)
    comparable = torch.isfinite(expected_f).all(dim=(1, 2))
    if not bool((difference <= scale)[comparable].all()):
        return "the batched forces differ from OpenMM's"
    some = x[comparable][:2]
    if len(some) and not _curvature_agrees(batched, some):
        return "the batched second derivatives differ from those of the batched energy"
    return None


def _curvature_agrees(batched: BatchedEnergy, x: Tensor) -> bool:
    """Whether the term Hessians and gradients agree with derivatives of the whole energy."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with differentiation():
        leaf = leaf_of(x)
        (slope,) = gradients(batched.energies(leaf).sum(dim=0), [leaf])
        (expected,) = gradients(slope * direction, [leaf], again=False)
    gradient, hessian = batched.derivatives(x)
    found = torch.einsum("biajc,bjc->bia", hessian, direction)
    for a, b in ((gradient, slope.detach()), (found, expected)):
        scale = b.abs().amax(dim=(1, 2)) + 1e-3
        finite = torch.isfinite(b).all(dim=(1, 2))
        if not bool(((a - b).abs().amax(dim=(1, 2)) <= _FORCE_TOLERANCE * scale)[finite].all()):
            return False
    return True


def _largest_change(
    probe: ForceProbe, before: Tensor, moved: Tensor, thermal_energy: float
) -> tuple[str, float] | None:
    return _largest_difference(probe, before, probe.energies(pad(moved)), thermal_energy)


def _largest_difference(
    probe: ForceProbe, before: Tensor, after: Tensor, thermal_energy: float
) -> tuple[str, float] | None:
    """The force, and its change in kJ/mol, that differs most; None if all agree.

    Where a force raised an exception, which it may do by a hair, it has no energy to compare.
    """
    change = (after - before).abs()
    tolerance = same_energy(before, thermal_energy)
    comparable = torch.isfinite(before)
    if probe.message is not None:
        comparable &= ~torch.isnan(after)
    excess = torch.where(comparable, change / tolerance, 0.0).nan_to_num(torch.inf)
    if not bool((excess > 1.0).any()):
        return None
    group, frame = divmod(int(excess.argmax()), excess.shape[1])
    return probe.names[group], float(change[group, frame])


def _check_finite(probe: ForceProbe, energies: Tensor) -> None:
    """Check that every force is finite somewhere, or nothing can be said about it."""
    for name, row in zip(probe.names, energies, strict=True):
        if not bool(torch.isfinite(row).any()):
            said = "" if probe.message is None else f" ({probe.message})"
            raise ValueError(
                f"system: expected finite energies, got none from {name} on {len(row)} "
                f"configurations{said}; check its parameters, or give positions= if it is defined "
                "for real ones only"
            )


def _check_repeatable(probe: ForceProbe, x: Tensor, before: Tensor, thermal_energy: float) -> None:
    """Check that the same positions have the same energy, whatever came in between."""
    again = probe.energies(pad(x.flip(0))).flip(1)
    offender = _largest_difference(probe, before, again, thermal_energy)
    if offender is not None:
        name, change = offender
        raise ValueError(
            f"system: expected an energy that depends on positions only, got {name}, whose energy "
            f"for the same positions changed by {change:.3g} kJ/mol between two calls"
        )
