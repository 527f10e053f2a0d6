"""BAR: Gaussian work with a known answer, exact generators, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pymbar
import pytest

from openmm_vtdis import WeightedEnsemble
from openmm_vtdis.core.space import Space
from openmm_vtdis.ensemble import Estimate, FreeEnergy
from openmm_vtdis.ensemble.bar import bar
from tests.conftest import exact_generator

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


def test_sides_of_two_hamiltonians_disagree() -> None:
    """Energies that differ by half a kT."""
    generated, target = work(2_000, 1.0, 10)
    assert abs(bar(generated, target).disagreement) < 4.0
    assert abs(bar(generated, target - 0.5).disagreement) > 4.0


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


def test_a_side_that_rests_on_one_sample_is_named() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(loc=0.5, size=500)
    assert "the two sides alone differ by" in str(bar(rng.normal(size=500), target))  # control
    alone = np.append(target, -40.0)
    found = bar(rng.normal(size=500), alone)
    assert math.isnan(found.disagreement)
    assert "a single sample has nearly all the weight on the target side" in str(found)
