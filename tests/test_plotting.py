"""Figures: what is drawn, on which axes; pixels are for the eye."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

from openmm_vtdis import plotting
from openmm_vtdis.ensemble import WeightedEnsemble, forward_ess, reverse_ess


@pytest.fixture(autouse=True)
def _close() -> object:
    yield
    plt.close("all")


@pytest.fixture
def ensemble() -> WeightedEnsemble:
    x = 1.3 * np.random.default_rng(0).standard_normal((2000, 2, 2))
    square = (x**2).sum(axis=(1, 2))
    lw = -0.5 * square * (1.0 - 1.0 / 1.69)
    lw[0] = -np.inf
    return WeightedEnsemble(x, lw, 0.5 * square)


def test_energy_histogram_draws_three_densities(ensemble: WeightedEnsemble) -> None:
    ax = plotting.energy_histogram(ensemble, np.random.default_rng(1).gamma(2.0, size=2000))
    _, labels = ax.get_legend_handles_labels()
    assert len(labels) == 3
    assert "energy" in ax.get_xlabel()
    with pytest.raises(ValueError, match="reference_energies: expected a non-empty, finite"):
        plotting.energy_histogram(ensemble, [np.nan])


def test_eta_profile_has_a_log_axis_and_a_line_at_one() -> None:
    ax = plotting.eta_profile(np.geomspace(0.01, 10.0, 21), np.linspace(0.5, 1.0, 20))
    assert ax.get_xscale() == "log"
    assert any(np.all(np.asarray(line.get_ydata()) == 1.0) for line in ax.lines)
    with pytest.raises(ValueError, match="eta_profile: expected times of shape"):
        plotting.eta_profile(np.ones(3), np.ones(7))


def test_ess_curves_share_axes() -> None:
    _, given = plt.subplots()
    for label in ("a", "b"):
        ax = plotting.ess_curve([10, 20], [0.1, 0.2], [0.1, 0.3], label, given)
        assert ax is given
    assert len(given.lines) == 4
    with pytest.raises(ValueError, match="ess_curve: expected n_steps and reverse of one shape"):
        plotting.ess_curve([10, 20], [0.1, 0.2], [0.1], "a")


def test_ess_versus_samples_ends_at_the_ess_of_all() -> None:
    lw = np.random.default_rng(0).normal(size=500)
    ax = plotting.ess_versus_samples({"a": lw}, forward_log_weights={"a": lw})
    ends = sorted(float(np.asarray(line.get_ydata())[-1]) for line in ax.lines)
    np.testing.assert_allclose(ends, sorted([forward_ess(lw), reverse_ess(lw)]))


def test_weight_distribution_names_zero_weights(ensemble: WeightedEnsemble) -> None:
    ax = plotting.weight_distribution(ensemble)
    _, labels = ax.get_legend_handles_labels()
    assert any("1 of zero weight" in label for label in labels)
