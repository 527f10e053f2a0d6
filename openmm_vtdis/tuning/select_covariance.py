r"""Which covariance: a pilot run decides.

Every candidate, untuned, is tried on the same few forward trajectories, and exp(-Var log w) over
the price of a trajectory estimates its effective samples for the work. (A few hundred trajectories
tell a variance, where they would not tell a mean of weights.) The price is counted, not timed, in
network evaluations, so that the same seed makes the same choice::

    isotropic   1 a step; always a candidate
    pairwise    PAIRWISE a step; if the network has a pair head
    hessian     1 + d DIMENSION a step; if the energy can be differentiated twice

and a step that goes by the Laplace approximation costs what one of "hessian" does. Both constants
are rounded from ``benchmarks/step_time.py``. "tweedie" is no candidate, at 1.5
evaluations for each product with the Jacobian; the others, "diagonal" to "time-network", are for
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.covariance import FAMILIES, Covariance, Energy, Ranked, make_covariance
from openmm_vtdis.diffusion.covariance.state_dependent import StateCovariance
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.paths import forward_paths
from openmm_vtdis.diffusion.process import DiffusionKernel

N_PILOT = 256
"""Trajectories of a candidate."""
PAIRWISE, DIMENSION = 1.3, 0.025
"""Prices in network evaluations: a step of "pairwise"; a Hessian and its eigenvectors, over d."""


@dataclass(frozen=True)
class Pilot:
    """What a candidate did.

    Attributes
    ----------
    variance
        Of log w over forward trajectories.
    price
        Of a trajectory, in network evaluations.
    """

    variance: float
    price: float

    @property
    def log_yield(self) -> float:
        """Log of the effective samples for a network evaluation."""
        return -self.variance - math.log(self.price)


def candidates(
    covariance: str,
    objective: str,
    denoiser: Denoiser,
    labels: Sequence[int],
    twice_differentiable: bool,
    rank: int = 4,
) -> list[Covariance]:
    """The family of a name, or those that "auto" has to choose from."""
    kinds = [checks.choice("covariance", covariance, ("auto", *FAMILIES, "full"))]
    if covariance == "auto":
        kinds = ["isotropic"]
        head = getattr(getattr(denoiser, "network", None), "pair_head", None)
        if objective != "ddpm" and head is not None:
            kinds.append("pairwise")
        if objective != "ddpm" and twice_differentiable:
            kinds.append("hessian")
    families = []
    for kind in kinds:
        ranked = issubclass(FAMILIES.get(kind, Covariance), Ranked)
        options: dict[str, Any] = {"rank": rank} if ranked else {}
        families.append(make_covariance(kind, denoiser.space, labels, **options))
    return families


def price(kernel: DiffusionKernel, kind: str) -> float:
    """Network evaluations that a trajectory costs, see the module."""
    second = 1.0 + kernel.space.dim * DIMENSION
    level = 0.0 if kernel.laplace is None else kernel.laplace.level
    n_laplace = sum(t <= level for t in kernel.schedule.times[1:])
    one = {"isotropic": 1.0, "pairwise": PAIRWISE, "hessian": second}[kind]
    return n_laplace * second + (kernel.schedule.n_steps - n_laplace) * one


def run_pilots(
    kernels: Mapping[str, DiffusionKernel],
    families: Sequence[Covariance],
    energy: Energy,
    frames: Tensor,
    generator: torch.Generator,
    n: int = N_PILOT,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Pilot]:
    """Try families (of the kernels under their names) on n frames drawn from (n', M, D).

    All see the same frames and the same noise.
    """
    index = torch.randint(len(frames), (n,), generator=generator, device=generator.device)
    x = frames[index.to(frames.device)].to(generator.device, torch.float64)
    energies, start = energy(x).detach().cpu(), generator.get_state()
    pilots = {}
    for family in families:
        kernel = kernels[family.kind]
        generator.set_state(start)
        if isinstance(family, StateCovariance):
            untuned = family.with_parameters(family.ddpm_parameters(kernel.schedule))
            kernel = kernel.with_covariance(untuned)
            paths = forward_paths(kernel, x, generator, None, batch_size, progress)
            log_p = paths.log_reverse
        else:
            paths = forward_paths(kernel, x, generator, family, batch_size, progress)
            statistics: Tensor = paths.statistics  # type: ignore[assignment]
            initial = family.initial(statistics, kernel.schedule)
            log_p = -family.cost(initial, statistics, kernel.schedule)
        log_w = paths.log_forward - energies - log_p
        log_w = log_w[torch.isfinite(log_w)]
        variance = float(log_w.var()) if 2 * len(log_w) > n else math.inf
        pilots[family.kind] = Pilot(variance, price(kernel, family.kind))
    return pilots


def explain(pilots: Mapping[str, Pilot]) -> str:
    """Why the best one is: a sentence."""
    best = max(pilots, key=lambda kind: pilots[kind].log_yield)
    told = "; ".join(
        f"{kind}: Var log w {pilot.variance:.2f} for {pilot.price:.0f} evaluations"
        for kind, pilot in pilots.items()
    )
    return f"{best} gives the most effective samples for the work ({told})"
