"""Standard errors over many seeds: the z-scores of every kernel are a standard normal sample.

An exact denoiser, so that log Z = 0 and <|x|^2> are known; what is estimated from generated
samples, from noised frames, and from both. One seed shows a bias of several errors. With 300 of
them errors are seen that are short by a fifth or long by a quarter (``judge.seen``); with the 3,150
of all kernels together those that are short or long by a tenth, and a bias of a tenth of one.

A few seeds are in the normal suite, the others take minutes: ``make test-slow``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.ensemble import mbar
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import exact_generator
from tests.statistical.judge import collect, fault, faults, seen


@dataclass(frozen=True)
class Case:
    """How to tune a kernel, at how many steps to use it, and over how many seeds."""

    covariance: str
    n_seeds: int = 300
    n_samples: int = 800
    n_steps: int | None = None
    laplace: bool = False
    options: dict[str, object] = field(default_factory=dict)


def by_state(covariance: str, n_steps: int | None = None, laplace: bool = True) -> Case:
    """Fewer seeds and samples, since each costs more."""
    return Case(covariance, 150, 400, n_steps, laplace, {"laplace": laplace})


CASES = {
    "isotropic": Case("isotropic"),
    "diagonal": Case("diagonal"),
    "block": Case("block"),
    "full": Case("full"),
    "low-rank": Case("low-rank", options={"rank": 2}),
    "time-network": Case("time-network"),
    "diagonal with its mean, from 20 to 30 steps": Case(
        "diagonal", n_steps=30, options={"tune_mean": True}
    ),
    "time-network, from 20 to 14 steps": Case("time-network", n_steps=14),
    "tweedie": by_state("tweedie"),
    "hessian": by_state("hessian"),
    "hessian without Laplace": by_state("hessian", laplace=False),
    "hessian with its jump, from 20 to 26 steps": by_state("hessian", n_steps=26),
}
LESS_BIAS = "log Z, generated, less the bias of skewed weights"
LOG_Z = ("log Z, generated", LESS_BIAS, "log Z, frames", "BAR", "MBAR")


@functools.cache
def tuned(name: str) -> tuple[GaussianMixture, DiffusionBoltzmannGenerator]:
    case = CASES[name]
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(
        target.sample(2_000, seed=0), 20, case.covariance, n_trajectories=1_000, seed=0,
        progress=False, **case.options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert gen.process is not None
    assert gen.process.jumps == case.laplace
    return target, gen


def mean_square(target: GaussianMixture) -> float:
    """<|x|^2> of a mixture, from its components."""
    squares = target.means.square().sum(dim=(1, 2)) + target.space.dim * target.variances
    return float((target.weights * squares).sum())


def experiment(name: str, n: int, first: int = 0) -> Callable[[int], dict[str, float]]:
    """The z-score of each estimator, with n samples, n frames and noise of this seed alone."""
    target, gen = tuned(name)
    options: dict[str, Any] = {
        "n_steps": CASES[name].n_steps, "batch_size": n, "progress": False
    }  # fmt: skip
    square = mean_square(target)

    def run(seed: int) -> dict[str, float]:
        a, b, c = np.random.SeedSequence([first, seed]).generate_state(3).tolist()
        ensemble = gen.sample(n, seed=a, **options)
        frames = target.sample(n, seed=b)
        log_w = gen.log_weights(frames, seed=c, **options)
        bar = ensemble.free_energy(log_w, subsample=False, n_bootstraps=0)
        pool = mbar(ensemble, [target], [frames.numpy()], [log_w], subsample=False)
        log_z = ensemble.log_z()
        w = np.exp(ensemble.log_weights - log_z.value)
        return {
            "log Z, generated": log_z.z(0.0),
            LESS_BIAS: log_z.z(0.0) + (stats.skew(w) - w.std()) / (2.0 * math.sqrt(n)),
            "log Z, frames": bar.from_target.z(0.0),
            "BAR": bar.z(0.0),
            "MBAR": pool.log_z(0).z(0.0),
            "<|x|^2>": ensemble.expectation(lambda x: (x**2).sum(axis=(1, 2))).z(square),
        }

    return run


@functools.cache
def z_scores(name: str) -> dict[str, np.ndarray]:
    case, first = CASES[name], 1 + list(CASES).index(name)
    return collect(experiment(name, case.n_samples, first), range(case.n_seeds))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_z_scores_are_standard_normal(name: str) -> None:
    assert not faults(z_scores(name))


@pytest.mark.slow
def test_z_scores_of_all_kernels_together() -> None:
    """The seeds of a kernel are its own. Control: all errors short by an eighth.

    The weights are skewed, so that a mean that is too large comes with an error that is, too: to
    first order z is biased by (s - k) / 2 sqrt n, with k the skewness of the weights and s their
    deviation over their mean. That is -0.04 on average here, and seen with so many seeds (-0.06 +-
    0.02 when this was written); what is left without it must be none.
    """
    pooled = {
        name: np.concatenate([z_scores(case)[name] for case in CASES])
        for name in (LESS_BIAS, "log Z, frames", "BAR", "MBAR", "<|x|^2>")
    }
    assert not faults(pooled)
    n = sum(case.n_seeds for case in CASES.values())
    assert seen(n).short > 0.9
    assert seen(n).long < 1.1
    for z in pooled.values():
        assert "width" in fault(z / 0.88)


def test_a_few_seeds() -> None:
    assert not faults(collect(experiment("isotropic", 200), range(20)))


# -- negative controls -------------------------------------------------------------------------
def test_a_weight_without_the_jacobian_of_the_length_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = experiment("isotropic", 200)
    monkeypatch.setattr(Cartesian, "log_det", 0.0)
    found = faults(collect(run, range(8)))
    assert all("mean" in found[name] for name in LOG_Z)


def test_a_weight_without_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(process: DiffusionProcess, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64)

    run = experiment("isotropic", 200)
    monkeypatch.setattr(DiffusionProcess, "prior_log_prob", nothing)
    found = faults(collect(run, range(8)))
    assert all("mean" in found[name] for name in LOG_Z)


@pytest.mark.slow
def test_errors_times_seven_tenths() -> None:
    """Those of every estimator, over the seeds of one kernel."""
    assert seen(CASES["isotropic"].n_seeds).short > 0.75
    for z in z_scores("isotropic").values():
        assert "width" in fault(z / 0.7)
