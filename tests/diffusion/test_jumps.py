"""A last step that jumps over the low levels, and what grids, kernels and flows make of it."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from tests.conftest import make_oracle


def test_jumping_keeps_ends_number_and_density() -> None:
    grid = Schedule.geometric(40, 1e-3, 10.0)
    jumped = grid.jumping(0.05)
    assert (jumped.n_steps, jumped.times[0], jumped.times[-1]) == (40, 1e-3, 10.0)
    assert jumped.times[1] == 0.05
    ratios = torch.tensor(jumped.times[1:]).log().diff()
    torch.testing.assert_close(ratios, torch.full_like(ratios, math.log(200.0) / 39.0))
    assert grid.jumping(1e-4) is grid
    assert grid.jumping(20.0) is grid
    again = jumped.with_n_steps(20, keep_first=True)
    assert (again.n_steps, *again.times[:2], again.times[-1]) == (20, 1e-3, 0.05, 10.0)
    with pytest.raises(ValueError, match="n_steps"):
        jumped.with_n_steps(2, keep_first=True)


def test_a_flow_does_not_jump() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(40, 1e-3, 10.0), oracle.reduced_energy
    )
    jumped = process.with_laplace(LaplaceRange(0.2, 0.05))
    assert process.flow_schedule() == process.schedule
    for n in (40, 25):
        flow = jumped.flow_schedule(n)
        torch.testing.assert_close(flow.tensor, Schedule.geometric(n, 1e-3, 10.0).tensor)
    assert jumped.flow_schedule().n_steps == 40


def test_a_kernel_keeps_its_jump_for_another_number_of_steps() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(
        oracle.denoiser, Schedule.geometric(40, 1e-3, 10.0), oracle.reduced_energy
    )
    family = make_covariance("hessian", oracle.space, [0] * 3, torch.zeros(1, 22))
    jumped = process.with_covariance(family).with_laplace(LaplaceRange(0.2, 0.05))
    again = jumped.with_n_steps(20)
    assert again.schedule.times[:2] == jumped.schedule.times[:2] == (1e-3, 0.05)
    assert again.laplace == jumped.laplace


def test_a_jump_for_which_the_grid_has_no_room_is_none() -> None:
    """Below its second level, or with too few levels above: else a step would pass for a jump."""
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(12, 0.02, 10.0)
    process = DiffusionProcess.ddpm(oracle.denoiser, grid, oracle.reduced_energy)
    for jump in (0.9 * grid.times[1], 1.1 * grid.times[-2]):
        there = process.with_laplace(LaplaceRange(11.0, jump))
        assert there.schedule == grid
        assert not there.jumps
        assert there.laplace == LaplaceRange(11.0)
    assert process.with_laplace(LaplaceRange(11.0, 1.1 * grid.times[1])).jumps  # control
