"""OpenMMTarget: what it computes, what it refuses, and when it falls back."""

from __future__ import annotations

import logging
import time

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core import units
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets import OpenMMTarget, Target, double_well, lennard_jones
from openmm_vtdis.targets.openmm import probing, terms, validation
from openmm_vtdis.targets.openmm.term_hessians import TermHessians
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from openmm_vtdis.targets.openmm.translators import custom
from openmm_vtdis.testing import check_target
from openmm_vtdis.topology import topology_to_json
from tests.molecules import molecule
from tests.targets.reference import (
    all_pairs,
    bonds,
    by_openmm,
    configurations,
    external,
    many_body,
    system_of,
)

LENNARD_JONES = "4*(r^-12-r^-6)+0.1*r^2"


def topology_of(n_atoms: int) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for i in range(n_atoms):
        topology.addAtom(f"C{i}", app.element.carbon, residue)
    return topology


@pytest.fixture(params=["batched", "contexts"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_reduced_energies_and_forces_are_openmms_over_kt(backend: str) -> None:
    system = system_of(bonds("k*(r-1)^2", parameters=["k"], values=[[1.0], [2.0], [3.0], [4.0]]))
    target = OpenMMTarget(system, topology_of(4), 450 * unit.kelvin, backend)
    kt = units.GAS_CONSTANT * 450
    x = configurations(12)
    expected_u, expected_f = by_openmm(system, x)
    u, f = target.reduced_energy_and_force(x)
    for value in (u, target.reduced_energy(x)):
        assert value.shape == (12,)
        assert value.dtype == torch.float64
        assert torch.allclose(value, expected_u / kt, rtol=1e-12)
    assert torch.allclose(f, expected_f / kt, rtol=1e-11, atol=1e-11)
    check_target(target, x)


def test_two_dimensions_live_at_z_zero(backend: str) -> None:
    system = system_of(all_pairs(LENNARD_JONES))
    target = OpenMMTarget(system, n_dims=2, backend=backend)
    x = configurations(8, n_dims=2)
    expected_u, expected_f = by_openmm(system, x)
    u, f = target.reduced_energy_and_force(x)
    kt = units.thermal_energy(300)
    assert target.space == Space(4, 2, centred=True)
    assert torch.allclose(u, expected_u / kt, rtol=1e-11)
    assert f.shape == (8, 4, 2)
    assert torch.allclose(f, expected_f[:, :, :2] / kt, rtol=1e-10, atol=1e-10)
    assert not bool(expected_f[:, :, 2].any())


def test_gradients_flow_through_both_backends(backend: str) -> None:
    target = OpenMMTarget(system_of(all_pairs(LENNARD_JONES)), backend=backend)
    x = configurations(5).requires_grad_(True)
    (gradient,) = torch.autograd.grad((2.0 * target.reduced_energy(x)).sum(), x)
    _, force = target.reduced_energy_and_force(x)
    assert torch.allclose(gradient, -2.0 * force, rtol=1e-12)
    assert not force.requires_grad


def test_non_finite_samples_stay_alone(backend: str) -> None:
    target = OpenMMTarget(system_of(all_pairs(LENNARD_JONES)), backend=backend)
    x = configurations(4)
    clean = target.reduced_energy(x)
    x[1, 0, 0] = torch.nan
    x[2, 0, 0] = torch.inf
    u, f = target.reduced_energy_and_force(x)
    assert torch.isnan(u).tolist() == [False, True, True, False]
    assert torch.isnan(f).flatten(1).all(dim=1).tolist() == [False, True, True, False]
    assert torch.equal(u[[0, 3]], clean[[0, 3]])
    assert torch.isnan(target.reduced_energy(x)).tolist() == [False, True, True, False]


def test_the_target_keeps_its_own_system() -> None:
    system = system_of(all_pairs("r"))
    target = OpenMMTarget(system, backend="contexts", n_threads=1)
    x = configurations(2)
    before = target.reduced_energy(x)
    system.removeForce(0)
    assert target.system is not system
    assert target.system.getNumForces() == 1
    assert torch.equal(target.reduced_energy(x), before)


def test_properties() -> None:
    topology = topology_of(4)
    target = OpenMMTarget(system_of(all_pairs("r")), topology, 310.0)
    assert (target.temperature, target.backend) == (310.0, "batched")
    assert topology_to_json(target.topology) == topology_to_json(topology)  # type: ignore[arg-type]
    next(topology.atoms()).residue.chain.id = "changed"  # the target has a copy
    assert topology_to_json(target.topology) != topology_to_json(topology)  # type: ignore[arg-type]
    assert target.masses.tolist() == [1.0] * 4
    assert repr(target) == ("OpenMMTarget(4 particles in 3 dimensions, 310 K, backend='batched')")
    assert OpenMMTarget(system_of(all_pairs("r"))).temperature == 300.0


def test_construction_is_fast() -> None:
    benchmark = lennard_jones()
    start = time.perf_counter()
    benchmark.target()
    assert time.perf_counter() - start < 0.5


def test_default_forces_are_the_gradient() -> None:
    class Spring(Target):
        space = Space(2, 1)

        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * (x[:, 0] - x[:, 1]).square().sum(dim=1)

    x = torch.tensor([[[1.0], [-2.0]]], dtype=torch.float64)
    u, f = Spring().reduced_energy_and_force(x)
    assert (u.tolist(), f.tolist()) == ([4.5], [[[-3.0], [3.0]]])
    assert not u.requires_grad


def test_second_derivatives_in_kt_and_two_dimensions() -> None:
    target = OpenMMTarget(system_of(all_pairs(LENNARD_JONES)), n_dims=2)
    x = configurations(6, n_dims=2)
    expected = Target.derivatives(target, x)  # the default, which differentiates the energy
    x[1, 0, 0], x[2, 3, 1] = torch.nan, torch.inf
    good = torch.tensor([0, 3, 4, 5])
    for found, known in zip(target.derivatives(x), expected, strict=True):
        assert found.shape == known.shape
        torch.testing.assert_close(found[good], known[good], rtol=1e-10, atol=1e-10)
        assert bool(torch.isnan(found[1:3]).all())
    with pytest.raises(ValueError, match="x: expected positions of shape"):
        target.derivatives(x[0])
    contexts = OpenMMTarget(system_of(all_pairs(LENNARD_JONES)), backend="contexts")
    with pytest.raises(ValueError, match="expected an energy with second derivatives"):
        contexts.derivatives(configurations(2))


# ---------------------------------------------------------------------------------------------
# What is refused


def constrained() -> openmm.System:
    system = system_of(all_pairs("r"))
    system.addConstraint(0, 1, 0.1)
    return system


def with_virtual_site() -> openmm.System:
    system = system_of(all_pairs("r"))
    system.setParticleMass(2, 0.0)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    return system


def massless() -> openmm.System:
    system = system_of(all_pairs("r"))
    system.setParticleMass(1, 0.0)
    return system


def with_barostat() -> openmm.System:
    return system_of(all_pairs("r"), openmm.MonteCarloBarostat(1.0, 300.0))


def with_drude_particles() -> openmm.System:
    force = openmm.DrudeForce()
    force.addParticle(1, 0, -1, -1, -1, 1.0, 0.001, 1.0, 1.0)
    return system_of(force)


def periodic() -> openmm.System:
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    for _ in range(4):
        force.addParticle(0.0, 0.3, 1.0)
    return system_of(force)


def one_odd_particle() -> openmm.System:
    return system_of(all_pairs(LENNARD_JONES), bonds("r", [(0, 1)]))


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (constrained, r"expected no constraints, got 1; build the System with constraints=None"),
        (with_virtual_site, r"expected no virtual sites, got 1 \(the first is particle 2\)"),
        (with_drude_particles, "expected a model without Drude particles, got a DrudeForce"),
        (with_barostat, "expected a System of constant volume, got a MonteCarloBarostat"),
        (massless, r"expected particles with a mass, got 1 without \(the first is particle 1\)"),
        (periodic, "expected a system without periodic boundaries, got a periodic one"),
        (lambda: system_of(n_particles=1), "expected at least 2 particles, got 1"),
        (
            lambda: system_of(all_pairs("r"), external("x^2+y^2+z^2")),
            r"invariant under translation, got CustomExternalForce \(force 1\)",
        ),
        (
            lambda: system_of(all_pairs("r"), external("1e-3*z")),
            r"invariant under translation, got CustomExternalForce \(force 1\)",
        ),
        (one_odd_particle, r"not identical: give a topology \(CustomBondForce \(force 1\)"),
        (
            lambda: system_of(all_pairs("sqrt(-1-r)")),
            r"expected finite energies, got none from CustomBondForce \(force 0\)",
        ),
    ],
)
def test_unsuitable_systems_are_refused(system, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenMMTarget(system(), backend=backend)


def test_a_force_that_notices_rotations_only_is_named() -> None:
    """Dipoles in a field: invariant under translation, not under rotation."""
    force = openmm.CustomCompoundBondForce(2, "x1-x2")
    for i in range(4):
        force.addBond([i, (i + 1) % 4], [])
    force.addBond([0, 2], [])
    message = r"invariant under rotation, got CustomCompoundBondForce \(force 1\)"
    with pytest.raises(ValueError, match=message):
        OpenMMTarget(system_of(all_pairs("r"), force), topology_of(4))


def test_different_particles_are_welcome_with_a_topology() -> None:
    target = OpenMMTarget(one_odd_particle(), topology_of(4))
    check_target(target, configurations(4))


@pytest.mark.parametrize("value", [0.0, -300.0, float("nan"), float("inf"), "warm"])
def test_bad_temperatures(value: object) -> None:
    with pytest.raises(ValueError, match="temperature: expected"):
        OpenMMTarget(system_of(all_pairs("r")), temperature=value)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    system = system_of(all_pairs("r"))
    with pytest.raises(ValueError, match="topology: expected 4 atoms like the System, got 5"):
        OpenMMTarget(system, topology_of(5))
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'batched', 'contexts'"):
        OpenMMTarget(system, backend="cuda")
    with pytest.raises(ValueError, match="n_dims"):
        OpenMMTarget(system, n_dims=4)
    target = OpenMMTarget(system)
    with pytest.raises(TypeError, match="x: expected a torch tensor of positions, got ndarray"):
        target.reduced_energy(np.zeros((1, 4, 3)))  # type: ignore[arg-type]
    for x in (torch.zeros(4, 3), torch.zeros(1, 5, 3), torch.zeros(1, 4, 2)):
        with pytest.raises(ValueError, match=r"x: expected positions of shape \(B, 4, 3\) in nm"):
            target.reduced_energy(x)
        with pytest.raises(ValueError, match=r"x: expected positions of shape \(B, 4, 3\) in nm"):
            target.reduced_energy_and_force(x)


# ---------------------------------------------------------------------------------------------
# Fallback


def test_a_topology_without_bonds_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def springs() -> openmm.HarmonicBondForce:
        force = openmm.HarmonicBondForce()
        for i in (1, 2, 3):
            force.addBond(0, i, 0.1, 1000.0)
        return force

    with caplog.at_level(logging.WARNING):
        OpenMMTarget(system_of(springs()), molecule("CHHH", [(0, 1), (0, 2), (0, 3)]))
        OpenMMTarget(system_of(all_pairs("r^2"), openmm.HarmonicBondForce()), molecule("CHHH", []))
        assert not caplog.records  # controls
        OpenMMTarget(system_of(springs()), molecule("CHHH", []))
    assert "topology: has no bonds, where the System has 3 bonded pairs" in caplog.text


def test_fallback_says_which_force(caplog: pytest.LogCaptureFixture) -> None:
    system = system_of(all_pairs(LENNARD_JONES), many_body())
    with caplog.at_level(logging.WARNING):
        target = OpenMMTarget(system, topology_of(4))
    assert [record.name for record in caplog.records] == ["openmm_vtdis.targets.openmm.target"]
    assert "CustomManyParticleForce" in caplog.text
    assert target.backend == "contexts"
    x = configurations(4)
    expected, _ = by_openmm(system, x)
    assert torch.allclose(target.reduced_energy(x) * units.thermal_energy(300), expected)


def test_no_fallback_is_silent_about_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert double_well().target().backend == "batched"
        assert double_well().target(backend="contexts").backend == "contexts"
    assert not caplog.records


def test_batched_on_demand_is_batched_or_an_error() -> None:
    message = r"backend='batched': .*CustomManyParticleForce.*use backend='contexts'"
    with pytest.raises(ValueError, match=message):
        OpenMMTarget(system_of(many_body()), topology_of(4), backend="batched")


class ShiftedPairs(terms.PairSum):
    """Negative control: a translation that is wrong by a part in ten million."""

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        return (1.0 + 1e-7) * super().forward(coordinates)


class WrongGradient(terms.PairSum):
    """Negative control: the right energy with half the force."""

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        energy = super().forward(coordinates)
        return energy.detach() + 0.5 * (energy - energy.detach())


class WrongCurvature(terms.PairSum):
    """Negative control: the right energy and force, and a Hessian that is 1 % off."""

    def add_derivatives(self, coordinates: torch.Tensor, total: TermHessians) -> None:
        super().add_derivatives(coordinates, total)
        total.hessian *= 1.01


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (ShiftedPairs, r"CustomBondForce \(force 0\): the batched energy is .* where OpenMM's is"),
        (WrongGradient, "forces differ"),
        (WrongCurvature, "second derivatives differ"),
    ],
)
def test_a_wrong_translation_is_never_used(
    term: type[terms.PairSum],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(custom, "PairSum", term)
    with pytest.raises(ValueError, match=message):
        lennard_jones().target(backend="batched")
    target = lennard_jones().target()
    assert target.backend == "contexts"
    assert "no batched energy" in caplog.text


def test_bonds_of_another_molecule_are_refused() -> None:
    def springs() -> openmm.System:
        return system_of(bonds("r", [(0, 1), (1, 2), (2, 3)]))

    def chain(*pairs: tuple[int, int]) -> app.Topology:
        topology = topology_of(4)
        atoms = list(topology.atoms())
        for i, j in pairs:
            topology.addBond(atoms[i], atoms[j])
        return topology

    OpenMMTarget(springs(), chain((0, 1), (1, 2), (2, 3)))
    OpenMMTarget(system_of(bonds("r", [(0, 1), (0, 2), (0, 3)])), chain((0, 1)))
    with pytest.raises(ValueError, match=r"topology: .* got 2 that it has not, the first between"):
        OpenMMTarget(springs(), chain((0, 2), (2, 1), (1, 3)))


def test_atoms_without_an_element_need_labels() -> None:
    system = system_of(all_pairs("r"))
    topology = app.Topology()
    residue = topology.addResidue("BEAD", topology.addChain())
    for _ in range(4):
        topology.addAtom("B", None, residue)
    with pytest.raises(ValueError, match=r"an element for every atom, got none for atom 0 \(B of"):
        DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")
    gen = DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8", labels=[0, 0, 1, 1])
    assert gen.labels == [0, 0, 1, 1]


def test_a_small_force_does_not_hide_behind_a_large_one() -> None:
    """Negative control: table indices that fall between two integers, beside stiff bonds."""
    pair = openmm.CustomNonbondedForce("well(0.5*(k1+k2))*exp(-r)")
    pair.addPerParticleParameter("k")
    pair.addTabulatedFunction("well", openmm.Discrete1DFunction([1.0, 2.0, 4.0]))
    for i in range(4):
        pair.addParticle([i % 3])
    system = system_of(bonds("1e7*(r-0.1)^2"), pair)
    target = OpenMMTarget(system, topology_of(4), backend="batched")
    x = configurations(5)
    expected, _ = by_openmm(system, x)
    torch.testing.assert_close(target.reduced_energy(x) * units.thermal_energy(300), expected)
    probe = probing.ForceProbe(system)
    batched = BatchedEnergy(system)
    term = batched.terms[1]
    forward = term.forward
    term.forward = lambda c: forward(c) + 1e-3  # type: ignore[method-assign]
    reason = validation.disagreement(batched, probe, x, 2.5)
    assert reason is not None
    assert reason.startswith("CustomNonbondedForce (force 1)")
