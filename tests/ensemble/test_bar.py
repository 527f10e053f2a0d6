"""BAR and MBAR: Gaussian work with a known answer, exact generators, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pymbar
import pytest
import torch
from openmm import unit
from openmmtools.states import ThermodynamicState

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.ensemble import Estimate, FreeEnergy, mbar
from openmm_vtdis.ensemble.bar import bar
from openmm_vtdis.targets import GaussianMixture
from tests.conftest import exact_generator, springs

LOG_Z = -37.25


def work(
    n: int, spread: float, seed: int, m: int | None = None, log_z: float = LOG_Z
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian log weights of both sides that belong together: their densities differ by e^lw."""
    rng = np.random.default_rng(seed)
    generated = rng.normal(log_z - 0.5 * spread**2, spread, n)
    return generated, rng.normal(log_z + 0.5 * spread**2, spread, m or n)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("m", [400, 4_000])
def test_gaussian_work_has_a_known_answer(spread: float, m: int) -> None:
    result = bar(*work(2_000, spread, 1, m))
    assert isinstance(result, FreeEnergy)
    assert abs(result.z(-LOG_Z)) < 4.0
    assert result.bootstrap_stderr == pytest.approx(result.stderr, rel=0.35)
    assert result.n_generated == 2_000
    assert 0.0 < result.overlap < 1.0


def test_errors_are_those_of_repeated_experiments() -> None:
    results = [bar(*work(500, 1.5, seed), subsample=False, n_bootstraps=0) for seed in range(60)]
    z = np.array([result.z(-LOG_Z) for result in results])
    assert abs(z.mean()) < 4.0 / math.sqrt(60)
    assert 0.7 < z.std(ddof=1) < 1.35  # 1 +- 0.09
    assert math.isnan(results[0].bootstrap_stderr)


def test_both_sides_together_beat_either() -> None:
    """Over repeated experiments, since one-sided errors are themselves underestimated."""
    results = [bar(*work(500, 2.0, seed), subsample=False, n_bootstraps=0) for seed in range(60)]
    spread = {
        name: np.std([getattr(r, name).value if name else r.value for r in results], ddof=1)
        for name in ("", "from_generated", "from_target")
    }
    assert spread[""] < 0.7 * min(spread["from_generated"], spread["from_target"])
    one = results[0]
    assert abs(one.from_generated.z(one.value, one.stderr)) < 4.0
    assert abs(one.from_target.z(one.value, one.stderr)) < 4.0


def test_it_is_the_bar_of_pymbar() -> None:
    generated, target = work(800, 1.0, 3)
    ours = bar(generated, target, subsample=False, n_bootstraps=0)
    theirs = pymbar.bar(-generated, target)
    assert ours.value == pytest.approx(theirs["Delta_f"], abs=1e-6)
    assert ours.stderr == pytest.approx(theirs["dDelta_f"], rel=0.03)  # another O(1/n)


def test_weights_that_are_off_on_one_side_show() -> None:
    """Negative control: half a kT on the target's side, which BAR shares out."""
    generated, target = work(4_000, 1.0, 4)
    assert abs(bar(generated, target + 0.5).z(-LOG_Z)) > 5.0


def test_generated_samples_without_weight_count() -> None:
    alive = 0.7
    generated, target = work(3_000, 1.0, 5, log_z=LOG_Z - math.log(alive))
    generated[np.random.default_rng(0).random(3_000) > alive] = -math.inf
    assert abs(bar(generated, target).z(-LOG_Z)) < 4.0


def test_both_sides_agree_where_a_part_of_the_samples_is_outside() -> None:
    """Two of five samples have the wrong handedness, which noised frames cannot know of."""
    generated, target = work(4_000, 0.5, 1)
    outside = np.random.default_rng(2).random(len(generated)) < 0.4
    shift = math.log(1.0 / 0.6)
    generated = np.where(outside, -math.inf, generated + shift)  # mean w over all is still Z
    result = bar(generated, target + shift, n_bootstraps=0)
    for estimate in (result, result.from_generated, result.from_target):
        assert abs(estimate.z(-LOG_Z)) < 4.0
    assert abs(result.disagreement) < 4.0
    # control: the average over frames alone knows only the inside
    alone = Estimate(np.log(np.exp(-target - shift + LOG_Z).mean()) - LOG_Z, 0.01)
    assert abs(alone.z(-LOG_Z)) > 20.0


def test_the_error_of_the_frames_side_knows_of_the_share_outside() -> None:
    """Few generated samples, so that their share inside is what is known worst."""
    z = []
    for seed in range(80):
        generated, target = work(60, 0.3, seed, 2_000)
        outside = np.random.default_rng(1_000 + seed).random(60) < 0.4
        generated = np.where(outside, -math.inf, generated + math.log(1.0 / 0.6))
        result = bar(generated, target + math.log(1.0 / 0.6), subsample=False, n_bootstraps=0)
        z.append(result.from_target.z(-LOG_Z))
    assert abs(np.mean(z)) < 4.0 / math.sqrt(80)
    assert 0.7 < np.std(z, ddof=1) < 1.35  # 1 +- 0.08


def test_repeated_frames_count_once() -> None:
    generated, target = work(1_000, 1.0, 6, 500)
    once = bar(generated, target)
    often = bar(generated, np.repeat(target, 10))
    assert once.statistical_inefficiency < 2.0
    assert 6.0 < often.statistical_inefficiency < 15.0
    assert often.n_target == 5_000
    assert often.bootstrap_stderr == pytest.approx(often.stderr, rel=0.35)
    assert often.value == pytest.approx(once.value, abs=0.3 * once.stderr)
    assert often.stderr == pytest.approx(once.stderr, rel=0.3)
    unaware = bar(generated, np.repeat(target, 10), subsample=False)
    assert unaware.stderr < 0.75 * often.stderr  # control
    assert "5000 target samples of statistical inefficiency " in str(often)


def slow_and_white(n: int, spread: float, share: float, memory: float, seed: int) -> np.ndarray:
    """Log weights of target samples: a slow part and the white noise of the noising."""
    rng = np.random.default_rng(seed)
    decay = math.exp(-1.0 / memory)
    slow = np.empty(n)
    slow[0] = rng.normal()
    kicks = rng.normal(size=n) * math.sqrt(1.0 - decay**2)
    for i in range(1, n):
        slow[i] = decay * slow[i - 1] + kicks[i]
    mixed = math.sqrt(share) * slow + math.sqrt(1.0 - share) * rng.normal(size=n)
    return LOG_Z + 0.5 * spread**2 + spread * mixed


def test_errors_know_a_slow_part_under_white_noise() -> None:
    """Over repeated experiments; thinning to every g-th frame gave 1.6 standard errors here."""
    z = []
    for seed in range(40):
        target = slow_and_white(4_000, 3.0, 0.1, 100.0, seed)
        generated = work(20_000, 3.0, 1_000 + seed)[0]
        result = bar(generated, target, n_bootstraps=0)
        assert result.statistical_inefficiency > 2.0
        z.append(result.z(-LOG_Z))
    assert np.std(z) < 1.4  # 1 +- 0.11 if g were known
    plain = [
        bar(
            work(20_000, 3.0, 1_000 + s)[0],
            slow_and_white(4_000, 3.0, 0.1, 100.0, s),
            subsample=False,
            n_bootstraps=0,
        ).z(-LOG_Z)
        for s in range(40)
    ]
    assert np.std(plain) > 1.8  # control


def test_few_frames_that_overlap_are_enough() -> None:
    result = bar(*work(10_000, 0.1, 11, 9), n_bootstraps=0)
    assert abs(result.z(-LOG_Z)) < 4.0
    assert result.overlap > 0.9


@pytest.mark.parametrize("gap", [8.0, 60.0, 2_000.0])
def test_states_that_do_not_meet_are_refused(gap: float) -> None:
    generated, target = work(300, 0.5, 7)
    with pytest.raises(ValueError, match="expected states that overlap, got"):
        bar(generated - gap, target + gap)


def test_bad_input() -> None:
    generated, target = work(20, 0.5, 8)
    with pytest.raises(ValueError, match="got 1 of 20 with log weight -inf"):
        bar(generated, np.where(np.arange(20) == 3, -np.inf, target))
    with pytest.raises(ValueError, match="got 20 generated and 1 target samples"):
        bar(generated, target[:1])
    with pytest.raises(ValueError, match="expected a generated sample with weight"):
        bar(np.full(20, -np.inf), target)
    ensemble = WeightedEnsemble(np.zeros((20, 2, 3)), generated, np.zeros(20))
    with pytest.raises(ValueError, match="expected samples as drawn, got resampled ones"):
        ensemble.resample(10, seed=0).free_energy(target)


@pytest.mark.parametrize("space", [None, Space(4, 2)], ids=str)
def test_an_exact_generator_has_a_known_log_z(space: Space | None) -> None:
    target, gen = exact_generator(0.7, space)
    gen.tune(target.sample(2_000, seed=1), 12, "isotropic", n_trajectories=1_500, progress=False)
    ensemble = gen.sample(3_000, seed=2, progress=False)
    log_v = gen.log_weights(target.sample(3_000, seed=3), seed=4, progress=False)
    result = ensemble.free_energy(log_v)
    assert abs(result.z(0.0)) < 4.0
    assert result.stderr < 0.9 * ensemble.log_z().stderr


# -- several states ------------------------------------------------------------------------------
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


def test_sides_of_two_hamiltonians_disagree() -> None:
    """Energies that differ by half a kT."""
    generated, target = work(2_000, 1.0, 10)
    assert abs(bar(generated, target).disagreement) < 4.0
    assert abs(bar(generated, target - 0.5).disagreement) > 4.0


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


def test_pymbar_leaves_no_trace() -> None:
    before = np.geterr()
    bar(*work(50, 0.5, 9))
    assert np.geterr() == before
    code = (
        "import numpy as np; from openmm_vtdis.ensemble.bar import bar;"
        "x = np.random.default_rng(0).normal(size=50); bar(x - 0.5, x + 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
