"""Springs, whose Boltzmann distribution is known, and chains of the openmmtools move on them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit
from openmmtools import cache, states
from pymbar import timeseries

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.interop import DiffusionMove

TEMPERATURE, STIFFNESS = 300.0, 300.0


def springs(constraint: bool = False, n: int = 3) -> openmm.System:
    """Particles with springs of no length: a Gaussian, <u> = 3 (n - 1) / 2 at any temperature."""
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    for _ in range(n):
        system.addParticle(12.0)
    for i, j in itertools.combinations(range(n), 2):
        force.addBond(i, j, 0.0, STIFFNESS)
    system.addForce(force)
    if constraint:
        system.addConstraint(0, 1, 0.1)
    return system


def trained_archive(folder: Path) -> Path:
    """A generator that has hardly been trained: its samples are wrong, its weights are not."""
    gen = DiffusionBoltzmannGenerator(
        springs(), None, TEMPERATURE * unit.kelvin, network="egnn-2x16", seed=0
    )
    frames = gaussian_frames(4_000)
    gen.train(frames, 60, batch_size=64, learning_rate=5e-3, progress=False)
    gen.tune(frames, 4, "isotropic", n_trajectories=2_000, progress=False)
    return gen.save(folder / "springs.vtdis")


def gaussian_frames(n: int, m: int = 3) -> np.ndarray:
    """Exact samples: all normal modes of m particles have m times the stiffness of a spring."""
    kT = thermal_energy(TEMPERATURE)
    x = np.random.default_rng(0).normal(size=(n, m, 3)) * np.sqrt(kT / (m * STIFFNESS))
    return x - x.mean(axis=1, keepdims=True)


def state(temperature: float = TEMPERATURE, **options: Any) -> states.ThermodynamicState:
    return states.ThermodynamicState(springs(**options), temperature * unit.kelvin)


def reference_contexts() -> cache.ContextCache:
    return cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))


def energies(
    move: DiffusionMove, temperature: float, n: int, contexts: cache.ContextCache
) -> np.ndarray:
    """u after each call."""
    thermodynamic = state(temperature)
    sampler = states.SamplerState(gaussian_frames(1)[0] * unit.nanometer)
    series = []
    for _ in range(n):
        move.apply(thermodynamic, sampler, contexts)
        series.append(thermodynamic.reduced_potential(sampler))
    return np.array(series)


def z_of_mean(series: np.ndarray, exact: float) -> float:
    g = timeseries.statistical_inefficiency(series)
    return float((series.mean() - exact) / (series.std() * math.sqrt(g / len(series))))
