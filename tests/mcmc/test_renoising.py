"""Proposals by noise and back: drawn and renewed ones have weights with one known log Z."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.ensemble.diagnostics import log_mean_weight
from openmm_vtdis.interop import DiffusionMove
from tests.interop.moves import STIFFNESS, TEMPERATURE, gaussian_frames, trained_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_archive(tmp_path_factory.mktemp("move"))


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
