"""The openmmtools move: exact for a bad generator, at another temperature, stored and resumed."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from openmmtools import cache, mcmc, multistate, states, utils
from pymbar import timeseries
from scipy.stats import ks_2samp

from openmm_vtdis import DiffusionBoltzmannGenerator, pretrained
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.ensemble.diagnostics import log_mean_weight
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.interop import openmmtools as module
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.mcmc.renoising import IndependentProposals, Proposal
from openmm_vtdis.sampling import PathSampler
from openmm_vtdis.targets import double_well
from openmm_vtdis.topology import Handedness, stereocentres, symmetry_labels
from tests.molecules import molecule

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


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that has hardly been trained: its samples are wrong, its weights are not."""
    gen = DiffusionBoltzmannGenerator(
        springs(), None, TEMPERATURE * unit.kelvin, network="egnn-2x16", seed=0
    )
    frames = gaussian_frames(4_000)
    gen.train(frames, 60, batch_size=64, learning_rate=5e-3, progress=False)
    gen.tune(frames, 4, "isotropic", n_trajectories=2_000, progress=False)
    return gen.save(tmp_path_factory.mktemp("move") / "springs.vtdis")


def gaussian_frames(n: int, m: int = 3) -> np.ndarray:
    """Exact samples: all normal modes of m particles have m times the stiffness of a spring."""
    kT = thermal_energy(TEMPERATURE)
    x = np.random.default_rng(0).normal(size=(n, m, 3)) * np.sqrt(kT / (m * STIFFNESS))
    return x - x.mean(axis=1, keepdims=True)


def state(temperature: float = TEMPERATURE, **options: Any) -> states.ThermodynamicState:
    return states.ThermodynamicState(springs(**options), temperature * unit.kelvin)


def reference_contexts() -> cache.ContextCache:
    return cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))


@pytest.fixture
def contexts() -> cache.ContextCache:
    return reference_contexts()


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


def test_both_kinds_of_weights_have_one_known_log_z(archive: Path) -> None:
    """A factor in one of them changes only how often a step is taken, which no average shows."""
    proposals = DiffusionMove(archive, batch_size=1_000, seed=11)._kept().proposals
    target = proposals.sampler.target
    exact = 3.0 * math.log(2.0 * math.pi * thermal_energy(TEMPERATURE) / (3.0 * STIFFNESS))

    def energies_of(x: list[np.ndarray]) -> np.ndarray:
        return target.reduced_energy(torch.tensor(np.stack(x))).numpy()

    drawn = [proposals.draw() for _ in range(1_000)]
    log_w = np.array([p.log_ratio for p in drawn]) - energies_of([p.x for p in drawn])
    frames = list(gaussian_frames(300))
    log_v = np.array([proposals.renewed(x).log_ratio for x in frames]) - energies_of(frames)
    assert abs(log_mean_weight(log_w).z(exact)) < 4.0
    assert abs(log_mean_weight(-log_v).z(-exact)) < 4.0
    assert abs(log_mean_weight(-(log_v + 1.0)).z(-exact)) > 4.0  # control


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


def test_a_resumed_run_draws_others(archive: Path) -> None:
    """Its states have come from the first ones: they would not be independent."""
    move = DiffusionMove(archive, batch_size=5, seed=12)
    first = [move._kept().proposals.draw().x for _ in range(5)]
    move.n_proposed = 5
    module._KEPT.clear()  # as in another process
    second = [move._kept().proposals.draw().x for _ in range(5)]
    assert min(np.abs(a - b).max() for a in first for b in second) > 1e-6
    module._KEPT.clear()
    again = DiffusionMove(archive, batch_size=5, seed=12)
    np.testing.assert_array_equal(first[0], again._kept().proposals.draw().x)


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


# -- storage -------------------------------------------------------------------------------------
SAMPLERS = [multistate.MultiStateSampler, multistate.ReplicaExchangeSampler]


def stored_run(kind: type, archive: Path, file: Path, n: int) -> Any:
    """A sampler of three temperatures with the move in a sequence, every other iteration stored."""
    langevin = mcmc.LangevinDynamicsMove(n_steps=5, timestep=1.0 * unit.femtosecond)
    move = mcmc.SequenceMove([DiffusionMove(archive, batch_size=20, seed=8), langevin])
    sampler = kind(mcmc_moves=move, number_of_iterations=n)
    sampler.energy_context_cache = sampler.sampler_context_cache = reference_contexts()
    ladder = [state(t) for t in (300.0, 350.0, 420.0)]
    start = states.SamplerState(gaussian_frames(1)[0] * unit.nanometer)
    sampler.create(ladder, [start] * 3, multistate.MultiStateReporter(file, checkpoint_interval=2))
    return sampler


def resumed(kind: type, file: Path) -> Any:
    """The same from its file, as in another process."""
    module._KEPT.clear()
    sampler = kind.from_storage(multistate.MultiStateReporter(file, checkpoint_interval=2))
    sampler.energy_context_cache = sampler.sampler_context_cache = reference_contexts()
    return sampler


def proposed(sampler: Any) -> list[int]:
    """n_proposed of each state's move."""
    return [move.move_list[0].n_proposed for move in sampler.mcmc_moves]


@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.__name__)
def test_a_run_is_stored_and_goes_on(archive: Path, tmp_path: Path, kind: type) -> None:
    file = tmp_path / "run.nc"
    sampler = stored_run(kind, archive, file, 4)
    sampler.run()
    assert proposed(sampler) == [4, 4, 4]
    del sampler
    again = resumed(kind, file)
    assert again.iteration == 4
    assert proposed(again) == [4, 4, 4]
    again.extend(2)
    assert again.iteration == 6
    assert proposed(again) == [6, 6, 6]


VICTIM = """
import sys, time
from pathlib import Path
from tests.interop import test_openmmtools as module

apply = module.DiffusionMove.apply

def wait_in_the_sixth(self, *args, **options):
    if self.n_proposed == 5:
        print("now", flush=True)
        time.sleep(60.0)
    apply(self, *args, **options)

module.DiffusionMove.apply = wait_in_the_sixth
kind = module.multistate.ReplicaExchangeSampler
module.stored_run(kind, Path(sys.argv[1]), Path(sys.argv[2]), 9).run()
"""


def test_a_run_that_is_killed_goes_on_where_it_was_stored(archive: Path, tmp_path: Path) -> None:
    """SIGKILL in the sixth iteration: the fourth is the last whose positions are stored."""
    file = tmp_path / "run.nc"
    command = [sys.executable, "-c", VICTIM, str(archive), str(file)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        assert "now\n" in iter(process.stdout.readline, "")
        process.kill()
    assert process.returncode != 0
    again = resumed(multistate.ReplicaExchangeSampler, file)
    assert again.iteration == 4
    assert proposed(again) == [5, 5, 5]  # moves are stored in each iteration
    again.run()
    assert again.iteration == 9
    assert proposed(again) == [10, 10, 10]
    del again
    assert proposed(resumed(multistate.ReplicaExchangeSampler, file)) == [10, 10, 10]


def test_processes_that_share_replicas_draw_their_own_numbers(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that are offered the same samples become alike, and exchanges between them wrong."""

    def first(rank: int) -> np.ndarray:
        monkeypatch.setattr(module, "get_mpicomm", lambda: SimpleNamespace(rank=rank))
        module._KEPT.clear()
        return DiffusionMove(archive, batch_size=4, seed=11)._kept().proposals.draw().x

    np.testing.assert_array_equal(first(0), first(0))
    assert np.abs(first(0) - first(1)).min() > 0.0


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


# -- a stereocentre that dynamics inverts --------------------------------------------------------
CENTRE = molecule(["C", "F", "Cl", "Br", "H"], [(0, k) for k in range(1, 5)])
HAND = Handedness.of(
    stereocentres(CENTRE, symmetry_labels(CENTRE).tolist()), torch.tensor(gaussian_frames(1, 5)[0])
)


def is_inside(sampler: states.SamplerState) -> bool:
    x = torch.tensor(sampler.positions.value_in_unit(unit.nanometer))
    return int(HAND.agreement(x[None])) == 1


@pytest.fixture(scope="module", params=["reference", "any"])
def chiral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of CHFClBr, whose atoms pass through each other."""
    gen = DiffusionBoltzmannGenerator(
        springs(n=5),
        CENTRE,
        TEMPERATURE,
        network="egnn-2x16",
        stereochemistry=request.param,
        seed=0,
    )
    frames = HAND.fold(torch.tensor(gaussian_frames(4_000, 5)))[0].numpy()
    gen.train(frames, 60, batch_size=64, learning_rate=5e-3, progress=False)
    gen.tune(frames, 4, "isotropic", n_trajectories=2_000, progress=False)
    assert (gen.handedness == HAND) == (request.param == "reference")
    return gen.save(tmp_path_factory.mktemp("chiral") / f"{request.param}.vtdis")


def both_isomers(
    move: mcmc.MCMCMove, contexts: cache.ContextCache, n: int = 800
) -> tuple[np.ndarray, np.ndarray]:
    """Whether it is inside, and u, after each call of the move and a piece of dynamics at 450 K.

    That is overdamped Langevin dynamics, which springs have an exact solution of.
    """
    thermodynamic = states.ThermodynamicState(springs(n=5), 450.0 * unit.kelvin)
    kicks = math.sqrt(450.0 / TEMPERATURE) * gaussian_frames(n + 1, 5)
    sampler = states.SamplerState(kicks[n] * unit.nanometer)
    inside, u = [], []
    for kick in kicks[:n]:
        move.apply(thermodynamic, sampler, contexts)
        x = sampler.positions.value_in_unit(unit.nanometer)
        x = 0.9 * (x - x.mean(axis=0)) + math.sqrt(1.0 - 0.9**2) * kick
        sampler.positions = x * unit.nanometer
        inside.append(is_inside(sampler))
        u.append(0.5 * 5.0 * STIFFNESS * np.square(x).sum() / thermal_energy(450.0))
    return np.array(inside, dtype=float), np.array(u)


def test_all_isomers_keep_their_density_where_dynamics_inverts_a_centre(
    chiral: Path, contexts: cache.ContextCache
) -> None:
    move = DiffusionMove(chiral, batch_size=300, seed=14)
    inside, u = both_isomers(move, contexts)
    assert abs(z_of_mean(inside, 0.5)) < 4.0
    assert abs(z_of_mean(u, 6.0)) < 4.0
    assert 0.3 < move.fraction_accepted < 0.8
    assert move.n_proposed + move.n_outside == 800
    assert (move.n_outside > 100) == (chiral.stem == "reference")


@pytest.mark.parametrize("chiral", ["reference"], indirect=True)
def test_a_move_that_brought_the_chain_back_would_change_the_density(
    chiral: Path, contexts: cache.ContextCache
) -> None:
    """Negative control: any proposal is taken outside, being worth infinitely more there."""

    class Returning(DiffusionMove):
        def apply(self, state: Any, sampler: states.SamplerState, contexts: Any = None) -> None:
            while not is_inside(sampler):
                sampler.positions = self._kept().proposals.draw().x * unit.nanometer
            super().apply(state, sampler, contexts)

    inside, _ = both_isomers(Returning(chiral, batch_size=300, seed=15), contexts)
    assert z_of_mean(inside, 0.5) > 5.0


def test_a_configuration_of_another_isomer_stays_and_is_counted(
    chiral: Path, contexts: cache.ContextCache, caplog: pytest.LogCaptureFixture
) -> None:
    move = DiffusionMove(chiral, 5, seed=16)
    x = -gaussian_frames(1, 5)[0] + 1.0
    sampler = states.SamplerState(x * unit.nanometer)
    thermodynamic = states.ThermodynamicState(springs(n=5), TEMPERATURE * unit.kelvin)
    for _ in range(2):
        move.apply(thermodynamic, sampler, contexts)
    unchanged = np.array_equal(sampler.positions.value_in_unit(unit.nanometer), x)
    warnings = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    if chiral.stem == "reference":
        assert unchanged
        assert move.statistics == {"n_proposed": 0, "n_accepted": 0, "n_outside": 2}
        (warning,) = warnings
        assert "DiffusionMove: a stereocentre has another handedness" in warning
    else:
        assert not unchanged
        assert move.n_proposed == 10
        assert move.n_outside == 0
        assert not warnings


# -- a sampler in place of a file ---------------------------------------------------------------
def test_a_move_of_a_sampler_does_what_that_of_its_archive_does(
    archive: Path, contexts: cache.ContextCache
) -> None:
    sampler = DiffusionBoltzmannGenerator.load(archive).path_sampler()
    module._KEPT.clear()
    by_file = energies(DiffusionMove(archive, batch_size=9, seed=3), TEMPERATURE, 20, contexts)
    move = DiffusionMove(sampler, batch_size=9, seed=3)
    assert np.ptp(by_file) > 0.0
    np.testing.assert_allclose(energies(move, TEMPERATURE, 20, contexts), by_file, rtol=1e-9)
    assert copy.deepcopy(move)._kept() is move._kept()
    fewer = DiffusionMove(sampler, batch_size=9, seed=3, n_steps=7)
    assert fewer._kept().proposals.sampler.n_steps == 7


def test_a_move_of_a_sampler_says_in_another_process_what_it_lacks(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = DiffusionMove(DiffusionBoltzmannGenerator.load(archive).path_sampler(), seed=3)
    stored = utils.serialize(move)
    monkeypatch.setattr(module, "_KEPT", {})
    monkeypatch.setattr(module, "_SAMPLERS", {})
    with pytest.raises(ValueError, match=r"expected the sampler that this move was made with"):
        utils.deserialize(stored)._kept()
