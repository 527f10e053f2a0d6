"""Covariance from the denoiser's Jacobian: against the analytic posterior and dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.diffusion.covariance import ReverseStep, Tweedie, make_covariance
from openmm_vtdis.diffusion.covariance.state_dependent import EigenScatter, StateCovariance
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.posteriors.jacobian import denoiser_jacobian
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.networks import EGNN
from openmm_vtdis.tuning.fit import Trajectories, fit, fit_sgd, log_weights, objective_value
from openmm_vtdis.tuning.tune import collect
from tests.conftest import Oracle, make_oracle, z_of_mean_weight

GRID = Schedule.geometric(12, 0.03, 15.0)


def rng(seed: int) -> torch.Generator:
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
    family = make_covariance("tweedie", oracle.space, [0] * oracle.space.n_particles)
    return DiffusionProcess.ddpm(oracle.denoiser, GRID).step(n, x, family)


def arbitrary(space: Space) -> Tweedie:
    empty = make_covariance("tweedie", space, [0] * space.n_particles)
    start = empty.ddpm_parameters(GRID)
    noise = torch.randn(start.shape, generator=rng(5), dtype=torch.float64)
    return empty.with_parameters(0.3 * noise)  # type: ignore[return-value]


@pytest.mark.parametrize("t", [0.05, 0.7, 8.0])
def test_the_jacobian_is_the_posterior_covariance(oracle: Oracle, t: float) -> None:
    x = oracle.sample(20, seed=1) + t * oracle.space.standard_normal(20, rng(2))
    _, jacobian = denoiser_jacobian(oracle.denoiser, oracle.space, x, t)
    torch.testing.assert_close(t**2 * jacobian, posterior_covariance(oracle, x, t))


def test_scalars_are_linear_in_log_t_between_knots() -> None:
    space = Space(3, 3)
    knots = torch.linspace(-3.0, 2.0, 11, dtype=torch.float64)
    parameters = torch.cat([0.2 * knots + 0.1, 0.3 - 0.1 * knots])[None]
    family = Tweedie(space, [0] * 3, parameters)
    a, c = family._scales(parameters, GRID.pairs)
    level = GRID.pairs[:, 1].log10()
    torch.testing.assert_close(a.log(), 0.2 * level + 0.1)
    torch.testing.assert_close(c.log(), 0.3 - 0.1 * level)


def test_log_prob_is_the_dense_gaussian(oracle: Oracle) -> None:
    space = oracle.space
    family = arbitrary(space)
    for n in (1, 7, 12):
        x = GRID.times[n] * space.standard_normal(6, rng(n))
        step = reverse_step(oracle, n, x)
        levels = torch.tensor([[step.s, step.t]], dtype=torch.float64)
        a, c = (float(value) for value in family._scales(family.parameters, levels))
        dense = a * step.variance * torch.eye(space.dim, dtype=torch.float64)
        dense = dense + c * (1.0 - step.ratio) ** 2 * posterior_covariance(oracle, x, step.t)
        reference = torch.distributions.MultivariateNormal(
            torch.zeros(space.dim, dtype=torch.float64), dense
        )
        residual = space.standard_normal(6, rng(20 + n))
        torch.testing.assert_close(
            family.at(step).log_prob(residual),
            reference.log_prob(space.reduce(residual).flatten(1)),
        )


def test_cost_of_statistics_is_minus_the_log_prob(oracle: Oracle) -> None:
    family = arbitrary(oracle.space)
    rows, total = [], torch.zeros(5, dtype=torch.float64)
    for n in range(1, 13):
        step = reverse_step(oracle, n, GRID.times[n] * oracle.space.standard_normal(5, rng(n)))
        residual = 0.1 * oracle.space.standard_normal(5, rng(40 + n))
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
    residual = scatter.sample(n, rng(3))
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
    x = space.standard_normal(3, rng(1))
    turn = random_rotations(3, n_dims, rng(2))
    turn[:, :, 0] *= -1.0
    order = [0, 3, 1, 2]
    with torch.no_grad():
        _, before = denoiser_jacobian(denoiser, space, x, 0.4)
        _, after = denoiser_jacobian(denoiser, space, (x @ turn)[:, order], 0.4)

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
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID).with_covariance(family)
    paths = reverse_paths(process, 3000, rng(1), progress=False)
    right = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert abs(z_of_mean_weight(right)) < 4.0

    class Without(EigenScatter):
        def log_prob(self, residual: Tensor) -> Tensor:
            return super().log_prob(residual) + 0.5 * self.variances.log().sum(dim=1)

    class Broken(Tweedie):
        def at(self, step: ReverseStep) -> EigenScatter:
            scatter = super().at(step)
            return Without(scatter.space, scatter.vectors, scatter.variances)

    broken = process.with_covariance(Broken(oracle.space, [0] * 4, torch.zeros(1, 22)))
    paths = reverse_paths(broken, 3000, rng(1), progress=False)
    wrong = -oracle.reduced_energy(paths.x) + paths.log_ratio
    wrong = wrong - float(torch.logsumexp(wrong, 0)) + math.log(len(wrong))
    assert float(right.exp().var()) < 0.3 * float(wrong.exp().var())


def test_it_beats_isotropic_with_an_exact_denoiser() -> None:
    oracle = make_oracle(4, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID)
    objective = {}
    for kind in ("isotropic", "tweedie"):
        family = make_covariance(kind, oracle.space, [0] * 4)
        values = []
        for seed in (1, 2):
            x = oracle.sample(1500, seed)
            paths = forward_paths(process, x, rng(seed), family, progress=False)
            values.append(
                Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)  # type: ignore[arg-type]
            )
        train, test = values
        best = fit(family, train[:-300], GRID, "alpha2", train[-300:])
        objective[kind] = float(objective_value(log_weights(best.fitted, test, GRID), "alpha2"))
    assert objective["tweedie"] < 0.5 * objective["isotropic"]


@pytest.mark.parametrize("kind", ["tweedie"])
@pytest.mark.parametrize("case", ["coincident", "collinear", "far"])
def test_degenerate_configurations_stay_positive_definite(case: str, kind: str) -> None:
    space = Space(4, 3)
    torch.manual_seed(0)
    denoiser = PreconditionedDenoiser(EGNN([0] * 4, 3, n_layers=2, n_hidden=16), space)
    x = space.standard_normal(2, rng(0))
    if case == "coincident":
        x[:, 1] = x[:, 0]
    elif case == "collinear":
        x[:, :, 1:] = 0.0
    else:
        x = 1e4 * x
    process = DiffusionProcess.ddpm(denoiser, Schedule.geometric(3, 1e-3, 50.0))
    family = make_covariance(kind, space, [0] * 4, torch.zeros(1, 22))
    for n in (1, 3):
        scatter = family.at(process.step(n, space.project(x), family))
        assert bool(torch.isfinite(scatter.vectors).all())
        assert bool((scatter.variances > 0.0).all())
        assert bool(torch.isfinite(scatter.log_prob(x)).all())


# -- on another grid --------------------------------------------------------------------------
def test_only_what_grows_with_the_step_is_carried_in_proportion() -> None:
    family = arbitrary(Space(4, 2))
    fine, coarse = GRID.with_n_steps(48), GRID.with_n_steps(6)
    torch.testing.assert_close(family.carried(GRID, GRID).parameters, family.parameters)
    for grid in (fine, coarse):
        log_a, log_c = family.carried(GRID, grid).parameters[0].chunk(2)
        before, same = family.parameters[0].chunk(2)
        torch.testing.assert_close(log_c, same)
        ratio = float(grid.widening[0] / GRID.widening[0])  # of a geometric grid, everywhere
        torch.testing.assert_close(log_a.abs().expm1(), ratio * before.abs().expm1())
        assert bool((torch.sign(log_a) == torch.sign(before)).all())
        back = family.carried(GRID, grid).carried(grid, GRID)
        torch.testing.assert_close(back.parameters, family.parameters)


def test_a_tuning_for_few_steps_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter more variance is no matter in each of ten steps, and would be in each of forty."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    frames = sample_hmc(
        gen.target, n_chains=400, n_samples=1, burn_in=200, seed=45, progress=False
    ).positions
    untuned = gen.process.with_n_steps(10)  # type: ignore[union-attr]
    wider = torch.zeros_like(untuned.covariance.parameters)
    wider[:, 3:9] = 0.25

    def ess(n_steps: int, parameters: Tensor) -> float:
        gen.process = untuned.with_covariance(untuned.covariance.with_parameters(parameters))
        return forward_ess(gen.log_weights(frames, n_steps=n_steps, seed=5, progress=False))

    best = ess(40, 0.0 * wider)
    assert ess(10, wider) > 0.5 * ess(10, 0.0 * wider)
    assert ess(40, wider) > 0.75 * best
    # control: the variances of ten steps in each of forty
    monkeypatch.setattr(StateCovariance, "carried", lambda self, old, new: self)
    assert ess(40, wider) < 0.5 * best


def test_knots_that_trajectories_say_nothing_of_stay(oracle: Oracle) -> None:
    grid = Schedule.geometric(5, 0.03, 15.0)
    process = DiffusionProcess.ddpm(oracle.denoiser, grid)
    family = make_covariance("tweedie", oracle.space, [0] * oracle.space.n_particles)
    data = collect(
        process, family, oracle.reduced_energy, oracle.sample(300, 1), 300, rng(2),
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
    process = DiffusionProcess.ddpm(oracle.denoiser, grid)
    family = make_covariance("tweedie", oracle.space, [0] * oracle.space.n_particles)
    data = collect(
        process, family, oracle.reduced_energy, oracle.sample(50, 1), 50, rng(2), 50, False
    )
    start = family.ddpm_parameters(grid)
    start[0, 10] = 1.0
    done = fit_sgd(family, lambda n: data, grid, start, n_iterations=100, progress=False)
    assert float(done.fitted.parameters[0, 10]) < 0.9
    value = objective_value(log_weights(done.fitted, data, grid), "alpha2")
    assert done.objective == pytest.approx(float(value), abs=0.01)  # of the trajectories alone
