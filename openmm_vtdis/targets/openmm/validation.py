"""What a System must satisfy to be a target, checked when the target is built.

The diffusion lives on the zero-CoM subspace and its kernels are equivariant under rotations, so a
System's energy must not notice translations and rotations; with identical particles it must not
notice permutations either. This is *measured*: random configurations are moved at random and the
energy of every force is compared with itself, so that the message names the force to blame.

Where real positions are given, the configurations are these, perturbed: some potentials are not
defined for any others. The same configurations compare a batched translation with OpenMM, and a
second look at them shows whether an energy depends on anything but positions.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.derivatives import differentiation, gradients, leaf_of
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.targets.base import same_energy
from openmm_vtdis.targets.binding import check_bonds
from openmm_vtdis.targets.openmm.contexts import ContextPool
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from openmm_vtdis.targets.openmm.user_code import copied, functions_of, user_forces
from openmm_vtdis.topology import check_storable
from openmm_vtdis.topology.graph import mass_of

logger = logging.getLogger(__name__)

_LENGTH_SCALES = (0.1, 0.3, 1.0, 3.0)
"""Spacings of the random configurations, in nm: from chemical bonds to reduced units."""
_DRAWS = 16
_PER_SCALE = 2
_AGREEMENT_TOLERANCE = 1e-9
_SMALLEST_ENERGY = 1e-6
_FORCE_TOLERANCE = 1e-6
"""Of energies relative to their size, or in kT; of forces, whose derivatives lose some digits."""
_MASS_TOLERANCE = 0.1
"""In dalton: force fields round."""
_REPEATS = 8
"""Of the configurations, for threads to get into each other's way."""
_PROBES = 8
_STEP, _SINGLE = 1e-4, 1e-5
"""nm along a force; and a share of an energy of which its change must be more to be judged."""
_PERTURBATIONS = (0.002, 0.005, 0.01, 0.03)
"""Of real positions, over the smallest distance in them."""
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


class ForceProbe:
    """The energy of every single force of a System, by OpenMM's double-precision platform.

    ``names`` holds one label per force group: a force's class and index. (From the 32nd force on
    they share a group, and a label.) Where a force raises an exception the energy is NaN, and
    ``message`` what the first one said.

    Raises
    ------
    ValueError
        If OpenMM cannot make a Context of the System.
    """

    def __init__(self, system: openmm.System) -> None:
        system = copied(system)
        labels: dict[int, list[str]] = {}
        for index, force in enumerate(system.getForces()):
            group = min(index, _N_GROUPS - 1)
            force.setForceGroup(group)
            labels.setdefault(group, []).append(f"{type(force).__name__} (force {index})")
        self.names = [" or ".join(labels[group]) for group in sorted(labels)]
        self.message: str | None = None
        try:
            self._context = openmm.Context(
                system,
                openmm.VerletIntegrator(0.001),
                openmm.Platform.getPlatformByName("Reference"),
            )
        except openmm.OpenMMException as error:
            raise ValueError(
                f"system: expected a System that OpenMM can evaluate, got an error of it: {error}"
            ) from error

    def energies(self, x: Tensor) -> Tensor:
        """x (B, M, 3) nm -> (number of groups, B) kJ/mol."""
        table = np.full((len(self.names), len(x)), np.nan)
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            for group in range(len(self.names)):
                state = self._state(energy=True, groups={group})
                if state is not None:
                    table[group, b] = state.getPotentialEnergy()._value
        return torch.from_numpy(table)

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the whole System: x (B, M, 3) nm -> (B,) kJ/mol, (B, M, 3) kJ/mol/nm."""
        energies, forces = np.full(len(x), np.nan), np.full(x.shape, np.nan)
        for b, positions in enumerate(x.numpy()):
            self._context.setPositions(positions)
            state = self._state(energy=True, forces=True)
            if state is not None:
                energies[b] = state.getPotentialEnergy()._value
                forces[b] = state.getForces(asNumpy=True)._value
        return torch.from_numpy(energies), torch.from_numpy(forces)

    def _state(self, **what: Any) -> openmm.State | None:
        try:
            return self._context.getState(**what)
        except openmm.OpenMMException as error:
            self.message = self.message or str(error) or "an exception without a message"
            return None


def probe_configurations(space: Space, positions: object = None) -> Tensor:
    """Configurations (S, M, D) nm, centred, on which a System is tried.

    Real positions, (M, D) or (n, M, D) in nm, that are perturbed a little; random clouds without
    close contacts if there are none.

    Raises
    ------
    ValueError
        For positions of other particles, or such as lie in one place.
    """
    if positions is None:
        return random_configurations(space)
    given = nanometers(getattr(positions, "xyz", positions))  # of mdtraj too
    array = checks.real_array("positions", given)
    if array.ndim == 2:
        array = array[None]
    if array.shape[-1] == 3 and space.n_dims == 2 and not np.abs(array[..., 2:]).any():
        array = array[..., :2]
    x = space.project(checks.configurations("positions", array, space.n_particles, space.n_dims))
    x = x[np.linspace(0, len(x) - 1, _PROBES).astype(int)]
    distances = torch.cdist(x, x)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    closest = distances.flatten(1).amin(dim=1)
    if not bool((closest > 0.0).all()):
        raise ValueError("positions: expected particles apart, got some in one place")
    widths = closest * torch.tensor(_PERTURBATIONS, dtype=torch.float64).repeat(_PROBES)[:_PROBES]
    noise = space.standard_normal(_PROBES, make_rng(_SEED))
    return x + widths[:, None, None] * noise


def random_configurations(space: Space) -> Tensor:
    """Configurations without close contacts, over several length scales: (S, M, D) nm, centred.

    Of every 16 Gaussian clouds the two with the widest closest pair are kept.
    """
    rng = make_rng(_SEED)
    growth = space.n_particles ** (1.0 / space.n_dims)
    kept = []
    for scale in _LENGTH_SCALES:
        clouds = scale * growth * space.standard_normal(_DRAWS, rng)
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
    rng = make_rng(_SEED + 1)
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
    rng = make_rng(_SEED + 2)
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


def random_rotations(n: int, n_dims: int, rng: torch.Generator) -> Tensor:
    """n rotation matrices (n, D, D), float64: Q of a Gaussian matrix, with determinant +1."""
    gaussian = torch.randn(n, n_dims, n_dims, generator=rng, dtype=torch.float64)
    q, _ = torch.linalg.qr(gaussian)
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q


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
    """Every force must be finite somewhere, or nothing can be said about it."""
    for name, row in zip(probe.names, energies, strict=True):
        if not bool(torch.isfinite(row).any()):
            said = "" if probe.message is None else f" ({probe.message})"
            raise ValueError(
                f"system: expected finite energies, got none from {name} on {len(row)} "
                f"configurations{said}; check its parameters, or give positions= if it is defined "
                "for real ones only"
            )


def _check_repeatable(probe: ForceProbe, x: Tensor, before: Tensor, thermal_energy: float) -> None:
    """The same positions must have the same energy, whatever came between."""
    again = probe.energies(pad(x.flip(0))).flip(1)
    offender = _largest_difference(probe, before, again, thermal_energy)
    if offender is not None:
        name, change = offender
        raise ValueError(
            f"system: expected an energy that depends on positions only, got {name}, whose energy "
            f"for the same positions changed by {change:.3g} kJ/mol between two calls"
        )


def check_functions(system: openmm.System, x: Tensor) -> None:
    """Call the functions of PythonForces once, as OpenMM would, which dies of None.

    Raises
    ------
    ValueError
        If one gives something else than an energy and forces. (Exceptions are seen later.)
    """
    functions = functions_of(system)
    if not functions:
        return
    empty = openmm.System()
    for _ in range(system.getNumParticles()):
        empty.addParticle(1.0)
    context = openmm.Context(
        empty, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(pad(x)[0].numpy())
    state = context.getState(positions=True)
    for function in functions:
        try:
            found = function(state)
        except Exception as error:
            logger.debug("a PythonForce raises: %s", error)
            continue
        if not isinstance(found, tuple | list) or len(found) != 2 or any(v is None for v in found):
            raise ValueError(
                f"system: expected a PythonForce that gives (energy, forces), got {found!r:.80}"
            )


def check_forces(system: openmm.System, probe: ForceProbe, x: Tensor) -> None:
    """Check that code of the user's gives the forces that belong to its energies.

    The energy has to fall along the force as it says, half or twice as much at most, in the median
    of configurations x (S, M, D), nm: a wrong sign or unit is seen, rounding is not.

    Raises
    ------
    ValueError
        If it does not.
    """
    if not user_forces(system):
        return
    positions = pad(x)
    _, force = probe.energy_and_force(positions)
    size = force.flatten(1).norm(dim=1)[:, None, None]
    step = _STEP * force / size
    ends = [probe.energy_and_force(positions + k * step)[0] for k in (-1.0, 1.0)]
    ratio = (ends[0] - ends[1]) / (2.0 * _STEP * size.flatten())
    ratio = ratio[torch.isfinite(ratio) & (_STEP * size.flatten() > _SINGLE * ends[0].abs())]
    if len(ratio) and not 0.5 < float(ratio.median()) < 2.0:
        raise ValueError(
            f"system: expected forces that are minus the gradient of the energy, got "
            f"{', '.join(user_forces(system))}, whose energy falls along the force "
            f"{float(ratio.median()):.3g} times as much as it says (kJ/mol/nm)"
        )


def check_threads(system: openmm.System, pool: ContextPool, x: Tensor) -> None:
    """Check that a pool of several threads gives the energies of one, if they run user code.

    Parameters
    ----------
    system, pool
        The System that the pool evaluates.
    x
        Configurations (S, M, D), nm.

    Raises
    ------
    ValueError
        If energies differ.
    """
    names = user_forces(system)
    if not names or pool.n_threads == 1:
        return
    many = pad(x).repeat(_REPEATS, 1, 1)
    with ContextPool(system, n_threads=1) as alone:
        expected = alone.energy(many)
    change = (pool.energy(many) - expected).abs()
    if bool((change > same_energy(expected)).any()):
        raise ValueError(
            f"n_threads: expected code that may run in {pool.n_threads} threads, got "
            f"{', '.join(names)}, whose energies then change by up to "
            f"{float(change.nan_to_num().max()):.3g} kJ/mol; leave n_threads out"
        )
