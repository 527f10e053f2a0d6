"""The openmmtools move where dynamics inverts a stereocentre: all isomers keep their density."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools import cache, mcmc, states

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.interop import openmmtools as module
from openmm_vtdis.topology import Handedness, stereocentres, symmetry_labels
from tests.interop.moves import (
    STIFFNESS,
    TEMPERATURE,
    gaussian_frames,
    reference_contexts,
    springs,
    z_of_mean,
)
from tests.molecules import molecule


@pytest.fixture
def contexts() -> cache.ContextCache:
    return reference_contexts()


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
