"""Effective sample sizes, Pareto k, and what diagnostics say of good weights and of bad ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from openmm_vtdis.ensemble import Diagnostics, WeightedEnsemble, forward_ess, pareto_k, reverse_ess
from tests.ensemble.gaussian import ESS, SCALE, D, M, gaussian, gaussian_log_weights


@pytest.fixture(scope="module")
def ensemble() -> WeightedEnsemble:
    return gaussian(40_000, seed=1, temperature=300.0, metadata={"seed": 1})


def test_both_ess_converge_to_the_known_value() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 5_000, M, D))  # 40 blocks of target samples
    forward = np.array([forward_ess(gaussian_log_weights(block)[0]) for block in x])
    reverse = np.array([reverse_ess(gaussian_log_weights(SCALE * block)[0]) for block in x])
    for blocks in (forward, reverse):
        error = blocks.std(ddof=1) / math.sqrt(len(blocks))
        assert abs(blocks.mean() - ESS) / error < 4.0
        assert error < 0.005


@given(npst.arrays(np.float64, st.integers(1, 40), elements=st.floats(-30, 30)))
def test_ess_formulas_and_bounds(lw: np.ndarray) -> None:
    w = np.exp(lw)
    assert reverse_ess(lw) == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-9)
    assert forward_ess(lw) == pytest.approx(1.0 / (w.mean() * (1.0 / w).mean()), rel=1e-9)
    for ess in (reverse_ess(lw), forward_ess(lw)):
        assert 0.0 <= ess <= 1.0 + 1e-12
    assert reverse_ess(lw) >= (1.0 - 1e-12) / len(lw)


def test_a_single_large_weight_is_named() -> None:
    """Nothing in the tail, but one sample with an eighth of the weight."""
    log_w = np.zeros(71)
    log_w[0] = np.log(10.0)
    about = WeightedEnsemble(np.zeros((71, 1, 1)), log_w, np.zeros(71)).diagnostics()
    assert "largest weight 12.50% (< 10% wanted), Pareto k" in str(about)
    assert not about.reliable
    even = WeightedEnsemble(np.zeros((71, 1, 1)), np.zeros(71), np.zeros(71)).diagnostics()
    assert "largest weight 1.41%, Pareto k" in str(even)


# -- Pareto k ---------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_pareto_k_recovers_the_exponent_of_a_power_law(k: float) -> None:
    rng = np.random.default_rng(8)
    n = 40_000
    fits = np.array([pareto_k(np.log1p(rng.pareto(1.0 / k, n)) + 7.0) for _ in range(8)])
    error = (1.0 + k) / math.sqrt(3.0 * math.sqrt(n))  # of one maximum-likelihood fit to the tail
    shrunk = (k * 3.0 * math.sqrt(n) + 5.0) / (3.0 * math.sqrt(n) + 10.0)  # by the prior at 0.5
    assert abs(fits.mean() - shrunk) < 4.0 * error / math.sqrt(len(fits))
    assert fits.std() < 2.0 * error


def test_pareto_k_of_special_weights() -> None:
    rng = np.random.default_rng(2)
    assert math.isnan(pareto_k(rng.normal(size=24)))
    assert math.isfinite(pareto_k(rng.normal(size=25)))
    assert math.isnan(pareto_k(np.r_[rng.normal(size=24), np.full(100, -np.inf)]))
    assert pareto_k(np.full(1000, 3.0)) == -math.inf
    assert pareto_k(np.minimum(rng.normal(size=1000), -1.0)) == -math.inf
    assert pareto_k(rng.uniform(size=1000)) < 0.0
    one = np.zeros(1000)
    one[17] = 500.0
    assert pareto_k(one) == math.inf  # the library that fits the tail says 0.05
    assert pareto_k(1e4 * rng.normal(size=1000)) == math.inf
    lw = rng.normal(size=1000)
    assert pareto_k(np.r_[lw, -np.inf]) == pytest.approx(pareto_k(lw), abs=0.05)


def test_diagnostics_tell_good_weights_from_bad(ensemble: WeightedEnsemble) -> None:
    good = ensemble.diagnostics()
    assert good.reliable
    assert good.n == len(ensemble)
    assert good.largest_weight_share == pytest.approx(ensemble.weights.max())
    assert str(good).endswith(": reliable")
    assert "NOT" not in str(good)
    rng = np.random.default_rng(0)
    assert not Diagnostics.of(np.log1p(rng.pareto(1.0 / 1.5, 5_000))).reliable
    heavy = Diagnostics.of(np.log1p(rng.pareto(1.0 / 0.6, 5_000)))
    assert heavy.reliable
    assert str(heavy).endswith(": reliable, errors may be too small (k above 0.5)")
    assert not Diagnostics.of(np.r_[np.zeros(999), 20.0]).reliable
    assert not Diagnostics.of(rng.normal(size=10)).reliable  # too few to tell
    assert Diagnostics.of(np.zeros(5_000)).reliable
    assert Diagnostics.of(np.zeros(100)).pareto_k_threshold == pytest.approx(0.5)
