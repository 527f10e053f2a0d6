r"""Which covariance: a pilot run decides.

Every candidate, untuned, is tried on the same few forward trajectories. Its effective samples a
second are estimated as exp(-Var log w) over the seconds that a trajectory takes: a few hundred
trajectories tell a variance, where they would not tell a mean of weights. Candidates are

    isotropic   always;
    pairwise    if the network has a pair head;
    hessian     if the energy can be differentiated twice.

"tweedie" and "krylov" are none: what they gain over "pairwise" has not paid for their
Jacobian-vector products in any system that was measured. The others, "diagonal" to "time-network",
are for comparison.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance import RANKED, Covariance, Energy, make_covariance
from openmm_vtdis.diffusion.covariance.state import StateCovariance
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.sampling import forward_paths

N_PILOT = 256
"""Trajectories of a candidate."""


@dataclass(frozen=True)
class Pilot:
    """What a candidate did.

    Attributes
    ----------
    variance
        Of log w over forward trajectories.
    seconds
        A trajectory took, on this machine at that moment.
    """

    variance: float
    seconds: float

    @property
    def log_rate(self) -> float:
        """Log of the effective samples a second."""
        return -self.variance - math.log(self.seconds)


def candidates(
    covariance: str,
    objective: str,
    denoiser: Denoiser,
    labels: Sequence[int],
    twice_differentiable: bool,
    rank: int = 4,
) -> list[Covariance]:
    """The family of a name, or those that "auto" has to choose from."""
    kinds = [covariance]
    if covariance == "auto":
        kinds = ["isotropic"]
        head = getattr(getattr(denoiser, "network", None), "pair_head", None)
        if objective != "ddpm" and head is not None:
            kinds.append("pairwise")
        if objective != "ddpm" and twice_differentiable:
            kinds.append("hessian")
    families = []
    for kind in kinds:
        options: dict[str, Any] = {"rank": rank} if kind in RANKED else {}
        families.append(make_covariance(kind, denoiser.space, labels, **options))
    return families


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
    """Try families (of the kernels under their names) on n frames drawn from (n', M, D)."""
    index = torch.randint(len(frames), (n,), generator=generator, device=generator.device)
    x = frames[index.to(frames.device)]
    energies = energy(x).cpu()
    pilots = {}
    for family in families:
        kernel, state = kernels[family.kind], isinstance(family, StateCovariance)
        schedule = kernel.schedule
        if state:
            untuned = family.with_parameters(family.ddpm_parameters(schedule))
            kernel = kernel.with_covariance(untuned)
        began = time.perf_counter()
        paths = forward_paths(
            kernel, x, generator, None if state else family, batch_size, progress  # type: ignore[arg-type]
        )  # fmt: skip
        seconds = (time.perf_counter() - began) / n
        cost = -paths.log_reverse
        if paths.statistics is not None:
            cost = family.cost(
                family.initial(paths.statistics, schedule), paths.statistics, schedule
            )
        log_w = paths.log_forward - energies + cost
        log_w = log_w[torch.isfinite(log_w)]
        variance = float(log_w.var()) if 2 * len(log_w) > n else math.inf
        pilots[family.kind] = Pilot(variance, seconds)
    return pilots


def explain(pilots: Mapping[str, Pilot]) -> str:
    """Why the best one is: a sentence."""
    best = max(pilots, key=lambda kind: pilots[kind].log_rate)
    told = "; ".join(
        f"{kind}: Var log w {pilot.variance:.2f}, {1e3 * pilot.seconds:.1f} ms a trajectory"
        for kind, pilot in pilots.items()
    )
    return f"{best} gives the most effective samples a second ({told})"
