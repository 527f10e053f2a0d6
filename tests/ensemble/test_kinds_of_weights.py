"""What ensembles answer, and refuse, whose weights were taken away, changed or lost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.ensemble import mbar
from openmm_vtdis.ensemble.consistency import check_as_drawn
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget, double_well, gaussian_mixture


@pytest.fixture(scope="module")
def gen() -> DiffusionBoltzmannGenerator:
    return DiffusionBoltzmannGenerator.from_pretrained("dw4-small")


@pytest.fixture(scope="module")
def ensemble(gen: DiffusionBoltzmannGenerator) -> WeightedEnsemble:
    return gen.sample(400, n_steps=25, seed=11, progress=False)


@pytest.fixture(scope="module")
def log_w(gen: DiffusionBoltzmannGenerator, ensemble: WeightedEnsemble) -> np.ndarray:
    """Of frames, which are resampled here."""
    frames = ensemble.resample(300, seed=12).positions
    return gen.log_weights(frames, n_steps=25, seed=13, progress=False)


def test_unweighted_samples_have_means_and_nothing_else(
    gen: DiffusionBoltzmannGenerator, ensemble: WeightedEnsemble, log_w: np.ndarray
) -> None:
    raw = ensemble.unweighted()
    mean = raw.expectation(ensemble.reduced_energies)
    assert mean.value == pytest.approx(ensemble.reduced_energies.mean())
    assert mean.stderr == pytest.approx(ensemble.reduced_energies.std() / 20.0)
    assert "reliability unknown" in str(raw.diagnostics())
    states = [gen.target], [None], [None]
    for ask in (
        raw.log_z,
        lambda: raw.free_energy(log_w),
        lambda: raw.reweight(330 * unit.kelvin),
        lambda: mbar(raw, *states),
        lambda: raw[:10].log_z(),
    ):
        with pytest.raises(ValueError, match="expected samples with their weights, got unweighted"):
            ask()
    with pytest.raises(ValueError, match="concatenate: expected one kind of weights"):
        WeightedEnsemble.concatenate([ensemble, raw])
    assert len(raw.resample(10, seed=0)) == len(raw.to_sampler_states(10, seed=0)) == 10
    assert raw.with_log_weights(ensemble.log_weights).log_z().value == ensemble.log_z().value
    rest = raw[200:].with_metadata({"unweighted": True})
    parts = WeightedEnsemble.concatenate([raw[:200], rest])
    with pytest.raises(ValueError, match="log_z: .* got unweighted"):
        parts.log_z()
    again = parts.with_log_weights(ensemble.log_weights)
    assert again.log_z().value == pytest.approx(ensemble.log_z().value, abs=1e-12)
    # Control: as drawn, all of them answer
    assert abs(ensemble.free_energy(log_w).z(-29.670)) < 5.0
    assert ensemble.log_z().stderr > 0.0
    assert mbar(ensemble, *states).log_z().stderr > 0.0


def test_the_samples_own_weights_are_not_those_of_frames(
    gen: DiffusionBoltzmannGenerator, ensemble: WeightedEnsemble
) -> None:
    own = ensemble.log_weights
    for some in (own, own[::-1], own[:100]):
        with pytest.raises(ValueError, match="free_energy: .* got those of the generated samples"):
            ensemble.free_energy(some)
    for foreign in (ensemble, [[1.0], [2.0, 3.0]], torch.zeros(3, requires_grad=True)):
        with pytest.raises(ValueError, match=r"log_weights: expected an array \(n,\), as log_w"):
            ensemble.free_energy(foreign)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mbar, state 0: .* got those of the generated samples"):
        mbar(ensemble, [gen.target], [ensemble.positions], [own])


def test_resampled_samples_have_means_without_an_error(ensemble: WeightedEnsemble) -> None:
    u = ensemble.reduced_energies
    before, again = ensemble.expectation(u), ensemble.resample(20_000, seed=1)
    after = again.expectation(again.reduced_energies)
    assert after.value == pytest.approx(before.value, abs=0.1 * before.stderr)
    assert math.isnan(after.stderr)
    assert np.isnan(again.histogram(again.reduced_energies, bins=4)[2]).all()
    warmer = again.reweight(130 * unit.kelvin)
    assert math.isnan(warmer.expectation(warmer.reduced_energies).stderr)


def test_a_temperature_is_the_same_hamiltonian_there(ensemble: WeightedEnsemble) -> None:
    bench = double_well()
    warm = OpenMMTarget(bench.system, None, temperature=130 * unit.kelvin, n_dims=2)
    by_energies, by_scale = ensemble.reweight(warm), ensemble.reweight(130 * unit.kelvin)
    np.testing.assert_allclose(by_scale.log_weights, by_energies.log_weights, atol=1e-8)
    np.testing.assert_allclose(by_scale.reduced_energies, by_energies.reduced_energies, atol=1e-8)
    assert by_scale.temperature == by_energies.temperature == pytest.approx(130.0)
    share = 1.0 - bench.temperature / 130.0  # of the energy that no longer counts
    expected = ensemble.log_weights + share * ensemble.reduced_energies
    np.testing.assert_allclose(by_scale.log_weights, expected, atol=1e-8)
    with pytest.raises(ValueError, match="temperature: expected an openmm.unit temperature"):
        ensemble.reweight(1.0 * unit.nanometer)
    with pytest.raises(ValueError, match=r"OpenMMTarget\(system, topology, temperature\)"):
        ensemble.reweight(130.0)
    nowhere = dataclasses.replace(ensemble, temperature=None)
    with pytest.raises(ValueError, match="reweight: expected samples that have a temperature"):
        nowhere.reweight(130 * unit.kelvin)


def test_weights_for_two_hamiltonians_do_not_pool_and_those_for_one_do(
    gen: DiffusionBoltzmannGenerator, ensemble: WeightedEnsemble
) -> None:
    bench = double_well()
    bench.system.getForce(0).setEnergyFunction("0.5*square(r)")
    other = OpenMMTarget(bench.system, None, bench.temperature, n_dims=2)
    rest = ensemble[200:].with_metadata({"run": 2})
    pooled = WeightedEnsemble.concatenate([ensemble[:200], rest])
    assert "hamiltonian" not in pooled.metadata  # but in that of a part
    for one in (ensemble, pooled):
        with pytest.raises(ValueError, match="concatenate: expected one Hamiltonian, but ensemb"):
            WeightedEnsemble.concatenate([one, ensemble.reweight(other)])
    kelvin = bench.temperature * unit.kelvin
    carried = ensemble.reweight(130 * unit.kelvin).reweight(kelvin)
    for again in (carried, carried.reweight(gen.target), ensemble.reweight(gen.target)):
        pooled = WeightedEnsemble.concatenate([ensemble[:200], again[200:]])
        assert pooled.log_z().value == pytest.approx(ensemble.log_z().value, abs=1e-9)


def test_notes_of_ones_own_say_nothing_of_the_weights(ensemble: WeightedEnsemble) -> None:
    for notes in (
        {"unweighted": False, "reweighted": None, "resampled_from": 0},
        {"concatenated": "a.nc and b.nc"},
        {"concatenated": True},
        {"concatenated": [1, "b.nc"]},
    ):
        noted = ensemble.with_metadata(notes)
        check_as_drawn("test", noted.provenance)
        assert noted.log_z().value == ensemble.log_z().value


class Sometimes(GaussianMixtureDenoiser):
    """The exact denoiser of a target, but for NaN beyond a coordinate."""

    def __init__(self, target: GaussianMixture, where: float) -> None:
        super().__init__(target.space, target.weights, target.means, target.variances)
        self.where = where

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        lost = (x[:, 0, 0] > self.where * t)[:, None, None]
        return torch.where(lost, torch.nan, super().__call__(x, t))


def samples(where: float, seed: int = 2) -> WeightedEnsemble:
    """By a kernel that was tuned when its denoiser still knew all."""
    target = gaussian_mixture(3)
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, Sometimes(target, math.inf), Cartesian(target.space, 1.0)
    )
    gen.tune(target.sample(500, seed=1), 30, "isotropic", n_trajectories=300, progress=False)
    assert gen.process is not None
    gen.process = dataclasses.replace(gen.process, denoiser=Sometimes(target, where))
    return gen.sample(3_000, seed=seed, progress=False)


def test_samples_on_whose_way_the_network_gave_nan_are_not_zero_weights_like_others() -> None:
    sound, lost = samples(math.inf), samples(0.5)
    assert sound.diagnostics().n_failed == 0  # control
    assert sound.diagnostics().reliable
    about = lost.diagnostics()
    assert 300 < about.n_failed == about.n_zero_weight < 2_900
    assert about.n_outside == 0
    assert about.pareto_k < about.pareto_k_threshold  # which by itself sees nothing
    assert not about.reliable
    assert f"({about.n_failed} failed: none wanted): NOT reliable" in str(about)


def test_failures_are_remembered_where_their_samples_are_gone() -> None:
    lost = samples(0.5)
    again = lost.resample(seed=0)
    for after in (
        again,
        lost.unweighted(),
        again.unweighted(),
        WeightedEnsemble.concatenate([samples(math.inf, seed=3), again]),
    ):
        assert after.diagnostics().n_failed == lost.diagnostics().n_failed
        assert str(after.diagnostics()).endswith(": NOT reliable")


class Rough(torch.autograd.Function):
    """The identity, whose derivative is NaN where a flag says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(lost)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return torch.where(ctx.saved_tensors[0][:, None, None], torch.nan, gradient), None


class Unsmooth(Sometimes):
    """Its values are exact; beyond a coordinate its derivatives are NaN."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        lost = x[:, 0, 0] > self.where * t
        return GaussianMixtureDenoiser.__call__(self, Rough.apply(x, lost), t)


def test_a_flow_whose_divergence_is_nan_has_failed() -> None:
    """Positions and energies are sound there; the weight is not known."""
    target = gaussian_mixture(3)
    found = []
    for where in (math.inf, 0.5):
        gen = DiffusionBoltzmannGenerator.from_denoiser(
            target, Unsmooth(target, where), Cartesian(target.space, 1.0)
        )
        gen.tune(target.sample(300, seed=1), 20, "isotropic", n_trajectories=200, progress=False)
        found.append(gen.sample_ode(300, seed=2, progress=False).diagnostics())
    sound, lost = found
    assert sound.n_failed == 0
    assert lost.n_failed == lost.n_zero_weight > 30
    assert lost.n_outside == 0
    assert not lost.reliable


def test_an_energy_of_minus_infinity_is_a_failure_and_one_of_infinity_is_none() -> None:
    x = np.random.default_rng(0).normal(size=(400, 1, 1))
    log_w = np.where(np.arange(400) < 3, -math.inf, 0.01 * x[:, 0, 0])
    for energy, failed in ((math.inf, 0), (math.nan, 0), (-math.inf, 3), (1.0, 0)):
        u = np.where(np.arange(400) < 3, energy, 0.0)
        about = WeightedEnsemble(x, log_w, u).diagnostics()
        assert (about.n_failed, about.n_zero_weight) == (failed, 3)
        assert about.reliable == (failed == 0)


def test_a_grid_cannot_adapt_to_a_network_that_gives_nan() -> None:
    target = gaussian_mixture(3)
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, Sometimes(target, 0.5), Cartesian(target.space, 1.0)
    )
    with pytest.raises(ValueError, match="denoiser: expected finite predictions, got NaN"):
        gen.tune(target.sample(500, seed=1), 10, "isotropic", progress=False)
