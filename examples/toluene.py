"""A molecule of your own, from plain MD to a reweighted free-energy profile: toluene at 300 K.

A ring, a methyl group that turns almost freely, no stereocentre. `openmm.app.Simulation` makes the
training data; a second run, which the model never sees, judges it. About twenty minutes on one
core; writes `toluene-output/`. So short a training makes samples of the right shape, with weights
that are not flat yet, and `diagnostics()` says so: train ten times as long for averages.
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

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.ensemble import forward_ess
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


def methyl_angle(traj: mdtraj.Trajectory) -> np.ndarray:
    """Torsion H-C-C-C of methyl and ring in degrees, folded by its six-fold symmetry: (n,)."""
    index = {atom.name: atom.index for atom in traj.topology.atoms}
    atoms = [index[name] for name in ("H6", "C7", "C6", "C4")]
    return np.rad2deg(mdtraj.compute_dihedrals(traj, [atoms])[:, 0]) % 60.0


def main(
    n_frames: int = 20_000,
    n_iterations: int = 5_000,
    n_samples: int = 2_000,
    n_steps: int = 50,
) -> WeightedEnsemble:
    """Run all of it; returns the weighted samples."""
    OUTPUT.mkdir(exist_ok=True)
    molecule = TolueneVacuum(constraints=None)
    md, more_md = (dynamics(molecule, OUTPUT / f"md-{s}.dcd", n_frames, s) for s in (1, 2))

    gen = DiffusionBoltzmannGenerator(
        molecule.system, molecule.topology, TEMPERATURE, network="egnn-4x64", seed=0
    )
    gen.train(md, n_iterations, batch_size=128, checkpoint=OUTPUT / "network.ckpt")
    gen.train_covariance(md, n_iterations // 4, batch_size=128)
    for covariance in ("isotropic", "pairwise"):
        gen.tune(md, n_steps, covariance, n_trajectories=n_samples)
        ess = forward_ess(gen.noise(more_md[::10], seed=1))
        print(f"{covariance:<10} forward ESS on the second run {ess:.1%}")
    gen.save(OUTPUT / "toluene.vtdis")

    ensemble = gen.sample(n_samples, seed=0)
    print(ensemble.diagnostics())
    ensemble.save(OUTPUT / "toluene.nc")

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    energy_histogram(ensemble, energies(gen, more_md), ax=left)
    edges = np.linspace(0.0, 60.0, 13)
    density = np.histogram(methyl_angle(more_md), edges, density=True)[0]
    free_energy_profile(density, edges, ax=right, label="MD")
    density, _, stderr = ensemble.histogram(methyl_angle(ensemble.to_mdtraj()), edges)
    free_energy_profile(density, edges, stderr, ax=right, label="generated, reweighted")
    right.set_xlabel("methyl torsion / degrees")
    figure.savefig(OUTPUT / "toluene.png", dpi=150)
    print(f"wrote {OUTPUT / 'toluene.png'}, toluene.nc and toluene.vtdis")
    return ensemble


def energies(gen: DiffusionBoltzmannGenerator, traj: mdtraj.Trajectory) -> np.ndarray:
    """Reduced energies (n,) of MD frames."""
    return gen.target.reduced_energy(torch.tensor(traj.xyz)).numpy()


if __name__ == "__main__":
    main()
