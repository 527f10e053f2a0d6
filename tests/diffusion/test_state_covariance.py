"""Covariance from the denoiser's Jacobian: against the analytic posterior and dense algebra."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.covariance import ReverseStep, Tweedie, make_covariance
from openmm_vtdis.diffusion.covariance.hessian import energy_derivatives
from openmm_vtdis.diffusion.covariance.jacobian import denoiser_jacobian
from openmm_vtdis.diffusion.covariance.pairwise import pair_laplacian, posterior_shape
from openmm_vtdis.diffusion.covariance.state import EigenScatter, StateCovariance
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser, PreconditionedDenoiser
from openmm_vtdis.diffusion.fitting import (
    Trajectories,
    fit,
    fit_sgd,
    log_weights,
    objective_value,
)
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.pair_training import new_pair_head
from openmm_vtdis.diffusion.sampling import forward_paths, reverse_paths
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.diffusion.training import Trainer, TrainingConfig
from openmm_vtdis.diffusion.tuning import collect
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.geometry import Space
from openmm_vtdis.networks import EGNN, MLP
from openmm_vtdis.networks.pair_head import pair_indices
from openmm_vtdis.targets import sample_hmc
from openmm_vtdis.targets.validation import random_rotations
from tests.conftest import Oracle, make_oracle, z_of_mean_weight

GRID = Schedule.geometric(12, 0.03, 15.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def posterior_covariance(oracle: Oracle, x: Tensor, t: float) -> Tensor:
    """Cov[x_0 | x_t = x] in reduced coordinates, (B, d, d), by the textbook."""
    d = oracle.denoiser
    total = d.variances + t**2
    difference = x[:, None] - d.means
    square = difference.square().sum(dim=(-2, -1))
    p = torch.softmax(d.weights.log() - 0.5 * (square / total + d.space.dim * total.log()), dim=1)
    means = d.means + (d.variances / total)[:, None, None] * difference
    reduced = d.space.reduce(means).flatten(2)
    centre = (p[:, :, None] * reduced).sum(dim=1, keepdim=True)
    spread = reduced - centre
    within = (p * d.variances * t**2 / total).sum(dim=1)
    identity = torch.eye(d.space.dim, dtype=torch.float64)
    between = torch.einsum("bk,bki,bkj->bij", p, spread, spread)
    return within[:, None, None] * identity + between


def reverse_step(oracle: Oracle, n: int, x: Tensor) -> ReverseStep:
    return DiffusionKernel.ddpm(oracle.denoiser, GRID).step(n, x)


def arbitrary(space: Space) -> Tweedie:
    empty = make_covariance("tweedie", space, [0] * space.n_particles)
    start = empty.ddpm_parameters(GRID)
    noise = torch.randn(start.shape, generator=generator(5), dtype=torch.float64)
    return empty.with_parameters(0.3 * noise)  # type: ignore[return-value]


@pytest.mark.parametrize("t", [0.05, 0.7, 8.0])
def test_the_jacobian_is_the_posterior_covariance(oracle: Oracle, t: float) -> None:
    x = oracle.sample(20, seed=1) + t * oracle.space.standard_normal(20, generator(2))
    jacobian = denoiser_jacobian(oracle.denoiser, oracle.space, x, t)
    torch.testing.assert_close(t**2 * jacobian, posterior_covariance(oracle, x, t))


@pytest.mark.parametrize("rank", [1, 3])
def test_krylov_is_exact_on_its_space(oracle: Oracle, rank: int) -> None:
    """C v_1 for the start v_1 is in the space of two products, but not in that of one."""
    t, space = 0.9, oracle.space
    x = oracle.sample(20, seed=1) + t * space.standard_normal(20, generator(2))
    kernel = DiffusionKernel.ddpm(oracle.denoiser, Schedule((0.5, t, 10.0)))
    step = kernel.step(1, x)
    family = make_covariance("krylov", space, [0] * space.n_particles, rank=rank)
    exact = posterior_covariance(oracle, x, t) / t**2
    start = space.reduce(x - step.denoised).flatten(1)[:, :, None]
    start = start / start.norm(dim=1, keepdim=True)
    found = family.shape(step)  # type: ignore[attr-defined]
    torch.testing.assert_close(start.mT @ found @ start, start.mT @ exact @ start)
    if rank > 1:
        torch.testing.assert_close(found @ start, exact @ start)
    elif space.dim > 1:
        assert float((found @ start - exact @ start).abs().max()) > 1e-3


def test_krylov_turns_with_the_configuration() -> None:
    space = Space(5, 3)
    torch.manual_seed(0)
    network = EGNN([0, 1, 1, 1, 1], 3, n_layers=2, n_hidden=16).double()
    for p in network.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    kernel = DiffusionKernel.ddpm(PreconditionedDenoiser(network, space), GRID)
    family = make_covariance("krylov", space, [0, 1, 1, 1, 1], torch.zeros(1, 22), rank=3)
    x, residual = (space.standard_normal(3, generator(seed)) for seed in (1, 2))
    turn = random_rotations(3, 3, generator(3))
    turn[:, :, 0] *= -1.0
    order = [0, 3, 1, 2, 4]
    before = family.at(kernel.step(7, x)).log_prob(residual)
    x, residual = ((y @ turn)[:, order] for y in (x, residual))
    torch.testing.assert_close(
        family.at(kernel.step(7, x)).log_prob(residual), before, rtol=0.0, atol=1e-9
    )
    still = family.at(kernel.step(7, x)).log_prob(residual.flip(1))
    assert float((still - before).abs().max()) > 1e-3
    # as many products as dimensions: the whole Jacobian
    whole = make_covariance("krylov", space, [0, 1, 1, 1, 1], rank=100)
    exact = make_covariance("tweedie", space, [0, 1, 1, 1, 1])
    step = kernel.step(7, x)
    torch.testing.assert_close(whole.shape(step), exact.shape(step))  # type: ignore[attr-defined]


def test_log_prob_is_the_dense_gaussian(oracle: Oracle) -> None:
    space = oracle.space
    family = arbitrary(space)
    for n in (1, 7, 12):
        x = GRID.times[n] * space.standard_normal(6, generator(n))
        step = reverse_step(oracle, n, x)
        levels = torch.tensor([[step.s, step.t]], dtype=torch.float64)
        a, c = (float(value) for value in family._scales(family.parameters, levels))
        dense = a * step.variance * torch.eye(space.dim, dtype=torch.float64)
        dense = dense + c * (1.0 - step.ratio) ** 2 * posterior_covariance(oracle, x, step.t)
        reference = torch.distributions.MultivariateNormal(
            torch.zeros(space.dim, dtype=torch.float64), dense
        )
        residual = space.standard_normal(6, generator(20 + n))
        torch.testing.assert_close(
            family.at(step).log_prob(residual),
            reference.log_prob(space.reduce(residual).flatten(1)),
        )


def test_cost_of_statistics_is_minus_the_log_prob(oracle: Oracle) -> None:
    family = arbitrary(oracle.space)
    rows, total = [], torch.zeros(5, dtype=torch.float64)
    for n in range(1, 13):
        step = reverse_step(
            oracle, n, GRID.times[n] * oracle.space.standard_normal(5, generator(n))
        )
        residual = 0.1 * oracle.space.standard_normal(5, generator(40 + n))
        rows.append(family.statistics(step, residual))
        total -= family.at(step).log_prob(residual)
    statistics = torch.stack(rows, dim=1)
    torch.testing.assert_close(family.cost(family.parameters, statistics, GRID), total)


def test_samples_have_the_covariance(oracle: Oracle) -> None:
    n = 20_000
    x = oracle.sample(1, seed=4).expand(n, -1, -1)
    step = reverse_step(oracle, 9, x[:1])
    one = Tweedie(oracle.space, [0] * oracle.space.n_particles, torch.zeros(1, 22)).at(step)
    scatter = EigenScatter(oracle.space, one.vectors.expand(n, -1, -1), one.variances.expand(n, -1))
    residual = scatter.sample(n, generator(3))
    torch.testing.assert_close(oracle.space.project(residual), residual)
    flat = oracle.space.reduce(residual).flatten(1)
    measured = flat.mT @ flat / n
    exact = one.vectors[0] @ torch.diag(one.variances[0]) @ one.vectors[0].mT
    assert float((measured - exact).abs().max()) < 6.0 * float(exact.abs().max()) * (2 / n) ** 0.5


@pytest.mark.parametrize("n_dims", [2, 3])
def test_covariance_turns_with_the_configuration(n_dims: int) -> None:
    """Rotation, reflection and permutation of equal particles; to 1e-10 with a float64 network."""
    space = Space(4, n_dims)
    torch.manual_seed(0)
    network = EGNN([0, 1, 1, 1], n_dims, n_layers=2, n_hidden=16).double()
    for p in network.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    denoiser = PreconditionedDenoiser(network, space)
    x = space.standard_normal(3, generator(1))
    turn = random_rotations(3, n_dims, generator(2))
    turn[:, :, 0] *= -1.0
    order = [0, 3, 1, 2]
    with torch.no_grad():
        before = denoiser_jacobian(denoiser, space, x, 0.4)
        after = denoiser_jacobian(denoiser, space, (x @ turn)[:, order], 0.4)

    def move(reduced: Tensor) -> Tensor:
        """The same motion of tangents in reduced coordinates, (3, d, k) -> (3, d, k)."""
        k = reduced.shape[2]
        tangents = space.expand(reduced.mT.reshape(3, k, space.rank, n_dims))
        moved = (tangents @ turn[:, None])[:, :, order]
        return space.reduce(moved).flatten(2).mT

    identity = torch.eye(space.dim, dtype=torch.float64).expand(3, -1, -1)
    rotation = move(identity)
    torch.testing.assert_close(rotation @ before @ rotation.mT, after, rtol=0.0, atol=1e-10)
    assert float((before - after).abs().max()) > 1e-3  # the motion is not nothing


def test_a_missing_determinant_fails_the_weight_oracle() -> None:
    """Negative control: leave out how log det Sigma depends on the state."""
    oracle = make_oracle(4, 2, True)
    family = Tweedie(oracle.space, [0] * 4, torch.zeros(1, 22))
    kernel = DiffusionKernel.ddpm(oracle.denoiser, GRID).with_covariance(family)
    paths = reverse_paths(kernel, 3000, generator(1), progress=False)
    right = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert abs(z_of_mean_weight(right)) < 4.0

    class Without(EigenScatter):
        def log_prob(self, residual: Tensor) -> Tensor:
            return super().log_prob(residual) + 0.5 * self.variances.log().sum(dim=1)

    class Broken(Tweedie):
        def at(self, step: ReverseStep) -> EigenScatter:
            scatter = super().at(step)
            return Without(scatter.space, scatter.vectors, scatter.variances)

    broken = kernel.with_covariance(Broken(oracle.space, [0] * 4, torch.zeros(1, 22)))
    paths = reverse_paths(broken, 3000, generator(1), progress=False)
    wrong = -oracle.reduced_energy(paths.x) + paths.log_ratio
    wrong = wrong - float(torch.logsumexp(wrong, 0)) + math.log(len(wrong))
    assert float(right.exp().var()) < 0.3 * float(wrong.exp().var())


def test_it_beats_isotropic_with_an_exact_denoiser() -> None:
    oracle = make_oracle(4, 2, True)
    kernel = DiffusionKernel.ddpm(oracle.denoiser, GRID)
    objective = {}
    for kind in ("isotropic", "tweedie"):
        family = make_covariance(kind, oracle.space, [0] * 4)
        values = []
        for seed in (1, 2):
            x = oracle.sample(1500, seed)
            paths = forward_paths(kernel, x, generator(seed), family, progress=False)
            values.append(
                Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)  # type: ignore[arg-type]
            )
        train, test = values
        best = fit(family, train[:-300], GRID, "alpha2", train[-300:])
        objective[kind] = float(objective_value(log_weights(best.fitted, test, GRID), "alpha2"))
    assert objective["tweedie"] < 0.5 * objective["isotropic"]


@pytest.mark.parametrize("kind", ["tweedie", "krylov"])
@pytest.mark.parametrize("case", ["coincident", "collinear", "far"])
def test_degenerate_configurations_stay_positive_definite(case: str, kind: str) -> None:
    space = Space(4, 3)
    torch.manual_seed(0)
    denoiser = PreconditionedDenoiser(EGNN([0] * 4, 3, n_layers=2, n_hidden=16), space)
    x = space.standard_normal(2, generator(0))
    if case == "coincident":
        x[:, 1] = x[:, 0]
    elif case == "collinear":
        x[:, :, 1:] = 0.0
    else:
        x = 1e4 * x
    kernel = DiffusionKernel.ddpm(denoiser, Schedule.geometric(3, 1e-3, 50.0))
    family = make_covariance(kind, space, [0] * 4, torch.zeros(1, 22))
    for n in (1, 3):
        scatter = family.at(kernel.step(n, space.project(x)))
        assert bool(torch.isfinite(scatter.vectors).all())
        assert bool((scatter.variances > 0.0).all())
        assert bool(torch.isfinite(scatter.log_prob(x)).all())


# -- the energy's Hessian ---------------------------------------------------------------------
def test_gradient_and_hessian_are_the_derivatives(oracle: Oracle) -> None:
    x = oracle.sample(3, seed=1)
    space = oracle.space

    def reduced_energy(z: Tensor) -> Tensor:
        return oracle.reduced_energy(space.expand(z.reshape(1, space.rank, space.n_dims)))[0]

    exact = torch.stack(
        [torch.autograd.functional.hessian(reduced_energy, space.reduce(y).flatten()) for y in x]
    )
    gradient, hessian = energy_derivatives(oracle.reduced_energy, space, x)
    torch.testing.assert_close(hessian, exact)
    slopes = [
        torch.autograd.functional.jacobian(reduced_energy, space.reduce(y).flatten()) for y in x
    ]
    torch.testing.assert_close(gradient, torch.stack(slopes))


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_one_gaussian_has_the_exact_posterior(t: float) -> None:
    """Narrower than the data's unit variance, so that nothing is clamped."""
    space, variance = Space(3, 2), 0.4
    mean = torch.zeros(1, 3, 2, dtype=torch.float64)
    oracle = Oracle(GaussianMixtureDenoiser(space, torch.ones(1), mean, torch.tensor([variance])))
    kernel = DiffusionKernel.ddpm(oracle.denoiser, Schedule((0.05, 0.07, t)), oracle.reduced_energy)
    family = make_covariance("hessian", space, [0] * 3, torch.zeros(1, 22))
    shape = family.shape(kernel.step(2, oracle.sample(4, seed=0)))  # type: ignore[attr-defined]
    identity = torch.eye(space.dim, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(shape, variance / (variance + t**2) * identity)


def test_an_energy_that_is_not_finite_counts_as_flat() -> None:
    oracle = make_oracle(3, 2, True)
    kernel = DiffusionKernel.ddpm(
        oracle.denoiser, GRID, lambda x: x.square().sum(dim=(1, 2)) * torch.nan
    )
    family = make_covariance("hessian", oracle.space, [0] * 3, torch.zeros(1, 22))
    step = kernel.step(6, oracle.sample(4, seed=0))
    identity = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    torch.testing.assert_close(family.shape(step), identity / (1.0 + step.t**2))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match='a kernel that knows the energy .* for "hessian"'):
        family.at(DiffusionKernel.ddpm(oracle.denoiser, GRID).step(6, step.x))


# -- the learned elastic network --------------------------------------------------------------
def random_pairs(n: int, space: Space, seed: int = 0) -> Tensor:
    n_pairs = space.n_particles * (space.n_particles - 1) // 2
    return torch.randn(n, n_pairs, 4, generator=generator(seed), dtype=torch.float64).exp()


@pytest.mark.parametrize("space", [Space(4, 2), Space(5, 3), Space(3, 2, False)], ids=str)
def test_the_pair_laplacian_is_the_hessian_of_springs(space: Space) -> None:
    """1/2 sum_{i<j} [alpha |z_ij|^2 + beta (r_ij . z_ij)^2] for displacements z."""
    x = space.standard_normal(3, generator(1))
    pairs = random_pairs(3, space)
    matrix = pair_laplacian(space, pairs[..., 0], pairs[..., 1], x)
    z = space.standard_normal(3, generator(2))
    energy = torch.zeros(3, dtype=torch.float64)
    for p, (i, j) in enumerate(itertools.combinations(range(space.n_particles), 2)):
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
    x, pairs = space.standard_normal(3, generator(1)), random_pairs(3, space)
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


def test_a_posterior_that_is_not_finite_is_taken_as_round() -> None:
    """And only that one: those of others in its batch are what they were."""
    space, t = Space(4, 3), torch.full((3,), 0.4, dtype=torch.float64)
    pairs, x = random_pairs(3, space), space.standard_normal(3, generator(1))
    expected = posterior_shape(space, pairs, x, t)
    assert float((expected[1] - torch.eye(space.dim)).abs().max()) > 0.1
    bad_pairs, bad_x = pairs.clone(), x.clone()
    bad_pairs[1, 2, 0], bad_x[1, 0, 0] = torch.nan, torch.inf
    for springs, positions in ((bad_pairs, x), (pairs, bad_x)):
        found = posterior_shape(space, springs, positions, t)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        torch.testing.assert_close(found[1], torch.eye(space.dim, dtype=torch.float64))


def pairwise_kernel(space: Space, double: bool = False) -> DiffusionKernel:
    torch.manual_seed(0)
    network = EGNN([0] + [1] * (space.n_particles - 1), space.n_dims, 2, 16, pair_head=16)
    torch.nn.init.normal_(network.pair_head.exit.weight, std=1.0)  # type: ignore[union-attr]
    denoiser = PreconditionedDenoiser(network.double() if double else network, space)
    parameters = 0.3 * torch.randn(1, 22, generator=generator(5), dtype=torch.float64)
    family = make_covariance("pairwise", space, network.config["labels"], parameters)
    return DiffusionKernel.ddpm(denoiser, GRID).with_covariance(family)


def test_pairwise_log_prob_and_cost_agree_and_are_dense_gaussians() -> None:
    kernel = pairwise_kernel(Space(4, 3))
    space, family = kernel.space, kernel.covariance
    rows, total = [], torch.zeros(5, dtype=torch.float64)
    for n in range(1, 13):
        step = kernel.step(n, GRID.times[n] * space.standard_normal(5, generator(n)))
        residual = 0.1 * space.standard_normal(5, generator(40 + n))
        rows.append(family.statistics(step, residual))
        log_prob = family.at(step).log_prob(residual)
        total -= log_prob
        levels = torch.tensor([[step.s, step.t]], dtype=torch.float64)
        a, c = (float(v) for v in family._scales(family.parameters, levels))  # type: ignore[attr-defined]
        gain = c * (1.0 - step.ratio) / step.ratio
        identity = torch.eye(space.dim, dtype=torch.float64)
        dense = step.variance * (a * identity + gain * family.shape(step))  # type: ignore[attr-defined]
        reference = torch.distributions.MultivariateNormal(
            torch.zeros(space.dim, dtype=torch.float64), dense
        )
        torch.testing.assert_close(log_prob, reference.log_prob(space.reduce(residual).flatten(1)))
    statistics = torch.stack(rows, dim=1)
    torch.testing.assert_close(family.cost(family.parameters, statistics, GRID), total)


@pytest.mark.parametrize("n_dims", [2, 3])
def test_pairwise_turns_with_the_configuration(n_dims: int) -> None:
    space = Space(4, n_dims)
    kernel = pairwise_kernel(space, double=True)
    x = space.standard_normal(3, generator(1))
    turn = random_rotations(3, n_dims, generator(2))
    turn[:, :, 0] *= -1.0
    order = [0, 3, 1, 2]
    before = kernel.covariance.shape(kernel.step(5, x))  # type: ignore[attr-defined]
    after = kernel.covariance.shape(kernel.step(5, (x @ turn)[:, order]))  # type: ignore[attr-defined]
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

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return oracle.denoiser(x, t)

        def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            denoised = oracle.denoiser(x, t)
            i, j = pair_indices(4, x.device)
            square = (denoised[:, i] - denoised[:, j]).square().sum(dim=-1, keepdim=True)
            return denoised, torch.cat([1.0 + square, square, 0.5 + 0.0 * square, square], dim=-1)

    family = make_covariance("pairwise", oracle.space, [0] * 4, torch.zeros(1, 22))
    grid = Schedule.geometric(30, 0.03, 15.0)
    kernel = DiffusionKernel.ddpm(WithRandomPairs(), grid).with_covariance(family)
    paths = reverse_paths(kernel, 3000, generator(1), progress=False)
    log_w = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert abs(z_of_mean_weight(log_w)) < 4.0
    x = oracle.sample(3000, seed=2)
    log_v = (
        -oracle.reduced_energy(x) + forward_paths(kernel, x, generator(3), progress=False).log_ratio
    )
    assert abs(z_of_mean_weight(-log_v)) < 4.0


def test_training_the_head_lowers_its_loss_and_nothing_else() -> None:
    oracle = make_oracle(3, 2, True)
    frames = oracle.sample(600, seed=0)
    kernel = pairwise_kernel(Space(3, 2))
    denoiser = kernel.denoiser
    before = {k: v.clone() for k, v in denoiser.state_dict().items() if "pair_head" not in k}  # type: ignore[attr-defined]
    config = TrainingConfig(150, batch_size=64, learning_rate=5e-3, seed=1)
    with new_pair_head(denoiser, 16, seed=1) as objective:
        trainer = Trainer(objective, frames[:500], frames[500:], config)
        first = trainer.held_out_loss()
        log = trainer.run(evaluate_every=50, progress=False)
    assert log.held_out_losses[-1] < first - 0.05
    after = denoiser.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_head_whose_training_failed_is_taken_away_again() -> None:
    network = EGNN([0, 0, 0], 2, 1, 8)
    denoiser = PreconditionedDenoiser(network, Space(3, 2))
    with pytest.raises(KeyboardInterrupt), new_pair_head(denoiser, 16, seed=1):
        raise KeyboardInterrupt
    assert network.pair_head is None
    assert network.config["pair_head"] is None
    with pytest.raises(ValueError, match="expected a trained EGNN, .* got MLP"):  # noqa: SIM117
        with new_pair_head(PreconditionedDenoiser(MLP(3, 2, 1, 8), Space(3, 2)), 16, seed=1):
            pass


def test_a_checkpoint_for_another_denoiser_is_refused(tmp_path: Path) -> None:
    frames = make_oracle(3, 2, True).sample(100, seed=0)
    config = TrainingConfig(4, batch_size=8, seed=1)
    denoiser = pairwise_kernel(Space(3, 2)).denoiser
    for change in (0.0, 0.0, 0.1):
        denoiser.network.node_input.weight.data += change  # type: ignore[attr-defined]
        with new_pair_head(denoiser, 8, seed=1) as objective:
            trainer = Trainer(objective, frames[:80], frames[80:], config)
            if change == 0.0:
                trainer.run(tmp_path / "head.ckpt", progress=False)
        if change:
            with pytest.raises(ValueError, match="got one that differs in network"):
                trainer.run(tmp_path / "head.ckpt", progress=False)


def test_the_training_of_a_head_resumes_bit_for_bit(tmp_path: Path) -> None:
    frames = make_oracle(3, 2, True).sample(100, seed=0)
    path, config = tmp_path / "head.ckpt", TrainingConfig(12, batch_size=8, seed=1)

    def run(stop: bool) -> dict[str, Tensor]:
        denoiser = pairwise_kernel(Space(3, 2)).denoiser
        with new_pair_head(denoiser, 8, seed=1) as objective:
            trainer = Trainer(objective, frames[:80], frames[80:], config)
            if stop:
                for _ in range(5):
                    trainer._step()
                trainer.save(path)
                return {}
            trainer.run(path, progress=False)
            return dict(objective.head.state_dict())

    whole = run(stop=False)
    path.unlink()
    run(stop=True)
    resumed = run(stop=False)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- on another grid --------------------------------------------------------------------------
def test_only_what_grows_with_the_step_is_carried_in_proportion() -> None:
    family = arbitrary(Space(4, 2))
    fine, coarse = GRID.resampled(48), GRID.resampled(6)
    torch.testing.assert_close(family.resampled(GRID, GRID).parameters, family.parameters)
    for grid in (fine, coarse):
        log_a, log_c = family.resampled(GRID, grid).parameters[0].chunk(2)
        before, same = family.parameters[0].chunk(2)
        torch.testing.assert_close(log_c, same)
        ratio = float(grid.widening[0] / GRID.widening[0])  # of a geometric grid, everywhere
        torch.testing.assert_close(log_a.abs().expm1(), ratio * before.abs().expm1())
        assert bool((torch.sign(log_a) == torch.sign(before)).all())
        back = family.resampled(GRID, grid).resampled(grid, GRID)
        torch.testing.assert_close(back.parameters, family.parameters)


def test_a_tuning_for_few_steps_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter more variance is no matter in each of ten steps, and would be in each of forty."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    frames = sample_hmc(
        gen.target, n_chains=400, n_samples=1, burn_in=200, seed=45, progress=False
    ).positions
    untuned = gen.kernel.resampled(10)  # type: ignore[union-attr]
    wider = torch.zeros_like(untuned.covariance.parameters)
    wider[:, 3:9] = 0.25

    def ess(n_steps: int, parameters: Tensor) -> float:
        gen.kernel = untuned.with_covariance(untuned.covariance.with_parameters(parameters))
        return forward_ess(gen.noise(frames, n_steps=n_steps, seed=5, progress=False))

    best = ess(40, 0.0 * wider)
    assert ess(10, wider) > 0.5 * ess(10, 0.0 * wider)
    assert ess(40, wider) > 0.75 * best
    # control: the variances of ten steps in each of forty
    monkeypatch.setattr(StateCovariance, "resampled", lambda self, old, new: self)
    assert ess(40, wider) < 0.5 * best


def test_knots_that_trajectories_say_nothing_of_stay(oracle: Oracle) -> None:
    grid = Schedule.geometric(5, 0.03, 15.0)
    kernel = DiffusionKernel.ddpm(oracle.denoiser, grid)
    family = make_covariance("tweedie", oracle.space, [0] * oracle.space.n_particles)
    data = collect(
        kernel, family, oracle.reduced_energy, oracle.sample(300, 1), 300, generator(2),
        300, False,
    )  # fmt: skip
    fitted = fit(family, data, grid).fitted.parameters
    assert float(fitted.abs().max()) < 2.5
    # control: without the penalty they run away
    type_without = type("Free", (type(family),), {"penalty": lambda self, p, grid: p.new_zeros(())})
    free = type_without(family.space, family.labels, family.parameters)
    assert float(fit(free, data, grid).fitted.parameters.abs().max()) > 2.5


def test_the_paper_s_procedure_has_the_penalty_too(oracle: Oracle) -> None:
    """A knot that no level of the grid is near feels nothing else."""
    grid = Schedule.geometric(5, 0.03, 1.0)
    kernel = DiffusionKernel.ddpm(oracle.denoiser, grid)
    family = make_covariance("tweedie", oracle.space, [0] * oracle.space.n_particles)
    data = collect(
        kernel, family, oracle.reduced_energy, oracle.sample(50, 1), 50, generator(2), 50, False
    )
    start = family.ddpm_parameters(grid)
    start[0, 10] = 1.0
    done = fit_sgd(family, lambda n: data, grid, start, n_iterations=100, progress=False)
    assert float(done.fitted.parameters[0, 10]) < 0.9
    value = objective_value(log_weights(done.fitted, data, grid), "alpha2")
    assert done.objective == pytest.approx(float(value), abs=0.01)  # of the trajectories alone


# -- one bad configuration --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tweedie", "krylov", "hessian", "pairwise"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_configuration_that_is_not_finite_stays_alone(kind: str, bad: float) -> None:
    kernel = pairwise_kernel(Space(4, 2))
    family = make_covariance(kind, kernel.space, [0, 1, 1, 1], torch.zeros(1, 22))
    energy = make_oracle(4, 2, True).reduced_energy
    kernel = DiffusionKernel.ddpm(kernel.denoiser, GRID, energy).with_covariance(family)
    clean = kernel.space.standard_normal(5, generator(1))
    x = clean.clone()
    x[2, 1, 0] = bad
    residual = 0.1 * kernel.space.standard_normal(5, generator(2))
    expected = family.at(kernel.step(6, clean)).log_prob(residual)
    scatter = family.at(kernel.step(6, x))
    good = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(scatter.log_prob(residual)[good], expected[good])
    assert bool(torch.isfinite(scatter.sample(5, generator(3))).all())
    statistics = family.statistics(kernel.step(6, x, pairs=kind == "pairwise"), residual)
    assert bool(torch.isfinite(statistics[good]).all())
