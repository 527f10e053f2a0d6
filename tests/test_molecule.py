"""A molecule all the way, from MD to reweighted samples in files; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import testsystems

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.targets import OpenMMTarget, alanine_dipeptide
from openmm_vtdis.targets.openmm.validation import check_structure

TEMPERATURE = 800.0


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of plain openmm.app.Simulation, as a user would make them."""
    bench = alanine_dipeptide(TEMPERATURE)
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURE * unit.kelvin, 1.0 / unit.picosecond, 0.5 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(bench.topology, bench.system, integrator, platform)
    simulation.context.setPositions(bench.positions)
    simulation.minimizeEnergy(maxIterations=20)
    path = tmp_path_factory.mktemp("md") / "md.dcd"
    simulation.reporters.append(app.DCDReporter(str(path), 10))
    simulation.step(600)
    return path


@pytest.fixture(scope="module")
def gen(trajectory: Path) -> DiffusionBoltzmannGenerator:
    bench = alanine_dipeptide(TEMPERATURE)
    made = DiffusionBoltzmannGenerator(
        bench.system, bench.topology, TEMPERATURE, network="egnn-1x16", seed=0
    )
    made.train(trajectory, 20, batch_size=16, progress=False)
    return made


def test_what_the_network_is_told(gen: DiffusionBoltzmannGenerator) -> None:
    assert gen.target.backend == "batched"  # type: ignore[attr-defined]
    assert len(set(gen.labels)) == 16
    assert [centre.name for centre in gen.particles.stereocentres] == ["CA of ALA 2"]
    assert np.shape(gen.network.config["node_features"]) == (22, 4)
    assert np.shape(gen.network.config["edge_features"]) == (22, 22, 3)


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "block"])
def test_all_the_way(
    gen: DiffusionBoltzmannGenerator, trajectory: Path, tmp_path: Path, covariance: str
) -> None:
    report = gen.tune(trajectory, 6, covariance, n_trajectories=200, progress=False)
    assert report.eta.shape == (6, 16)
    ensemble = gen.sample(12, seed=1, progress=False)
    assert ensemble.positions.shape == (12, 22, 3)
    finite = np.isfinite(ensemble.log_weights)
    assert finite.any()
    assert gen.handedness is not None
    gen.handedness.check("samples", torch.tensor(ensemble.positions[finite]))
    path = gen.save(tmp_path / "aldp.vtdis")
    again = DiffusionBoltzmannGenerator.load(path)
    np.testing.assert_array_equal(
        again.sample(12, seed=1, progress=False).log_weights, ensemble.log_weights
    )
    assert 0.0 <= forward_ess(gen.log_weights(trajectory, seed=2, progress=False)) <= 1.0
    stored = WeightedEnsemble.load(ensemble.save(tmp_path / "aldp.nc"))
    assert stored.to_mdtraj().topology.n_residues == 3
    cold = OpenMMTarget(gen.target.system, gen.topology, 700.0)  # type: ignore[attr-defined]
    alive = ensemble[finite]
    difference = alive.reweight(cold).log_weights - alive.log_weights
    ratio = 1.0 - TEMPERATURE / 700.0
    np.testing.assert_allclose(difference, ratio * alive.reduced_energies, rtol=1e-9, atol=1e-9)


def test_energies_of_the_frames_are_those_of_openmm(
    gen: DiffusionBoltzmannGenerator, trajectory: Path
) -> None:
    bench = alanine_dipeptide(TEMPERATURE)
    x = md.load(trajectory, top=md.Topology.from_openmm(bench.topology)).xyz[:10]
    contexts = OpenMMTarget(bench.system, bench.topology, TEMPERATURE, backend="contexts")
    torch.testing.assert_close(
        gen.target.reduced_energy(torch.tensor(x, dtype=torch.float64)),
        contexts.reduced_energy(torch.tensor(x, dtype=torch.float64)),
        rtol=1e-10,
        atol=1e-8,
    )


def test_another_molecule_or_order_is_refused(
    gen: DiffusionBoltzmannGenerator, trajectory: Path
) -> None:
    bench = alanine_dipeptide(TEMPERATURE)
    traj = md.load(trajectory, top=md.Topology.from_openmm(bench.topology))
    toluene = testsystems.TolueneVacuum(constraints=None)
    other = md.Trajectory(
        np.asarray(toluene.positions._value)[None], md.Topology.from_openmm(toluene.topology)
    )
    with pytest.raises(ValueError, match="trajectory: expected 22 atoms as in the topology, got 1"):
        gen.train(other, 3)
    order = [1, 0, *range(2, 22)]
    shuffled = traj.atom_slice(np.arange(22))
    atoms = list(shuffled.topology.atoms)
    atoms[0].name, atoms[1].name = atoms[1].name, atoms[0].name
    shuffled.xyz = shuffled.xyz[:, order]
    with pytest.raises(ValueError, match=r"in the order of the topology, but atom 0 .* has name"):
        gen.train(shuffled, 3)


def test_constraints_are_refused_with_advice() -> None:
    bench = testsystems.AlanineDipeptideImplicit(constraints=app.HBonds)
    with pytest.raises(ValueError, match="expected no constraints, got 12; build .*constraints=No"):
        DiffusionBoltzmannGenerator(bench.system, bench.topology, TEMPERATURE)


def test_a_cutoff_falls_back_to_contexts_and_a_box_is_refused() -> None:
    bench = testsystems.AlanineDipeptideVacuum(constraints=None)
    force = next(f for f in bench.system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    assert OpenMMTarget(bench.system, bench.topology, TEMPERATURE).backend == "contexts"
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    with pytest.raises(ValueError, match="expected a system without periodic boundaries"):
        OpenMMTarget(bench.system, bench.topology, TEMPERATURE)


def test_files_with_atoms_of_their_own_are_checked(
    gen: DiffusionBoltzmannGenerator, trajectory: Path, tmp_path: Path
) -> None:
    bench = alanine_dipeptide(TEMPERATURE)
    traj = md.load(trajectory, top=md.Topology.from_openmm(bench.topology))[:12]
    traj.save_gro(tmp_path / "right.gro")
    gen.log_weights(tmp_path / "right.gro", seed=0, progress=False)
    atoms = list(traj.topology.atoms)
    atoms[6].name, atoms[7].name = atoms[7].name, atoms[6].name
    atoms[6].element, atoms[7].element = atoms[7].element, atoms[6].element
    traj.save_gro(tmp_path / "swapped.gro")
    with pytest.raises(ValueError, match="in the order of the topology, but atom 6"):
        gen.log_weights(tmp_path / "swapped.gro", seed=0, progress=False)


def test_elements_in_another_order_than_the_masses_are_refused() -> None:
    dipeptide = testsystems.AlanineDipeptideVacuum(constraints=None)
    atoms = list(dipeptide.topology.atoms())

    def topology(order: list[int]) -> app.Topology:
        """Without bonds, which would tell."""
        made = app.Topology()
        residue = made.addResidue("ALA", made.addChain())
        for k in order:
            made.addAtom(atoms[k].name, atoms[k].element, residue)
        return made

    carbon = next(k for k, atom in enumerate(atoms) if atom.element.symbol == "C")
    order = [carbon, *range(1, carbon), 0, *range(carbon + 1, len(atoms))]
    with pytest.raises(ValueError, match=r"got 2 whose .* first at index 0: C, where .* 1\.008 Da"):
        check_structure(dipeptide.system, topology(order))
    check_structure(dipeptide.system, topology(list(range(len(atoms)))))
    heavier = copy.deepcopy(dipeptide.system)  # configurations do not see masses
    heavier.setParticleMass(0, 4.0)
    check_structure(heavier, topology(order))
