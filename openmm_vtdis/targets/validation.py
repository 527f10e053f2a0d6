"""What a System must satisfy to be a target, checked when the target is built.

The diffusion lives on the zero-CoM subspace and its kernels are equivariant under rotations, so a
System's energy must not notice translations and rotations; with identical particles it must not
notice permutations either. This is *measured*: random configurations are moved at random and the
energy of every force is compared with itself, so that the message names the force to blame.

The same configurations compare a batched translation with OpenMM.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.derivatives import differentiation, gradients, leaf_of
from openmm_vtdis.geometry import Space
from openmm_vtdis.random import make_generator
from openmm_vtdis.targets.batched import BatchedEnergy
from openmm_vtdis.topology.atoms import bonded_graph

logger = logging.getLogger(__name__)

_LENGTH_SCALES = (0.1, 0.3, 1.0, 3.0)
"""Spacings of the random configurations, in nm: from chemical bonds to reduced units."""
_DRAWS = 16
_PER_SCALE = 2
_MOTION_TOLERANCE = 1e-5
_AGREEMENT_TOLERANCE = 1e-9
_SMALLEST_ENERGY = 1e-6
_FORCE_TOLERANCE = 1e-6
"""Of energies relative to their size, or in kT; of forces, whose derivatives lose some digits."""
_MASS_TOLERANCE = 0.1
"""In dalton: force fields round."""
_N_GROUPS = 32
_SEED = 20_240_607


def check_structure(system: openmm.System, topology: app.Topology | None) -> None:
    """Refuse Systems whose configurations do not fill the zero-CoM subspace.

    Raises
    ------
    ValueError
        Fewer than two particles, constraints, virtual sites, periodic boundaries, or a topology
        of another size.
    """
    if topology is not None and not isinstance(topology, app.Topology):
        hint = "; use its to_openmm()" if hasattr(topology, "to_openmm") else ""
        raise ValueError(
            f"topology: expected an openmm.app.Topology, got {type(topology).__module__}."
            f"{type(topology).__name__}{hint}"
        )
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
    if topology is not None and topology.getNumAtoms() != n:
        raise ValueError(
            f"topology: expected {n} atoms like the System, got {topology.getNumAtoms()}; "
            "give the topology that the System was built from"
        )
    if topology is not None:
        _check_bonds(system, topology)
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
            [element.mass for element in elements],
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


def _check_bonds(system: openmm.System, topology: app.Topology) -> None:
    """Refuse a topology in which bonds are missing from the System, and the other way round.

    Warn of one without any bond for a System with harmonic ones. Otherwise either alone is no
    contradiction: bonds may be a machine-learned potential's, and springs may join what is not
    bonded.
    """
    graph = bonded_graph(topology)
    pairs = [
        tuple(force.getBondParameters(k)[:2])
        for force in system.getForces()
        if isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce)
        for k in range(force.getNumBonds())
    ]
    bonded = {frozenset(pair) for pair in pairs}
    harmonic = (f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    if not graph.edges and any(force.getNumBonds() for force in harmonic):
        logger.warning(
            "topology: has no bonds, where the System has %d bonded pairs; which atoms are alike, "
            "their handedness, and what the network knows of them come from bonds: read a file "
            "that has them (PDB with CONECT), or call topology.createStandardBonds()",
            len(bonded),
        )

    def over_two_bonds(i: int, j: int) -> bool:
        """As in a Urey-Bradley term."""
        between = set(graph.adj[i]) & set(graph.adj[j])
        return any({frozenset((i, k)), frozenset((k, j))} <= bonded for k in between)

    strange = [(i, j) for i, j in pairs if j not in graph.adj[i] and not over_two_bonds(i, j)]
    missing = [pair for pair in graph.edges if frozenset(pair) not in bonded]
    if missing and strange:
        raise ValueError(
            f"topology: expected the bonds of the System, got {len(missing)} that it has not, the "
            f"first between atoms {missing[0][0]} and {missing[0][1]}, and {len(strange)} of its "
            f"own that are missing, the first between {strange[0][0]} and {strange[0][1]}; give "
            "the topology that the System was built from, with the atoms in the same order"
        )


class ForceProbe:
    """The energy of every single force of a System, by OpenMM's double-precision platform.

    ``names`` holds one label per force group: a force's class and index. (From the 32nd force on
    they share a group, and a label.)
    """

    def __init__(self, system: openmm.System) -> None:
        system = copy.deepcopy(system)
        labels: dict[int, list[str]] = {}
        for index, force in enumerate(system.getForces()):
            group = min(index, _N_GROUPS - 1)
            force.setForceGroup(group)
            labels.setdefault(group, []).append(f"{type(force).__name__} (force {index})")
        self.names = [" or ".join(labels[group]) for group in sorted(labels)]
        self._context = openmm.Context(
            system,
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName("Reference"),
        )

    def energies(self, x: Tensor) -> Tensor:
        """x (B, M, 3) nm -> (number of groups, B) kJ/mol."""
        table = np.empty((len(self.names), len(x)))
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            for group in range(len(self.names)):
                state = self._context.getState(energy=True, groups={group})
                table[group, b] = state.getPotentialEnergy()._value
        return torch.from_numpy(table)

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the whole System: x (B, M, 3) nm -> (B,) kJ/mol, (B, M, 3) kJ/mol/nm."""
        energies, forces = np.empty(len(x)), np.empty(x.shape)
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            state = self._context.getState(energy=True, forces=True)
            energies[b] = state.getPotentialEnergy()._value
            forces[b] = state.getForces(asNumpy=True)._value
        return torch.from_numpy(energies), torch.from_numpy(forces)


def random_configurations(space: Space) -> Tensor:
    """Configurations without close contacts, over several length scales: (S, M, D) nm, centred.

    Of every 16 Gaussian clouds the two with the widest closest pair are kept.
    """
    generator = make_generator(_SEED)
    growth = space.n_particles ** (1.0 / space.n_dims)
    kept = []
    for scale in _LENGTH_SCALES:
        clouds = scale * growth * space.standard_normal(_DRAWS, generator)
        distances = torch.cdist(clouds, clouds)
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        best = distances.flatten(1).amin(dim=1).topk(_PER_SCALE).indices
        kept.append(clouds[best])
    return torch.cat(kept)


def check_invariance(probe: ForceProbe, x: Tensor, thermal_energy: float) -> None:
    """Check that no force notices a rotation or a translation.

    Parameters
    ----------
    probe
        Of the System.
    x
        Configurations (S, M, D), nm, D = 2 (rotated in the plane) or 3.
    thermal_energy
        kT in kJ/mol: the scale on which a change counts.
    """
    generator = make_generator(_SEED + 1)
    before = probe.energies(pad(x))
    _check_finite(probe, before)
    n_dims = x.shape[2]
    shift = torch.randn(len(x), 1, n_dims, generator=generator, dtype=torch.float64)
    motions = {
        "translation": x + shift * x.square().mean().sqrt(),
        "rotation": x @ random_rotations(len(x), n_dims, generator),
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
    generator = make_generator(_SEED + 2)
    before = probe.energies(pad(x))
    permuted = torch.stack([frame[torch.randperm(x.shape[1], generator=generator)] for frame in x])
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

    Force by force, so that a small one does not hide behind a large one.
    """
    x = pad(x)
    expected = probe.energies(x)
    found = torch.zeros_like(expected)
    for k, row in enumerate(batched.energies(x).detach()):
        found[min(k, _N_GROUPS - 1)] += row
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
    """Gradient and Hessian times a vector, term by term, against the whole energy's."""
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


def pad(x: Tensor) -> Tensor:
    """Positions in the plane to OpenMM's three dimensions, z = 0: (B, M, 2 or 3) -> (B, M, 3)."""
    return x if x.shape[-1] == 3 else torch.nn.functional.pad(x, (0, 3 - x.shape[-1]))


def random_rotations(n: int, n_dims: int, generator: torch.Generator) -> Tensor:
    """n rotation matrices (n, D, D), float64: Q of a Gaussian matrix, with determinant +1."""
    gaussian = torch.randn(n, n_dims, n_dims, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(gaussian)
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q


def _largest_change(
    probe: ForceProbe, before: Tensor, moved: Tensor, thermal_energy: float
) -> tuple[str, float] | None:
    change = (probe.energies(pad(moved)) - before).abs()
    tolerance = _MOTION_TOLERANCE * (before.abs() + thermal_energy)
    excess = torch.where(torch.isfinite(before), change / tolerance, 0.0).nan_to_num(torch.inf)
    if not bool((excess > 1.0).any()):
        return None
    group, frame = divmod(int(excess.argmax()), excess.shape[1])
    return probe.names[group], float(change[group, frame])


def _check_finite(probe: ForceProbe, energies: Tensor) -> None:
    """Every force must be finite somewhere, or nothing can be said about it."""
    for name, row in zip(probe.names, energies, strict=True):
        if not bool(torch.isfinite(row).any()):
            raise ValueError(
                f"system: expected finite energies, got none from {name} on {len(row)} random "
                "configurations; check its parameters"
            )
