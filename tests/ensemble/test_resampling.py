"""Resampling: fair samples, each as often as its share says, with all that belongs to them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from openmm_vtdis.ensemble import WeightedEnsemble
from tests.ensemble.gaussian import DIM, Spring, gaussian, gaussian_log_weights, squared


@pytest.fixture(scope="module")
def ensemble() -> WeightedEnsemble:
    return gaussian(40_000, seed=1, temperature=300.0, metadata={"seed": 1})


def z_of_resampled(resampled: WeightedEnsemble, ess: float) -> float:
    """z of the mean of |x|^2; the error is that of the ensemble before resampling."""
    mean = resampled.expectation(squared).value
    return (mean - DIM) / math.sqrt(2.0 * DIM / (len(resampled) * ess))


def test_resampling_gives_equally_weighted_target_samples(ensemble: WeightedEnsemble) -> None:
    resampled = ensemble.resample(seed=4)
    assert np.unique(resampled.log_weights).size == 1
    assert resampled.log_z().value == pytest.approx(ensemble.log_z().value, abs=1e-12)
    assert resampled.ess == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(resampled.log_z().stderr)
    assert not resampled.diagnostics().reliable
    half = ensemble[:20_000].resample(seed=0)
    pooled = WeightedEnsemble.concatenate([ensemble[20_000:30_000], half])
    assert math.isnan(pooled.log_z().stderr)
    more = WeightedEnsemble.concatenate([pooled, ensemble[30_000:]])
    assert not more.diagnostics().reliable
    assert abs(z_of_resampled(resampled, ensemble.ess)) < 4.0
    assert resampled.metadata == {"seed": 1}
    assert resampled.provenance.resampled_from == 40_000
    # the control: weights that travel along with the positions count twice
    travelling = resampled.with_log_weights(gaussian_log_weights(resampled.positions)[0])
    assert abs(z_of_resampled(travelling, ensemble.ess)) > 20.0


def test_any_slice_of_a_resampled_ensemble_is_fair(ensemble: WeightedEnsemble) -> None:
    ordered = ensemble[np.argsort(squared(ensemble.positions))]
    half = ordered.resample(seed=2)[: len(ordered) // 2]
    assert abs(z_of_resampled(half, ensemble.ess)) < 4.0


def test_resampling_takes_energies_along(ensemble: WeightedEnsemble) -> None:
    resampled = ensemble.resample(20_000, seed=4)
    assert len(resampled) == 20_000
    exact = 0.5 * squared(resampled.positions)
    np.testing.assert_array_equal(resampled.reduced_energies, exact)
    # the control: positions resampled, the rest not
    assert (ensemble.reduced_energies[:20_000] != exact).mean() > 0.9
    stiff = resampled.reweight(Spring(0.9))
    broken = dataclasses.replace(
        resampled, reduced_energies=ensemble.reduced_energies[:20_000]
    ).reweight(Spring(0.9))
    error = math.sqrt(2.0 * DIM / 0.9**2 / (len(resampled) * ensemble.ess))
    assert abs(stiff.expectation(squared).value - DIM / 0.9) < 4.0 * error
    assert abs(broken.expectation(squared).value - DIM / 0.9) > 20.0 * error


@given(
    npst.arrays(np.float64, st.integers(1, 30), elements=st.floats(-20, 20) | st.just(-np.inf)),
    st.integers(1, 60),
    st.integers(0, 1_000),
)
def test_resampling_counts_are_the_two_integers_next_to_the_share(
    log_weights: np.ndarray, n: int, seed: int
) -> None:
    if np.isneginf(log_weights).all():
        log_weights[0] = 0.0
    size = len(log_weights)
    x = np.arange(size, dtype=np.float64).reshape(size, 1, 1)
    ensemble = WeightedEnsemble(x, log_weights, np.zeros(size))
    resampled = ensemble.resample(n, seed)
    index = resampled.positions[:, 0, 0].astype(int)
    counts = np.bincount(index, minlength=size)
    assert (np.abs(counts - n * ensemble.weights) < 1.0 + 1e-9).all()
    assert (counts[np.isneginf(log_weights)] == 0).all()
    np.testing.assert_array_equal(resampled.positions, ensemble.resample(n, seed).positions)


def test_a_resampled_ensemble_does_not_know_whether_it_is_reliable(
    ensemble: WeightedEnsemble,
) -> None:
    assert "reliability unknown" in str(ensemble.resample(seed=0).diagnostics())
