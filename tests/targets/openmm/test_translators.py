"""The forces of molecular force fields, one by one, against OpenMM's Reference platform."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import testsystems
from torch.utils.flop_counter import FlopCounterMode

from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.targets.openmm.tabulated import lookup, spline
from openmm_vtdis.targets.openmm.term_geometry import angle, dihedral
from openmm_vtdis.targets.openmm.term_hessians import TermHessians
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from openmm_vtdis.targets.openmm.translators.bonded import bicubic, evaluate_map
from openmm_vtdis.targets.openmm.translators.implicit import _Chain
from tests.targets.reference import by_openmm, configurations, system_of

N = 6
"""Particles of the hand-made Systems."""


def agree(system: openmm.System, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Energies and forces of every configuration, relative to the largest of it."""
    expected_u, expected_f = by_openmm(system, x)
    energy = BatchedEnergy(system)
    u, f = energy.energy_and_force(x)
    scale = 1e-3 + expected_u.abs()
    assert float(((u - expected_u).abs() / scale).max()) < tolerance
    assert float(((energy.energy(x) - expected_u).abs() / scale).max()) < tolerance
    scale = 1e-3 + expected_f.abs().amax(dim=(1, 2))
    assert float(((f - expected_f).abs().amax(dim=(1, 2)) / scale).max()) < tolerance
    if x.shape[1] <= 60:
        derivatives_agree(energy, x[1:4], tolerance)


def derivatives_agree(energy: BatchedEnergy, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Term by term against the whole energy differentiated once for every coordinate."""
    for found, expected in zip(
        energy.derivatives(x), differentiate_twice(energy.energy, x), strict=True
    ):
        assert found.shape == expected.shape
        difference, size = ((y.flatten(1).abs().amax(1)) for y in (found - expected, expected))
        assert float((difference / (1e-3 + size)).max()) < tolerance


# -- hand-made forces with every feature --------------------------------------------------------
def rows(n: int, k: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).uniform(0.2, 1.0, size=(n, k)).tolist()


def angles() -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for i, j, k in ((0, 1, 2), (3, 1, 5), (4, 0, 2)):
        force.addAngle(i, j, k, 1.9 - 0.2 * i, 50.0 + j)
    return force


def torsions() -> openmm.Force:
    force = openmm.PeriodicTorsionForce()
    force.addTorsion(0, 1, 2, 3, 3, 0.4, 5.0)
    force.addTorsion(5, 1, 4, 3, 1, 3.1, -2.0)
    force.addTorsion(0, 1, 2, 3, 2, -0.9, 1.5)
    return force


def ryckaert_bellemans() -> openmm.Force:
    force = openmm.RBTorsionForce()
    force.addTorsion(0, 1, 2, 3, 1.1, -0.4, 2.0, 0.7, -1.3, 0.2)
    force.addTorsion(2, 4, 5, 1, 0.3, 0.2, -0.6, 1.0, 0.5, -0.8)
    return force


def maps() -> openmm.Force:
    rng = np.random.default_rng(1)
    force = openmm.CMAPTorsionForce()
    for size in (5, 8):
        force.addMap(size, rng.normal(size=size * size))
    force.addTorsion(1, 0, 1, 2, 3, 1, 2, 3, 4)
    force.addTorsion(0, 5, 1, 4, 3, 0, 2, 3, 4)
    force.addTorsion(1, 2, 1, 0, 5, 4, 3, 2, 0)
    return force


def nonbonded() -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    for q, s, e in rows(N, 3):
        force.addParticle(q - 0.5, 0.5 * s, e)
    force.addException(0, 1, 0.0, 0.3, 0.0)
    force.addException(1, 2, 0.0, 0.0, 0.0)
    force.addException(4, 2, -0.2, 0.4, 0.7)
    force.addException(5, 3, 0.0, 0.2, 0.5)
    return force


def nonbonded_with_offsets() -> openmm.Force:
    force = nonbonded()
    force.addGlobalParameter("lambda", 0.7)
    force.addGlobalParameter("mu", -0.2)
    force.addParticleParameterOffset("lambda", 0, 0.3, 0.1, 0.2)
    force.addParticleParameterOffset("mu", 0, 0.1, 0.0, 0.1)
    force.addParticleParameterOffset("mu", 5, 1.0, 0.0, 0.0)
    force.addExceptionParameterOffset("lambda", 1, 0.4, 0.3, 0.5)
    return force


def custom_angles() -> openmm.Force:
    force = openmm.CustomAngleForce("scale*k*(cos(theta)-cos(theta0))^2+theta")
    force.addPerAngleParameter("k")
    force.addPerAngleParameter("theta0")
    force.addGlobalParameter("scale", 1.3)
    for (i, j, k), row in zip(((0, 1, 2), (3, 1, 5)), rows(2, 2), strict=True):
        force.addAngle(i, j, k, row)
    return force


def custom_torsions() -> openmm.Force:
    force = openmm.CustomTorsionForce("0.5*k*min(d, 2*pi-d)^2; d=abs(theta-theta0); pi=3.14159265")
    force.addPerTorsionParameter("k")
    force.addPerTorsionParameter("theta0")
    force.addTorsion(0, 1, 2, 3, [2.0, 1.0])
    force.addTorsion(5, 2, 4, 1, [0.7, -1.5])
    return force


def compound(source: str, n: int = 4) -> openmm.CustomCompoundBondForce:
    force = openmm.CustomCompoundBondForce(n, source)
    force.addPerBondParameter("k")
    for shift, row in enumerate(rows(2, 1)):
        force.addBond([(i + shift) % N for i in range(n)], row)
    return force


def compound_with_tables() -> openmm.Force:
    force = compound("k*f(distance(p1,p2))+g(angle(p1,p2,p3))")
    values = np.random.default_rng(2).normal(size=9)
    values[-1] = values[0]
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(values, 0.2, 2.0))
    force.addTabulatedFunction("g", openmm.Continuous1DFunction(values, 0.1, 0.9, True))
    return force


def pairs_with_groups() -> openmm.Force:
    force = openmm.CustomNonbondedForce("a1*a2*exp(-r)+strength*b1*b2/r")
    force.addPerParticleParameter("a")
    force.addGlobalParameter("strength", 0.6)
    force.addComputedValue("b", "a^2+strength")
    for row in rows(N, 1):
        force.addParticle(row)
    force.addExclusion(0, 3)
    force.addInteractionGroup([0, 1, 2], [2, 3, 1])
    force.addInteractionGroup([4], [0, 1, 5])
    return force


def pairs_with_tables() -> openmm.Force:
    force = openmm.CustomNonbondedForce("well(type1,type2)*ramp(r)+grid(type1+type2,type1,type2)")
    force.addPerParticleParameter("type")
    rng = np.random.default_rng(3)
    force.addTabulatedFunction(
        "well", openmm.Discrete2DFunction(3, 3, np.outer(*[rng.normal(size=3)] * 2).ravel())
    )
    force.addTabulatedFunction("ramp", openmm.Continuous1DFunction(rng.normal(size=12), 0.3, 2.5))
    table = np.add.outer(np.arange(5.0), np.outer(*[rng.normal(size=3)] * 2))
    force.addTabulatedFunction("grid", openmm.Discrete3DFunction(5, 3, 3, table.T.ravel()))
    for i in range(N):
        force.addParticle([i % 3])
    return force


def born() -> openmm.Force:
    """Every type of computed value and energy term, exclusions and a table."""
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addPerParticleParameter("s")
    force.addGlobalParameter("c", 0.4)
    kinds = (force.SingleParticle, force.ParticlePair, force.ParticlePairNoExclusions)
    single, pair, every = kinds
    force.addTabulatedFunction("scale", openmm.Discrete1DFunction([0.5, 2.0, 1.5]))
    force.addComputedValue("I", "exp(-r/s1)*s2*scale(1)", pair)
    force.addComputedValue("B", "s/(1+I)+0.1*x^2", single)
    force.addComputedValue("C", "B^2+c*q", single)
    force.addEnergyTerm("c*q^2/B+C*y", single)
    force.addEnergyTerm("q1*q2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", every)
    force.addEnergyTerm("C1*C2*exp(-r)", pair)
    for row in rows(N, 2):
        force.addParticle(row)
    force.addExclusion(0, 1)
    force.addExclusion(5, 2)
    return force


def born_without_exclusions() -> openmm.Force:
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("s")
    force.addComputedValue("I", "exp(-r/s1)*s2", force.ParticlePairNoExclusions)
    force.addEnergyTerm("I1*I2*r", force.ParticlePair)
    for row in rows(N, 1):
        force.addParticle(row)
    force.addExclusion(3, 1)
    return force


def born_with_a_value_named_r() -> openmm.Force:
    """In expressions of single particles, r is not the distance."""
    force = openmm.CustomGBForce()
    force.addComputedValue("I", "exp(-r)", force.ParticlePairNoExclusions)
    force.addComputedValue("r", "1+I^2", force.SingleParticle)
    force.addEnergyTerm("1/r", force.SingleParticle)
    force.addEnergyTerm("r1*r2/(1+r)", force.ParticlePairNoExclusions)
    for _ in range(N):
        force.addParticle([])
    return force


def gbsa() -> openmm.Force:
    force = openmm.GBSAOBCForce()
    force.setSolventDielectric(60.0)
    force.setSoluteDielectric(2.0)
    force.setSurfaceAreaEnergy(3.1)
    for q, radius, scale in rows(N, 3):
        force.addParticle(q - 0.5, 0.3 * radius, scale)
    return force


FORCES: dict[str, Callable[[], openmm.Force]] = {
    "angles": angles,
    "torsions": torsions,
    "Ryckaert-Bellemans": ryckaert_bellemans,
    "CMAP": maps,
    "nonbonded": nonbonded,
    "parameter offsets": nonbonded_with_offsets,
    "custom angles": custom_angles,
    "custom torsions": custom_torsions,
    "compound": lambda: compound("k*(distance(p1,p3)-x2)^2+sin(dihedral(p4,p2,p1,p3))*z4+y1"),
    "compound, points": lambda: compound(
        "k*pointdistance(x1,y1,z1,0.1,x2,z3)+pointangle(x1,y1,z1,x2,y2,z2,x3,y3,z3)"
        "+pointdihedral(x1,y1,z1,x2,y2,z2,x3,y3,z3,1,2,3)"
    ),
    "compound, tables": compound_with_tables,
    "interaction groups": pairs_with_groups,
    "pair tables": pairs_with_tables,
    "generalized Born": born,
    "generalized Born without exclusions": born_without_exclusions,
    "generalized Born, a value named r": born_with_a_value_named_r,
    "GBSA-OBC": gbsa,
}


@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES.keys())
def test_a_force_agrees_with_openmm(force: Callable[[], openmm.Force]) -> None:
    x = configurations(30, N)
    agree(system_of(force(), n_particles=N), torch.cat([0.3 * x, x]))


def test_negative_control_a_wrong_constant_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmm_vtdis.targets.openmm.translators.nonbonded.COULOMB", 138.935456)
    with pytest.raises(AssertionError):
        agree(system_of(nonbonded(), n_particles=N), configurations(5, N))


def test_negative_control_a_missing_part_of_a_hessian_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy = BatchedEnergy(system_of(born(), n_particles=N))
    x = 0.5 * configurations(3, N)
    derivatives_agree(energy, x)
    with monkeypatch.context() as patch:
        patch.setattr(
            TermHessians, "add_outer", lambda *_: None
        )  # all that goes through Born radii
        with pytest.raises(AssertionError):
            derivatives_agree(energy, x)
    with monkeypatch.context() as patch:
        patch.setattr(_Chain, "_pull_second", lambda *_: None)
        with pytest.raises(AssertionError):
            derivatives_agree(energy, x)


def test_derivatives_under_a_counter_of_operations() -> None:
    """Its hooks on modules must not meet the leaves that are differentiated by."""
    energy = BatchedEnergy(system_of(born(), maps(), n_particles=N))
    x = 0.5 * configurations(3, N)
    expected = energy.derivatives(x)
    with FlopCounterMode(display=False):
        found = energy.derivatives(x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_hessian_is_the_slope_of_openmms_forces() -> None:
    dipeptide = testsystems.AlanineDipeptideImplicit(constraints=None)
    x = geometries(dipeptide.positions)[1:2]
    gradient, hessian = BatchedEnergy(dipeptide.system).derivatives(x)
    _, force = by_openmm(dipeptide.system, x)
    torch.testing.assert_close(gradient, -force, rtol=1e-8, atol=1e-6)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    step = 1e-5 * direction
    _, (before, after) = by_openmm(dipeptide.system, torch.cat([x - step, x + step]))
    slope = (before - after) / 2e-5
    product = torch.einsum("iajb,jb->ia", hessian[0], direction[0])
    torch.testing.assert_close(product, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))


# -- building blocks ----------------------------------------------------------------------------
def test_angles_are_those_of_a_known_geometry() -> None:
    a, b, c, d = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64
    )[:, :, None, None]
    assert float(angle(a, b, c)) == pytest.approx(np.pi / 2)
    assert float(dihedral(a, b, c, d)) == pytest.approx(-np.pi / 2)
    assert float(dihedral(d, c, b, a)) == pytest.approx(-np.pi / 2)


def test_a_map_goes_through_its_nodes_and_is_periodic() -> None:
    grid = np.random.default_rng(0).normal(size=(7, 7))
    table = torch.from_numpy(bicubic(grid))
    nodes = torch.arange(7.0, dtype=torch.float64) * (2.0 * torch.pi / 7)
    phi, psi = torch.meshgrid(nodes + 1e-12, nodes + 1e-12, indexing="ij")
    np.testing.assert_allclose(evaluate_map(table, phi, psi).numpy(), grid, atol=1e-9)
    x = torch.linspace(-3.0, 3.0, 40, dtype=torch.float64)[:, None]
    once = evaluate_map(table, x, 0.3 * x)
    torch.testing.assert_close(evaluate_map(table, x + 2 * torch.pi, 0.3 * x), once)


def test_tables_say_nothing_outside_their_range() -> None:
    curve = spline(np.array([1.0, 2.0, 0.5]), 0.0, 1.0, periodic=False)
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1, torch.nan], dtype=torch.float64)
    np.testing.assert_allclose(curve(x), [0.0, 1.0, 2.0, 0.5, 0.0, np.nan])
    line = lookup((3,), [1.0, 2.0, 4.0])  # halves go away from zero, as in C
    halves = torch.tensor([0.5, 1.5, 2.4, 2.5, -0.4, -0.5], dtype=torch.float64)
    np.testing.assert_allclose(line(halves), [2.0, 4.0, 4.0, np.nan, 1.0, np.nan])
    table = lookup((2, 3), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    i = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.0], dtype=torch.float64)
    j = torch.tensor([2.0, 1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    np.testing.assert_allclose(table(i, j), [5.0, 2.0, np.nan, np.nan, np.nan])


# -- test systems and force fields --------------------------------------------------------------
def geometries(positions: unit.Quantity) -> torch.Tensor:
    """The given one, four increasingly distorted, and a random cloud: (6, M, 3) nm."""
    x = torch.tensor(np.asarray(positions.value_in_unit(unit.nanometer)), dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(x.shape, generator=rng, dtype=torch.float64)

    distorted = [x + scale * noise() for scale in (0.003, 0.01, 0.05, 0.2)]
    return torch.stack([x, *distorted, 0.3 * len(x) ** (1.0 / 3.0) * noise()])


def force_by_force(system: openmm.System, positions: unit.Quantity) -> None:
    for force in system.getForces():
        alone = system_of(copy.deepcopy(force), n_particles=system.getNumParticles())
        agree(alone, geometries(positions), tolerance=1e-8)


SMALL = [
    "AlanineDipeptideVacuum",
    "AlanineDipeptideImplicit",
    "TolueneVacuum",
    "TolueneImplicitHCT",
    "TolueneImplicitOBC1",
    "TolueneImplicitOBC2",
    "TolueneImplicitGBn",
    "TolueneImplicitGBn2",
    "Diatom",
    "LennardJonesCluster",
    "WaterCluster",
]
LARGE = ["HostGuestVacuum", "HostGuestImplicit", "MolecularIdealGas"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_systems_of_openmmtools_agree_force_by_force(name: str) -> None:
    benchmark = getattr(testsystems, name)()
    force_by_force(benchmark.system, benchmark.positions)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LARGE)
def test_larger_systems_of_openmmtools_agree_force_by_force(name: str) -> None:
    benchmark = getattr(testsystems, name)()
    force_by_force(benchmark.system, benchmark.positions)


FORCE_FIELDS = {
    "ff14SB, OBC2": ("amber14/protein.ff14SB.xml", "implicit/obc2.xml"),
    "ff99SBildn, GBn2": ("amber99sbildn.xml", "implicit/gbn2.xml"),
    "ff19SB (CMAP)": ("amber19/protein.ff19SB.xml",),
}
IN_NEWER = {"ff19SB (CMAP)": (8, 3)}
"""The version of OpenMM that brought a force field, where that is not the lowest supported one."""
OURS = tuple(int(part) for part in openmm.version.short_version.split(".")[:2])


@pytest.mark.slow  # reading this force field takes a minute
@pytest.mark.filterwarnings("ignore")
def test_charmm_agrees_force_by_force() -> None:
    dipeptide = testsystems.AlanineDipeptideVacuum()
    field = app.ForceField("charmm36_2024.xml")
    force_by_force(field.createSystem(dipeptide.topology, constraints=None), dipeptide.positions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "files",
    [
        pytest.param(files, id=name, marks=pytest.mark.skipif(
            IN_NEWER.get(name, OURS) > OURS, reason="this OpenMM is older than the force field"
        ))
        for name, files in FORCE_FIELDS.items()
    ],
)  # fmt: skip
def test_force_fields_agree_force_by_force(files: tuple[str, ...]) -> None:
    dipeptide = testsystems.AlanineDipeptideVacuum()
    system = app.ForceField(*files).createSystem(dipeptide.topology, constraints=None)
    force_by_force(system, dipeptide.positions)
