"""Which covariance "auto" takes, and that it says why."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import COVARIANCES, make_covariance
from openmm_vtdis.diffusion.covariance.state_dependent import PAIRWISE_PRICE
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import forward_paths
from openmm_vtdis.diffusion.posteriors.hessian import hessian_price
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import EGNN
from openmm_vtdis.tuning import select_covariance
from openmm_vtdis.tuning.select_covariance import Pilot, candidates, explain, price, run_pilots
from tests.conftest import Oracle, exact_generator, make_oracle

GRID = Schedule.geometric(12, 0.03, 15.0)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pilots_of(oracle: Oracle, kinds: list[str], n: int = 2000) -> dict[str, Pilot]:
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    labels = [0] * oracle.space.n_particles
    families = [candidates(kind, "alpha2", oracle.denoiser, labels, True)[0] for kind in kinds]
    x = oracle.sample(n, seed=1)
    processes, energy = dict.fromkeys(kinds, process), oracle.reduced_energy
    return run_pilots(processes, families, energy, x, rng(2), n, 500, False)


def test_candidates_are_what_the_generator_has() -> None:
    space = Space(3, 2)
    network = EGNN([0] * 3, 2, n_layers=1, n_hidden=8)
    denoiser = PreconditionedDenoiser(network, space)

    def kinds(*arguments: object) -> list[str]:
        return [f.kind for f in candidates(*arguments)]  # type: ignore[arg-type]

    rest = (denoiser, [0] * 3)
    assert kinds("auto", "alpha2", *rest, False) == ["isotropic"]
    assert kinds("auto", "alpha2", *rest, True) == ["isotropic", "hessian"]
    network.add_pair_head(8)
    assert kinds("auto", "kl", *rest, True) == ["isotropic", "pairwise", "hessian"]
    assert kinds("auto", "ddpm", *rest, True) == ["isotropic"]
    assert kinds("tweedie", "alpha2", *rest, True) == ["tweedie"]
    (low_rank,) = candidates("low-rank", "alpha2", *rest, False, 3)
    assert low_rank.options == {"rank": 3}
    with pytest.raises(ValueError, match="covariance: expected one of"):
        kinds("best", "alpha2", *rest, True)


def test_the_variance_is_that_of_the_weights() -> None:
    """Against forward trajectories of another stream; an exact denoiser's curvature pays."""
    oracle = make_oracle(4, 2, True)
    pilots = pilots_of(oracle, ["isotropic", "hessian"])
    family = make_covariance("hessian", oracle.space, [0] * 4)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    process = process.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
    x = oracle.sample(2000, seed=3)
    paths = forward_paths(process, x, rng(4), progress=False)
    log_w = paths.log_ratio - oracle.reduced_energy(x)
    assert pilots["hessian"].variance == pytest.approx(float(log_w.var()), rel=0.25)
    shifted = log_w + 0.7 * oracle.reduced_energy(x)  # the control: a wrong part of the energy
    assert abs(float(shifted.var()) / pilots["hessian"].variance - 1.0) > 0.5
    best = max(pilots, key=lambda kind: pilots[kind].log_yield)
    assert explain(pilots).startswith(f"{best} gives the most effective samples for the work")


def test_the_same_seed_makes_the_same_pilots_and_all_see_the_same_noise() -> None:
    oracle = make_oracle(3, 2, True)
    both = pilots_of(oracle, ["isotropic", "hessian"], 100)
    assert both == pilots_of(oracle, ["isotropic", "hessian"], 100)
    assert both["hessian"] == pilots_of(oracle, ["hessian"], 100)["hessian"]


KINDS = ("isotropic", "pairwise", "hessian")


def test_the_price_counts_steps_of_either_kind() -> None:
    oracle = make_oracle(4, 2, True)
    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    second = hessian_price(6)
    isotropic, pairwise, hessian = (COVARIANCES[kind] for kind in KINDS)
    assert price(process, isotropic) == 12.0
    assert price(process, pairwise) == pytest.approx(12.0 * PAIRWISE_PRICE)
    assert price(process, hessian) == pytest.approx(12.0 * second)
    below = process.with_laplace(LaplaceRange(GRID.times[4]), jump=False)
    assert price(below, pairwise) == pytest.approx(4.0 * second + 8.0 * PAIRWISE_PRICE)
    assert Pilot(1.0, 12.0).log_yield > Pilot(1.0, 20.0).log_yield
    assert Pilot(1.0, 200.0).log_yield > Pilot(8.0, 12.0).log_yield


def test_a_candidate_that_fails_on_most_frames_is_not_chosen() -> None:
    oracle = make_oracle(3, 2, True)

    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x),), math.nan, dtype=torch.float64)

    process = DiffusionProcess.ddpm(oracle.denoiser, GRID, broken)
    families = candidates("isotropic", "alpha2", oracle.denoiser, [0] * 3, True)
    x = oracle.sample(50, seed=1)
    pilot = run_pilots({"isotropic": process}, families, broken, x, rng(2), 50, 50, False)
    assert pilot["isotropic"].log_yield == -math.inf


def test_tune_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    target, gen = exact_generator(space=Space(4, 2))
    frames = target.sample(500, seed=1)
    report = gen.tune(frames, 8, n_trajectories=200, progress=False)
    assert report.reason is not None
    assert f"{report.covariance} gives the most effective" in report.reason
    assert report.reason in str(report)
    assert gen.process is not None
    assert gen.process.covariance.kind == report.covariance
    for favourite in ("isotropic", "hessian"):  # whatever the pilots say is done
        rigged = {
            kind: Pilot(0.1 if kind == favourite else 5.0, 8.0) for kind in ("isotropic", "hessian")
        }
        monkeypatch.setattr(select_covariance, "run_pilots", lambda *args, rigged=rigged: rigged)
        assert gen.tune(frames, 8, n_trajectories=200, progress=False).covariance == favourite
        assert (gen.process.laplace is not None) == (favourite == "hessian")
    assert gen.tune(frames, 8, "isotropic", n_trajectories=200, progress=False).reason is None
