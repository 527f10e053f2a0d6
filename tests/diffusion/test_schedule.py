"""Grids: both ends, formulas, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_vtdis.diffusion.schedule import Schedule, default_range, make_schedule


@pytest.mark.parametrize("make", [Schedule.geometric, Schedule.karras])
def test_both_ends_are_exact_and_levels_increase(make) -> None:  # type: ignore[no-untyped-def]
    grid = make(25, 0.02, 20.0)
    assert grid.n_steps == 25
    assert len(grid.times) == 26
    assert grid.times[0] == pytest.approx(0.02, rel=1e-14)
    assert grid.times[-1] == pytest.approx(20.0, rel=1e-14)
    assert all(np.diff(grid.times) > 0)


def test_karras_is_linear_in_the_root_and_tends_to_geometric() -> None:
    root = np.asarray(Schedule.karras(10, 0.01, 10.0, rho=5.0).times) ** 0.2
    np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=1e-9)
    far = Schedule.karras(10, 0.01, 10.0, rho=1e5).times
    np.testing.assert_allclose(far, Schedule.geometric(10, 0.01, 10.0).times, rtol=1e-3)


def test_variances_are_those_of_the_exact_bridge() -> None:
    grid = Schedule((0.1, 0.3, 0.7))
    t = grid.tensor
    bridge = 1.0 / (1.0 / t[:-1] ** 2 + 1.0 / (t[1:] ** 2 - t[:-1] ** 2))
    torch.testing.assert_close(grid.variances, bridge)
    torch.testing.assert_close(grid.ratios, (t[:-1] / t[1:]) ** 2)
    assert bool((grid.ratios < 1.0).all())


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((0.1, 1.0), "n_steps >= 2"),
        ((0.1, 1.0, 0.5), "strictly increasing"),
        ((0.0, 1.0, 2.0), "positive"),
        ((0.1, float("nan"), 2.0), "finite"),
    ],
)
def test_bad_levels_are_refused(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(times)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="n_steps: expected an integer >= 2, got 1"):
        Schedule.geometric(1, 0.1, 1.0)
    with pytest.raises(ValueError, match="t_min < t_max"):
        Schedule.geometric(10, 1.0, 0.1)
    with pytest.raises(ValueError, match="one of 'adaptive', 'geometric', 'karras'"):
        make_schedule("linear", 10, 0.1, 1.0)
    with pytest.raises(ValueError, match="expected 11 noise levels for n_steps=10, got 3"):
        make_schedule((0.1, 0.2, 0.3), 10, 0.1, 1.0)


def test_default_range_follows_the_stiffest_mode() -> None:
    soft = default_range(6, torch.full((6,), 3.0))
    stiff = default_range(6, torch.full((6,), 3.0 * 100.0**4))
    assert stiff[0] < soft[0]
    assert stiff[0] == pytest.approx((12e-3 / (18.0 * 1e8)) ** 0.25)
    assert soft[1] == pytest.approx(max((6 / 4e-3) ** 0.25, 5.0))


@pytest.mark.parametrize("n_steps", [5, 20, 77])
def test_resampling_a_geometric_grid_gives_a_geometric_grid(n_steps: int) -> None:
    again = Schedule.geometric(20, 0.02, 10.0).with_n_steps(n_steps)
    expected = Schedule.geometric(n_steps, 0.02, 10.0)
    np.testing.assert_allclose(again.times, expected.times, rtol=1e-12)
    pairs = again.pairs
    assert pairs.shape == (n_steps, 2)
    assert bool((pairs[1:, 0] == pairs[:-1, 1]).all())


def test_the_prior_end_makes_room_for_the_mean_of_the_data() -> None:
    """d / (4 T^4) + |m|^2 / (2 T^2) is the budget, 10^-3 nats."""
    for mean_square in (0.0, 1.0, 50.0):
        t_max = default_range(50, mean_square=mean_square)[1]
        cost = 50 / (4.0 * t_max**4) + mean_square / (2.0 * t_max**2)
        assert cost == pytest.approx(1e-3)
