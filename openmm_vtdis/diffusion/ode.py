r"""Probability-flow ODE: deterministic sampling with exact or estimated likelihoods.

In s = log t the flow is dx/ds = f(x, s) = x - D(x, t), and along it (paper, Eq. 3 and 5)

    d log p / ds = -div f = -(d - tr dD/dx)

with the trace over the space that configurations live in. Integrating from x_N ~ N_x(0, T^2 I) down
to t_0 gives a sample and its log density, whose importance weight is exact up to the integration
error; integrating target samples upwards gives their log density (forward ESS).

The baseline that the trajectory weights of :mod:`~openmm_vtdis.diffusion.sampling` are judged
against: with ``divergence="exact"`` a step costs d Jacobian-vector products more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from openmm_vtdis import checks
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.geometry import Space
from openmm_vtdis.random import derive_seed, make_generator

DIVERGENCES = ("exact", "hutchinson")
SOLVERS = ("heun", "dopri5")

Flow = Callable[[float, Tensor], tuple[Tensor, Tensor]]


def trace_basis(space: Space, like: Tensor) -> Tensor:
    """Orthonormal basis of the space as tangents: (d, M, D)."""
    rows = space.basis.to(like)
    axes = torch.eye(space.n_dims, dtype=like.dtype, device=like.device)
    return torch.einsum("rm,de->rdme", rows, axes).reshape(space.dim, *like.shape[1:])


def make_flow(denoiser: Denoiser, probes: Tensor, exact: bool) -> Flow:
    """f(s, x) -> (dx/ds, -div f): probes (P, B, M, D) are the tangents of the trace estimate.

    Exact: P = d basis vectors, and the trace is their sum. Hutchinson: P random vectors of identity
    covariance on the space, and the trace is the mean.
    """

    def flow(s: float, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        level = torch.full((x.shape[0],), math.exp(s), dtype=x.dtype, device=x.device)

        def velocity(y: Tensor) -> Tensor:
            return y - denoiser(y, level)

        def directional(probe: Tensor) -> tuple[Tensor, Tensor]:
            value, derivative = torch.func.jvp(velocity, (x,), (probe,))  # type: ignore[misc]
            return value, (probe * derivative).sum(dim=(-2, -1))

        values, products = torch.func.vmap(directional, randomness="error", chunk_size=16)(probes)
        divergence = products.sum(dim=0) if exact else products.mean(dim=0)
        return values[0], -divergence.to(torch.float64)

    return flow


def integrate(
    flow: Flow, x: Tensor, levels: list[float], solver: str, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Integrate (x, log p) along increasing or decreasing noise levels; returns both ends' change.

    Parameters
    ----------
    levels
        Noise levels t in the order of integration. Heun takes one step between neighbours; dopri5
        goes from the first to the last with its own steps.
    """
    if solver == "dopri5":
        times = torch.tensor([math.log(levels[0]), math.log(levels[-1])], dtype=torch.float64)

        def field(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return flow(float(s), state[0])

        change = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        path, log_p = odeint(
            field, (x, change), times.to(x.device), method="dopri5", rtol=tolerance, atol=tolerance
        )
        return path[-1], log_p[-1]
    change = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    grid = [math.log(t) for t in levels]
    velocity, rate = flow(grid[0], x)
    for s, s_next in itertools.pairwise(grid):
        h = s_next - s
        velocity_end, rate_end = flow(s_next, x + h * velocity)
        x_next = x + 0.5 * h * (velocity + velocity_end)
        change = change + 0.5 * h * (rate + rate_end)
        x = x_next
        if s_next != grid[-1]:
            velocity, rate = flow(s_next, x)
    return x, change


@torch.no_grad()
def ode_paths(
    denoiser: Denoiser,
    schedule: Schedule,
    generator: torch.Generator,
    n: int | None = None,
    x_0: Tensor | None = None,
    divergence: str = "exact",
    solver: str = "heun",
    n_probes: int = 1,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log densities of the flow: of n generated samples, or of given ones.

    Parameters
    ----------
    n
        Generate this many samples from the prior; or else
    x_0
        (n, M, D) target samples in model units, whose density is wanted.

    Returns
    -------
    tuple
        x_0 (n, M, D) and log p(x_0) (n,) float64 in model units, on the CPU.
    """
    checks.choice("divergence", divergence, DIVERGENCES)
    checks.choice("solver", solver, SOLVERS)
    if (n is None) == (x_0 is None):
        raise ValueError("ode_paths: expected exactly one of n and x_0")
    total = len(x_0) if x_0 is not None else checks.positive_integer("n", n)
    space, device, times = denoiser.space, generator.device, list(schedule.times)
    prior_variance = times[-1] ** 2
    positions, densities = [], []
    with tqdm(total=total, desc="probability flow", disable=not progress) as bar:
        for start in range(0, total, batch_size):
            size = min(batch_size, total - start)
            stream = make_generator(derive_seed(generator), device)
            if x_0 is None:
                x = times[-1] * space.standard_normal(size, stream)
            else:
                x = x_0[start : start + size].to(device, torch.float64)
            exact = divergence == "exact"
            if exact:
                probes = trace_basis(space, x)[:, None].repeat(1, size, 1, 1)
            else:
                probes = torch.stack([space.standard_normal(size, stream) for _ in range(n_probes)])
            flow = make_flow(denoiser, probes, exact)
            if x_0 is None:
                end, change = integrate(flow, x, times[::-1], solver)
                log_p = space.isotropic_log_prob(x, prior_variance) + change
            else:
                top, change = integrate(flow, x, times, solver)
                end, log_p = x, space.isotropic_log_prob(top, prior_variance) - change
            positions.append(end.cpu())
            densities.append(log_p.cpu())
            bar.update(size)
    return torch.cat(positions), torch.cat(densities)
