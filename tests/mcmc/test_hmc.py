"""HMC against exact Gaussians and reference values; broken chains must fail the same checks."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.mcmc import ReferenceData, accepted, hmc, sample_hmc
from openmm_vtdis.targets import GaussianMixture, Target, double_well, lennard_jones

LIMIT = 4.0


def gaussian(space: Space, variance: float = 0.5) -> GaussianMixture:
    """One Gaussian about the origin: u = |x|^2 / (2 v) + const."""
    means = torch.zeros(1, space.n_particles, space.n_dims)
    return GaussianMixture(means, [variance], [1.0], space)


def short(target: Target, **changes: object) -> ReferenceData:
    arguments = {
        "n_chains": 400,
        "n_samples": 10,
        "burn_in": 60,
        "thin": 3,
        "step_size": 0.6,
        "n_leapfrog": 2,
        "seed": 0,
        "progress": False,
    } | changes
    return sample_hmc(target, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", [Space(4, 2), Space(3, 3), Space(5, 1, centred=False)], ids=str)
def test_samples_of_a_gaussian(space: Space) -> None:
    """Mean, energy and variance of a Gaussian are known; all within 4 standard errors."""
    target = gaussian(space)
    data = short(target)
    report, x = data.report, data.positions
    assert x.shape == (4_000, space.n_particles, space.n_dims)
    assert x.dtype == data.reduced_energies.dtype == torch.float64
    assert torch.allclose(space.project(x), x, atol=1e-13)
    assert torch.allclose(target.reduced_energy(x), data.reduced_energies, rtol=1e-12)
    assert 0.7 < report.acceptance < 0.9
    assert abs(report.virial_z) < LIMIT
    exact = 0.5 * space.dim * (1.0 + math.log(2.0 * math.pi * 0.5))
    assert abs(report.energy - exact) < LIMIT * report.energy_stderr
    assert report.energy_std == pytest.approx(math.sqrt(space.dim / 2), rel=0.1)
    assert report.r_hat < 1.05
    per_chain = space.reduce(x).reshape(400, 10, -1).square().mean(dim=(1, 2))
    assert abs(float(per_chain.mean()) - 0.5) < LIMIT * float(per_chain.std()) / math.sqrt(400)


def test_rows_go_chain_by_chain() -> None:
    """A chain that never accepts repeats itself; the rows of one chain are neighbours."""
    start = 0.1 * torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    data = sample_hmc(
        gaussian(Space(4, 2)),
        n_chains=3,
        n_samples=2,
        burn_in=0,
        step_size=1e3,
        initial=start,
        seed=0,
        progress=False,
    )
    assert data.report.acceptance < 1e-6
    centred = start - start.mean(dim=1, keepdim=True)
    assert torch.allclose(data.positions, centred.repeat_interleave(2, dim=0))


def test_the_seed_decides() -> None:
    target = double_well().target()
    settings = {"n_chains": 20, "n_samples": 2, "burn_in": 5}
    a, b = (short(target, **settings, seed=7).positions for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, short(target, **settings, seed=8).positions)
    rng = torch.Generator().manual_seed(7)
    assert torch.equal(a, short(target, **settings, seed=rng).positions)


def test_the_current_state_is_not_computed_again() -> None:
    class Counting(Target):
        def __init__(self) -> None:
            self.inner, self.calls = gaussian(Space(3, 2)), 0
            self.space = self.inner.space

        def reduced_energy(self, x: Tensor) -> Tensor:
            raise AssertionError("HMC asks for energies and forces together")

        def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return self.inner.reduced_energy_and_force(x)

    target = Counting()
    start = torch.zeros(3, 2)
    short(target, n_chains=4, n_samples=5, burn_in=3, thin=2, n_leapfrog=1, initial=start)
    assert target.calls == 1 + (3 + 5 * 2) * 1


class Cliff(Target):
    """A unit Gaussian whose energy is NaN beyond |x| = 1.2."""

    def __init__(self) -> None:
        self.space = Space(2, 1, centred=False)

    def reduced_energy(self, x: Tensor) -> Tensor:
        square = x.double().square().sum(dim=(1, 2))
        return 0.5 * torch.where(square < 1.44, square, torch.nan)


def test_non_finite_proposals_are_never_accepted() -> None:
    data = short(Cliff(), initial=torch.zeros(2, 1))
    assert bool(torch.isfinite(data.positions).all())
    assert bool(torch.isfinite(data.reduced_energies).all())
    assert float(data.positions.square().sum(dim=(1, 2)).max()) < 1.44


def test_a_finite_energy_with_a_broken_force_is_not_accepted_either() -> None:
    class BrokenForce(Cliff):
        def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 0.5 * x.square().sum(dim=(1, 2)), torch.where(x.abs() < 1.2, -x, torch.nan)

    data = short(BrokenForce(), initial=torch.zeros(2, 1))
    assert math.isfinite(data.report.step_size)
    assert 0.0 < data.report.acceptance < 1.0
    assert float(data.positions.abs().max()) < 1.2


# ---------------------------------------------------------------------------------------------
# A ladder of temperatures


LADDER = (1.0, 2.5, 6.0, 15.0, 40.0)


def far_modes(ladder: tuple[float, ...]) -> ReferenceData:
    """Two modes behind a barrier of 45 kT, of which every chain starts in the rare one."""
    means = torch.tensor([[[3.0], [0.0]], [[-3.0], [0.0]]])
    target = GaussianMixture(means, [0.1, 0.1], [0.2, 0.8])
    start = torch.tensor([[3.0], [0.0]])
    return short(target, n_samples=60, thin=2, burn_in=200, initial=start, ladder=ladder)


def share_and_error(data: ReferenceData) -> tuple[float, float]:
    per_chain = (data.positions[:, 0, 0] < 0.0).double().reshape(400, 60).mean(dim=1)
    return float(per_chain.mean()), float(per_chain.std()) / math.sqrt(400)


def test_a_ladder_of_temperatures_crosses_what_one_does_not() -> None:
    share, error = share_and_error(far_modes(LADDER))
    assert error < 0.02
    assert abs(share - 0.8) < LIMIT * error
    assert share_and_error(far_modes((1.0,))) == (0.0, 0.0)


def test_the_coldest_rung_is_the_target() -> None:
    """Energy and its spread are those of the target's temperature; neighbours do exchange."""
    space = Space(4, 2)
    report = short(gaussian(space), n_samples=30, ladder=(1.0, 1.5, 2.25)).report
    exact = 0.5 * space.dim * (1.0 + math.log(2.0 * math.pi * 0.5))
    assert abs(report.energy - exact) < LIMIT * report.energy_stderr
    assert report.energy_std == pytest.approx(math.sqrt(space.dim / 2), rel=0.05)
    assert abs(report.virial_z) < LIMIT
    assert len(report.exchanges) == 2
    # Of Gaussians in d dimensions at temperatures of ratio r: P(F > r) twice, F with (d, d)
    # degrees of freedom; here d = 6 and r = 1.5, by the regularised incomplete beta function.
    p = 2.0 * float(scipy.stats.f.sf(1.5, space.dim, space.dim))
    assert report.exchanges == pytest.approx((p, p), abs=0.02)
    assert "exchanges         6" in str(report)


@pytest.mark.parametrize(("n_proposals", "burn_in"), [(1, 60), (1, 61), (3, 60), (3, 61)])
def test_shares_of_exchanges_are_those_of_a_pair_s_turns(n_proposals: int, burn_in: int) -> None:
    """Of an odd number of proposals one pair has a turn more, or all."""
    space = Space(4, 2)
    report = short(
        gaussian(space), n_samples=n_proposals, thin=1, burn_in=burn_in, ladder=(1.0, 1.5, 2.25)
    ).report
    p = 2.0 * float(scipy.stats.f.sf(1.5, space.dim, space.dim))
    seen = [share for share in report.exchanges if not math.isnan(share)]
    assert seen == pytest.approx([p] * min(n_proposals, 2), abs=0.08)
    assert math.isnan(report.exchanges[1 - burn_in % 2]) == (n_proposals == 1)


def test_exchanges_that_are_always_accepted_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without Metropolis' criterion the coldest chains are too hot."""
    shapes = {2: always, 1: accepted}
    monkeypatch.setattr(hmc, "accepted", lambda ratio, u: shapes[ratio.ndim](ratio, u))
    broken = short(gaussian(Space(4, 2)), ladder=(1.0, 1.5, 2.25)).report
    assert broken.virial_z > 2 * LIMIT


# ---------------------------------------------------------------------------------------------
# Negative controls: the checks above notice what they are there to notice


def always(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    return torch.isfinite(log_ratio)


def test_a_broken_accept_step_fails_the_virial_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmc, "accepted", always)
    report = short(gaussian(Space(4, 2))).report
    assert abs(report.virial_z) > 2 * LIMIT


def test_a_force_that_is_not_the_gradient_fails_the_virial_check() -> None:
    class Wrong(GaussianMixture):
        def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, f = super().reduced_energy_and_force(x)
            return u, 1.1 * f

    right = gaussian(Space(4, 2))
    target = Wrong(right.means, right.variances, right.weights, right.space)
    assert abs(short(target).report.virial_z) > LIMIT


def test_chains_that_disagree_are_seen() -> None:
    """Two far modes, every chain stuck in its own: R-hat of u tells, <u> looks certain."""
    means = torch.tensor([[[20.0]], [[-20.0]]])
    target = GaussianMixture(means, [1.0, 1.0], [0.99, 0.01])
    start = torch.where(torch.arange(100)[:, None, None] % 2 == 0, 20.0, -20.0)
    report = short(target, n_chains=100, initial=start).report
    assert report.r_hat > 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_chains": 1}, "n_chains: expected an integer >= 2, got 1"),
        ({"n_samples": 0}, "n_samples: expected an integer >= 1, got 0"),
        ({"burn_in": -1}, "burn_in: expected an integer >= 0, got -1"),
        ({"thin": 0}, "thin: expected an integer >= 1"),
        ({"n_leapfrog": 0}, "n_leapfrog: expected an integer >= 1"),
        ({"step_size": 0.0}, "step_size: expected a finite number > 0"),
        ({"ladder": "1, 2"}, "ladder: expected an array of real numbers"),
        ({"ladder": None}, "that rise from 1"),
        ({"ladder": (1.0, None)}, "that rise from 1"),
        ({"ladder": ()}, r"ladder: expected temperatures .* that rise from 1"),
        ({"ladder": (1.0, 1.0)}, "that rise from 1"),
        ({"ladder": (0.5, 1.0)}, "that rise from 1"),
        ({"ladder": (1.0, math.inf)}, "that rise from 1"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"initial": torch.zeros(3, 4, 2)}, "initial: expected 400 configurations, got 3"),
        ({"initial": torch.zeros(5, 2)}, r"initial: expected positions of shape \(n, 4, 2\)"),
        ({"initial": torch.full((4, 2), torch.nan)}, "initial: expected finite positions"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(gaussian(Space(4, 2)), **changes)


def test_a_start_of_infinite_energy_is_refused() -> None:
    with pytest.raises(ValueError, match="expected finite energies and forces, got 400 of 400"):
        short(lennard_jones(4).target(), initial=torch.zeros(4, 3), ladder=(1.0, 2.0))


# ---------------------------------------------------------------------------------------------
# Reference values (independent: see the table of benchmark systems in the documentation)


@pytest.mark.slow
def test_dw4_reference_values() -> None:
    data = sample_hmc(
        double_well().target(), 3_000, 10, burn_in=300, thin=20, seed=1, progress=False
    )
    report = data.report
    assert abs(report.virial_z) < LIMIT
    assert abs(report.energy + 22.552) < LIMIT * math.hypot(report.energy_stderr, 0.005)
    assert report.energy_std == pytest.approx(1.898, rel=0.02)
    # negative control: the mean of a widely copied, biased set is told apart at this precision
    assert report.energy_stderr < 0.02
    assert abs(report.energy + 22.48) > 0.03


@pytest.mark.slow
def test_lj13_reference_values() -> None:
    data = sample_hmc(
        lennard_jones().target(),
        600,
        20,
        burn_in=250,
        thin=10,
        n_leapfrog=12,
        seed=1,
        progress=False,
    )
    report = data.report
    assert abs(report.virial_z) < LIMIT
    assert abs(report.energy + 43.06) < LIMIT * math.hypot(report.energy_stderr, 0.05)
    assert report.energy_std == pytest.approx(7.06, rel=0.05)
    assert float(data.positions.square().mean().sqrt()) == pytest.approx(0.681, abs=0.005)
    i, j = torch.triu_indices(13, 13, offset=1)
    distances = (data.positions[::7, i] - data.positions[::7, j]).norm(dim=2).flatten()
    quantiles = distances.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
    expected = torch.tensor([0.955, 1.109, 1.610, 1.999, 2.682]).double()
    assert torch.allclose(quantiles, expected, atol=0.02)
