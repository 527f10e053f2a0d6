r"""Tuning of a diffusion process: simulate forward trajectories once, fit, judge on others.

Trajectories that are fitted, and those that stop the fit early, start from one set of frames; those
of the report start from another, which no fit sees. What is kept of a trajectory is the part of its
log weight that does not depend on the covariance, and the family's sufficient statistics, so that
memory grows with trajectories x steps and not with positions
(:mod:`~openmm_vtdis.tuning.fit` has the optimisation).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import forward_ess
from openmm_vtdis.diffusion.covariance import Covariance, Fittable
from openmm_vtdis.diffusion.paths import forward_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.tuning import select_covariance
from openmm_vtdis.tuning.adaptive_schedule import N_FRAMES as GRID_FRAMES
from openmm_vtdis.tuning.adaptive_schedule import adapt
from openmm_vtdis.tuning.fit import (
    OBJECTIVES,
    Fit,
    MeanCoefficients,
    Trajectories,
    check_finite,
    fit,
    fit_sgd,
    log_weights,
)
from openmm_vtdis.tuning.laplace_range import N_FRAMES as LAPLACE_FRAMES
from openmm_vtdis.tuning.laplace_range import find_range


@dataclass(frozen=True)
class TuningConfig:
    """Settings of one tuning run.

    Attributes
    ----------
    objective
        "alpha2" (largest forward ESS), "kl", or "ddpm" (no tuning: the baseline).
    n_trajectories
        Forward trajectories in all: 7/10 fitted, 1/10 for early stopping, 2/10 for the report.
    tune_mean
        Fit the mean coefficients k_n first, in a pass of its own.
    method
        "convex" (one pass, L-BFGS) or "sgd" (the paper's: Adam on fresh trajectories).
    sgd_iterations, sgd_batch_size
        Steps of the latter, and fresh trajectories in each.
    """

    objective: str = "alpha2"
    n_trajectories: int = 10_000
    tune_mean: bool = False
    method: str = "convex"
    sgd_iterations: int = 5000
    sgd_batch_size: int = 512

    def __post_init__(self) -> None:
        checks.choice("objective", self.objective, (*OBJECTIVES, "ddpm"))
        checks.choice("method", self.method, ("convex", "sgd"))
        checks.positive_integer("n_trajectories", self.n_trajectories, minimum=100)
        if checks.boolean("tune_mean", self.tune_mean) and self.objective == "ddpm":
            raise ValueError('tune_mean: expected False with objective="ddpm", which tunes nothing')
        checks.positive_integer("sgd_iterations", self.sgd_iterations)
        checks.positive_integer("sgd_batch_size", self.sgd_batch_size)


@dataclass(frozen=True)
class TuningReport:
    """Report of :meth:`~openmm_vtdis.DiffusionBoltzmannGenerator.tune`.

    Attributes
    ----------
    forward_ess_train, forward_ess_test
        Forward ESS (fractions) on the trajectories that were fitted and on held-out ones, which
        start from other frames. Where the two differ, n_trajectories is too small.
    eta
        (N, K) variance of the reverse kernel in units of the DDPM variance, per step and class.
    times
        (N + 1,) noise levels in model coordinates.
    objective
        "alpha2", "kl" or "ddpm".
    covariance
        Name of the family; "block" for "full", which is that with every particle a class.
    reason
        Reason for the choice of "auto"; None if the family was asked for by name.
    n_network_evaluations
        Network evaluations of the trajectories (those of measurements before them come on top).
    n_trajectories
        Trajectories simulated in all, held-out ones included.
    n_iterations, fit_seconds, seconds
        Iterations of the optimiser; its wall time; wall time of the whole call.
    """

    forward_ess_train: float
    forward_ess_test: float
    eta: np.ndarray
    times: np.ndarray
    objective: str
    covariance: str
    reason: str | None
    n_network_evaluations: int
    n_trajectories: int
    n_iterations: int
    fit_seconds: float
    seconds: float

    def __str__(self) -> str:
        text = (
            f"{self.covariance}, {self.objective}, {len(self.times) - 1} steps: forward ESS "
            f"{self.forward_ess_test:.2%} held out ({self.forward_ess_train:.2%} fitted), "
            f"{self.n_trajectories} trajectories, {self.n_iterations} iterations in "
            f"{self.fit_seconds:.2f} s, {self.seconds:.0f} s in all"
        )
        return text if self.reason is None else f"{text}\n{self.reason}"


def _prepare(
    process: DiffusionProcess,
    families: Sequence[Covariance],
    energy: Energy,
    frames: Tensor,
    rng: torch.Generator,
    schedule: str | None,
    laplace: bool,
    n_frames: int,
    batch_size: int,
    progress: bool,
) -> tuple[DiffusionProcess, Covariance, str | None]:
    """Measure the adaptive grid and the Laplace range, and select the covariance, before the fit.

    Returns the process, the family, and why it was chosen (None if there was no choice).
    ``n_frames``: most frames to measure on.
    """
    if schedule == "adaptive":
        n = min(GRID_FRAMES, n_frames)
        process = process.with_schedule(
            adapt(process.schedule, process.denoiser, frames, rng, batch_size, progress, n)
        )
    low, high = process.schedule.times[0], min(process.schedule.times[-1], 1.0)
    processes = {family.kind: process for family in families}
    by_state = [family.kind for family in families if family.by_state]
    if by_state and laplace and low < high and process.energy is not None:
        found = find_range(
            process.energy, process.denoiser, frames, low, high, rng, batch_size, progress,
            min(LAPLACE_FRAMES, n_frames),
        )  # fmt: skip
        better = process.with_laplace(found, jump=schedule is not None)
        processes |= dict.fromkeys(by_state, better)
    if len(families) == 1:
        return processes[families[0].kind], families[0], None
    n = min(select_covariance.N_PILOT, n_frames)
    pilots = select_covariance.run_pilots(
        processes, families, energy, frames, rng, n, batch_size, progress
    )
    best = max(families, key=lambda family: pilots[family.kind].log_yield)
    return processes[best.kind], best, select_covariance.explain(pilots)


def collect(
    process: DiffusionProcess,
    family: Fittable,
    energy: Energy,
    frames: Tensor,
    n: int,
    rng: torch.Generator,
    batch_size: int = 256,
    progress: bool = True,
) -> Trajectories:
    """Simulate n forward trajectories from frames (n', M, D) drawn with replacement."""
    index = torch.randint(len(frames), (n,), generator=rng, device=rng.device)
    x = frames[index.to(frames.device)].to(rng.device, torch.float64)
    paths = forward_paths(process, x, rng, family, batch_size, progress)
    data = Trajectories(paths.log_forward - energy(x).detach().cpu(), paths.collected)
    check_finite(data)
    return data


def tune(
    process: DiffusionProcess,
    families: Sequence[Covariance],
    energy: Energy,
    frames: Tensor,
    held_out: Tensor,
    rng: torch.Generator,
    config: TuningConfig,
    schedule: str | None = "adaptive",
    laplace: bool = True,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[DiffusionProcess, TuningReport]:
    """Choose grid and family, and fit the covariance, and the mean if asked, of a process.

    Parameters
    ----------
    process
        Denoiser and grid; its covariance is replaced.
    families
        Covariances to choose from, or the only one; their own parameters are ignored.
    energy
        The target's energy in model coordinates.
    frames, held_out
        (n, M, D) equilibrium configurations in model coordinates: to fit, and for the report.
    schedule
        Name of the grid: "adaptive" is measured. None: it was given by levels, which are kept.
    laplace
        Whether families that depend on the state may go by the energy at low noise.

    Returns
    -------
    tuple
        The fitted process, and the report.
    """
    began = time.perf_counter()
    if config.objective == "ddpm" and families[0].kind != "isotropic":
        raise ValueError(
            'covariance: expected "isotropic" with objective="ddpm", which tunes nothing'
        )
    for family in families:
        family.estimator(process.denoiser, process.energy)  # before anything is measured
    process, family, reason = _prepare(
        process, families, energy, frames, rng, schedule, laplace, config.n_trajectories,
        batch_size, progress,
    )  # fmt: skip
    n_test, n_validation = config.n_trajectories // 5, config.n_trajectories // 10
    n_fit = config.n_trajectories - n_test
    n_simulated = 0

    def simulate(kind: Fittable, n: int, pool: Tensor, show: bool = progress) -> Trajectories:
        nonlocal n_simulated
        n_simulated += n
        return collect(process, kind, energy, pool, n, rng, batch_size, show)

    if config.tune_mean:
        mean_coefficients = MeanCoefficients(family.space, family.labels, torch.zeros(1, 1))
        data = simulate(mean_coefficients, n_fit, frames)
        train, validation = data[:-n_validation], data[-n_validation:]
        mean = fit(mean_coefficients, train, process.schedule, config.objective, validation)
        process = process.with_mean_coefficients(mean.fitted.mean_coefficients)
    data = simulate(family, n_fit, frames)
    train, validation = data[:-n_validation], data[-n_validation:]
    grid = process.schedule
    if config.objective == "ddpm":
        best = Fit(family.with_parameters(family.ddpm_parameters(grid)), math.nan, 0, 0.0)
    elif config.method == "convex":
        best = fit(family, train, grid, config.objective, validation)
    else:
        best = fit_sgd(
            family,
            lambda n: simulate(family, n, frames, show=False),
            grid,
            family.ddpm_parameters(grid),
            config.objective,
            config.sgd_iterations,
            config.sgd_batch_size,
            progress=progress,
        )
    test = simulate(family, n_test, held_out)
    return process.with_covariance(best.fitted), TuningReport(
        forward_ess_train=forward_ess(log_weights(best.fitted, train, grid).detach().numpy()),
        forward_ess_test=forward_ess(log_weights(best.fitted, test, grid).detach().numpy()),
        eta=best.fitted.eta(grid).detach().numpy(),
        times=np.asarray(grid.times),
        objective=config.objective,
        covariance=family.kind,
        reason=reason,
        n_network_evaluations=n_simulated * grid.n_steps,
        n_trajectories=n_simulated,
        n_iterations=best.n_iterations,
        fit_seconds=best.seconds,
        seconds=time.perf_counter() - began,
    )
