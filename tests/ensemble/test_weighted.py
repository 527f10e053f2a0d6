"""Weighted ensembles against a Gaussian oracle with known log Z, ESS and moments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mdtraj as md
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openmm import unit
from openmmtools.states import ThermodynamicState

from openmm_vtdis.ensemble import WeightedEnsemble, forward_ess, pareto_k, reverse_ess
from openmm_vtdis.targets import double_well
from openmm_vtdis.topology import placeholder_topology
from tests.ensemble.gaussian import DIM, ESS, LOG_Z, D, M, Spring, gaussian, squared


@pytest.fixture(scope="module")
def ensemble() -> WeightedEnsemble:
    return gaussian(40_000, seed=1, temperature=300.0, metadata={"seed": 1})


# -- oracle -----------------------------------------------------------------------------------
def test_log_z_is_unbiased(ensemble: WeightedEnsemble) -> None:
    estimate = ensemble.log_z()
    assert abs(estimate.z(LOG_Z)) < 4.0
    assert estimate.stderr == pytest.approx(math.sqrt((1.0 / ESS - 1.0) / len(ensemble)), rel=0.05)


def test_a_shifted_log_weight_fails_the_log_z_check(ensemble: WeightedEnsemble) -> None:
    broken = ensemble.with_log_weights(ensemble.log_weights + 0.05)
    assert abs(broken.log_z().z(LOG_Z)) > 4.0
    assert broken.ess == pytest.approx(ensemble.ess, rel=1e-12)  # ESS cannot see it


def test_expectations_are_those_of_the_target(ensemble: WeightedEnsemble) -> None:
    assert abs(ensemble.expectation(squared).z(DIM)) < 4.0
    unweighted = ensemble.with_log_weights(np.zeros(len(ensemble)))
    assert abs(unweighted.expectation(squared).z(DIM)) > 20.0  # the control
    vector = ensemble.expectation(lambda x: x.reshape(len(x), -1) ** 2)
    assert vector.value.shape == vector.stderr.shape == (DIM,)
    assert np.abs(vector.z(1.0)).max() < 4.0
    by_values = ensemble.expectation(squared(ensemble.positions))
    assert by_values.value == ensemble.expectation(squared).value


def test_standard_errors_by_hand(ensemble: WeightedEnsemble) -> None:
    lw = np.log([2.0, 1.0, 1.0])
    three = WeightedEnsemble(np.zeros((3, 1, 1)), lw, np.zeros(3))
    estimate = three.expectation([0.0, 1.0, 3.0])
    assert estimate.value == pytest.approx(1.0)
    assert estimate.stderr == pytest.approx(math.sqrt(0.25 * 1.0 + 0.0625 * 4.0))
    assert three.log_z().stderr == pytest.approx(
        math.sqrt(3.0) / 3.0 / (4.0 / 3.0) / math.sqrt(3.0)
    )
    values = squared(ensemble.positions)
    density, edges, stderr = ensemble.histogram(values, bins=6, range=(2.0, 14.0))
    for k in range(6):
        share = ensemble.expectation((values >= edges[k]) & (values < edges[k + 1]))
        assert density[k] == pytest.approx(share.value / 2.0, rel=1e-9)
        assert stderr[k] == pytest.approx(share.stderr / 2.0, rel=1e-9)


def test_standard_errors_have_the_spread_of_repetitions() -> None:
    repeats = [gaussian(1_000, seed=100 + k) for k in range(400)]
    for estimates, truth in (
        ([e.expectation(squared) for e in repeats], float(DIM)),
        ([e.log_z() for e in repeats], LOG_Z),
    ):
        z = np.array([estimate.z(truth) for estimate in estimates])
        assert abs(z.mean()) < 4.0 / math.sqrt(len(z)) + 0.1  # a bias of order 1 / sqrt n
        assert z.std() == pytest.approx(1.0, abs=4.0 / math.sqrt(2 * len(z)))


def test_histogram_is_the_chi_square_density(ensemble: WeightedEnsemble) -> None:
    from scipy.stats import chi2

    density, edges, stderr = ensemble.histogram(squared, bins=20, range=(1.0, 15.0))
    exact = np.diff(chi2(DIM).cdf(edges)) / np.diff(edges)
    assert np.abs((density - exact) / stderr).max() < 4.0
    inside = chi2(DIM).cdf(15.0) - chi2(DIM).cdf(1.0)
    assert (density * np.diff(edges)).sum() == pytest.approx(inside, abs=0.01)
    raw = ensemble.with_log_weights(np.zeros(len(ensemble)))
    density, _, stderr = raw.histogram(squared, edges)
    assert np.abs((density - exact) / stderr).max() > 20.0  # the control


# -- log space --------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_nothing_overflows(ensemble: WeightedEnsemble, shift: float) -> None:
    part = ensemble[:500]
    moved = part.with_log_weights(part.log_weights + shift)
    with np.errstate(all="raise", under="ignore"):
        assert moved.log_z().value == pytest.approx(part.log_z().value + shift, rel=1e-12)
        assert moved.log_z().stderr == pytest.approx(part.log_z().stderr, rel=1e-6)
        assert moved.expectation(squared).value == pytest.approx(
            part.expectation(squared).value, rel=1e-9
        )
        assert moved.ess == pytest.approx(part.ess, rel=1e-9)
        assert forward_ess(moved.log_weights) == pytest.approx(forward_ess(part.log_weights))
        assert moved.weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert moved.diagnostics().pareto_k == pytest.approx(part.diagnostics().pareto_k, abs=1e-6)


def test_weights_that_span_twenty_thousand_units() -> None:
    lw = np.linspace(-1e4, 1e4, 100)
    assert reverse_ess(lw) == pytest.approx(0.01)
    assert forward_ess(lw) == 0.0
    assert pareto_k(lw) == math.inf
    ensemble = WeightedEnsemble(np.zeros((100, 1, 1)), lw, np.zeros(100))
    assert ensemble.log_z().value == pytest.approx(1e4 - math.log(100.0))
    assert math.isnan(ensemble.log_z().stderr)  # the delta method's is 1, whatever there is
    assert ensemble.weights[-1] == 1.0


# -- samples of zero weight -------------------------------------------------------------------
def test_zero_weight_counts_as_a_draw_and_may_hold_anything(ensemble: WeightedEnsemble) -> None:
    half = ensemble[:1000]
    x = np.concatenate([half.positions, np.full((1000, M, D), np.nan)])
    lw = np.concatenate([half.log_weights, np.full(1000, -np.inf)])
    u = np.concatenate([half.reduced_energies, np.full(1000, np.inf)])
    mixed = WeightedEnsemble(x, lw, u)
    assert mixed.log_z().value == pytest.approx(half.log_z().value - math.log(2.0))
    assert mixed.ess == pytest.approx(half.ess / 2.0)
    assert mixed.diagnostics().n_zero_weight == 1000
    estimate, expected = mixed.expectation(squared), half.expectation(squared)
    assert estimate.value == pytest.approx(expected.value, rel=1e-12)
    assert estimate.stderr == pytest.approx(expected.stderr, rel=1e-12)
    density, edges, _ = mixed.histogram(squared, bins=10)
    np.testing.assert_allclose(density, half.histogram(squared, edges)[0])
    assert np.isfinite(mixed.resample(500, seed=0).positions).all()
    assert forward_ess(lw) == 0.0


def test_all_weights_zero() -> None:
    dead = WeightedEnsemble(np.zeros((30, 1, 1)), np.full(30, -np.inf), np.full(30, np.nan))
    assert dead.ess == 0.0
    about = dead.diagnostics()
    assert about.n_zero_weight == 30
    assert not about.reliable
    assert "30 of weight zero (30 without an energy): NOT reliable" in str(about)
    assert repr(dead).endswith("ESS 0.00%)")
    with pytest.raises(ValueError, match="expected a sample with weight, but all 30 log weights"):
        _ = dead.weights
    with pytest.raises(ValueError, match="expected a weight above zero, got 30 of -inf"):
        dead.log_z()
    for use in (lambda: dead.expectation(squared), lambda: dead.resample(3, seed=0)):
        with pytest.raises(ValueError, match="expected a sample with weight"):
            use()


# -- reweighting ------------------------------------------------------------------------------
def test_reweighting_to_another_hamiltonian(ensemble: WeightedEnsemble) -> None:
    k = 0.9
    stiff = ensemble.reweight(Spring(k))
    assert abs(stiff.log_z().z(LOG_Z - 0.5 * DIM * math.log(k))) < 4.0
    assert abs(stiff.expectation(squared).z(DIM / k)) < 4.0
    assert stiff.temperature is None
    back = stiff.reweight(Spring(1.0))
    np.testing.assert_allclose(back.log_weights, ensemble.log_weights, atol=1e-12)
    np.testing.assert_allclose(back.reduced_energies, ensemble.reduced_energies, atol=1e-12)


def test_reweighting_drops_what_the_new_target_forbids(ensemble: WeightedEnsemble) -> None:
    cut = ensemble.reweight(Spring(1.0, cutoff=5.0))
    forbidden = squared(ensemble.positions) > 5.0
    np.testing.assert_array_equal(np.isneginf(cut.log_weights), forbidden)
    inside = ensemble.expectation(~forbidden)
    ratio = cut.log_z().value - ensemble.log_z().value
    assert ratio == pytest.approx(math.log(inside.value), abs=1e-12)
    again = cut.reweight(Spring(1.0))  # what had no weight does not get it back
    np.testing.assert_array_equal(np.isneginf(again.log_weights), forbidden)


def test_reweighting_to_a_thermodynamic_state() -> None:
    well = double_well()
    rng = np.random.default_rng(0)
    x = well.positions + 0.3 * rng.normal(size=(50, *well.positions.shape))
    target = well.target()
    u = target.reduced_energy(torch.tensor(x)).numpy()
    ensemble = WeightedEnsemble(x, rng.normal(size=50), u, temperature=well.temperature)
    state = ThermodynamicState(well.system, temperature=2.0 * well.temperature * unit.kelvin)
    hot = ensemble.reweight(state)
    assert hot.temperature == pytest.approx(2.0 * well.temperature)
    np.testing.assert_allclose(hot.reduced_energies, 0.5 * u, rtol=1e-10)
    np.testing.assert_allclose(hot.log_weights, ensemble.log_weights + 0.5 * u, rtol=1e-10)
    same = ensemble.reweight(target)
    np.testing.assert_allclose(same.log_weights, ensemble.log_weights, atol=1e-9)
    assert same.temperature == well.temperature


def test_reweighting_refuses_other_things(ensemble: WeightedEnsemble) -> None:
    with pytest.raises(ValueError, match=r"expected a target with reduced_energy\(x\).*got int"):
        ensemble.reweight(300)

    class Column:
        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(dim=(1, 2))[:, None]

    with pytest.raises(ValueError, match=r"each of 40000 configurations, got shape \(40000, 1\)"):
        ensemble.reweight(Column())


# -- the container ----------------------------------------------------------------------------
def test_indexing_keeps_samples_together(ensemble: WeightedEnsemble) -> None:
    mask = np.zeros(len(ensemble), dtype=bool)
    mask[[3, 8]] = True
    for part, rows in (
        (ensemble[2:9:3], [2, 5, 8]),
        (ensemble[mask], [3, 8]),
        (ensemble[[8, 3, -1]], [8, 3, -1]),
        (ensemble[np.int64(4)], [4]),
        (ensemble[-1], [len(ensemble) - 1]),
    ):
        assert len(part) == len(rows)
        np.testing.assert_array_equal(part.positions, ensemble.positions[rows])
        np.testing.assert_array_equal(part.log_weights, ensemble.log_weights[rows])
        np.testing.assert_array_equal(part.reduced_energies, ensemble.reduced_energies[rows])
        assert part.temperature == 300.0
        assert part.metadata == {"seed": 1}
    twice = ensemble[[8, 3, 3]]  # no three samples, whose errors nobody knows
    assert twice.metadata == {"seed": 1}
    assert twice.provenance.resampled_from == len(ensemble)
    assert math.isnan(twice.log_z().stderr)
    with pytest.raises(IndexError):
        ensemble[len(ensemble)]
    with pytest.raises(ValueError, match="at least one sample"):
        ensemble[:0]


def test_ensembles_are_immutable_and_independent_of_their_source() -> None:
    x, lw, u = np.zeros((3, 1, 2)), np.zeros(3), np.zeros(3)
    notes = {"a": [1]}
    ensemble = WeightedEnsemble(x, lw, u, metadata=notes)
    x[0], lw[0], notes["a"][0] = 9.0, 9.0, 9
    assert ensemble.positions[0, 0, 0] == ensemble.log_weights[0] == 0.0
    assert ensemble.metadata == {"a": [1]}
    for array in (ensemble.positions, ensemble.log_weights, ensemble.reduced_energies):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        ensemble.temperature = 3.0  # type: ignore[misc]


def test_input_of_other_kinds_is_converted() -> None:
    ensemble = WeightedEnsemble(
        torch.ones(2, 1, 3, dtype=torch.float32),
        [0, 1],
        (2, 3),
        temperature=0.3e3 * unit.kelvin,
        metadata={"times": (1, 2)},
    )
    for array in (ensemble.positions, ensemble.log_weights, ensemble.reduced_energies):
        assert array.dtype == np.float64
    assert ensemble.temperature == 300.0
    assert ensemble.metadata == {"times": [1, 2]}
    angstrom = WeightedEnsemble(np.ones((1, 1, 3)) * unit.angstrom, [0.0], [0.0])
    np.testing.assert_allclose(angstrom.positions, 0.1)


GOOD: dict[str, Any] = {
    "positions": np.zeros((3, 2, 3)),
    "log_weights": np.zeros(3),
    "reduced_energies": np.zeros(3),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("positions", np.zeros((3, 2)), r"positions: expected shape \(n, M, D\) in nm.*\(3, 2\)"),
        ("positions", np.zeros((0, 2, 3)), r"at least one sample, got \(0, 2, 3\)"),
        ("positions", np.full((3, 2, 3), np.nan), "positions: expected finite .* 3 of 3 .*index 0"),
        ("log_weights", np.zeros(2), r"log_weights: expected shape \(3,\), .* got \(2,\)"),
        ("log_weights", np.zeros((3, 1)), r"log_weights: expected shape \(n,\) .* got \(3, 1\)"),
        ("log_weights", [0, np.nan, 0], "got NaN or .inf in 1 of 3 samples, the first at index 1"),
        ("log_weights", [0, 0, np.inf], "expected finite numbers or -inf, .* index 2"),
        ("reduced_energies", np.zeros(4), r"reduced_energies: expected shape \(3,\), .* \(4,\)"),
        ("reduced_energies", [0, 0, np.inf], "reduced_energies: expected finite .* index 2"),
        ("temperature", -1.0, "temperature: expected a positive"),
        ("topology", "ALDP", r"topology: expected an openmm\.app\.Topology or None, got str"),
        ("topology", placeholder_topology(3), "topology: expected 2 atoms .* got 3"),
        ("metadata", {"x": np.zeros(2)}, "metadata: expected JSON-able values"),
        ("metadata", {"x": math.nan}, "metadata: expected JSON-able values without NaN"),
        ("metadata", [1], "metadata: expected a dictionary, got list"),
    ],
)
def test_invalid_fields_are_refused(field: str, value: object, message: str) -> None:
    WeightedEnsemble(**GOOD)
    with pytest.raises(ValueError, match=message):
        WeightedEnsemble(**{**GOOD, field: value})


def test_observables_must_match_the_samples(ensemble: WeightedEnsemble) -> None:
    with pytest.raises(ValueError, match=r"expectation: expected one value per sample, .*\(7,\)"):
        ensemble.expectation(np.zeros(7))
    with pytest.raises(ValueError, match=r"expectation: expected one value per sample, .*\(\)"):
        ensemble.expectation(lambda x: x.sum())
    with pytest.raises(ValueError, match=r"expectation: expected finite values .* 40000 of 40000"):
        ensemble.expectation(lambda x: np.full(len(x), np.nan))
    with pytest.raises(ValueError, match=r"histogram: expected one value per sample, got \(40000,"):
        ensemble.histogram(lambda x: x[:, 0])
    with pytest.raises(ValueError, match="n: expected an integer >= 1, got 0"):
        ensemble.resample(0)


def test_concatenation_pools_raw_weights(ensemble: WeightedEnsemble) -> None:
    parts = [ensemble[:100], ensemble[100:]]
    pooled = WeightedEnsemble.concatenate(parts)
    np.testing.assert_array_equal(pooled.positions, ensemble.positions)
    np.testing.assert_array_equal(pooled.log_weights, ensemble.log_weights)
    np.testing.assert_array_equal(pooled.reduced_energies, ensemble.reduced_energies)
    assert pooled.metadata == ensemble.metadata
    other = dataclasses.replace(parts[1], metadata={"seed": 2})
    assert WeightedEnsemble.concatenate([parts[0], other]).metadata == {
        "concatenated": [{"seed": 1}, {"seed": 2}]
    }


def test_concatenation_of_unlike_ensembles_is_refused(ensemble: WeightedEnsemble) -> None:
    part = ensemble[:5]
    for other, message in (
        (dataclasses.replace(part, temperature=310.0), r"one temperature, .* 1 .*310.* of 300"),
        (dataclasses.replace(part, topology=placeholder_topology(2)), "one topology"),
        (dataclasses.replace(part, positions=part.positions[:, :, :2]), "one particles and dim"),
        (part.positions, "expected WeightedEnsembles, got ndarray in place 1"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedEnsemble.concatenate([part, other])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected at least one ensemble, got none"):
        WeightedEnsemble.concatenate([])


def test_to_mdtraj(ensemble: WeightedEnsemble) -> None:
    flat = dataclasses.replace(ensemble[:5], positions=ensemble.positions[:5, :, :2])
    traj = flat.to_mdtraj()
    assert isinstance(traj, md.Trajectory)
    np.testing.assert_allclose(traj.xyz[..., :2], flat.positions, atol=1e-6)
    assert (traj.xyz[..., 2] == 0.0).all()
    assert [atom.element.symbol for atom in traj.topology.atoms] == ["Ar", "Ar"]
    four = WeightedEnsemble(np.zeros((1, 1, 4)), [0.0], [0.0])
    with pytest.raises(ValueError, match="to_mdtraj: expected at most 3 dimensions, got 4"):
        four.to_mdtraj()


# -- what is not known ------------------------------------------------------------------------
def test_one_sample_has_no_error_estimate() -> None:
    one = WeightedEnsemble(np.ones((1, 1, 1)), [0.0], [0.0])
    assert math.isnan(one.log_z().stderr)
    assert math.isnan(one.expectation(squared).stderr)


def test_what_would_lose_something_on_the_way_is_refused(ensemble: WeightedEnsemble) -> None:
    u = ensemble.reduced_energies
    with pytest.raises(ValueError, match="expectation: expected an array of real numbers, got an"):
        ensemble.expectation(1j * u)
    with pytest.raises(ValueError, match="expectation: expected plain numbers, got a Quantity in"):
        ensemble.expectation(unit.Quantity(u, unit.kilojoule_per_mole))
    with pytest.raises(ValueError, match="log_weights: .* got an array with masked entries"):
        ensemble.with_log_weights(
            np.ma.masked_less(ensemble.log_weights, np.median(ensemble.log_weights))
        )
    with pytest.raises(TypeError, match="a WeightedEnsemble, whose weights an array does not have"):
        np.asarray(ensemble)


def test_unweighted_samples_are_those_with_an_energy() -> None:
    ensemble = WeightedEnsemble(
        np.zeros((4, 2, 3)), [1.0, -np.inf, 3.0, -np.inf], [0.0, np.inf, 1.0, 5.0]
    )
    np.testing.assert_array_equal(ensemble.unweighted().log_weights, [0.0, -np.inf, 0.0, 0.0])


def test_one_sample_with_all_the_weight_knows_no_error() -> None:
    x = np.random.default_rng(0).normal(size=(50, 1, 1))
    log_w = np.where(np.arange(50) == 7, 20.0, 0.0)
    single = WeightedEnsemble(x, log_w, np.zeros(50))
    mean, log_z = single.expectation(x[:, 0, 0]), single.log_z()
    assert mean.value == pytest.approx(x[7, 0, 0], abs=1e-6)
    assert log_z.value == pytest.approx(20.0 - math.log(50.0), abs=1e-6)
    assert math.isnan(mean.stderr)
    assert math.isnan(log_z.stderr)
    two = np.where(np.arange(50) < 2, 20.0, 0.0)  # control: two of them do
    pair = WeightedEnsemble(x, two, np.zeros(50))
    assert pair.expectation(x[:, 0, 0]).stderr > 0.0
    assert pair.log_z().stderr == pytest.approx(math.sqrt(24.0 / 49.0), rel=1e-6)


@given(st.floats(0.0, 6.0), st.integers(2, 30))
def test_both_errors_are_known_from_the_same_share_on(gap: float, n: int) -> None:
    log_w = np.zeros(n)
    log_w[0] = gap
    x = np.arange(float(n)).reshape(n, 1, 1)
    ensemble = WeightedEnsemble(x, log_w, np.zeros(n))
    mean = ensemble.expectation(x[:, 0, 0])
    assert (
        math.isnan(mean.stderr) == math.isnan(ensemble.log_z().stderr) == (n * ensemble.ess < 1.5)
    )
