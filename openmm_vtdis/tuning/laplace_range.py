r"""The noise levels at which the Laplace approximation of the posterior beats the denoiser.

It also finds the levels at which the approximation is exact enough to jump to the data.

Both are measured on frames, see :mod:`~openmm_vtdis.diffusion.posteriors.laplace`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.base import EigenPosterior
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange, laplace_posterior
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime.progress import progress_bar

JUMP_COST, MOST = 0.01, 1.0
"""Nats that the jump to the data end may cost, and by how many the Gaussian may fall short of the
posterior at any frame: where it misses a mode, it does so by far more."""
N_LEVELS, N_FRAMES, N_DRAWS = 16, 200, 16


@torch.no_grad()
def find_range(
    energy: Energy,
    denoiser: Denoiser,
    frames: Tensor,
    t_min: float,
    t_max: float,
    rng: torch.Generator,
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
        (n, M, D) equilibrium configurations in model coordinates, of which ``n_frames`` are drawn.
    t_min, t_max
        Noise levels to look between.

    Raises
    ------
    ValueError
        If the energy cannot be differentiated twice.
    """
    space, device = denoiser.space, rng.device
    index = torch.randint(len(frames), (n_frames,), generator=rng, device=device)
    clean = frames[index.to(frames.device)].to(device, torch.float64)
    noise = space.standard_normal(len(clean), rng)
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
                costs.append(_jump_cost(energy, space, x_0, x, posterior, t, rng))
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
    posterior: EigenPosterior,
    t: float,
    rng: torch.Generator,
) -> Tensor:
    """KL divergence of p(x_0 | x) from the Gaussian, and what the latter lacks at x_0, in nats.

    x_0 and x are (B, M, D), the result (2, B).
    """

    def log_weight(y: Tensor, z: Tensor) -> Tensor:
        """log p(y | x) minus the Gaussian's, up to a constant; z is y in the Gaussian's axes."""
        distance = (y - x).square().sum(dim=(1, 2)) / t**2
        return 0.5 * (z.square().sum(dim=1) - distance) - energy(y).to(x)

    width = t * posterior.values.sqrt()
    log_w = []
    for _ in range(N_DRAWS):
        z = space.reduce(space.standard_normal(len(x), rng)).flatten(1)
        reduced = posterior.vectors @ (width * z)[:, :, None]
        y = posterior.mean + space.expand(reduced.reshape(len(x), space.rank, space.n_dims))
        log_w.append(log_weight(y, z))
    drawn = torch.stack(log_w)
    residual = space.reduce(x_0 - posterior.mean).flatten(1)[:, :, None]
    z_0 = (posterior.vectors.mT @ residual)[:, :, 0] / width
    at_x_0 = log_weight(x_0, z_0)
    mean = torch.logsumexp(drawn, dim=0) - math.log(N_DRAWS)
    return torch.stack([0.5 * drawn.var(dim=0), at_x_0 - mean])
