"""Probability flow: with an exact denoiser the log density converges to the known one."""

from __future__ import annotations

import pytest
import torch

from openmm_vtdis.diffusion.flow import ode_paths, tangent_basis
from openmm_vtdis.diffusion.schedule import Schedule
from tests.conftest import Oracle, make_oracle


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(oracle: Oracle, n_steps: int, **options: object) -> torch.Tensor:
    grid = Schedule.geometric(n_steps, 0.005, 200.0)
    x, log_p = ode_paths(
        oracle.denoiser,
        grid,
        rng(0),
        n=40,
        progress=False,
        **options,  # type: ignore[arg-type]
    )
    return log_p + oracle.reduced_energy(x)


def test_generated_density_is_the_exact_one(oracle: Oracle) -> None:
    error = errors(oracle, 120)
    assert float(error.abs().mean()) < 0.12


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_fixed_step_solvers_have_their_order(solver: str, order: int) -> None:
    """Halving the step divides the change of x and of log p by 2^order."""
    oracle = make_oracle(3, 2, True)
    ends = []
    for n in (30, 60, 120):
        grid = Schedule.geometric(n, 0.1, 8.0)
        x, log_p = ode_paths(oracle.denoiser, grid, rng(0), n=40, solver=solver, progress=False)
        ends.append((x, log_p))
    for coarse, fine, finest in zip(*ends, strict=True):
        ratio = float((coarse - fine).abs().mean() / (fine - finest).abs().mean())
        assert 0.6 * 2**order < ratio < 1.8 * 2**order


def test_density_of_given_samples_agrees_with_generating_them() -> None:
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(60, 0.02, 40.0)
    x, log_p = ode_paths(oracle.denoiser, grid, rng(0), n=20, progress=False)
    _, again = ode_paths(oracle.denoiser, grid, rng(1), x_0=x, progress=False)
    torch.testing.assert_close(again, log_p, atol=0.1, rtol=0.0)


def test_hutchinson_is_unbiased_for_the_log_density() -> None:
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(20, 0.005, 400.0)
    x = oracle.sample(1, seed=3).expand(400, -1, -1)
    _, exact = ode_paths(oracle.denoiser, grid, rng(0), x_0=x[:1], progress=False)
    _, estimate = ode_paths(
        oracle.denoiser, grid, rng(1), x_0=x, divergence="hutchinson", progress=False
    )
    z = (estimate.mean() - exact[0]) / (estimate.std() / 20.0)
    assert abs(float(z)) < 4.0
    assert float(estimate.std()) > 1e-3


def test_tangent_basis_is_orthonormal_in_the_space() -> None:
    oracle = make_oracle(4, 3, True)
    basis = tangent_basis(oracle.space, oracle.sample(1, 0)).flatten(1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(9, dtype=torch.float64))


def test_negative_control_a_trace_over_all_coordinates_is_wrong() -> None:
    """Counting the centre of mass as a degree of freedom shifts the log density."""
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(60, 0.005, 40.0)
    x, log_p = ode_paths(oracle.denoiser, grid, rng(0), n=10, progress=False)
    extra = 2 * torch.tensor(grid.times[0] / grid.times[-1]).log()
    wrong = log_p - extra + oracle.reduced_energy(x)
    assert float(wrong.abs().min()) > 1.0


def test_bad_input_is_refused() -> None:
    oracle = make_oracle(3, 2, True)
    grid = Schedule.geometric(10, 0.01, 10.0)
    with pytest.raises(ValueError, match="divergence: expected one of"):
        ode_paths(oracle.denoiser, grid, rng(0), n=2, divergence="none")
    with pytest.raises(ValueError, match="solver: expected one of"):
        ode_paths(oracle.denoiser, grid, rng(0), n=2, solver="euler")
    with pytest.raises(ValueError, match="exactly one of n and x_0"):
        ode_paths(oracle.denoiser, grid, rng(0))
