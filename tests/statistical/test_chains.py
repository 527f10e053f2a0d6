"""Markov chains over many seeds: HMC with the error between its chains, and the generator's move.

What n seeds show is computed in ``judge.seen``.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from openmmtools import cache, states
from scipy import stats

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.ensemble import Estimate
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.mcmc.renoising import IndependentProposals, Proposal
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import springs
from tests.statistical.judge import collect, faults


# -- HMC ---------------------------------------------------------------------------------------
@functools.cache
def mixture() -> tuple[GaussianMixture, Estimate]:
    """Two components that overlap, and <u> of them from many exact samples."""
    noise = 0.4 * torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    target = GaussianMixture(noise, [0.15, 0.3], [2.0, 1.0], Space(4, 2))
    u = target.reduced_energy(target.sample(1_000_000, seed=0))
    return target, Estimate(float(u.mean()), float(u.std()) / 1e3)


def hmc(seed: int) -> dict[str, float]:
    """From exact samples, with a burn-in in which the step size adapts."""
    target, exact = mixture()
    start, run = np.random.SeedSequence(seed).generate_state(2).tolist()
    data = sample_hmc(
        target, 60, 6, burn_in=20, thin=1, step_size=0.3, n_leapfrog=2,
        initial=target.sample(60, seed=start), seed=run, progress=False,
    )  # fmt: skip
    report = data.report
    energy = Estimate(report.energy, report.energy_stderr)
    alone = Estimate(report.energy, report.energy_std / math.sqrt(len(data.positions)))
    return {
        "<u>": energy.z(exact.value, exact.stderr),
        "virial": report.virial_z,
        "control": alone.z(exact.value, exact.stderr),
    }


@pytest.mark.slow
def test_hmc() -> None:
    """Control: the error of samples that are taken for independent ones, along the chains too."""
    found = faults(collect(hmc, range(1_000)))
    assert found.keys() == {"control"}
    assert "width" in found["control"]


def test_hmc_over_a_few_seeds() -> None:
    z = collect(hmc, range(20))
    assert not faults({name: z[name] for name in ("<u>", "virial")})


# -- the move ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of springs that has hardly been trained."""
    target, _ = springs(300.0)
    gen = DiffusionBoltzmannGenerator(target.system, None, 300.0, network="egnn-1x16", seed=0)
    frames = equilibrium(300.0, 2_000, 0)
    gen.train(frames, 60, batch_size=64, learning_rate=5e-3, progress=False)
    gen.tune(frames, 4, "isotropic", n_trajectories=500, progress=False)
    return gen.save(tmp_path_factory.mktemp("move") / "springs.vtdis")


def equilibrium(temperature: float, n: int, seed: int) -> np.ndarray:
    """Exact samples (n, 3, 3) of the springs."""
    x = np.random.default_rng(seed).normal(size=(n, 3, 3))
    x *= math.sqrt(thermal_energy(temperature) / 900.0)
    return x - x.mean(axis=1, keepdims=True)


def chains(archive: Path, temperature: float, n: int, n_moves: int) -> np.ndarray:
    """u after each move of n chains that start from exact samples: (n, n_moves)."""
    move = DiffusionMove(archive, batch_size=500, seed=int(temperature))
    thermodynamic = states.ThermodynamicState(springs(300.0)[0].system, temperature * unit.kelvin)
    contexts = cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))
    u = np.empty((n, n_moves))
    for i, frame in enumerate(equilibrium(temperature, n, int(temperature))):
        sampler = states.SamplerState(frame * unit.nanometer)
        for k in range(n_moves):
            move.apply(thermodynamic, sampler, contexts)
            u[i, k] = thermodynamic.reduced_potential(sampler)
    assert 0.1 < move.fraction_accepted < 0.97
    return u


def z_scores(u: np.ndarray) -> dict[str, np.ndarray]:
    """After any number of moves u is half of a chi squared with 6 degrees of freedom; its mean over
    25 chains has the error of the spread between them, and is a Student's t. (Over 10, whose means
    are skewed, t is biased by a quarter.)
    """
    last = stats.norm.ppf(stats.gamma.cdf(u[:, -1], 3.0))
    means = u.mean(axis=1).reshape(-1, 25)
    t = (means.mean(axis=1) - 3.0) / (means.std(axis=1, ddof=1) / 5.0)
    return {"u": last, "<u>": stats.norm.ppf(stats.t.cdf(t, 24))}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [300.0, 420.0])
def test_the_move(archive: Path, temperature: float) -> None:
    assert not faults(z_scores(chains(archive, temperature, 1_000, 4)))


@pytest.mark.slow
def test_proposals_whose_weight_forgets_half_of_the_energy(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    draw = IndependentProposals.draw

    def broken(self: IndependentProposals) -> Proposal:
        found = draw(self)
        u = float(self.sampler.target.reduced_energy(torch.tensor(found.x[None]))[0])
        return Proposal(found.x, found.log_ratio + 0.5 * u)

    monkeypatch.setattr(IndependentProposals, "draw", broken)
    found = faults(z_scores(chains(archive, 420.0, 500, 4)))
    assert "mean" in found["u"]
    assert "mean" in found["<u>"]


def test_the_move_over_a_few_chains(archive: Path) -> None:
    assert not faults(z_scores(chains(archive, 420.0, 75, 2)))
