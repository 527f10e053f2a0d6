"""What a tuning is fitted to, stopped by and judged by are different trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.tuning import tune
from openmm_vtdis.tuning.fit import Fit, Trajectories
from openmm_vtdis.tuning.tune import TuningConfig, TuningReport
from tests.conftest import make_oracle

ORACLE = make_oracle(3, 2, True)
GRID = Schedule.geometric(8, 0.05, 20.0)


def tuned(held_out: Tensor) -> TuningReport:
    process = DiffusionProcess.ddpm(ORACLE.denoiser, GRID, ORACLE.reduced_energy)
    family = make_covariance("isotropic", ORACLE.space, [0, 1, 2])
    rng = torch.Generator().manual_seed(2)
    frames = ORACLE.sample(800, seed=0)
    return tune.tune(
        process, [family], ORACLE.reduced_energy, frames, held_out, rng,
        TuningConfig(n_trajectories=1_000), "geometric", progress=False,
    )[1]  # fmt: skip


def test_the_report_is_on_the_held_out_frames() -> None:
    honest = tuned(ORACLE.sample(200, seed=1))
    assert honest.forward_ess_test == pytest.approx(honest.forward_ess_train, rel=0.2)
    other = tuned(3.0 * ORACLE.sample(200, seed=1))
    assert other.forward_ess_train == honest.forward_ess_train
    assert other.forward_ess_test < 0.5 * honest.forward_ess_test


def test_the_fit_is_stopped_by_trajectories_that_it_does_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit, seen = tune.fit, []

    def watched(family: Any, train: Trajectories, *rest: Any) -> Fit[Any]:
        seen.append((train.base, rest[-1].base))
        return fit(family, train, *rest)

    monkeypatch.setattr(tune, "fit", watched)
    tuned(ORACLE.sample(200, seed=1))
    ((train, validation),) = seen
    assert (len(train), len(validation)) == (700, 100)
    assert not torch.isin(validation, train).any()
