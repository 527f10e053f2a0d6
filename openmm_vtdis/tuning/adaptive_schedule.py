r"""A grid on which every step costs the same.

Given x_0 and x_n, x_{n-1} is Gaussian, and the entropy of x_t follows from the denoising error
(I-MMSE). The KL divergence of one tuned isotropic kernel from the true reverse kernel is therefore
known from the denoising error alone. With::

    m(t) = E |x_0 - D(x_t, t)|^2 / t^2,     h_n = log(t_n / t_{n-1}),

it is ``(d/2) log(1 + (e^{2 h_n} - 1) m(t_n) / d)`` less the integral of m over log t, or::

    KL_n = C(t_n) h_n^2 + O(h_n^3),         C = m + (1/2) dm/dlog t - m^2 / d.

C is the spread of the posterior covariance: zero where the posterior is isotropic, at both ends of
the grid. Under a fixed number of steps the sum is least where all KL_n are equal, with a density of
levels over log t proportional to the square root of C.

The denoising errors are measured with one set of configurations and noises for all levels, so that
their derivative is that of a smooth function. There is no gradient descent, and one measurement
serves any number of steps. (The paper's joint descent on levels and variances, Sec. 4.5, was
unstable.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime.progress import progress_bar

N_LEVELS, N_FRAMES = 32, 1_000
LEAST_SHARE = 0.3
"""Share of the steps that is spread evenly over log t. Where the mean cost is small, rare
configurations (between two modes) can cost a lot, which KL hardly notices and alpha = 2 does; and
the expansion in h wants small steps everywhere."""


def adapt(
    grid: Schedule,
    denoiser: Denoiser,
    frames: Tensor,
    rng: torch.Generator,
    batch_size: int = 256,
    progress: bool = True,
    n_frames: int = N_FRAMES,
) -> Schedule:
    """A grid with the same ends and number of steps, in which all steps cost the same.

    Parameters
    ----------
    frames
        (n, M, D) equilibrium configurations in model coordinates, of which ``n_frames`` are drawn.
        Between two modes C is noisy: with 1,000 frames the grid of GMM-2 costs 5 to 30 % more than
        the best one, with 250 up to 60 %, a geometric one 150 to 200 %.
    """
    even = Schedule.geometric(N_LEVELS - 1, grid.times[0], grid.times[-1]).tensor
    index = torch.randint(len(frames), (n_frames,), generator=rng, device=rng.device).to(
        frames.device
    )
    errors = denoising_errors(denoiser, frames[index], even, rng, batch_size, progress)
    return equal_shares(even, step_cost(even, errors, denoiser.space.dim), grid.n_steps)


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser,
    frames: Tensor,
    levels: Tensor,
    rng: torch.Generator,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    """m(t) at levels (L,), from frames (n, M, D) noised once each: (L,) float64.

    Measured as d times the ratio of ``|x_0 - D|^2`` to ``t^2 |xi|^2``, which tends to one at low
    noise without any scatter.

    Raises
    ------
    ValueError
        If the denoiser gives NaN or infinity.
    """
    device = rng.device
    clean = frames.to(device, torch.float64)
    noise = denoiser.space.standard_normal(len(clean), rng)
    total = torch.zeros(len(levels), dtype=torch.float64)
    bar = progress_bar(len(levels), "adapting the grid", progress)
    for i, t in enumerate(levels):
        for x, xi in zip(clean.split(batch_size), noise.split(batch_size), strict=True):
            denoised = denoiser(x + t * xi, t.to(device).expand(len(x)))
            total[i] += (x - denoised).square().sum().cpu() / t**2
        bar.update()
    bar.close()
    if not bool(total.isfinite().all()):
        levels = levels[~total.isfinite()]
        raise ValueError(
            "denoiser: expected finite predictions, got NaN or infinity at "
            f"{len(levels)} of {len(total)} noise levels, the first at t = {levels[0]:.3g}"
        )
    return denoiser.space.dim * total / noise.square().sum().cpu()


def step_cost(levels: Tensor, errors: Tensor, dim: int) -> Tensor:
    """Cost C at the levels, (L,), not negative."""
    (slope,) = torch.gradient(errors, spacing=(levels.log(),))
    return (errors + 0.5 * slope - errors.square() / dim).clamp_min(0.0)


def equal_shares(
    levels: Tensor, cost: Tensor, n_steps: int, least_share: float = LEAST_SHARE
) -> Schedule:
    """A grid of N steps with equal sqrt(C) h between the first and the last level.

    A share of the steps is spread evenly over log t. If C is zero everywhere, the grid is
    geometric.
    """
    width, root = levels.log().diff(), cost.sqrt()
    work = 0.5 * (root[1:] + root[:-1]) * width
    even = width / width.sum()
    if not bool((work > 0.0).any()):
        return Schedule.of_shares(n_steps, levels.tolist(), even.tolist())
    shares = (1.0 - least_share) * work / work.sum() + least_share * even
    return Schedule.of_shares(n_steps, levels.tolist(), shares.tolist())
