"""A System of your own, from OpenMM MD to reweighted averages, in about two minutes on one core.

Five Lennard-Jones particles in a weak trap: plain Langevin dynamics makes the training data, a
small network learns it, and the weighted samples are compared with more dynamics.
"""

from __future__ import annotations

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_vtdis import DiffusionBoltzmannGenerator, Estimate, WeightedEnsemble
from openmm_vtdis.ensemble import forward_ess

N_PARTICLES = 5
TEMPERATURE = 60.0 * unit.kelvin


def cluster() -> openmm.System:
    """Make a System of argon-like particles, kept together by a trap that depends on distances.

    The energy must not notice translations and rotations: a spring to a fixed point in space would
    be refused, springs between the particles are fine.
    """
    force = openmm.CustomBondForce("4*epsilon*(s6*s6-s6)+0.5*k*r^2; s6=(sigma/r)^6")
    force.addGlobalParameter("epsilon", 1.0)  # kJ/mol
    force.addGlobalParameter("sigma", 0.34)  # nm
    force.addGlobalParameter("k", 2.0)  # kJ/mol/nm^2
    system = openmm.System()
    for i in range(N_PARTICLES):
        system.addParticle(39.9)
        for j in range(i):
            force.addBond(i, j)
    system.addForce(force)
    return system


def dynamics(system: openmm.System, n_frames: int, seed: int) -> np.ndarray:
    """Positions (n_frames, N, 3) in nm, every 1 ps of Langevin dynamics."""
    integrator = openmm.LangevinMiddleIntegrator(
        TEMPERATURE, 1.0 / unit.picosecond, 10.0 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, integrator, platform)
    context.setPositions(0.4 * np.random.default_rng(seed).normal(size=(N_PARTICLES, 3)))
    openmm.LocalEnergyMinimizer.minimize(context)
    integrator.step(5_000)
    frames = np.empty((n_frames, N_PARTICLES, 3))
    for frame in frames:
        integrator.step(100)
        state = context.getState(getPositions=True)
        frame[:] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return frames


def radius_of_gyration(x: np.ndarray) -> np.ndarray:
    """(n, N, 3) -> (n,), nm."""
    return np.sqrt(((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=2).mean(axis=1))


def blocked(values: np.ndarray, n_blocks: int = 20) -> Estimate:
    """Mean of a correlated series, with an error from blocks."""
    blocks = np.array([block.mean() for block in np.array_split(values, n_blocks)])
    return Estimate(blocks.mean(), blocks.std(ddof=1) / np.sqrt(n_blocks))


def main(
    n_frames: int = 20_000, n_iterations: int = 3_000, n_samples: int = 4_000
) -> tuple[WeightedEnsemble, Estimate]:
    """Run all of it; returns the weighted samples and the radius of gyration from dynamics."""
    system = cluster()
    md, more_md = (dynamics(system, n_frames, seed) for seed in (1, 2))

    gen = DiffusionBoltzmannGenerator(
        system, temperature=TEMPERATURE, network="egnn-3x32", seed=0
    )  # no topology: the particles are identical, which is checked
    gen.train(md, n_iterations, batch_size=256, learning_rate=3e-3)
    print(gen.tune(md, n_steps=50))

    ensemble = gen.sample(n_samples, seed=0)
    print(ensemble.diagnostics())
    print(f"forward ESS on new frames {forward_ess(gen.log_weights(more_md[::10], seed=1)):.1%}")

    reference = blocked(radius_of_gyration(more_md))
    reweighted = ensemble.expectation(radius_of_gyration)
    energy = gen.target.reduced_energy(torch.tensor(more_md)).numpy()
    print(f"<Rg>  dynamics {reference} nm, reweighted {reweighted} nm")
    print(f"<u>   dynamics {blocked(energy)}, ", end="")
    print(f"reweighted {ensemble.expectation(ensemble.reduced_energies)}")
    return ensemble, reference


if __name__ == "__main__":
    main()
