r"""The posterior at low noise from the energy, not from the network.

Given x_n, the density of x_0 is proportional to ``exp(-u(x_0) - |x_0 - x_n|^2 / 2 t_n^2)``. At low
noise it is nearly a Gaussian, which one Newton step from D(x_n) finds, whatever error D has there
(Laplace's approximation). With g and H the gradient and Hessian of u at D, in reduced coordinates::

    P    = H_+ + I / t_n^2,                  H_+ the Hessian with eigenvalues of at least 1
    mean = D - P^-1 [ g + (D - x_n) / t_n^2 ],      Cov[x_0 | x_n] = P^-1.

Stiff degrees of freedom, bonds first of all, are where a network's score is worst in units of the
noise; here they are exact. The price is a Hessian of the energy a step. The step is kept within a
trust region: its length in the norm of P is at most ``TRUST_RADIUS`` times the square root of d.
All is exact for a Gaussian of no more than unit variance, and turns and permutes with the
configuration.

Below some level the Gaussian is so good that x_0 can be drawn from it directly: the grid then
*jumps* from there to its data end, and all other steps go where they are needed.
:func:`find_range` measures both levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import Energy, Posterior
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.hessian import energy_derivatives, hessian_spectrum
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime.progress import progress_bar

TRUST_RADIUS = 0.25
JUMP_COST, MOST = 0.01, 1.0
"""Nats that the jump to the data end may cost, and by how many the Gaussian may fall short of the
posterior at any frame: where it misses a mode, it does so by far more."""
N_LEVELS, N_FRAMES, N_DRAWS = 16, 200, 16


def laplace_posterior(
    energy: Energy, space: Space, x: Tensor, denoised: Tensor, t: Tensor
) -> Posterior:
    """Newton step from D (B, M, D) for x_n = x (B, M, D) at noise levels t (B,).

    Where the gradient or the Hessian is not finite, the mean is D.
    """
    gradient, matrix = energy_derivatives(energy, space, denoised)
    values, vectors = hessian_spectrum(matrix.to(x.device), t)
    square = t.square()[:, None]
    slope = gradient.to(x.device) + space.reduce(denoised - x).flatten(1) / square
    # In the eigenbasis, with P = 1 / (t^2 values)
    step = -square * values * (vectors.mT @ slope[:, :, None])[:, :, 0]
    length = (step.square() / (square * values)).sum(dim=1, keepdim=True).sqrt()
    step = step * (TRUST_RADIUS * math.sqrt(space.dim) / length).clamp_max(1.0)
    reduced = (vectors @ step[:, :, None])[:, :, 0]
    reduced = torch.where(torch.isfinite(reduced).all(dim=1, keepdim=True), reduced, 0.0)
    shift = space.expand(reduced.reshape(len(x), space.rank, space.n_dims))
    return Posterior(denoised + shift, values, vectors)


@dataclass(frozen=True)
class LaplaceRange:
    """Where a kernel goes by the Laplace approximation, in model units.

    Attributes
    ----------
    level
        Steps from noise levels up to this use it.
    jump
        Level from which it is good enough for one step to the data end; 0 if there is none.
    """

    level: float
    jump: float = 0.0


@torch.no_grad()
def find_range(
    energy: Energy,
    denoiser: Denoiser,
    frames: Tensor,
    t_min: float,
    t_max: float,
    generator: torch.Generator,
    batch_size: int = 256,
    progress: bool = True,
    n_frames: int = N_FRAMES,
) -> LaplaceRange:
    """Measure where the Laplace approximation is better than the denoiser, and where it is exact.

    The first ends where the gain in the denoising error ``|x_0 - mean|^2 / t^2``, added up over
    log t from the lowest level, is largest; the search stops where half of it is surely lost
    again. The jump is from a level below which the Gaussian is the posterior, and all below it goes
    by the Gaussian too. Half the variance of the log weights of draws from it is its KL divergence,
    at most ``JUMP_COST``; a mode that it misses is seen from the frames themselves, which are draws
    from the posterior, and since such a mode can be rare the jump is from the level before the last
    that passes, unless all do.

    Parameters
    ----------
    frames
        (n, M, D) equilibrium configurations in model units, of which ``n_frames`` are drawn.
    t_min, t_max
        Noise levels to look between.

    Raises
    ------
    ValueError
        If the energy cannot be differentiated twice.
    """
    space, device = denoiser.space, generator.device
    index = torch.randint(len(frames), (n_frames,), generator=generator, device=device)
    clean = frames[index.to(frames.device)].to(device, torch.float64)
    noise = space.standard_normal(len(clean), generator)
    levels = Schedule.geometric(N_LEVELS - 1, t_min, t_max).times
    gain, variance, best, level, passed = 0.0, 0.0, 0.0, 0.0, 0
    exact = True
    bar = progress_bar(len(levels), "range of the Laplace approximation", progress)
    for k, t in enumerate(levels):
        errors, costs = [], []
        for x_0, xi in zip(clean.split(batch_size), noise.split(batch_size), strict=True):
            x = x_0 + t * xi
            of_each = x.new_full((len(x),), t)
            denoised = space.project(denoiser(x, of_each))
            posterior = laplace_posterior(energy, space, x, denoised, of_each)
            before, after = ((x_0 - m).square().sum(dim=(1, 2)) for m in (denoised, posterior.mean))
            errors.append((before - after) / t**2)
            if exact:
                costs.append(_jump_cost(energy, space, x_0, x, posterior, t, generator))
        gain += float(torch.cat(errors).mean())
        variance += float(torch.cat(errors).var()) / len(clean)
        if gain > best:
            best, level = gain, t
        if exact:
            cost, shortfall = torch.cat(costs, dim=1)
            exact = float(cost.mean()) <= JUMP_COST and float(shortfall.max()) <= MOST
            passed = k + 1 if exact else passed
        bar.update()
        if not exact and gain + 4.0 * math.sqrt(variance) < 0.5 * best:
            break
    bar.close()
    if passed < len(levels):
        passed -= 1
    jump = levels[passed - 1] if passed > 0 else 0.0
    return LaplaceRange(max(level, jump), jump)


def _jump_cost(
    energy: Energy,
    space: Space,
    x_0: Tensor,
    x: Tensor,
    posterior: Posterior,
    t: float,
    generator: torch.Generator,
) -> Tensor:
    """KL divergence of p(x_0 | x) from the Gaussian, in nats, and what the latter lacks at x_0.

    x_0 and x are (B, M, D); (2, B).
    """

    def log_weight(y: Tensor, z: Tensor) -> Tensor:
        """log p(y | x) less that of the Gaussian, up to a constant: z is y in its own axes."""
        distance = (y - x).square().sum(dim=(1, 2)) / t**2
        return 0.5 * (z.square().sum(dim=1) - distance) - energy(y).to(x)

    width = t * posterior.values.sqrt()
    log_w = []
    for _ in range(N_DRAWS):
        z = space.reduce(space.standard_normal(len(x), generator)).flatten(1)
        reduced = posterior.vectors @ (width * z)[:, :, None]
        y = posterior.mean + space.expand(reduced.reshape(len(x), space.rank, space.n_dims))
        log_w.append(log_weight(y, z))
    drawn = torch.stack(log_w)
    residual = space.reduce(x_0 - posterior.mean).flatten(1)[:, :, None]
    z_0 = (posterior.vectors.mT @ residual)[:, :, 0] / width
    at_x_0 = log_weight(x_0, z_0)
    mean = torch.logsumexp(drawn, dim=0) - math.log(N_DRAWS)
    return torch.stack([0.5 * drawn.var(dim=0), at_x_0 - mean])
