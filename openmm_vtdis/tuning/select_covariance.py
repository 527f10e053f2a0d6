r"""Selection of a family of covariances by pilot runs.

Every candidate, untuned, is tried on the same few forward trajectories, and exp(-Var log w) over
the price of a trajectory estimates its effective samples for the work. (A few hundred trajectories
tell a variance, where they would not tell a mean of weights.) The price is counted, not timed, in
network evaluations, so that the same seed makes the same choice::

    isotropic   1 a step; always a candidate
    pairwise    PAIRWISE_PRICE a step; if the network has a pair head
    hessian     ``hessian_price`` a step; if the energy can be differentiated twice

and a step that goes by the Laplace approximation costs what one of "hessian" does. "tweedie" is no
candidate, at 1.5 evaluations for each product with the Jacobian; the others, "diagonal" to
"time-network", are for comparison. A family says itself whether it is one, and what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.covariance import COVARIANCES, Covariance, Ranked, make_covariance
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.paths import forward_paths
from openmm_vtdis.diffusion.posteriors.hessian import hessian_price
from openmm_vtdis.diffusion.process import DiffusionProcess

N_PILOT = 256
"""Forward trajectories in a pilot run."""


@dataclass(frozen=True)
class Pilot:
    """Result of a candidate's pilot run.

    Attributes
    ----------
    variance
        Variance of log w over forward trajectories.
    price
        Price of a trajectory in network evaluations.
    """

    variance: float
    price: float

    @property
    def log_yield(self) -> float:
        """Log of the effective samples per network evaluation."""
        return -self.variance - math.log(self.price)


def candidates(
    covariance: str,
    objective: str,
    denoiser: Denoiser,
    labels: Sequence[int],
    twice_differentiable: bool,
    rank: int = 4,
) -> list[Covariance]:
    """The family of a name, or all candidates for "auto"."""
    kinds = [checks.choice("covariance", covariance, ("auto", *COVARIANCES, "full"))]
    if covariance == "auto" and objective == "ddpm":
        kinds = ["isotropic"]
    elif covariance == "auto":
        kinds = [
            kind
            for kind in COVARIANCES
            if COVARIANCES[kind].is_candidate(denoiser, twice_differentiable)
        ]
    families = []
    for kind in kinds:
        ranked = kind in COVARIANCES and issubclass(COVARIANCES[kind], Ranked)
        options: dict[str, Any] = {"rank": rank} if ranked else {}
        families.append(make_covariance(kind, denoiser.space, labels, **options))
    return families


def price(process: DiffusionProcess, family: Covariance | type[Covariance]) -> float:
    """Price of a trajectory in network evaluations; see the module."""
    dim = process.space.dim
    level = 0.0 if process.laplace is None else process.laplace.level
    n_laplace = sum(t <= level for t in process.schedule.times[1:])
    rest = process.schedule.n_steps - n_laplace
    return n_laplace * hessian_price(dim) + rest * family.step_price(dim)


def run_pilots(
    processes: Mapping[str, DiffusionProcess],
    families: Sequence[Covariance],
    energy: Energy,
    frames: Tensor,
    rng: torch.Generator,
    n: int = N_PILOT,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Pilot]:
    """Run each family, with the process under its name, on n frames drawn from (n', M, D).

    All get the same frames and the same noise.
    """
    index = torch.randint(len(frames), (n,), generator=rng, device=rng.device)
    x = frames[index.to(frames.device)].to(rng.device, torch.float64)
    energies, start = energy(x).detach().cpu(), rng.get_state()
    pilots = {}
    for family in families:
        process = processes[family.kind]
        rng.set_state(start)
        if family.by_state:
            untuned = family.with_parameters(family.ddpm_parameters(process.schedule))
            process = process.with_covariance(untuned)
            paths = forward_paths(process, x, rng, None, batch_size, progress)
            log_p = paths.log_reverse
        else:
            paths = forward_paths(process, x, rng, family, batch_size, progress)
            statistics = paths.collected
            initial = family.initial(statistics, process.schedule)
            log_p = -family.cost(initial, statistics, process.schedule)
        log_w = paths.log_forward - energies - log_p
        log_w = log_w[torch.isfinite(log_w)]
        variance = float(log_w.var()) if 2 * len(log_w) > n else math.inf
        pilots[family.kind] = Pilot(variance, price(process, family))
    return pilots


def explain(pilots: Mapping[str, Pilot]) -> str:
    """Say in a sentence why the best candidate is the best."""
    best = max(pilots, key=lambda kind: pilots[kind].log_yield)
    told = "; ".join(
        f"{kind}: Var log w {pilot.variance:.2f} for {pilot.price:.0f} evaluations"
        for kind, pilot in pilots.items()
    )
    return f"{best} gives the most effective samples for the work ({told})"
