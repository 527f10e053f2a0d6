"""A small generator and equilibrium frames of its system."""

from __future__ import annotations

import numpy as np
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import double_well


def equilibrium_frames() -> np.ndarray:
    data = sample_hmc(
        double_well().target(), n_chains=300, n_samples=2, burn_in=60, seed=1, progress=False
    )
    return data.positions.numpy()


def new_generator() -> DiffusionBoltzmannGenerator:
    torch.manual_seed(0)
    system = double_well()
    return DiffusionBoltzmannGenerator(
        system.system, system.topology, system.temperature, n_dims=2, network="egnn-2x16"
    )


def trained_generator(frames: np.ndarray) -> DiffusionBoltzmannGenerator:
    gen = new_generator()
    gen.train(frames, 200, batch_size=64, learning_rate=3e-3, progress=False)
    gen.tune(frames, 20, "isotropic", n_trajectories=500, progress=False)
    return gen
