"""Exact-weight oracles: an exact denoiser has E[w] = 1 and known log Z, for every covariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import denoise, forward_paths, noise, reverse_paths
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import EGNN
from openmm_vtdis.tuning.fit import MeanCoefficients, Trajectories, fit
from tests.conftest import Oracle, make_oracle, z_of_mean_weight

GRID = Schedule.geometric(30, 0.03, 15.0)
KINDS = [
    "isotropic", "diagonal", "block", "full", "low-rank", "time-network", "tweedie",
    "hessian",
]  # fmt: skip


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tuned_process(oracle: Oracle, kind: str, n: int = 800) -> DiffusionProcess:
    labels = [0] + [1] * (oracle.space.n_particles - 1)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    family = make_covariance(kind, oracle.space, labels)
    x = oracle.sample(n, seed=11)
    paths = forward_paths(process, x, rng(12), family, progress=False)
    data = Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)
    options = {"max_iterations": 60}
    return process.with_covariance(fit(family, data, GRID, "alpha2", **options).fitted)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_weight_is_one_and_both_directions_agree(oracle: Oracle, kind: str) -> None:
    process = tuned_process(oracle, kind)
    paths = reverse_paths(process, 3000, rng(1), progress=False)
    log_w = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert log_w.dtype == torch.float64
    assert abs(z_of_mean_weight(log_w)) < 4.0
    x = oracle.sample(3000, seed=2)
    noised = forward_paths(process, x, rng(3), progress=False)
    log_v = -oracle.reduced_energy(x) + noised.log_ratio
    assert abs(z_of_mean_weight(-log_v)) < 4.0


@pytest.mark.parametrize("kind", [*KINDS, "pairwise"])
def test_few_samples_are_noised_at_many_levels_at_once(kind: str) -> None:
    """Two of them at thirty levels are one batch of 64: the same numbers from one evaluation."""
    oracle = make_oracle(3, 2, True)
    batches: list[int] = []

    class Counting:
        space = oracle.space
        knows_pairs = True

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            batches.append(len(x))
            return oracle.denoiser(x, t)

        def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            """Coefficients that are another's at every level and of every sample."""
            own = t + x.square().sum(dim=(1, 2))
            return self(x, t), own[:, None, None] * torch.arange(1, 13).reshape(3, 4)

    energy = oracle.reduced_energy
    family = make_covariance(kind, oracle.space, [0, 1, 1])
    process = DiffusionProcess.ddpm(Counting(), GRID, energy).with_laplace(LaplaceRange(0.2), False)  # type: ignore[arg-type]
    process = process.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
    x = oracle.sample(2, seed=2)
    found = []
    for batch_size in (2, 15, 64):
        batches.clear()
        paths = forward_paths(process, x, rng(3), family, batch_size, progress=False)
        found.append(paths)
        n_low = sum(t <= 0.2 for t in GRID.times[1:])
        if kind != "tweedie":  # which differentiate the denoiser, level by level
            expected = {2: [2] * 30, 64: [2 * n_low, 60 - 2 * n_low]}
            assert batches == expected.get(batch_size, batches)
            assert max(batches) <= batch_size
        assert sum(batches) >= 60
    for paths in found[1:]:
        torch.testing.assert_close(paths.log_forward, found[0].log_forward)
        torch.testing.assert_close(paths.log_reverse, found[0].log_reverse)
        torch.testing.assert_close(paths.statistics, found[0].statistics)


@pytest.mark.parametrize("break_it", ["covariance", "projection", "prior", "jacobian"])
def test_negative_control_a_wrong_log_weight_fails(break_it: str) -> None:
    """Leave out one ingredient of the path density, and the same check fails."""
    oracle = make_oracle(4, 2, True)
    process = tuned_process(oracle, "diagonal" if break_it == "projection" else "isotropic")
    paths = reverse_paths(process, 3000, rng(1), progress=False)
    log_w = -oracle.reduced_energy(paths.x) + paths.log_ratio
    if break_it == "projection":  # the determinant over all particles, not over the subspace
        share = torch.tensor([1.0, 3.0]) / 4.0
        centre = (share / process.covariance.parameters).sum(dim=1).log().sum()
        log_w = log_w + 0.5 * oracle.space.n_dims * centre
    elif break_it == "covariance":
        log_w = log_w + 0.5 * oracle.space.n_dims * process.covariance.parameters.sum()
    elif break_it == "prior":
        extra = oracle.space.n_dims
        log_w = log_w + 0.5 * extra * math.log(2.0 * math.pi * GRID.times[-1] ** 2)
    else:
        log_w = log_w + oracle.space.dim * math.log(0.9)
    assert abs(z_of_mean_weight(log_w)) > 8.0


def test_tuned_gains_keep_the_weights_exact() -> None:
    oracle = make_oracle(4, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    family = MeanCoefficients(oracle.space, [0] * 4, torch.zeros(1, 1))
    x = oracle.sample(2000, seed=4)
    paths = forward_paths(process, x, rng(5), family, progress=False)
    data = Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)
    fitted = fit(family, data, GRID).fitted
    torch.testing.assert_close(
        fitted.mean_coefficients[5:],
        process.coefficients[5:],
        rtol=0.15,
        atol=0.0,  # type: ignore[attr-defined]
    )
    tuned = process.with_mean_coefficients(fitted.mean_coefficients)  # type: ignore[attr-defined]
    generated = reverse_paths(tuned, 3000, rng(6), progress=False)
    log_w = -oracle.reduced_energy(generated.x) + generated.log_ratio
    assert abs(z_of_mean_weight(log_w)) < 4.0


def test_log_ratio_is_invariant_under_rotation_and_reflection() -> None:
    """An equivariant denoiser (one Gaussian at the origin) sees no difference."""
    oracle = make_oracle(4, 3, True)
    oracle.denoiser.means.zero_()
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    x = oracle.sample(50, seed=1)
    step = process.step(3, x)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = process.step(3, x @ rotation)
    torch.testing.assert_close(process.mean(turned), process.mean(step) @ rotation)
    before = x + 0.01 * oracle.sample(50, seed=2)
    for turn in (rotation, -torch.eye(3, dtype=torch.float64)):
        torch.testing.assert_close(
            process.forward_log_prob(3, before @ turn, x @ turn),
            process.forward_log_prob(3, before, x),
        )


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "block"])
def test_log_weight_of_a_moved_trajectory_is_the_same(kind: str) -> None:
    """With a network: rotations, reflections, translations, and permutations inside a class."""
    space, labels = Space(5, 3), [0, 1, 1, 2, 1]
    torch.manual_seed(0)
    network = EGNN(labels, 3, n_layers=2, n_hidden=16).double()
    process = DiffusionProcess.ddpm(PreconditionedDenoiser(network, space), GRID)
    family = make_covariance(kind, space, labels)
    path = [space.standard_normal(4, rng(8))]
    for n in range(1, GRID.n_steps + 1):
        path.append(process.sample_forward(n, path[-1], rng(100 + n)))
    residuals = [path[n - 1] - process.mean(process.step(n, path[n])) for n in (1, 7, 30)]
    rows = [family.statistics(process.step(7, path[7]), r) for r in residuals]
    spread = torch.stack(rows, dim=1).repeat(1, 10, 1)
    process = process.with_covariance(family.with_parameters(family.initial(spread, GRID)))

    def log_ratio(points: list[Tensor]) -> Tensor:
        total = -process.prior_log_prob(points[-1])
        for n in range(1, len(points)):
            step = process.step(n, points[n])
            reverse = process.covariance.at(step).log_prob(points[n - 1] - process.mean(step))
            total = total + process.forward_log_prob(n, points[n - 1], points[n]) - reverse
        return total

    reference = log_ratio(path)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    moves = {
        "rotation": lambda x: x @ rotation,
        "reflection": lambda x: x * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64),
        "permutation": lambda x: x[:, [0, 4, 1, 3, 2]],
    }
    for name, move in moves.items():
        moved = log_ratio([move(x) for x in path])
        torch.testing.assert_close(moved, reference, rtol=1e-9, atol=1e-9, msg=name)
    forbidden = log_ratio([x[:, [1, 0, 2, 3, 4]] for x in path])
    assert float((forbidden - reference).abs().max()) > 1e-3


def test_another_number_of_steps_needs_a_covariance_for_any_grid() -> None:
    oracle = make_oracle(3, 2, True)
    process = tuned_process(oracle, "time-network", 400)
    other = process.with_n_steps(17)
    assert other.schedule.n_steps == 17
    assert other.schedule.times[0] == GRID.times[0]
    assert other.schedule.times[-1] == GRID.times[-1]
    paths = reverse_paths(other, 3000, rng(1), progress=False)
    log_w = -oracle.reduced_energy(paths.x) + paths.log_ratio
    assert abs(z_of_mean_weight(log_w)) < 4.0
    with pytest.raises(ValueError, match="expected parameters for 17 steps, got 30"):
        tuned_process(oracle, "block", 400).with_n_steps(17)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal"])
@pytest.mark.parametrize("n_steps", [12, 60])
def test_a_tuning_transfers_between_numbers_of_steps(kind: str, n_steps: int) -> None:
    """Against a fresh fit on the other grid; the control carries eta over without its grid."""
    oracle = make_oracle(4, 2, True)

    def objective(process: DiffusionProcess) -> float:
        x = oracle.sample(4000, seed=21)
        paths = forward_paths(process, x, rng(22), progress=False)
        log_w = -oracle.reduced_energy(x) + paths.log_ratio
        return float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))

    tuned = tuned_process(oracle, kind, 4000)
    carried = tuned.with_n_steps(n_steps)
    other = carried.schedule
    family = make_covariance(kind, oracle.space, [0, 1, 1, 1])
    x = oracle.sample(4000, seed=11)
    ddpm = DiffusionProcess.ddpm(oracle.denoiser, other)
    paths = forward_paths(ddpm, x, rng(12), family, progress=False)
    data = Trajectories(paths.log_forward - oracle.reduced_energy(x), paths.statistics)  # type: ignore[arg-type]
    fresh = objective(ddpm.with_covariance(fit(family, data, other, "alpha2").fitted))
    lost = objective(carried) - fresh
    assert lost < 0.02
    n = torch.linspace(0.0, 29.0, n_steps).round().long()
    naive = tuned.covariance.with_parameters(tuned.covariance.parameters[n])
    assert objective(ddpm.with_covariance(naive)) - fresh > max(0.03, 3.0 * lost)
    generated = reverse_paths(carried, 3000, rng(1), progress=False)
    log_w = -oracle.reduced_energy(generated.x) + generated.log_ratio
    assert abs(z_of_mean_weight(log_w)) < 4.0


def test_mean_coefficients_transfer_too() -> None:
    """Those of DDPM, 1 - r_n, stay those of DDPM."""
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID)
    process = process.with_mean_coefficients(0.9 * (1.0 - GRID.ratios)).with_n_steps(17)
    assert process.mean_coefficients is not None
    torch.testing.assert_close(process.mean_coefficients, 0.9 * (1.0 - process.schedule.ratios))


def test_same_seed_same_result_and_batches_are_independent_streams() -> None:
    oracle = make_oracle(3, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    a = reverse_paths(process, 100, rng(7), batch_size=40, progress=False)
    b = reverse_paths(process, 100, rng(7), batch_size=40, progress=False)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.log_ratio, b.log_ratio)
    assert len(a.x.flatten(1).unique(dim=0)) == 100


def test_a_batch_that_does_not_fit_is_halved_and_begun_again() -> None:
    oracle = make_oracle(3, 2, True)
    largest: list[int] = []

    class Small:
        space, room = oracle.space, 5

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            largest.append(len(x))
            if len(x) > self.room:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return oracle.denoiser(x, t)

    grid = Schedule.geometric(6, 0.1, 10.0)
    small, whole = (DiffusionProcess.ddpm(d, grid) for d in (Small(), oracle.denoiser))
    expected = reverse_paths(whole, 30, rng(1), 4, progress=False)
    found = reverse_paths(small, 30, rng(1), 16, progress=False)
    assert largest[:3] == [16, 8, 4]
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.log_ratio, expected.log_ratio)
    x = oracle.sample(20, seed=0)
    expected_f = forward_paths(whole, x, rng(2), None, 4, progress=False)
    found_f = forward_paths(small, x, rng(2), None, 16, progress=False)
    assert torch.equal(found_f.log_ratio, expected_f.log_ratio)
    Small.room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        reverse_paths(small, 30, rng(1), 16, progress=False)


# -- between any two levels -------------------------------------------------------------------
@pytest.mark.parametrize("m", [1, 4, 30])
def test_a_partial_path_is_the_beginning_of_a_whole_one(m: int) -> None:
    oracle = make_oracle(3, 2, True)
    process = tuned_process(oracle, "isotropic")
    x = oracle.sample(6, seed=1)
    part = noise(process, x, torch.Generator().manual_seed(2), to=m)
    whole = noise(process, x, torch.Generator().manual_seed(2), at_once=7)
    log_q, log_p, x_n = torch.zeros(6).double(), torch.zeros(6).double(), x
    rng = torch.Generator().manual_seed(2)
    for n in range(1, m + 1):
        after = process.sample_forward(n, x_n, rng)
        log_q += process.forward_log_prob(n, x_n, after)
        step = process.step(n, after)
        log_p += process.covariance.at(step).log_prob(x_n - process.mean(step))
        x_n = after
    torch.testing.assert_close(part.end, x_n)
    torch.testing.assert_close(part.log_q, log_q)
    torch.testing.assert_close(part.log_p, log_p)
    assert torch.equal(part.end, whole.end) == (m == 30)
    back = denoise(process, part.end, torch.Generator().manual_seed(3), from_=m)
    assert back.end.shape == x.shape
    assert float((back.end - part.end).norm()) > 0.0
    nowhere = noise(process, x, rng, to=0)
    assert torch.equal(nowhere.end, x)
    assert not bool(nowhere.log_q.any())
    for wrong in (-1, 31, 2.5):
        with pytest.raises(ValueError, match="from_: expected"):
            denoise(process, x, rng, from_=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["isotropic", "tweedie"])
@pytest.mark.parametrize("m", [3, 12, 30])
def test_there_and_back_has_exact_weights(kind: str, m: int) -> None:
    """x_0 of the target, noised to m and denoised again: the ratio of Hastings has mean one.

    So it is for any denoiser and any level, since both ways are counted; control: one way is not.
    """
    oracle = make_oracle(4, 2, True)
    drifting = lambda x, t: 0.999 * oracle.denoiser(x, t)  # noqa: E731
    drifting.space = oracle.space  # type: ignore[attr-defined]
    process = DiffusionProcess.ddpm(drifting, GRID)  # type: ignore[arg-type]
    process = process.with_covariance(tuned_process(oracle, kind).covariance)
    x, rng = oracle.sample(4_000, seed=1), torch.Generator().manual_seed(2)
    there = noise(process, x, rng, to=m)
    back = denoise(process, there.end, rng, from_=m)
    before = -oracle.reduced_energy(x) + there.log_q - there.log_p
    after = -oracle.reduced_energy(back.end) + back.log_q - back.log_p
    assert abs(z_of_mean_weight(after - before)) < 4.0
    assert float((after - before).std()) > 1e-3
    broken = after - before - 0.2  # a factor that was lost
    assert abs(z_of_mean_weight(broken)) > 4.0
