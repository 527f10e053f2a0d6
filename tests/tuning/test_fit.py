"""The fit: convex, one optimum, better than what it starts from, and as good as SGD."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_vtdis.diffusion.covariance import Covariance, make_covariance
from openmm_vtdis.diffusion.covariance.base import roughness
from openmm_vtdis.diffusion.paths import forward_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.tuning.fit import Trajectories, fit, fit_sgd, log_weights, objective_value
from tests.conftest import Oracle, make_oracle

GRID = Schedule.geometric(12, 0.05, 10.0)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return make_oracle(4, 2, True)


def collect(oracle: Oracle, family: Covariance, n: int, seed: int) -> Trajectories:
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID)
    x = oracle.sample(n, seed)
    paths = forward_paths(
        process, x, torch.Generator().manual_seed(seed + 1), family, progress=False
    )
    return Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)


def free(family: Covariance) -> Covariance:
    """The family without a price on its parameters."""
    kind = type("Free", (type(family),), {"penalty": lambda self, p, grid: p.new_zeros(())})
    return kind(family.space, family.labels, family.parameters)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "block"])
def test_ten_random_starts_end_at_one_optimum(oracle: Oracle, kind: str) -> None:
    family = make_covariance(kind, oracle.space, [0, 0, 1, 2])
    data = collect(oracle, family, 2000, seed=1)
    first = family.initial(data.statistics, GRID)
    reference = fit(family, data, GRID)
    rng = torch.Generator().manual_seed(0)
    for _ in range(10):
        noise = torch.randn(first.shape, generator=rng, dtype=torch.float64)
        start = torch.maximum(first * (1.0 + 0.3 * noise), 0.1 * first.abs())
        start = torch.where(family.lower_bounds(first) > 0, start, first + 0.2 * noise)
        again = fit(family, data, GRID, start=start, max_iterations=3000)
        assert again.objective == pytest.approx(reference.objective, abs=1e-5)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "block"])
@pytest.mark.parametrize("objective", ["alpha2", "kl"])
def test_objective_is_convex_along_random_lines(oracle: Oracle, kind: str, objective: str) -> None:
    family = make_covariance(kind, oracle.space, [0, 0, 1, 2])
    data = collect(oracle, family, 300, seed=2)
    first = family.initial(data.statistics, GRID)
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        ends = []
        for _ in range(2):
            noise = torch.randn(first.shape, generator=rng, dtype=torch.float64)
            end = first + 0.3 * noise
            ends.append(torch.maximum(end, family.lower_bounds(first) + 0.05))
        middle = 0.5 * (ends[0] + ends[1])
        values = [
            float(
                objective_value(data.base + family.cost(p, data.statistics, GRID), objective)
                + family.penalty(p, GRID)
            )
            for p in (ends[0], middle, ends[1])
        ]
        assert values[1] <= 0.5 * (values[0] + values[2]) + 1e-9


def test_isotropic_kl_optimum_is_the_closed_form(oracle: Oracle) -> None:
    """Where nothing else is asked of it."""
    family = free(make_covariance("isotropic", oracle.space, [0] * 4))
    data = collect(oracle, family, 2000, seed=3)
    closed = family.initial(data.statistics, GRID)
    start = torch.zeros_like(closed)
    found = fit(family, data, GRID, "kl", start=start).fitted.parameters
    torch.testing.assert_close(found, closed, atol=1e-4, rtol=0.0)


def test_alpha2_beats_kl_and_untuned_on_held_out_trajectories(oracle: Oracle) -> None:
    family = make_covariance("isotropic", oracle.space, [0] * 4)
    train, test = collect(oracle, family, 6000, seed=4), collect(oracle, family, 6000, seed=40)

    def cost(covariance: Covariance) -> float:
        return float(objective_value(log_weights(covariance, test, GRID), "alpha2"))

    untuned = family.with_parameters(torch.zeros(12, 1, dtype=torch.float64))
    alpha2 = cost(fit(family, train, GRID, "alpha2").fitted)
    assert alpha2 < cost(fit(family, train, GRID, "kl").fitted)
    assert alpha2 < cost(untuned) - 0.5


@pytest.mark.parametrize("kind", ["isotropic", "diagonal"])
def test_steps_learn_from_each_other(oracle: Oracle, kind: str) -> None:
    """From 100 trajectories: a price on roughness gains on others."""
    family = make_covariance(kind, oracle.space, [0, 0, 1, 1])
    test = collect(oracle, family, 6000, seed=11)
    mean_coefficients = []
    for seed in range(12, 24):
        train = collect(oracle, family, 100, seed=100 * seed)
        with_price, without = (
            float(objective_value(log_weights(fit(f, train, GRID).fitted, test, GRID), "alpha2"))
            for f in (family, free(family))
        )
        mean_coefficients.append(without - with_price)
    gain = torch.tensor(mean_coefficients)
    assert float(gain.mean()) > 4.0 * float(gain.std()) / math.sqrt(len(mean_coefficients))


def test_roughness_is_what_steps_differ_by_beyond_the_grid() -> None:
    line = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)[:, None]
    assert float(roughness(line, GRID)) == 0.0
    kink = line + 0.1 * (torch.arange(12) == 5)[:, None]
    assert float(roughness(kink, GRID)) == pytest.approx(1e-2 * 12**2 * 0.01 * (1 + 4 + 1))
    uneven = Schedule([*GRID.times[:7], *(1.5 * t for t in GRID.times[7:])])
    jump = -uneven.widening.log()[:, None]
    assert float(roughness(jump, uneven)) == 0.0
    assert float(roughness(2.0 * jump, uneven)) > 0.1
    assert float(roughness(line[:2], Schedule(GRID.times[:3]))) == 0.0


def test_convex_fit_is_at_least_as_good_as_sgd(oracle: Oracle) -> None:
    family = make_covariance("isotropic", oracle.space, [0] * 4)
    train, test = collect(oracle, family, 6000, seed=5), collect(oracle, family, 6000, seed=50)
    rng = torch.Generator().manual_seed(9)

    def draw(n: int) -> Trajectories:
        return train[torch.randint(len(train), (n,), generator=rng)]

    sgd = fit_sgd(family, draw, GRID, torch.zeros(12, 1), n_iterations=400, progress=False)
    one_pass = fit(family, train, GRID)
    a, b = (
        float(objective_value(log_weights(f.fitted, test, GRID), "alpha2")) for f in (one_pass, sgd)
    )
    assert a <= b + 0.01


def test_early_stopping_never_ends_above_its_start(oracle: Oracle) -> None:
    family = make_covariance("full", oracle.space, [0] * 4)
    few, validation = collect(oracle, family, 60, seed=6), collect(oracle, family, 2000, seed=60)
    stopped = fit(family, few, GRID, validation=validation).fitted
    start = family.with_parameters(family.initial(few.statistics, GRID))
    value = [
        float(objective_value(log_weights(c, validation, GRID), "alpha2")) for c in (stopped, start)
    ]
    assert value[0] <= value[1]


def test_bad_input_is_refused(oracle: Oracle) -> None:
    family = make_covariance("isotropic", oracle.space, [0] * 4)
    data = collect(oracle, family, 50, seed=7)
    with pytest.raises(ValueError, match="objective: expected one of 'alpha2', 'kl'"):
        fit(family, data, GRID, "reverse-kl")
    data.base[3] = math.nan
    with pytest.raises(ValueError, match="got 1 of 50 trajectories"):
        fit(family, data, GRID)
    data = collect(oracle, family, 50, seed=7)
    broken = collect(oracle, family, 50, seed=8)
    broken.base[0] = math.inf
    with pytest.raises(ValueError, match="got 1 of 50 trajectories"):
        fit(family, data, GRID, validation=broken)
    with pytest.raises(FloatingPointError, match="Adam diverged"):
        fit_sgd(family, lambda n: broken, GRID, torch.zeros(12, 1), progress=False)
