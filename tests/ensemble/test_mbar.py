"""MBAR: states pooled with generated samples, with known log Z, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools.states import ThermodynamicState

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.ensemble import mbar
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import exact_generator, springs


def warmer(target: GaussianMixture) -> GaussianMixture:
    """Another state: wider, moved, and normalised too."""
    return GaussianMixture(
        0.8 * target.means, 1.3 * target.variances, target.weights.flip(0), target.space
    )


def pooled(shift: float = 0.0, with_second: bool = True):  # type: ignore[no-untyped-def]
    target, gen = exact_generator(0.7, Space(4, 2))
    other = warmer(target)
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=1_500, progress=False)
    frames = [target.sample(1_500, seed=3), other.sample(1_500, seed=5) if with_second else None]
    weights = [
        None if x is None else gen.log_weights(x, seed=7, progress=False) + shift for x in frames
    ]
    arrays = [None if x is None else x.numpy() for x in frames]
    ensemble = gen.sample(2_000, seed=2, progress=False)
    return mbar(ensemble, [target, other], arrays, weights), target, other


def square(x: np.ndarray) -> np.ndarray:
    return np.square(x).sum(axis=(1, 2))


@pytest.mark.parametrize("with_second", [True, False])
def test_pooled_states_have_known_log_z_and_averages(with_second: bool) -> None:
    pool, *targets = pooled(with_second=with_second)
    for k, target in enumerate(targets):
        assert abs(pool.log_z(k).z(0.0)) < 4.0
        exact = square(target.sample(400_000, seed=9).numpy())
        assert abs(pool.expectation(square, k).z(exact.mean(), exact.std() / 632.0)) < 4.0
    assert abs(pool.free_energy_difference(0, 1).z(0.0)) < 4.0
    assert pool.overlap.sum(axis=1) == pytest.approx(np.ones(3))
    assert list(pool.n_samples[:1]) == [2_000]
    assert np.isnan(pool.statistical_inefficiencies[1]) == (not with_second)


def test_pooling_beats_the_generated_samples_alone() -> None:
    pool = pooled()[0]
    gen_only = pooled(with_second=False)[0]
    assert pool.expectation(square, 1).stderr < 0.8 * gen_only.expectation(square, 1).stderr


def test_frames_whose_weights_are_off_show() -> None:
    """Negative control."""
    pool, *_ = pooled(shift=1.0)
    assert abs(pool.log_z().z(0.0)) > 5.0


def test_what_cannot_be_pooled() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(300, seed=2, progress=False)
    x = target.sample(300, seed=3).numpy()
    lw = gen.log_weights(x, seed=7, progress=False)
    with pytest.raises(ValueError, match="the one that the ensemble is weighted for"):
        mbar(ensemble, [warmer(target)], [x], [lw])
    with pytest.raises(ValueError, match="frames and log weights of state 0, got only one"):
        mbar(ensemble, [target], [x], [None])
    with pytest.raises(ValueError, match=r"of shape \(299, 4, 2\), one for each log weight"):
        mbar(ensemble, [target], [x], [lw[1:]])
    with pytest.raises(ValueError, match="got 1 states, 2 and 1"):
        mbar(ensemble, [target], [x, x], [lw])
    with pytest.raises(ValueError, match="ThermodynamicState, got str"):
        mbar(ensemble, ["300 K"], [x], [lw])
    far = GaussianMixture(torch.full((1, 4, 2), 0.0), [1e-6], [1.0], target.space)
    y = far.sample(300, seed=1).numpy()
    with pytest.raises(ValueError, match="expected states that overlap"):
        mbar(ensemble, [target, far], [x, y], [lw, lw + 300.0])
    pool = mbar(ensemble, [target], [x], [lw])
    with pytest.raises(ValueError, match="state: expected one of 0 to 0, got 1"):
        pool.log_z(1)
    with pytest.raises(ValueError, match="one value for each of"):
        pool.expectation(np.zeros(3))


def test_samples_that_noise_does_not_belong_to_are_refused() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(300, seed=2, progress=False)
    x = target.sample(300, seed=3).numpy()
    lw = gen.log_weights(x, seed=7, progress=False)
    gen.tune(target.sample(2_000, seed=1), 10, "isotropic", n_trajectories=500, progress=False)
    both = WeightedEnsemble.concatenate([ensemble, gen.sample(300, seed=4, progress=False)])
    for other, message in (
        (ensemble.reweight(warmer(target)), "got reweighted ones"),
        (ensemble.resample(seed=0), "got resampled ones"),
        (both, "samples of one kernel, got several"),
    ):
        with pytest.raises(ValueError, match=f"free_energy: .*{message}"):
            other.free_energy(lw)
        with pytest.raises(ValueError, match=f"mbar: .*{message}"):
            mbar(other, [target], [x], [lw])
    assert abs(ensemble.free_energy(lw).disagreement) < 4.0


def test_frames_are_checked_and_may_be_views() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(300, seed=2, progress=False)
    x = target.sample(300, seed=3).numpy()
    lw = gen.log_weights(x[::-1], seed=7, progress=False)
    assert abs(mbar(ensemble, [target], [x[::-1]], [lw]).log_z().z(0.0)) < 4.0
    bad = x.copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 frames of state 0.*index 3"):
        mbar(ensemble, [target], [bad], [lw])
    with pytest.raises(ValueError, match="expected a list of states, one for each state, got"):
        mbar(ensemble, target, [x], [lw])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a g for each of 1 states"):
        mbar(ensemble, [target], [x], [lw], subsample=[1.0, 2.0])
    assert list(mbar(ensemble, [target], [x], [lw], subsample=[3.0]).n_samples) == [300, 100]
    pool = mbar(ensemble, [target], [x], [lw])
    for state in ("a", 0.5, True):
        with pytest.raises(ValueError, match="state: expected one of 0 to 0"):
            pool.log_z(state)  # type: ignore[arg-type]


def test_frames_are_thinned_by_the_energies_of_their_own_state() -> None:
    """Frames of state 1 in the order of its energy: it is the slowest that they can be."""
    target, gen = exact_generator(0.7, Space(4, 2))
    other = warmer(target)
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    x = other.sample(1_000, seed=5)
    slow = x[other.reduced_energy(x).argsort()]
    ensemble = gen.sample(500, seed=2, progress=False)
    number = {}
    for name, frames in (("white", x), ("slow", slow)):
        lw = gen.log_weights(frames, seed=7, progress=False)
        pool = mbar(ensemble, [target, other], [None, frames.numpy()], [None, lw])
        number[name] = pool.statistical_inefficiencies[1]
    assert number["white"] < 3.0
    assert number["slow"] > 30.0


def test_states_that_no_sample_reaches_are_refused() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(500, seed=2, progress=False)
    apart = torch.tensor([[3.0, 0.0], [-3.0, 0.0]]).repeat(2, 1)
    far = GaussianMixture(target.means + apart, target.variances, target.weights, target.space)
    with pytest.raises(ValueError, match="expected samples that reach state 1, got"):
        mbar(ensemble, [target, far], [None, None], [None, None])


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_averages_have_no_scale(scale: float) -> None:
    pool = pooled()[0]
    one, other = pool.expectation(square), pool.expectation(lambda x: scale * square(x))
    assert other.value == pytest.approx(scale * one.value, rel=1e-9)
    assert other.stderr == pytest.approx(scale * one.stderr, rel=1e-6)


def test_a_first_state_that_is_slightly_another_is_refused() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(300, seed=2, progress=False)
    near = GaussianMixture(target.means, 1.001 * target.variances, target.weights, target.space)
    with pytest.raises(ValueError, match="the one that the ensemble is weighted for"):
        mbar(ensemble, [near], [None], [None])


def test_md_of_another_temperature_in_openmm_units() -> None:
    """log Z in nm at both, <u> = 3 at both; the second state is one of openmmtools."""
    (cold, log_z_cold), (warm, log_z_warm) = springs(300.0), springs(450.0)
    variances = [math.exp(log_z / 3.0) / (2.0 * math.pi) for log_z in (log_z_cold, log_z_warm)]
    exact = GaussianMixtureDenoiser(  # but for its width: the weights are not flat
        cold.space, torch.ones(1), torch.zeros(1, 3, 3), torch.tensor([1.15 * variances[0]])
    )
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        cold, exact.scaled(0.05), Cartesian(cold.space, 0.05)
    )
    rng = torch.Generator().manual_seed(1)
    frames = [v**0.5 * cold.space.standard_normal(3_000, rng) for v in variances]
    gen.tune(frames[0], 12, "isotropic", n_trajectories=1_000, progress=False)
    ensemble = gen.sample(3_000, seed=2, progress=False)
    noised = [gen.log_weights(x, seed=3 + k, progress=False) for k, x in enumerate(frames)]
    state = ThermodynamicState(warm.system, 450.0 * unit.kelvin)
    pool = mbar(ensemble, [cold, state], [x.numpy() for x in frames], noised)
    for k, (target, log_z) in enumerate(((cold, log_z_cold), (warm, log_z_warm))):
        assert abs(pool.log_z(k).z(log_z)) < 4.0
        energies = target.reduced_energy(torch.tensor(pool.positions)).numpy()
        assert abs(pool.expectation(energies, k).z(3.0)) < 4.0
    assert abs(ensemble.free_energy(noised[0]).z(-log_z_cold)) < 4.0
    # Controls: the length of the model forgotten on one side, and kJ/mol for kT
    jacobian = cold.space.dim * math.log(0.05)
    off = mbar(ensemble, [cold, state], [x.numpy() for x in frames], [w + jacobian for w in noised])
    assert abs(off.log_z(0).z(log_z_cold)) > 10.0
    in_kj = pool.expectation(2.494 * cold.reduced_energy(torch.tensor(pool.positions)).numpy(), 0)
    assert abs(in_kj.z(3.0)) > 10.0


def test_a_generated_sample_without_weight_has_none_in_the_pool() -> None:
    target, gen = exact_generator(0.7, Space(4, 2))
    gen.tune(target.sample(2_000, seed=1), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(2_000, seed=2, progress=False)
    rng = np.random.default_rng(0)
    lost = rng.random(2_000) < 0.3
    halved = ensemble.with_log_weights(np.where(lost, -np.inf, ensemble.log_weights))
    x = target.sample(1_000, seed=3).numpy()
    pool = mbar(halved, [target], [x], [gen.log_weights(x, seed=7, progress=False)])
    values = np.zeros(len(pool.positions))
    values[:2_000] = lost
    assert pool.expectation(values).value == pytest.approx(0.0, abs=1e-9)
    assert pool.n_samples[0] == 2_000
