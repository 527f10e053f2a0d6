"""The learned elastic network: its Laplacian, its posterior and its weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import LOG_2PI, Space, random_rotations
from openmm_vtdis.diffusion.covariance import ReverseStep, make_covariance
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.posteriors.base import Posterior
from openmm_vtdis.diffusion.posteriors.pairwise import pair_laplacian, posterior_shape
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import EGNN
from openmm_vtdis.networks.pair_head import pair_indices
from tests.conftest import make_oracle, z_of_mean_weight

GRID = Schedule.geometric(12, 0.03, 15.0)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pairs(n: int, space: Space, seed: int = 0) -> Tensor:
    n_pairs = space.n_particles * (space.n_particles - 1) // 2
    return torch.randn(n, n_pairs, 4, generator=rng(seed), dtype=torch.float64).exp()


def pairs_of(n_particles: int) -> list[tuple[int, int]]:
    """In the order of the coefficients."""
    return [(i, j) for j in range(n_particles) for i in range(j)]


@pytest.mark.parametrize("space", [Space(4, 2), Space(5, 3), Space(3, 2, False)], ids=str)
def test_the_pair_laplacian_is_the_hessian_of_springs(space: Space) -> None:
    """1/2 sum_{i<j} [alpha |z_ij|^2 + beta (r_ij . z_ij)^2] for displacements z."""
    x = space.standard_normal(3, rng(1))
    pairs = random_pairs(3, space)
    matrix = pair_laplacian(space, pairs[..., 0], pairs[..., 1], x)
    z = space.standard_normal(3, rng(2))
    energy = torch.zeros(3, dtype=torch.float64)
    for p, (i, j) in enumerate(pairs_of(space.n_particles)):
        line = x[:, i] - x[:, j]
        line = line / line.norm(dim=1, keepdim=True)
        stretch = z[:, i] - z[:, j]
        energy += 0.5 * pairs[:, p, 0] * stretch.square().sum(dim=1)
        energy += 0.5 * pairs[:, p, 1] * (line * stretch).sum(dim=1).square()
    reduced = space.reduce(z).flatten(1)
    torch.testing.assert_close(0.5 * torch.einsum("bi,bij,bj->b", reduced, matrix, reduced), energy)
    values = torch.linalg.eigvalsh(matrix)
    n_null = 0 if space.centred else space.n_dims  # translations, where there are any
    assert float(values[:, n_null:].min()) > 0.01
    assert bool((values[:, :n_null].abs() < 1e-12).all())


@pytest.mark.parametrize("space", [Space(4, 2), Space(5, 3), Space(3, 2, False)], ids=str)
def test_the_posterior_is_a_precision_and_a_covariance(space: Space) -> None:
    """(I + t^2 / M  L_1)^-1 + t^2 / (10 M (1 + t^2)^2) L_2, of levels that differ."""
    x, pairs = space.standard_normal(3, rng(1)), random_pairs(3, space)
    t = torch.tensor([0.02, 0.5, 3.0], dtype=torch.float64)
    found = posterior_shape(space, pairs, x, t)
    for k, level in enumerate(t.tolist()):
        first, second = (
            pair_laplacian(space, pairs[k : k + 1, :, a], pairs[k : k + 1, :, a + 1], x[k : k + 1])
            for a in (0, 2)
        )
        stiff = torch.eye(space.dim) + level**2 / space.n_particles * first[0]
        wide = level**2 / (10.0 * space.n_particles * (1.0 + level**2) ** 2) * second[0]
        torch.testing.assert_close(found[k], torch.linalg.inv(stiff) + wide)
        assert float(wide.norm()) > 1e-6 * float(found[k].norm())


def test_a_laplacian_may_be_needed_in_inference_mode_first() -> None:
    """What is kept of a space then serves training too."""
    space = Space(9, 2)  # of no other test
    x, pairs = space.standard_normal(2, rng(1)), random_pairs(2, space)
    with torch.inference_mode():
        expected = pair_laplacian(space, pairs[..., 0], pairs[..., 1], x)
    alpha = pairs[..., 0].clone().requires_grad_()
    found = pair_laplacian(space, alpha, pairs[..., 1], x)
    found.sum().backward()
    assert torch.equal(found.detach(), expected)
    assert alpha.grad is not None


def test_factors_of_a_step_are_those_of_the_fit() -> None:
    """For levels between knots, on them and beyond them, whatever the step's other end."""
    family = pairwise_process(Space(3, 2)).covariance
    for t in (1e-4, 0.01, 0.0234, 0.7, 90.0, 300.0):
        for ratio in (0.3, 0.9):
            levels = torch.tensor([[ratio * t, t]], dtype=torch.float64)
            x = torch.zeros(1, 3, 2)
            step = ReverseStep(1, t, ratio * t, x, Posterior(x))
            a, c = (float(v) for v in family._scales(family.parameters, levels))  # type: ignore[attr-defined]
            expected = a, c * (1.0 - ratio**2) / ratio**2
            assert family._factors(step) == pytest.approx(expected, rel=1e-12)  # type: ignore[attr-defined]


def test_a_posterior_that_is_not_finite_is_taken_as_round() -> None:
    """And only that one: those of others in its batch are what they were."""
    space, t = Space(4, 3), torch.full((3,), 0.4, dtype=torch.float64)
    pairs, x = random_pairs(3, space), space.standard_normal(3, rng(1))
    expected = posterior_shape(space, pairs, x, t)
    assert float((expected[1] - torch.eye(space.dim)).abs().max()) > 0.1
    bad_pairs, bad_x = pairs.clone(), x.clone()
    bad_pairs[1, 2, 0], bad_x[1, 0, 0] = torch.nan, torch.inf
    for springs, positions in ((bad_pairs, x), (pairs, bad_x)):
        found = posterior_shape(space, springs, positions, t)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        torch.testing.assert_close(found[1], torch.eye(space.dim, dtype=torch.float64))


def pairwise_process(space: Space, double: bool = False) -> DiffusionProcess:
    torch.manual_seed(0)
    network = EGNN([0] + [1] * (space.n_particles - 1), space.n_dims, 2, 16, pair_head=16)
    torch.nn.init.normal_(network.pair_head.exit.weight, std=1.0)  # type: ignore[union-attr]
    denoiser = PreconditionedDenoiser(network.double() if double else network, space)
    parameters = 0.3 * torch.randn(1, 22, generator=rng(5), dtype=torch.float64)
    family = make_covariance("pairwise", space, network.config["labels"], parameters)
    return DiffusionProcess.ddpm(denoiser, GRID).with_covariance(family)


def in_particle_coordinates(
    process: DiffusionProcess, step: ReverseStep, residual: Tensor, projected: bool = True
) -> Tensor:
    """log density of residuals from (M D, M D) matrices, loops and their definition: (B,).

    No reduced coordinates: on the space the covariance has a pseudo-inverse and a
    pseudo-determinant. Not ``projected``: the precision's identity is that of all R^(M D).
    """
    family, m, n_dims = process.covariance, process.space.n_particles, process.space.n_dims
    a, c = (
        float(v)
        for v in family._scales(family.parameters, torch.tensor([[step.s, step.t]]).double())  # type: ignore[attr-defined]
    )
    identity = torch.eye(m * n_dims, dtype=torch.float64)
    centre = torch.full((m, m), 1.0 / m, dtype=torch.float64)
    projector = identity - torch.kron(centre, torch.eye(n_dims, dtype=torch.float64))
    r, found = (step.s / step.t) ** 2, []
    level = torch.full((len(step.x),), step.t, dtype=torch.float64)
    with torch.no_grad():
        denoised, pairs = process.denoiser.with_pairs(step.x, level)  # type: ignore[attr-defined]
    for x, springs, rest in zip(denoised.double(), pairs.double(), residual, strict=True):
        laplacians = torch.zeros(2, m * n_dims, m * n_dims, dtype=torch.float64)
        for p, (i, j) in enumerate(pairs_of(m)):
            line = torch.nn.functional.normalize(x[i] - x[j], dim=0)
            for k in range(2):
                alpha, beta = springs[p, 2 * k], springs[p, 2 * k + 1]
                spring = alpha * torch.eye(n_dims) + beta * torch.outer(line, line)
                ends = torch.zeros(m, dtype=torch.float64)
                ends[i], ends[j] = 1.0, -1.0
                laplacians[k] += torch.kron(torch.outer(ends, ends), spring)
        space = projector if projected else identity
        stiff = torch.linalg.pinv(space + step.t**2 / m * laplacians[0], hermitian=True)
        wide = 0.1 * step.t**2 / m / (1.0 + step.t**2) ** 2 * laplacians[1]
        sigma = step.s**2 * (1.0 - r) * (a * space + c * (1.0 - r) / r * (stiff + wide))
        values = torch.linalg.eigvalsh(sigma)
        values = values[values > 1e-12 * values.max()]
        square = rest.flatten() @ torch.linalg.pinv(sigma, hermitian=True) @ rest.flatten()
        found.append(-0.5 * (square + values.log().sum() + len(values) * LOG_2PI))
    return torch.stack(found)


@pytest.mark.parametrize("n", [2, 6, 11])
def test_the_density_is_that_of_the_projected_covariance(n: int) -> None:
    process = pairwise_process(Space(4, 3))
    step = process.step(n, GRID.times[n] * process.space.standard_normal(3, rng(n)))
    scatter = process.covariance.at(step)
    residual = scatter.sample(3, rng(9))
    log_p = scatter.log_prob(residual)
    torch.testing.assert_close(
        log_p, in_particle_coordinates(process, step, residual), rtol=1e-8, atol=1e-8
    )
    # Controls: without the projection, and a covariance in the unit of another noise level
    wrong = in_particle_coordinates(process, step, residual, projected=False)
    assert float((wrong - log_p).abs().min()) > 0.1
    other = dataclasses.replace(step, s=1.01 * step.s)
    assert float((in_particle_coordinates(process, other, residual) - log_p).abs().max()) > 0.01


def test_pairwise_log_prob_and_cost_agree_and_are_dense_gaussians() -> None:
    process = pairwise_process(Space(4, 3))
    space, family = process.space, process.covariance
    rows, total = [], torch.zeros(5, dtype=torch.float64)
    for n in range(1, 13):
        step = process.step(n, GRID.times[n] * space.standard_normal(5, rng(n)))
        residual = 0.1 * space.standard_normal(5, rng(40 + n))
        rows.append(family.statistics(step, residual))
        log_prob = family.at(step).log_prob(residual)
        total -= log_prob
        levels = torch.tensor([[step.s, step.t]], dtype=torch.float64)
        a, c = (float(v) for v in family._scales(family.parameters, levels))  # type: ignore[attr-defined]
        gain = c * (1.0 - step.ratio) / step.ratio
        identity = torch.eye(space.dim, dtype=torch.float64)
        dense = step.variance * (a * identity + gain * step.posterior.matrix)  # type: ignore[attr-defined]
        reference = torch.distributions.MultivariateNormal(
            torch.zeros(space.dim, dtype=torch.float64), dense
        )
        torch.testing.assert_close(log_prob, reference.log_prob(space.reduce(residual).flatten(1)))
    statistics = torch.stack(rows, dim=1)
    torch.testing.assert_close(family.cost(family.parameters, statistics, GRID), total)


@pytest.mark.parametrize("n_dims", [2, 3])
def test_pairwise_turns_with_the_configuration(n_dims: int) -> None:
    space = Space(4, n_dims)
    process = pairwise_process(space, double=True)
    x = space.standard_normal(3, rng(1))
    turn = random_rotations(3, n_dims, rng(2))
    turn[:, :, 0] *= -1.0
    order = [0, 3, 1, 2]
    before = process.step(5, x).posterior.matrix  # type: ignore[attr-defined]
    after = process.step(5, (x @ turn)[:, order]).posterior.matrix  # type: ignore[attr-defined]
    identity = torch.eye(space.dim, dtype=torch.float64).expand(3, -1, -1)
    tangents = space.expand(identity.reshape(3, space.dim, space.rank, n_dims))
    motion = space.reduce((tangents @ turn[:, None])[:, :, order]).flatten(2).mT
    torch.testing.assert_close(motion @ before @ motion.mT, after, rtol=0.0, atol=1e-10)
    assert float((before - after).abs().max()) > 1e-4


def test_pairwise_weights_are_exact_with_any_head() -> None:
    """E[w] = 1 with an exact denoiser and an untrained, random head."""
    oracle = make_oracle(4, 2, True)

    class WithRandomPairs:
        space = oracle.space
        knows_pairs = True

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return oracle.denoiser(x, t)

        def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            denoised = oracle.denoiser(x, t)
            i, j = pair_indices(4)
            square = (denoised[:, i] - denoised[:, j]).square().sum(dim=-1, keepdim=True)
            return denoised, torch.cat([1.0 + square, square, 0.5 + 0.0 * square, square], dim=-1)

    family = make_covariance("pairwise", oracle.space, [0] * 4, torch.zeros(1, 22))
    grid = Schedule.geometric(30, 0.03, 15.0)
    process = DiffusionProcess.ddpm(WithRandomPairs(), grid).with_covariance(family)
    paths = reverse_paths(process, 3000, rng(1), progress=False)
    log_w = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert abs(z_of_mean_weight(log_w)) < 4.0
    x = oracle.sample(3000, seed=2)
    log_v = -oracle.reduced_energy(x) + forward_paths(process, x, rng(3), progress=False).log_ratio
    assert abs(z_of_mean_weight(-log_v)) < 4.0


# -- one bad configuration --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tweedie", "hessian", "pairwise"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_configuration_that_is_not_finite_stays_alone(kind: str, bad: float) -> None:
    process = pairwise_process(Space(4, 2))
    family = make_covariance(kind, process.space, [0, 1, 1, 1], torch.zeros(1, 22))
    energy = make_oracle(4, 2, True).reduced_energy
    process = DiffusionProcess.ddpm(process.denoiser, GRID, energy).with_covariance(family)
    clean = process.space.standard_normal(5, rng(1))
    x = clean.clone()
    x[2, 1, 0] = bad
    residual = 0.1 * process.space.standard_normal(5, rng(2))
    expected = family.at(process.step(6, clean, family)).log_prob(residual)
    scatter = family.at(process.step(6, x, family))
    good = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(scatter.log_prob(residual)[good], expected[good])
    assert bool(torch.isfinite(scatter.sample(5, rng(3))).all())
    statistics = family.statistics(process.step(6, x, family), residual)
    assert bool(torch.isfinite(statistics[good]).all())
