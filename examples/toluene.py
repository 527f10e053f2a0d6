"""A molecule of your own, from plain MD to a reweighted free-energy profile: toluene at 300 K.

A ring, a methyl group that turns almost freely, no stereocentre. `openmm.app.Simulation` makes the
training data; a second run, which the model never sees, judges it. Half an hour on one core, half
of it training; writes `toluene-output/`. Called again, it goes on from the network that it has
trained.
"""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import openmm
import torch
from matplotlib.figure import Figure
from openmm import app, unit
from openmmtools.testsystems import TolueneVacuum

from openmm_vtdis import DiffusionBoltzmannGenerator, Estimate, WeightedEnsemble
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.ensemble.bar import statistical_inefficiency
from openmm_vtdis.plotting import energy_histogram, free_energy_profile

OUTPUT = Path("toluene-output")
TEMPERATURE = 300.0 * unit.kelvin


def dynamics(molecule: TolueneVacuum, path: Path, n_frames: int, seed: int) -> mdtraj.Trajectory:
    """Frames every 100 fs of Langevin dynamics, written to a DCD file and read again."""
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURE, 2.0 / unit.picosecond, 1.0 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(TEMPERATURE, seed)
    simulation.step(20_000)
    simulation.reporters.append(app.DCDReporter(str(path), 100))
    simulation.step(100 * n_frames)
    del simulation  # closes the file
    return mdtraj.load(path, top=mdtraj.Topology.from_openmm(molecule.topology))


def torsion(traj: mdtraj.Trajectory, *names: str) -> np.ndarray:
    """A dihedral angle in degrees: (n,)."""
    index = {atom.name: atom.index for atom in traj.topology.atoms}
    atoms = [index[name] for name in names]
    return np.rad2deg(mdtraj.compute_dihedrals(traj, [atoms])[:, 0])


def methyl_turn(traj: mdtraj.Trajectory) -> np.ndarray:
    """Turn of the methyl group about its bond, folded by symmetry to 0 to 60 degrees: (n,)."""
    return torsion(traj, "H6", "C7", "C6", "C4") % 60.0


def methyl_bend(traj: mdtraj.Trajectory) -> np.ndarray:
    """Bend of the methyl group out of the plane of the ring, to either side, in degrees: (n,)."""
    return 180.0 - abs(torsion(traj, "C4", "C5", "C6", "C7"))


def time_average(series: np.ndarray) -> Estimate:
    """Mean (n,) of correlated frames."""
    n = len(series) / statistical_inefficiency(series)
    return Estimate(series.mean(), series.std() / np.sqrt(n))


def main(
    n_frames: int = 20_000,
    n_iterations: int = 5_000,
    n_samples: int = 2_000,
    n_steps: int = 100,
) -> WeightedEnsemble:
    """Run all of it; returns the weighted samples."""
    OUTPUT.mkdir(exist_ok=True)
    molecule = TolueneVacuum(constraints=None)
    md, more_md = (dynamics(molecule, OUTPUT / f"md-{s}.dcd", n_frames, s) for s in (1, 2))

    gen = DiffusionBoltzmannGenerator(
        molecule.system, molecule.topology, TEMPERATURE, network="egnn-4x64", seed=0
    )
    gen.train(md, n_iterations, batch_size=128, checkpoint=OUTPUT / "network.ckpt")
    gen.train_pair_head(md, n_iterations // 4, batch_size=128)
    for covariance in ("isotropic", "pairwise"):
        gen.tune(md, n_steps, covariance, n_trajectories=n_samples)
        ess = forward_ess(gen.log_weights(more_md[::10], seed=1))
        print(f"{covariance:<10} forward ESS on the second run {ess:.1%}")
    gen.save(OUTPUT / "toluene.vtdis")

    ensemble = gen.sample(n_samples, seed=0)
    print(ensemble.diagnostics())
    ensemble.save(OUTPUT / "toluene.nc")

    print(f"{'':<24}{'raw':>16}{'reweighted':>16}{'MD':>16}")
    generated = ensemble.to_mdtraj()
    for name, ours, theirs in (
        ("energy / kT", ensemble.reduced_energies, energies(gen, more_md)),
        ("bend^2 / degrees^2", methyl_bend(generated) ** 2, methyl_bend(more_md) ** 2),
        ("share of turn < 30", methyl_turn(generated) < 30.0, methyl_turn(more_md) < 30.0),
    ):
        found = [e.expectation(1.0 * ours) for e in (ensemble.unweighted(), ensemble)]
        print(f"{name:<24}{found[0]!s:>16}{found[1]!s:>16}{time_average(1.0 * theirs)!s:>16}")
    plot(ensemble, energies(gen, more_md), methyl_bend(generated), methyl_bend(more_md))
    print(f"wrote {OUTPUT / 'toluene.png'}, toluene.nc and toluene.vtdis")
    return ensemble


def energies(gen: DiffusionBoltzmannGenerator, traj: mdtraj.Trajectory) -> np.ndarray:
    """Reduced energies (n,) of MD frames."""
    return gen.target.reduced_energy(torch.tensor(traj.xyz)).numpy()


def plot(
    ensemble: WeightedEnsemble, md_energies: np.ndarray, bend: np.ndarray, md_bend: np.ndarray
) -> None:
    """Plot energies, and the free energy of the bend."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    energy_histogram(ensemble, md_energies, left, bins=30)
    edges = np.array([*np.linspace(0.0, 18.0, 7), 180.0])
    density = np.histogram(md_bend, edges, density=True)[0]
    free_energy_profile(density, edges, ax=right, label="MD")
    for weighted, label in ((ensemble, "reweighted"), (ensemble.unweighted(), "raw")):
        density, _, stderr = weighted.histogram(bend, edges)
        free_energy_profile(density, edges, stderr, ax=right, label=f"generated, {label}")
    right.set(xlabel="methyl group out of the plane / degrees", xlim=(0, 16.5), ylim=(-0.5, 4))
    figure.savefig(OUTPUT / "toluene.png", dpi=150)


if __name__ == "__main__":
    main()
