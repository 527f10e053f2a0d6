"""What holds a System together: parts that can fly apart, and bonds without a term, are named."""

from __future__ import annotations

import logging
import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from scipy.integrate import quad

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets import (
    GaussianMixture,
    OpenMMTarget,
    Target,
    alanine_dipeptide,
    double_well,
    lennard_jones,
)
from openmm_vtdis.targets.binding import parts_of, slowest_rise
from tests import potentials
from tests.conftest import needs_python_force
from tests.molecules import molecule
from tests.targets.reference import bonds, system_of

LJ = "4*0.5*((0.3/r)^12-(0.3/r)^6)"


def dimers(*forces: openmm.Force, charge: float = 0.0) -> tuple[openmm.System, app.Topology]:
    """Two molecules of two atoms each, which attract each other weakly."""
    system = system_of(*forces)
    system.addForce(bonds("5000*(r-0.15)^2", [(0, 1), (2, 3)]))
    weak = openmm.NonbondedForce()
    for k in range(4):
        weak.addParticle(charge * (-1) ** k, 0.3, 0.5)
    weak.addException(0, 1, 0.0, 1.0, 0.0)
    weak.addException(2, 3, 0.0, 1.0, 0.0)
    system.addForce(weak)
    return system, molecule("CNCN", [(0, 1), (2, 3)])


def restraint(source: str) -> openmm.CustomCentroidBondForce:
    force = openmm.CustomCentroidBondForce(2, source)
    force.addGroup([0, 1])
    force.addGroup([2, 3])
    force.addBond([0, 1], [])
    return force


# -- parts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("force", "charge"),
    [
        (None, 0.0),
        (None, 0.5),
        (restraint("50*exp(-distance(g1,g2))"), 0.0),
        (restraint("-100/(1+distance(g1,g2)^2)"), 0.0),
        (restraint("2*log(1+distance(g1,g2))"), 0.0),  # rises too slowly: 0.8 log R in kT
    ],
    ids=["van der Waals", "charges", "repulsion", "well", "slow logarithm"],
)
def test_parts_that_can_fly_apart_are_named(force: openmm.Force | None, charge: float) -> None:
    system, topology = dimers(*[] if force is None else [force], charge=charge)
    with pytest.raises(ValueError, match=r"holds particles 0 \(C0 of MOL 1\), 1 \(N1.*Centroid"):
        DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")


def test_charges_are_no_bond_in_the_cold() -> None:
    """u of a charge rises by hundreds of kT there, but less and less a decade."""
    system, topology = dimers(charge=0.5)
    with pytest.raises(ValueError, match="holds all particles together"):
        DiffusionBoltzmannGenerator(system, topology, 0.1, network="egnn-1x8")


@pytest.mark.parametrize(
    "source",
    [
        "0.5*distance(g1,g2)^2",
        "max(0,distance(g1,g2)-5)^2",
        "distance(g1,g2)",
        "20*log(1+distance(g1,g2))",
        "exp(distance(g1,g2))",
    ],
)
def test_any_restraint_that_makes_z_finite_will_do(source: str) -> None:
    system, topology = dimers(restraint(source))
    DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")


def test_one_part_of_three_and_a_pair_of_four() -> None:
    """Two parts that hold each other, and nothing else holds."""
    atoms = molecule("CNOS", [])
    tether = bonds("r^2", [(0, 1), (2, 3)])
    weak = openmm.CustomNonbondedForce(LJ)
    for _ in range(4):
        weak.addParticle([])
    with pytest.raises(ValueError, match=r"holds particles 0 \(C0 of MOL 1\), 1 \(N1 of MOL 1\)"):
        DiffusionBoltzmannGenerator(system_of(tether, weak), atoms, network="egnn-1x8")
    weak = openmm.CustomNonbondedForce("r^2*(select(1-group1*group2,1,0)+group1*group2*0)")
    weak.addPerParticleParameter("group")
    for group in (0.0, 0.0, 0.0, 1.0):
        weak.addParticle([group])
    DiffusionBoltzmannGenerator(system_of(weak), atoms, network="egnn-1x8")
    only = openmm.CustomNonbondedForce("r^2*(1-abs(group1-group2))")
    only.addPerParticleParameter("group")
    for group in (0.0, 0.0, 1.0, 1.0):
        only.addParticle([group])
    with pytest.raises(ValueError, match=r"holds particles 0 \(C0 of MOL 1\), 1 \(N1 of MOL 1\)"):
        DiffusionBoltzmannGenerator(system_of(only), atoms, network="egnn-1x8")


def test_parts_of_atoms_without_bonds() -> None:
    """Two times three atoms, held by forces that are no bonds: neither one nor two of them fly."""

    def threes(k: float) -> openmm.CustomNonbondedForce:
        force = openmm.CustomNonbondedForce(f"{k}*r^2+{LJ}*0")
        for _ in range(6):
            force.addParticle([])
        force.addInteractionGroup([0, 1, 2], [0, 1, 2])
        force.addInteractionGroup([3, 4, 5], [3, 4, 5])
        return force

    weak = openmm.CustomNonbondedForce(LJ)
    for _ in range(6):
        weak.addParticle([])
    atoms = molecule("CNOSPF", [])
    system = system_of(threes(50.0), weak, n_particles=6)
    message = r"holds particles 0 \(C0 of MOL 1\), 1 \(N1 of MOL 1\), 2 \(O2 of MOL 1\): pulled"
    with pytest.raises(ValueError, match=message):
        DiffusionBoltzmannGenerator(system, atoms, network="egnn-1x8")
    between = openmm.CustomNonbondedForce("0.1*r^2")
    for _ in range(6):
        between.addParticle([])
    between.addInteractionGroup([0], [5])
    system.addForce(between)
    DiffusionBoltzmannGenerator(system, atoms, network="egnn-1x8")  # control


def test_a_restraint_that_is_as_slow_as_it_may_be_beside_charges() -> None:
    """u = 4 log R in kT, and a Coulomb attraction that fades: Z is finite."""
    system, topology = dimers(restraint("4*2.494*log(1+distance(g1,g2))"), charge=0.3)
    DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")


def test_what_ships_is_held_together() -> None:
    for bench in (double_well(), lennard_jones(), lennard_jones(20), alanine_dipeptide()):
        bench.target().check_bound()
    one = parts_of(alanine_dipeptide().system, alanine_dipeptide().topology)
    assert [len(part) for part in one] == [22]
    assert len(parts_of(lennard_jones().system, None)) == 13


def test_a_state_to_reweight_to_is_asked_too() -> None:
    from openmmtools.states import ThermodynamicState

    from openmm_vtdis.ensemble.states import as_target

    system, topology = dimers()
    state = ThermodynamicState(system, 300 * unit.kelvin)
    for other in (state, OpenMMTarget(system, topology)):
        with pytest.raises(ValueError, match="holds all particles together"):
            as_target("reweight", other, topology, 3)


def test_energies_can_be_had_of_anything() -> None:
    """A target is a density; its energy is not."""
    system, topology = dimers()
    assert OpenMMTarget(system, topology).reduced_energy(torch.randn(3, 4, 3)).shape == (3,)


def test_the_criterion_is_that_of_the_integral() -> None:
    """u = c log(1 + r) between two points in the plane: finite for c > 2, as the integral says."""
    for c in (1.9, 2.1):

        def energy(x: torch.Tensor, c: float = c) -> torch.Tensor:
            return c * (x[:, 0] - x[:, 1]).norm(dim=1).log1p()

        x = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
        found = slowest_rise(energy, x, [0])
        z = [quad(lambda t, c=c: math.exp(2.0 * t) * (1.0 + math.exp(t)) ** -c, 0.0, end)[0]
             for end in (20.0, 40.0)]  # fmt: skip
        assert (found is not None) == (z[1] / z[0] > 2.0) == (c < 2.0)


def test_a_torch_energy_that_does_not_rise_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Well(Target):
        space = Space(3, 3, centred=True)

        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            return -5.0 / (1.0 + x.square().sum(dim=(1, 2)))

    with caplog.at_level(logging.WARNING):
        DiffusionBoltzmannGenerator.from_target(Well(), network="egnn-1x8")
    assert "so that Z is infinite" in caplog.text
    caplog.clear()
    mixture = GaussianMixture(torch.zeros(1, 3, 3), [1.0], [1.0], Space(3, 3))
    DiffusionBoltzmannGenerator.from_target(mixture, network="egnn-1x8")
    assert "Z is infinite" not in caplog.text


# -- the standard state -------------------------------------------------------------------------
def gaussian_log_z(system: openmm.System, n_particles: int) -> float:
    """Of a System of springs of no length, from the determinant of its Hessian."""
    target = OpenMMTarget(system, molecule(["C"] * n_particles, []))
    anywhere = target.space.standard_normal(1, torch.Generator().manual_seed(0))
    _, hessian = target.derivatives(anywhere)
    v = target.space.basis
    reduced = torch.einsum("ai,icjd,bj->acbd", v, hessian[0], v)
    d = target.space.dim
    return 0.5 * (d * math.log(2.0 * math.pi) - float(torch.logdet(reduced.reshape(d, d))))


def test_the_standard_state_of_the_docs() -> None:
    """log Z of two molecules that only a restraint holds: theirs, and a volume (docs/molecules).

    Springs of no length between atoms of several masses, so that everything is Gaussian.
    """
    stiffness, kt = 40.0, 8.31446261815324e-3 * 300.0
    one, two = [(0, 1)], [(2, 3), (3, 4), (2, 4)]
    apart = [
        gaussian_log_z(system_of(bonds("300*r^2", [(0, 1)]), n_particles=2), 2),
        gaussian_log_z(system_of(bonds("200*r^2", [(0, 1), (1, 2), (0, 2)]), n_particles=3), 3),
    ]
    source = f"{stiffness / 2}*((x1/2+x2/2-x3/6-x4/3-x5/2)^2+(y1/2+y2/2-y3/6-y4/3-y5/2)^2"
    source += "+(z1/2+z2/2-z3/6-z4/3-z5/2)^2)"  # of centroids by mass: 1, 1 and 1, 2, 3
    held = openmm.CustomCompoundBondForce(5, source)
    held.addBond(list(range(5)), [])
    both = system_of(bonds("300*r^2", one), bonds("200*r^2", two), held, n_particles=5)
    volume = (2.0 * math.pi * kt / stiffness) ** 1.5
    expected = sum(apart) + 1.5 * math.log(2.0 * 3.0 / 5.0) + math.log(volume)
    assert gaussian_log_z(both, 5) == pytest.approx(expected, abs=1e-9)


# -- bonds ----------------------------------------------------------------------------------------
def without_constraints(constraints: object, rigid_water: bool = True) -> openmm.System:
    """What people do after the error about constraints."""
    field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    system = field.createSystem(
        alanine_dipeptide().topology, constraints=constraints, rigidWater=rigid_water
    )
    while system.getNumConstraints():
        system.removeConstraint(0)
    return system


def test_deleted_constraints_leave_bonds_without_a_term() -> None:
    topology = alanine_dipeptide().topology
    message = r"each of 21 bonds of the topology, got 12 bonds that nothing holds: .*and 7 more"
    with pytest.raises(ValueError, match=message):
        OpenMMTarget(without_constraints(app.HBonds), topology)
    OpenMMTarget(without_constraints(None), topology)  # control


def test_where_no_bond_has_a_term_parts_are_pulled_apart() -> None:
    """AllBonds, deleted: angles and torsions alone hold nothing."""
    topology = alanine_dipeptide().topology
    system = without_constraints(app.AllBonds)
    OpenMMTarget(system, topology)
    with pytest.raises(ValueError, match="holds all particles together"):
        DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")


def test_rigid_water_whose_constraints_were_deleted() -> None:
    topology, _ = potentials.water()
    field = app.ForceField("amber14/tip3p.xml")
    system = field.createSystem(topology)
    while system.getNumConstraints():
        system.removeConstraint(0)
    message = "got bonds without a term: O of HOH 1 - H1 of HOH 1.*rigidWater=False"
    with pytest.raises(ValueError, match=message):
        DiffusionBoltzmannGenerator(system, topology, network="egnn-1x8")


@pytest.mark.parametrize("restrained", ["centroids", "heavy atoms", "RG", "RMSD"])
def test_restraints_hide_no_deleted_constraints(restrained: str) -> None:
    """Nor do they pass for bonds of another molecule."""
    bench, system = alanine_dipeptide(), without_constraints(app.HBonds)
    heavy = [a.index for a in bench.topology.atoms() if a.element is not app.element.hydrogen]
    groups = (range(11), range(11, 22)) if restrained == "centroids" else (heavy[:5], heavy[5:])
    force = openmm.CustomCentroidBondForce(2, "50*distance(g1,g2)^2")
    for group in groups:
        force.addGroup(list(group))
    force.addBond([0, 1], [])
    if restrained in ("RG", "RMSD"):
        inner = openmm.RGForce() if restrained == "RG" else openmm.RMSDForce(bench.positions, heavy)
        force = openmm.CustomCVForce("100*x^2")
        force.addCollectiveVariable("x", inner)
    system.addForce(force)
    with pytest.raises(ValueError, match="got 12 bonds that nothing holds"):
        OpenMMTarget(system, bench.topology)
    whole = without_constraints(None)  # control
    whole.addForce(force.__copy__())
    OpenMMTarget(whole, bench.topology)


def test_bonds_may_be_terms_of_other_kinds() -> None:
    compound = openmm.CustomCompoundBondForce(2, "1000*(distance(p1,p2)-0.1)^2")
    compound.addBond([0, 1], [])
    centroid = openmm.CustomCentroidBondForce(2, "1000*(distance(g1,g2)-0.1)^2")
    for k in (1, 2):
        centroid.addGroup([k])
    centroid.addBond([0, 1], [])
    inside = openmm.CustomCVForce("u")
    inside.addCollectiveVariable("u", bonds("1000*(r-0.1)^2", [(2, 3)]))
    chain = molecule("CNOS", [(0, 1), (1, 2), (2, 3)])
    system = system_of(compound, centroid, inside)
    DiffusionBoltzmannGenerator(system, chain, network="egnn-1x8")
    system.removeForce(2)
    with pytest.raises(ValueError, match="got 1 bonds that nothing holds: O2 of MOL 1 - S3"):
        OpenMMTarget(system, chain)


@needs_python_force
def test_potentials_that_bind_without_terms_are_not_judged() -> None:
    """A model with a bias of two atoms that no bond joins, and one for a part of the molecule."""
    topology, _ = potentials.water()
    for pair in ((1, 2), (0, 1)):
        for nested in (False, True):
            system = potentials.system_with(potentials.Springs(), nested)
            system.addForce(bonds("10*(r-0.15)^2", [pair]))
            OpenMMTarget(system, topology).check_bound()


def test_a_bias_over_a_force_field_is_no_other_molecule() -> None:
    bench = alanine_dipeptide()
    bias = openmm.CustomCVForce("50*(d-0.5)^2")
    distance = openmm.CustomBondForce("r")
    distance.addBond(4, 18, [])
    bias.addCollectiveVariable("d", distance)
    bench.system.addForce(bias)
    assert OpenMMTarget(bench.system, bench.topology).backend == "contexts"
    order = molecule(["C"] * 22, [(k, (k + 5) % 22) for k in range(21)])
    with pytest.raises(ValueError, match="topology: expected the bonds of the System"):  # control
        OpenMMTarget(bench.system, order)


def test_numbers_of_parts() -> None:
    system, topology = dimers()
    assert parts_of(system, topology) == [[0, 1], [2, 3]]
    assert parts_of(system, None) == [[0], [1], [2], [3]]
    assert np.concatenate(parts_of(system, topology)).tolist() == [0, 1, 2, 3]
