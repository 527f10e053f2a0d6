"""The openmmtools move: exact for a bad generator, at another temperature, and for double wells."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools import cache, states, utils
from scipy.stats import ks_2samp

from openmm_vtdis import pretrained
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.interop import openmmtools as module
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.mcmc.renoising import IndependentProposals, Proposal
from openmm_vtdis.sampling import PathSampler
from openmm_vtdis.targets import double_well
from tests.interop.moves import (
    TEMPERATURE,
    energies,
    gaussian_frames,
    reference_contexts,
    state,
    trained_archive,
    z_of_mean,
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_archive(tmp_path_factory.mktemp("move"))


@pytest.fixture
def contexts() -> cache.ContextCache:
    return reference_contexts()


@pytest.mark.parametrize("temperature", [TEMPERATURE, 420.0])
def test_it_leaves_the_boltzmann_distribution_as_it_is(
    archive: Path, contexts: cache.ContextCache, temperature: float
) -> None:
    move = DiffusionMove(archive, n_proposals=3, batch_size=300, seed=1)
    series = energies(move, temperature, 500, contexts)
    assert abs(z_of_mean(series, 3.0)) < 4.0
    assert series.std() ** 2 == pytest.approx(3.0, rel=0.35)
    assert 0.1 < move.fraction_accepted < 0.97
    assert move.statistics["n_proposed"] == 1_500


def test_proposals_are_drawn_in_batches_and_used_in_turn(
    archive: Path, contexts: cache.ContextCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of a move, six proposals, three a batch: two draws, and each sample is one."""
    drawn, tried = [], []
    sample, draw = PathSampler.sample, IndependentProposals.draw

    def sample_spy(self: PathSampler, n: int, **options: Any) -> Any:
        drawn.append(sample(self, n, **options))
        return drawn[-1]

    def draw_spy(self: IndependentProposals) -> Proposal:
        tried.append(draw(self))
        return tried[-1]

    monkeypatch.setattr(PathSampler, "sample", sample_spy)
    monkeypatch.setattr(IndependentProposals, "draw", draw_spy)
    move = DiffusionMove(archive, batch_size=3, seed=13)
    twin = copy.deepcopy(move)
    for k in range(6):
        energies((move, twin)[k % 2], TEMPERATURE, 1, contexts)
        assert len(drawn) == 1 + k // 3
    assert [len(batch) for batch in drawn] == [3, 3]
    for k, batch in enumerate(drawn):
        used = np.stack([p.x for p in tried[3 * k : 3 * k + 3]])
        np.testing.assert_array_equal(np.sort(used, axis=0), np.sort(batch.positions, axis=0))


def test_weights_that_are_off_show(
    archive: Path, contexts: cache.ContextCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: proposals whose log w forgets half of the energy."""
    draw = IndependentProposals.draw

    def broken(self: IndependentProposals) -> Proposal:
        found = draw(self)
        u = float(self.sampler.target.reduced_energy(torch.tensor(found.x[None]))[0])
        return Proposal(found.x, found.log_ratio + 0.5 * u)

    monkeypatch.setattr(IndependentProposals, "draw", broken)
    move = DiffusionMove(archive, n_proposals=3, batch_size=300, seed=2)
    assert abs(z_of_mean(energies(move, TEMPERATURE, 500, contexts), 3.0)) > 5.0


def test_a_path_is_renewed_in_each_call(
    archive: Path, contexts: cache.ContextCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And samples without weight, or whose energy is not a number, are never taken."""
    seen = []
    renew = IndependentProposals.renewed

    def spy(self: IndependentProposals, x: np.ndarray) -> Proposal:
        seen.append(renew(self, x))
        return seen[-1]

    monkeypatch.setattr(IndependentProposals, "renewed", spy)
    monkeypatch.setattr(
        IndependentProposals, "draw", lambda self: Proposal(np.full((3, 3), np.nan), -math.inf)
    )
    move = DiffusionMove(archive, seed=3)
    series = energies(move, TEMPERATURE, 5, contexts)
    assert np.ptp(series) < 1e-9
    assert len({proposal.log_ratio for proposal in seen}) == 5
    assert move.statistics == {"n_proposed": 5, "n_accepted": 0, "n_outside": 0}


def test_velocities_and_the_centre_stay(archive: Path, contexts: cache.ContextCache) -> None:
    move = DiffusionMove(archive, n_proposals=20, seed=4)
    x = gaussian_frames(1)[0] + np.array([3.0, -2.0, 1.0])
    v = np.arange(9.0).reshape(3, 3)
    sampler = states.SamplerState(
        x * unit.nanometer, velocities=v * unit.nanometer / unit.picosecond
    )
    move.apply(state(), sampler, contexts)
    after = sampler.positions.value_in_unit(unit.nanometer)
    assert move.n_accepted > 0
    assert np.abs(after - x).max() > 1e-3
    np.testing.assert_allclose(after.mean(axis=0), x.mean(axis=0), atol=1e-9)
    np.testing.assert_array_equal(
        sampler.velocities.value_in_unit(unit.nanometer / unit.picosecond), v
    )


def test_copies_share_the_generator_and_hold_no_weights(archive: Path) -> None:
    move = DiffusionMove(archive, n_proposals=2, seed=5)
    counts = {"n_proposed": 7, "n_accepted": 3, "n_outside": 2}
    move.statistics = counts
    twin = copy.deepcopy(move)
    assert twin._kept() is move._kept()
    assert twin.__getstate__() == move.__getstate__()
    stored = utils.deserialize(utils.serialize(move))
    assert isinstance(stored, DiffusionMove)
    assert stored.statistics == counts
    assert all(isinstance(v, str | int | None) for v in move.__getstate__().values())


def test_bad_input(archive: Path, contexts: cache.ContextCache, tmp_path: Path) -> None:
    move = DiffusionMove(archive, seed=6)
    sampler = states.SamplerState(gaussian_frames(1)[0] * unit.nanometer)
    with pytest.raises(ValueError, match="expected a System without constraints, got 1"):
        move.apply(state(constraint=True), sampler, contexts)
    four = states.SamplerState(np.zeros((4, 3)) * unit.nanometer)
    with pytest.raises(ValueError, match="expected a state of 3 particles.*got 4"):
        move.apply(state(), four, contexts)
    with pytest.raises(ValueError, match="n_proposals"):
        DiffusionMove(archive, n_proposals=0)
    with pytest.raises(ValueError, match="n_steps: expected an integer >= 2, got 0"):
        DiffusionMove(archive, n_steps=0)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        DiffusionMove(archive, seed=-1)
    with pytest.raises(FileNotFoundError, match="no such archive; save.. of a generator writes"):
        DiffusionMove(tmp_path / "nothing.vtdis")
    assert DiffusionMove("dw4").archive == str(pretrained.path("dw4").resolve())
    changed = tmp_path / "changed.vtdis"
    changed.write_bytes(archive.read_bytes())
    stale = DiffusionMove(changed, seed=7)
    module._KEPT.clear()
    changed.write_bytes(archive.read_bytes() + b" ")
    with pytest.raises(ValueError, match="a file that has changed since"):
        stale.apply(state(), sampler, contexts)


# -- a distribution that is not Gaussian ---------------------------------------------------------
def distance(x: np.ndarray) -> np.ndarray:
    """Of the first two particles, (n, 4, 2) -> (n,): two wells."""
    return np.linalg.norm(x[:, 0] - x[:, 1], axis=1)


@pytest.fixture(scope="module")
def double_wells() -> tuple[np.ndarray, np.ndarray]:
    """2,000 frames of DW-4, (n, 4, 2) in nm, that know no network; and their energies."""
    data = sample_hmc(
        double_well().target(), 1_000, 2, burn_in=200, thin=20, seed=31, progress=False
    )
    return data.positions.numpy(), data.reduced_energies.numpy()


def unlike(
    frames: np.ndarray, energies: np.ndarray, contexts: cache.ContextCache
) -> tuple[float, float]:
    """p that the move leaves frames like these, by energy and by distance.

    With twelve network evaluations, so that two of five proposals are refused, and twelve
    proposals between those configurations that count, so that these are nearly independent.
    """
    module._KEPT.clear()  # the same numbers in any order of the tests
    move = DiffusionMove(pretrained.path("dw4"), 12, 480, n_steps=12, seed=32)
    bench = double_well()
    thermodynamic = states.ThermodynamicState(bench.system, bench.temperature * unit.kelvin)
    sampler = states.SamplerState(np.pad(frames[0], [(0, 0), (0, 1)]) * unit.nanometer)
    x, u = [], []
    for _ in range(160):
        move.apply(thermodynamic, sampler, contexts)
        u.append(thermodynamic.reduced_potential(sampler))
        x.append(sampler.positions.value_in_unit(unit.nanometer)[:, :2])
    assert 0.3 < move.fraction_accepted < 0.8
    by_energy = ks_2samp(np.array(u), energies).pvalue
    return by_energy, ks_2samp(distance(np.array(x)), distance(frames)).pvalue


def test_dynamics_that_leaves_the_plane_is_not_mixed_with_flat_proposals(
    contexts: cache.ContextCache,
) -> None:
    """Such a chain would sample neither two dimensions nor three."""
    bench = double_well()
    thermodynamic = states.ThermodynamicState(bench.system, bench.temperature * unit.kelvin)
    flat = np.pad(bench.positions, [(0, 0), (0, 1)], constant_values=0.3)  # a plane, z = 0.3
    sampler = states.SamplerState(flat * unit.nanometer)
    move = DiffusionMove("dw4", n_steps=4, batch_size=4, seed=1)
    move.apply(thermodynamic, sampler, contexts)
    off = flat + np.random.default_rng(0).normal(scale=0.01, size=flat.shape)
    sampler.positions = off * unit.nanometer
    with pytest.raises(ValueError, match="DiffusionMove: expected particles at z = 0"):
        move.apply(thermodynamic, sampler, contexts)


def test_it_leaves_the_distribution_of_double_wells_as_it_is(
    double_wells: tuple[np.ndarray, np.ndarray], contexts: cache.ContextCache
) -> None:
    assert min(unlike(*double_wells, contexts)) > 1e-3


def test_path_densities_that_are_off_change_the_distribution(
    double_wells: tuple[np.ndarray, np.ndarray],
    contexts: cache.ContextCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control; off by half an energy about its mean, so that the chain still moves."""
    draw = IndependentProposals.draw

    def broken(self: IndependentProposals) -> Proposal:
        found = draw(self)
        u = float(self.sampler.target.reduced_energy(torch.tensor(found.x[None]))[0])
        return Proposal(found.x, found.log_ratio + 0.5 * (u + 22.6))

    monkeypatch.setattr(IndependentProposals, "draw", broken)
    assert unlike(*double_wells, contexts)[0] < 1e-6
