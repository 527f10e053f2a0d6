"""Every covariance family against dense linear algebra in reduced coordinates, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import (
    Block,
    ClassCovariance,
    Covariance,
    Diagonal,
    Isotropic,
    LowRank,
    ReverseStep,
    TimeNetwork,
    make_covariance,
)
from openmm_vtdis.diffusion.posteriors.base import Posterior
from openmm_vtdis.diffusion.schedule import Schedule

GRID = Schedule.geometric(4, 0.1, 5.0)
SPACES = [Space(5, 2), Space(5, 3), Space(5, 1, centred=False)]
LABELS = [0, 1, 1, 2, 1]


def fitted(family: type[ClassCovariance], space: Space, labels: list[int]) -> Covariance:
    """A family with arbitrary, valid parameters that differ from step to step."""
    rng = torch.Generator().manual_seed(3)
    n_classes = max(labels) + 1
    empty = family(space, labels, torch.zeros(1, 1))
    if family is Block:
        k = len(empty.between)
        rows, columns = torch.tril_indices(k, k)
        triangle = torch.randn(4, len(rows), generator=rng, dtype=torch.float64)
        triangle[:, rows == columns] = triangle[:, rows == columns].abs() + 0.5
        lam = torch.rand(4, n_classes, generator=rng, dtype=torch.float64) + 0.5
        return empty.with_parameters(torch.cat([lam, triangle], dim=1))
    if family is Diagonal:
        lam = torch.rand(4, n_classes, generator=rng, dtype=torch.float64) + 0.5
        return empty.with_parameters(lam)
    if family is LowRank:
        k = len(empty.between)
        size = 1 + k * min(4, k)
        return empty.with_parameters(torch.randn(4, size, generator=rng, dtype=torch.float64))
    if family is TimeNetwork:
        start = empty.initial(torch.zeros(1, 4, 1), GRID)
        noise = torch.randn(start.shape, generator=rng, dtype=torch.float64)
        return empty.with_parameters(start + 0.3 * noise)
    return empty.with_parameters(torch.randn(4, 1, generator=rng, dtype=torch.float64))


FAMILIES = [Isotropic, Diagonal, Block, LowRank, TimeNetwork]


def reverse_step(space: Space, n: int) -> ReverseStep:
    x = torch.zeros(1, space.n_particles, space.n_dims, dtype=torch.float64)
    return ReverseStep(n, GRID.times[n], GRID.times[n - 1], x, Posterior(x))


def reduced_covariance(covariance: Covariance, step: ReverseStep) -> Tensor:
    """V B V^T of one Cartesian direction, times v_n: from the root that sampling uses."""
    root = covariance.at(step).root  # type: ignore[attr-defined]
    v = covariance.space.basis
    return step.variance * v @ root @ root.mT @ v.mT


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
@pytest.mark.parametrize("n", [1, 4])
def test_log_prob_is_the_dense_gaussian(
    family: type[ClassCovariance], space: Space, n: int
) -> None:
    covariance = fitted(family, space, LABELS)
    step = reverse_step(space, n)
    dense = torch.kron(
        reduced_covariance(covariance, step), torch.eye(space.n_dims, dtype=torch.float64)
    )
    reference = torch.distributions.MultivariateNormal(
        torch.zeros(space.dim, dtype=torch.float64), dense
    )
    residual = space.standard_normal(7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        covariance.at(step).log_prob(residual),
        reference.log_prob(space.reduce(residual).flatten(1)),
    )


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
def test_cost_of_statistics_is_minus_the_log_prob(
    family: type[ClassCovariance], space: Space
) -> None:
    covariance = fitted(family, space, LABELS)
    rng = torch.Generator().manual_seed(1)
    rows, total = [], torch.zeros(6, dtype=torch.float64)
    for n in range(1, 5):
        step = reverse_step(space, n)
        residual = space.standard_normal(6, rng)
        rows.append(covariance.statistics(step, residual))
        total -= covariance.at(step).log_prob(residual)
    statistics = torch.stack(rows, dim=1)
    torch.testing.assert_close(covariance.cost(covariance.parameters, statistics, GRID), total)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
def test_samples_have_the_covariance_and_stay_in_the_space(
    family: type[ClassCovariance], space: Space
) -> None:
    covariance = fitted(family, space, LABELS)
    step = reverse_step(space, 2)
    n = 20_000
    x = covariance.at(step).sample(n, torch.Generator().manual_seed(2))
    torch.testing.assert_close(space.project(x), x)
    expected = reduced_covariance(covariance, step)
    z = space.reduce(x)
    empirical = torch.einsum("nad,nbd->ab", z, z) / (n * space.n_dims)
    spread = torch.diagonal(expected)
    error = ((spread[:, None] * spread + expected**2) / (n * space.n_dims)).sqrt()
    assert float(((empirical - expected) / error).abs().max()) < 4.5


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_diagonal_precision_is_the_projected_diagonal(space: Space) -> None:
    covariance = fitted(Diagonal, space, LABELS)
    step = reverse_step(space, 3)
    lam = covariance.parameters[2][torch.tensor(LABELS)]
    v = space.basis
    precision = v @ torch.diag(lam) @ v.mT / step.variance
    torch.testing.assert_close(torch.linalg.inv(reduced_covariance(covariance, step)), precision)


def test_negative_control_the_sandwich_of_eq_24_is_not_the_inverse() -> None:
    """P Sigma^-1 P^T is not (P Sigma P^T)^-1 unless Sigma commutes with the projector."""
    space = SPACES[0]
    v = space.basis
    sigma = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    right = torch.linalg.inv(v @ sigma @ v.mT)
    wrong = v @ torch.linalg.inv(sigma) @ v.mT
    assert float((right - wrong).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["diagonal", "block", "low-rank"])
def test_identical_particles_leave_only_the_isotropic_covariance(kind: str) -> None:
    """Schur: with one class and zero CoM every family is isotropic ("block" equals "isotropic")."""
    space = Space(4, 3)
    template = make_covariance(kind, space, [0] * 4)
    isotropic = make_covariance("isotropic", space, [0] * 4)
    rng = torch.Generator().manual_seed(0)
    step = reverse_step(space, 1)
    residual = [space.standard_normal(50, rng) for _ in range(4)]
    rows = [template.statistics(step, r) for r in residual]
    plain = [isotropic.statistics(step, r) for r in residual]
    a = template.with_parameters(template.initial(torch.stack(rows, 1), GRID))
    b = isotropic.with_parameters(isotropic.initial(torch.stack(plain, 1), GRID))
    torch.testing.assert_close(reduced_covariance(a, step), reduced_covariance(b, step))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
def test_density_is_invariant_under_rotation_reflection_and_class_permutation(
    family: type[ClassCovariance],
) -> None:
    space = Space(5, 3)
    scatter = fitted(family, space, LABELS).at(reverse_step(space, 2))
    residual = space.standard_normal(9, torch.Generator().manual_seed(5))
    reference = scatter.log_prob(residual)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(scatter.log_prob(residual @ rotation), reference)
    torch.testing.assert_close(scatter.log_prob(-residual), reference)
    allowed = residual[:, [0, 4, 1, 3, 2]]
    torch.testing.assert_close(scatter.log_prob(allowed), reference)
    if family in (Block, Diagonal, LowRank, TimeNetwork):
        forbidden = residual[:, [1, 0, 2, 3, 4]]
        assert float((scatter.log_prob(forbidden) - reference).abs().max()) > 1e-3


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_eta_is_the_mean_variance_of_a_class(space: Space) -> None:
    covariance = fitted(Isotropic, space, LABELS)
    expected = (-covariance.parameters).exp().expand(-1, 3)
    torch.testing.assert_close(covariance.eta(GRID), expected)


def test_time_network_does_not_depend_on_how_many_steps_the_grid_has() -> None:
    covariance = fitted(TimeNetwork, Space(4, 2), [0] * 4)
    coarse = Schedule.geometric(10, 0.1, 5.0)
    fine = Schedule.geometric(100, 0.1, 5.0)
    assert covariance.eta(coarse).shape == (10, 1)
    assert covariance.eta(fine).shape == (100, 1)
    excess_coarse = float(covariance.eta(coarse)[-1])
    excess_fine = float(covariance.eta(fine)[-1])
    assert excess_coarse > excess_fine


def test_bad_input_is_refused() -> None:
    space = Space(4, 2)
    with pytest.raises(ValueError, match="labels: expected 4 integers"):
        Isotropic(space, [0, 1], torch.zeros(1, 1))
    with pytest.raises(ValueError, match="expected parameters for 4 steps, got 3"):
        Isotropic(space, [0] * 4, torch.zeros(3, 1)).check_schedule(GRID)
    with pytest.raises(ValueError, match="covariance: expected one of"):
        make_covariance("banded", space, [0] * 4)
    assert math.isclose(GRID.variances[0], reverse_step(space, 1).variance)


def test_the_time_network_reads_the_level_that_a_step_is_drawn_at() -> None:
    """Two grids with one level t_n have one g there, and eta by their own r_n."""
    covariance = fitted(TimeNetwork, Space(4, 2), [0] * 4)
    grids = [Schedule((0.1, lower, 1.0, 5.0)) for lower in (0.3, 0.7)]
    g = [float((covariance.eta(grid)[1, 0] - 1.0) / grid.widening[1]) for grid in grids]
    assert g[0] > 1e-3
    assert g[1] == pytest.approx(g[0], rel=1e-12)
