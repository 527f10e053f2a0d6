"""Standard errors over many seeds: the z-scores of every estimator are a standard normal sample.

One seed shows a bias of several errors; only many show an error bar that is a tenth too small.
Minutes, so run by `make test-slow`.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats

from openmm_vtdis.ensemble import mbar
from openmm_vtdis.geometry import Space
from tests.conftest import exact_generator

N_SAMPLES = 800
N_SEEDS = {
    "isotropic": 200, "block": 200, "low-rank": 200, "time-network": 200, "hessian": 100,
    "tweedie": 50, "krylov": 50,
}  # fmt: skip
"""Fewer where a sample costs more."""


def fault(z: np.ndarray) -> str:
    """What tells z-scores from a standard normal sample; empty if nothing does."""
    n = len(z)
    mean, width = z.mean(), z.std(ddof=1)
    p = stats.kstest(z, "norm").pvalue
    found = []
    if abs(mean) > 4.0 / math.sqrt(n):
        found.append(f"mean {mean:+.3f}")
    if abs(width - 1.0) > 4.0 / math.sqrt(2.0 * n):
        found.append(f"width {width:.3f}")
    if p < 1e-4:
        found.append(f"Kolmogorov-Smirnov p {p:.1e}")
    return ", ".join(found)


def z_scores(covariance: str) -> dict[str, np.ndarray]:
    """Of each estimator, one a seed."""
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(
        target.sample(2_000, seed=0), 20, covariance, n_trajectories=1_000, rank=2, seed=0,
        progress=False,
    )  # fmt: skip
    # <|x|^2> of the mixture, from its components
    d = target.space.dim
    squares = target.means.square().sum(dim=(1, 2)) + d * target.variances
    square = float((target.weights * squares).sum() / target.weights.sum())
    found = defaultdict(list)
    for seed in range(1, N_SEEDS[covariance] + 1):
        ensemble = gen.sample(N_SAMPLES, seed=seed, progress=False)
        frames = target.sample(N_SAMPLES, seed=10_000 + seed)
        log_w = gen.noise(frames, seed=20_000 + seed, progress=False)
        bar = ensemble.free_energy(log_w, subsample=False, n_bootstraps=0)
        pool = mbar(ensemble, [target], [frames.numpy()], [log_w], subsample=False)
        estimates = {
            "log Z, generated": (ensemble.log_z(), 0.0),
            "log Z, frames": (bar.from_target, 0.0),
            "BAR": (bar, 0.0),
            "<|x|^2>, generated": (ensemble.expectation(lambda x: (x**2).sum(axis=(1, 2))), square),
            "log Z, MBAR": (pool.log_z(0), 0.0),
        }
        for name, (estimate, exact) in estimates.items():
            found[name].append(estimate.z(exact))
    return {name: np.array(z) for name, z in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("covariance", list(N_SEEDS))
def test_z_scores_are_standard_normal(covariance: str) -> None:
    faults = {name: fault(z) for name, z in z_scores(covariance).items()}
    assert not any(faults.values()), faults


def test_the_judge_finds_wrong_errors_and_biases() -> None:
    """Control: errors a quarter too small or too large, a bias of a third of an error, a tail."""
    z = np.random.default_rng(0).standard_normal(200)
    assert not fault(z)
    assert "width" in fault(1.25 * z)
    assert "width" in fault(0.78 * z)
    assert "mean" in fault(z + 0.35)
    assert fault(np.where(np.arange(200) < 10, 8.0, z))
