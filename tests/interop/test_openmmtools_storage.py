"""The openmmtools move in runs that are stored, killed, resumed and shared between processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools import cache, mcmc, multistate, states, utils

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.interop import openmmtools as module
from tests.interop.moves import (
    TEMPERATURE,
    energies,
    gaussian_frames,
    reference_contexts,
    state,
    trained_archive,
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_archive(tmp_path_factory.mktemp("move"))


@pytest.fixture
def contexts() -> cache.ContextCache:
    return reference_contexts()


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
from tests.interop import test_openmmtools_storage as module

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


def test_a_move_of_a_sampler_that_was_trained_on_says_so(archive: Path) -> None:
    gen = DiffusionBoltzmannGenerator.load(archive)
    move = DiffusionMove(gen.path_sampler(), seed=3)
    move._kept()  # control
    with torch.no_grad():
        next(gen.network.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="whose network has changed since"):
        move._kept()
