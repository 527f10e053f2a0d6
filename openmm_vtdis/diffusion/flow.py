r"""Probability-flow ODE: deterministic sampling with exact or estimated likelihoods.

In s = log t the flow is dx/ds = f(x, s) = x - D(x, t), and along it (paper, Eq. 3 and 5)

    d log p / ds = -div f = -(d - tr dD/dx)

with the trace over the space that configurations live in. Integrating from x_N ~ N_x(0, T^2 I) down
to t_0 gives a sample and its log density, whose importance weight is exact up to the integration
error; integrating target samples upwards gives their log density (forward ESS).

The baseline that the trajectory weights of :mod:`~openmm_vtdis.diffusion.paths` are judged
against: with ``divergence="exact"`` a step costs d products with the Jacobian more.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
from scipy.integrate import simpson
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.derivatives import Linearised
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.jacobian import tangent_basis
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime.progress import progress_bar

DIVERGENCES = ("exact", "hutchinson")
SOLVERS = ("heun", "rk4")


class Flow:
    """The flow in s = log t, with the trace of its Jacobian taken along tangents.

    Parameters
    ----------
    probes
        (P, B, M, D). Exact: P = d basis vectors, and the trace is the sum over them. Hutchinson: P
        random vectors of identity covariance on the space, and the trace is the mean.
    """

    def __init__(self, denoiser: Denoiser, probes: Tensor, exact: bool) -> None:
        self.denoiser, self.probes, self.exact = denoiser, probes, exact

    def velocity(self, s: float, x: Tensor) -> Tensor:
        """dx/ds = x - D(x, e^s), (B, M, D)."""
        level = torch.full((x.shape[0],), math.exp(s), dtype=x.dtype, device=x.device)
        return x - self.denoiser.space.project(self.denoiser(x, level))

    def velocity_and_rate(self, s: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """dx/ds and d log p / ds = -div dx/ds, (B,) float64."""
        velocity = Linearised(functools.partial(self.velocity, s), x)
        traces = [(v * velocity.product(v)).sum(dim=(-2, -1)) for v in self.probes]
        products = torch.stack(traces)
        divergence = products.sum(dim=0) if self.exact else products.mean(dim=0)
        return velocity.value, -divergence.to(torch.float64)


def integrate(flow: Flow, x: Tensor, levels: list[float], solver: str) -> tuple[Tensor, Tensor]:
    """Integrate along increasing or decreasing noise levels; return the end and change of log p.

    Parameters
    ----------
    levels
        Noise levels t in the order of integration. "heun" (order 2) and "rk4" (order 4) take one
        step between neighbours.

    The fixed-step methods advance x in t, dx/dt = (x - D) / t (Karras et al. 2022, Alg. 1), which
    is exact where D is constant, and so at both ends of the grid. The divergence, which costs most,
    is taken at the levels only, and integrated over log t by Simpson's rule.
    """

    def slope(t: float, y: Tensor) -> Tensor:
        return flow.velocity(math.log(t), y) / t

    rates = []
    for t, t_next in itertools.pairwise(levels):
        velocity, rate = flow.velocity_and_rate(math.log(t), x)
        rates.append(rate)
        h, k1 = t_next - t, velocity / t
        if solver == "heun":
            x = x + 0.5 * h * (k1 + slope(t_next, x + h * k1))
        else:
            k2 = slope(t + 0.5 * h, x + 0.5 * h * k1)
            k3 = slope(t + 0.5 * h, x + 0.5 * h * k2)
            k4 = slope(t_next, x + h * k3)
            x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    rates.append(flow.velocity_and_rate(math.log(levels[-1]), x)[1])
    change = simpson(torch.stack(rates).cpu().numpy(), x=np.log(levels), axis=0)
    return x, torch.as_tensor(change, device=x.device)


@torch.no_grad()
def ode_paths(
    denoiser: Denoiser,
    schedule: Schedule,
    rng: torch.Generator,
    n: int | None = None,
    x_0: Tensor | None = None,
    divergence: str = "exact",
    solver: str = "heun",
    n_probes: int = 1,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log densities under the flow, of n generated samples or of given ones.

    Parameters
    ----------
    n
        Generate this many samples from the prior; or else
    x_0
        (n, M, D) target samples in model coordinates, whose density is wanted.

    Returns
    -------
    tuple
        x_0 (n, M, D) and log p(x_0) (n,), float64 in model coordinates, on the CPU.
    """
    checks.choice("divergence", divergence, DIVERGENCES)
    checks.choice("solver", solver, SOLVERS)
    if (n is None) == (x_0 is None):
        raise ValueError("ode_paths: expected exactly one of n and x_0")
    total = len(x_0) if x_0 is not None else checks.positive_integer("n", n)
    space, device, times = denoiser.space, rng.device, list(schedule.times)
    prior_variance = times[-1] ** 2
    positions, densities = [], []
    with progress_bar(total, "probability flow", progress) as bar:
        for start in range(0, total, batch_size):
            size = min(batch_size, total - start)
            if x_0 is None:
                x = times[-1] * space.standard_normal(size, rng)
            else:
                x = x_0[start : start + size].to(device, torch.float64)
            exact = divergence == "exact"
            if exact:
                probes = tangent_basis(space, x)[:, None].repeat(1, size, 1, 1)
            else:
                probes = torch.stack([space.standard_normal(size, rng) for _ in range(n_probes)])
            flow = Flow(denoiser, probes, exact)
            if x_0 is None:
                end, change = integrate(flow, x, times[::-1], solver)
                log_p = space.isotropic_log_prob(x, prior_variance) + change
            else:
                top, change = integrate(flow, x, times, solver)
                end, log_p = x, space.isotropic_log_prob(top, prior_variance) - change
            positions.append(end)
            densities.append(log_p)
            bar.update(size)
    return torch.cat(positions), torch.cat(densities)
