"""Figures hold the numbers they claim to, compose on shared axes, and refuse unfit data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.special import boxcox

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import StepPatch  # noqa: E402

from openmm_vtdis import plotting  # noqa: E402
from openmm_vtdis.ensemble import WeightedEnsemble, forward_ess, reverse_ess  # noqa: E402


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def ensemble() -> WeightedEnsemble:
    rng = np.random.default_rng(0)
    x = 1.2 * rng.normal(size=(2000, 2, 3))
    u = 0.5 * (x**2).sum(axis=(1, 2))
    lw = -u + u / 1.44
    x[0], lw[0], u[0] = np.nan, -np.inf, np.inf
    return WeightedEnsemble(x, lw, u)


def stairs(ax: Axes) -> dict[str, StepPatch]:
    return {p.get_label(): p for p in ax.patches if isinstance(p, StepPatch)}


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def assert_everything_is_inside(ax: Axes) -> None:
    low, high = ax.get_ylim()
    for line in (line for line in ax.lines if line.get_transform() == ax.transData):
        y = np.asarray(line.get_ydata(), dtype=float)
        assert low <= y.min()
        assert y.max() <= high
    for values in (p.get_data().values for p in ax.patches if isinstance(p, StepPatch)):
        assert max(values) <= high


def test_energy_histogram_holds_the_three_densities(ensemble: WeightedEnsemble) -> None:
    reference = 0.5 * np.random.default_rng(1).chisquare(6, size=3000)
    ax = plotting.energy_histogram(ensemble, reference, bins=25)
    drawn = stairs(ax)
    values, edges, _ = drawn["generated, reweighted"].get_data()
    density, _, _ = ensemble.histogram(ensemble.reduced_energies, edges)
    np.testing.assert_allclose(values, density)
    assert len(values) == 25
    raw = drawn["generated, raw"].get_data()
    expected = np.histogram(ensemble.reduced_energies, edges)[0] / 2000 / np.diff(edges)
    np.testing.assert_allclose(raw.values, expected)
    mine = drawn["reference"].get_data()
    assert (mine.values * np.diff(edges)).sum() == pytest.approx(1.0, abs=0.003)
    means = {
        name: np.average(0.5 * (edges[1:] + edges[:-1]), weights=drawn[name].get_data().values)
        for name in drawn
        if not name.startswith("_")
    }
    assert means["generated, reweighted"] == pytest.approx(means["reference"], abs=0.3)
    assert means["generated, raw"] > means["reference"] + 0.6
    assert legend(ax) == ["reference", "generated, raw", "generated, reweighted"]
    assert "k_\\mathrm{B}T" in ax.get_xlabel()
    assert ax.get_ylabel() == "probability density"
    assert ax.get_title() == ""
    assert_everything_is_inside(ax)


def test_energy_histogram_takes_edges_and_shared_axes(ensemble: WeightedEnsemble) -> None:
    _, ax = plt.subplots()
    edges = np.array([0.0, 2.0, 4.0, 8.0])
    assert plotting.energy_histogram(ensemble, ax=ax, bins=edges) is ax
    np.testing.assert_array_equal(stairs(ax)["generated, raw"].get_data().edges, edges)
    assert legend(ax) == ["generated, raw", "generated, reweighted"]


def test_the_energy_range_ignores_a_few_wild_energies(ensemble: WeightedEnsemble) -> None:
    u, lw = ensemble.reduced_energies.copy(), ensemble.log_weights.copy()
    u[1:11], lw[1:11] = 1e12, -1e12
    wild = WeightedEnsemble(ensemble.positions, lw, u)
    assert plotting.energy_histogram(wild).get_xlim()[1] < 40.0


def test_eta_profile_places_step_n_at_t_n() -> None:
    times = np.geomspace(0.02, 20.0, 11)
    eta = np.linspace(1.6, 1.0, 10)
    ax = plotting.eta_profile(times, eta)
    profile, unity = ax.lines
    np.testing.assert_array_equal(profile.get_xdata(), times[1:])
    np.testing.assert_array_equal(profile.get_ydata(), eta)
    assert set(unity.get_ydata()) == {1.0}
    assert ax.get_xscale() == "log"
    assert legend(ax) == [r"DDPM ($\eta = 1$)"]
    by_class = plotting.eta_profile(times[1:], np.stack([eta, eta**2], axis=1))
    assert legend(by_class)[:2] == ["class 0", "class 1"]
    np.testing.assert_array_equal(by_class.lines[1].get_ydata(), eta**2)


def test_ess_curves_compose() -> None:
    steps = [50, 100, 200]
    ax = plotting.ess_curve(steps, [0.1, 0.2, 0.3], [0.1, 0.2, 0.25], "isotropic")
    assert plotting.ess_curve(steps, [0.7, 0.8, 0.95], label="J", ax=ax) is ax
    plotting.ess_curve(steps, reverse=[0.0, 0.0, 0.01], label="DDPM", ax=ax)
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1]
    assert len(set(colours)) == 3
    assert set(colours) <= set(plotting.PALETTE)
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    assert legend(ax) == ["isotropic, forward", "isotropic, reverse", "J, forward", "DDPM, reverse"]
    assert ax.get_ylim()[0] == 0.0
    assert_everything_is_inside(ax)  # though the second method is above the first


def test_ess_versus_samples_ends_at_the_ess_of_all() -> None:
    rng = np.random.default_rng(0)
    reverse = {"good": rng.normal(size=3000), "bad": 1e4 * rng.normal(size=500)}
    reverse["good"][:100] = -np.inf
    forward = {"good": rng.normal(size=2000), "only forward": rng.normal(size=3)}
    forward["good"][1200] = -np.inf  # a zero weight: forward ESS 0 from here on
    ax = plotting.ess_versus_samples(reverse, forward_log_weights=forward)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == [
        "good, forward",
        "good, reverse",
        "bad, reverse",
        "only forward, forward",
    ]
    for name, lw, ess in (
        ("good, forward", forward["good"], forward_ess),
        ("good, reverse", reverse["good"], reverse_ess),
        ("bad, reverse", reverse["bad"], reverse_ess),
        ("only forward, forward", forward["only forward"], forward_ess),
    ):
        m, values = (np.asarray(data) for data in lines[name].get_data())
        assert m[-1] == len(lw)
        for k in (0, len(m) // 2, -1):
            assert values[k] == pytest.approx(ess(lw[: m[k]]), abs=1e-12)
    assert_everything_is_inside(ax)


def test_weight_distribution_accounts_for_every_sample(ensemble: WeightedEnsemble) -> None:
    ax = plotting.weight_distribution(ensemble, label="VT-DIS")
    counts, mass = (p.get_data().values for p in list(stairs(ax).values())[1:])
    assert counts.sum() == pytest.approx(1999 / 2000)
    assert mass.sum() == pytest.approx(1.0)
    assert legend(ax)[0].startswith("VT-DIS\nESS ")
    assert "(1 of zero weight not shown)" in legend(ax)[0]
    assert_everything_is_inside(ax)
    flat = WeightedEnsemble(np.zeros((30, 1, 1)), np.full(30, 5.0), np.zeros(30))
    assert "ESS 100.0%" in legend(plotting.weight_distribution(flat))[0]


def test_unfit_data_are_refused(ensemble: WeightedEnsemble) -> None:
    with pytest.raises(ValueError, match=r"reference_energies: expected .* got shape \(0,\)"):
        plotting.energy_histogram(ensemble, [])
    with pytest.raises(ValueError, match="reference_energies: expected a non-empty, finite array"):
        plotting.energy_histogram(ensemble, [1.0, np.nan])
    with pytest.raises(ValueError, match=r"eta_profile: expected times .* \(5,\) and \(9,\)"):
        plotting.eta_profile(np.ones(5), np.ones(9))
    with pytest.raises(ValueError, match=r"ess_curve: expected n_steps and reverse of one shape"):
        plotting.ess_curve([1, 2], [0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="log_weights: expected finite numbers or -inf"):
        plotting.ess_versus_samples({"x": [0.0, np.nan]})
    dead = WeightedEnsemble(np.zeros((3, 1, 1)), np.full(3, -np.inf), np.zeros(3))
    for draw in (plotting.weight_distribution, plotting.energy_histogram):
        with pytest.raises(ValueError, match="expected a sample with weight"):
            draw(dead)


def test_ramachandran_shows_minus_log_of_the_weighted_density() -> None:
    phi = np.array([-2.0, -2.0, -2.0, 1.0, 1.0, 3.0])
    psi = np.array([2.0, 2.0, 2.0, -1.0, -1.0, 0.0])
    weights = np.array([1.0, 1.0, 2.0, 1.0, 1.0, 0.0])
    ax = plotting.ramachandran(phi, psi, weights, bins=12)
    energy = ax.collections[0].get_array().reshape(12, 12)
    column = int((1.0 + np.pi) / (2 * np.pi) * 12)
    row = int((-1.0 + np.pi) / (2 * np.pi) * 12)
    assert float(energy[row, column]) == pytest.approx(np.log(2.0))
    assert energy.count() == 2  # what has no weight is not shown
    assert float(energy.min()) == 0.0
    with pytest.raises(ValueError, match=r"ramachandran: .* got \(6,\), \(6,\) and \(2,\)"):
        plotting.ramachandran(phi, psi, weights[:2])


def test_ramachandran_takes_radians_of_either_kind_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    phi, psi = rng.uniform(-np.pi, np.pi, size=(2, 500))
    maps = [
        plotting.ramachandran(x, psi, bins=6).collections[0].get_array()
        for x in (phi, np.where(phi < 0.0, phi + 2.0 * np.pi, phi))
    ]
    np.testing.assert_allclose(*maps)
    with pytest.raises(ValueError, match=r"expected angles in radians, up to 2 pi, got 17\d"):
        plotting.ramachandran(np.degrees(phi), psi)
    with pytest.raises(ValueError, match="expected angles in radians"):
        plotting.ramachandran(np.full(500, np.nan), psi)
    for bad in (np.full(500, -1.0), np.zeros(500), np.full(500, np.inf)):
        with pytest.raises(ValueError, match="expected weights that are finite"):
            plotting.ramachandran(phi, psi, bad)
    with pytest.raises(ValueError, match="not all zero"):
        plotting.ramachandran([], [])


def test_a_weight_of_next_to_nothing_does_not_take_the_axis(ensemble: WeightedEnsemble) -> None:
    lw = ensemble.log_weights.copy()
    lw[5] = -1_000.0
    ax = plotting.weight_distribution(ensemble.with_log_weights(lw))
    assert "(1 of next to none not shown)" in legend(ax)[0]
    assert ax.get_xlim()[0] > -20.0
    edges = plotting.energy_histogram(ensemble, bins=np.int64(20)).patches[0].get_data().edges
    assert len(edges) == 21


def test_free_energy_profile_has_gaps_and_a_band(ensemble: WeightedEnsemble) -> None:
    u = ensemble.reduced_energies
    density, edges, stderr = ensemble.histogram(u, bins=10, range=(-1.0, 30.0))
    ax = plotting.free_energy_profile(density, edges, stderr, label="reweighted")
    y = np.asarray(ax.lines[0].get_ydata())
    np.testing.assert_array_equal(np.isnan(y), density == 0.0)
    assert np.nanmin(y) == 0.0
    best = int(np.argmax(density))
    other = int(np.flatnonzero(density > 0.0)[-1])
    assert y[other] == pytest.approx(np.log(density[best] / density[other]))
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    middle = 0.5 * (edges[best] + edges[best + 1])
    assert np.ptp(corners[np.isclose(corners[:, 0], middle), 1]) == pytest.approx(
        2.0 * stderr[best] / density[best]
    )
    with pytest.raises(ValueError, match="free_energy_profile: expected a density"):
        plotting.free_energy_profile(np.zeros(3), np.arange(4.0))


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.6, 0.9])
def test_pareto_tail_shows_the_largest_weights_and_what_was_fitted(shape: float) -> None:
    """Weights that are one more than a generalised Pareto distribution's."""
    p = np.random.default_rng(0).random(4_000)
    lw = np.log(1.0 - boxcox(p, -shape) if shape else 1.0 - np.log(p))
    ax = plotting.pareto_tail(lw, label="x")
    points, fitted, limit = (np.asarray(line.get_ydata()) for line in ax.lines)
    np.testing.assert_allclose(points, np.sort(np.exp(lw))[::-1][: len(points)] / np.exp(lw).sum())
    apart = [np.abs(np.log(line / points))[20:].max() for line in (fitted, limit)]
    assert apart[0] < 0.12
    assert shape > 0.5 or apart[1] > 2.0 * apart[0]  # control
    assert np.median(limit) == pytest.approx(np.median(points), rel=0.02)
    assert legend(ax)[0] == "x"
    assert_everything_is_inside(ax)


def test_pareto_tail_needs_a_tail() -> None:
    with pytest.raises(ValueError, match="expected log weights with a tail"):
        plotting.pareto_tail(np.zeros(100))


def test_step_cost_marks_the_grid() -> None:
    levels = np.logspace(-2, 1, 30)
    ax = plotting.step_cost(levels, levels, times=[0.1, 1.0, 5.0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), levels)
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [0.1, 1.0, 5.0])
    assert legend(ax) == ["2 steps"]
    with pytest.raises(ValueError, match="step_cost: expected positive levels"):
        plotting.step_cost([0.0, 1.0], [1.0, 1.0])


def test_overlap_matrix_prints_its_entries() -> None:
    ax = plotting.overlap_matrix([[0.9, 0.1], [0.2, 0.8]], ["generator", "300 K"])
    assert [text.get_text() for text in ax.texts] == ["0.90", "0.10", "0.20", "0.80"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["generator", "300 K"]
    with pytest.raises(ValueError, match="expected a square matrix"):
        plotting.overlap_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="expected 2 labels, got 1"):
        plotting.overlap_matrix(np.eye(2), ["a"])
