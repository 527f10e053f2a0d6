"""Which covariance "auto" takes, and that it says why."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openmm_vtdis.diffusion import choice
from openmm_vtdis.diffusion.choice import Pilot, candidates, explain, run_pilots
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.geometry import Space
from openmm_vtdis.networks import EGNN
from tests.conftest import Oracle, exact_generator, make_oracle

GRID = Schedule.geometric(12, 0.03, 15.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pilots_of(oracle: Oracle, kinds: list[str], n: int = 2000) -> dict[str, Pilot]:
    kernel = DiffusionKernel.ddpm(oracle.denoiser, GRID, oracle.reduced_energy)
    labels = [0] * oracle.space.n_particles
    families = [candidates(kind, "alpha2", oracle.denoiser, labels, True)[0] for kind in kinds]
    x = oracle.sample(n, seed=1)
    return run_pilots(
        dict.fromkeys(kinds, kernel),
        families,
        oracle.reduced_energy,
        x,
        generator(2),
        n,
        500,
        False,
    )


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
    (krylov,) = candidates("krylov", "alpha2", *rest, False, 3)
    assert krylov.options == {"rank": 3}
    with pytest.raises(ValueError, match="covariance: expected one of"):
        kinds("best", "alpha2", *rest, True)


def test_the_variance_orders_covariances_as_their_weights_do() -> None:
    pilots = pilots_of(make_oracle(4, 2, True), ["isotropic", "tweedie"])
    assert pilots["tweedie"].variance < 0.7 * pilots["isotropic"].variance
    assert pilots["isotropic"].seconds < pilots["tweedie"].seconds
    best = max(pilots, key=lambda kind: pilots[kind].log_rate)
    assert explain(pilots).startswith(f"{best} gives the most effective samples a second")


def test_time_counts() -> None:
    """The same variance in half the time; and a large variance that no speed makes up for."""
    one = Pilot(1.0, 2e-3)
    assert one.log_rate < replace(one, seconds=1e-3).log_rate
    assert Pilot(8.0, 1e-3).log_rate < Pilot(1.0, 1e-1).log_rate
    slow, oracle = [], make_oracle(3, 2, True)
    fast = pilots_of(oracle, ["hessian"], 50)["hessian"]

    def delayed(x: Tensor) -> Tensor:
        slow.append(len(x))
        time.sleep(0.02)
        return oracle.reduced_energy(x)

    kernel = DiffusionKernel.ddpm(oracle.denoiser, GRID, delayed)
    families = candidates("hessian", "alpha2", oracle.denoiser, [0] * 3, True)
    x = oracle.sample(50, seed=1)
    pilot = run_pilots({"hessian": kernel}, families, delayed, x, generator(2), 50, 50, False)
    assert pilot["hessian"].variance == pytest.approx(fast.variance)
    assert pilot["hessian"].seconds > fast.seconds


def test_a_candidate_that_fails_on_most_frames_is_not_chosen() -> None:
    oracle = make_oracle(3, 2, True)

    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x),), math.nan, dtype=torch.float64)

    kernel = DiffusionKernel.ddpm(oracle.denoiser, GRID, broken)
    families = candidates("isotropic", "alpha2", oracle.denoiser, [0] * 3, True)
    x = oracle.sample(50, seed=1)
    pilot = run_pilots({"isotropic": kernel}, families, broken, x, generator(2), 50, 50, False)
    assert pilot["isotropic"].log_rate == -math.inf


def test_tune_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    target, gen = exact_generator(space=Space(4, 2))
    frames = target.sample(500, seed=1)
    report = gen.tune(frames, 8, n_trajectories=200, progress=False)
    assert report.reason is not None
    assert f"{report.covariance} gives the most effective" in report.reason
    assert report.reason in str(report)
    assert gen.kernel is not None
    assert gen.kernel.covariance.kind == report.covariance
    for favourite in ("isotropic", "hessian"):  # whatever the pilots say is done
        rigged = {
            kind: Pilot(0.1 if kind == favourite else 5.0, 1e-3)
            for kind in ("isotropic", "hessian")
        }
        monkeypatch.setattr(choice, "run_pilots", lambda *args, rigged=rigged: rigged)
        assert gen.tune(frames, 8, n_trajectories=200, progress=False).covariance == favourite
        assert (gen.kernel.laplace is not None) == (favourite == "hessian")
    assert gen.tune(frames, 8, "isotropic", n_trajectories=200, progress=False).reason is None
