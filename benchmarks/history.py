r"""Would a mean that remembers the step before be better? Measured, not assumed.

    python -m benchmarks.history dw4 lj13

The forward process is a Markov chain, and so is its exact reversal: given x_n, the configurations
before it tell nothing more about x_{n-1}. Only where the denoiser is wrong could D(x_{n+1}) help to
correct D(x_n). Here the residual of every reverse step is regressed, under the isotropic KL, on::

    (1 - r_n) [ k_n (D_n - x_n) + m_n (D_{n+1} - D_n) ],

with k_n alone, and with k_n and m_n, on trajectories from training frames; what it gains in nats a
trajectory, the sum of (d / 2) log of the ratio of mean squares, is told for trajectories from other
frames.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.run import FIT_SEED, TEST_SEED, Bench, make_case
from openmm_vtdis.diffusion.process import DiffusionProcess


@torch.no_grad()
def products(process: DiffusionProcess, x: Tensor, seed: int, batch_size: int) -> Tensor:
    """Mean inner products of (x_{n-1} - x_n, b, h) for each step but the last: (N - 1, 3, 3)."""
    rng = torch.Generator().manual_seed(seed)
    total = torch.zeros(process.schedule.n_steps - 1, 3, 3, dtype=torch.float64)
    for chunk in x.split(batch_size):
        before, level = chunk, process.sample_forward(1, chunk, rng)
        denoised = process.step(1, level).denoised
        for n in range(1, process.schedule.n_steps):
            after = process.sample_forward(n + 1, level, rng)
            later = process.step(n + 1, after).denoised
            rows = torch.stack([before - level, denoised - level, later - denoised])
            flat = rows.flatten(2)
            total[n - 1] += torch.einsum("ibk,jbk->ij", flat, flat)
            before, level, denoised = level, after, later
    return total / len(x)


def gain(fitted: Tensor, judged: Tensor, dim: int) -> tuple[float, float]:
    """Nats a trajectory that m_n gains over k_n alone, in all and at the step where most."""

    def error(terms: list[int]) -> Tensor:
        index = torch.tensor(terms)
        matrix, vector = fitted[:, index][:, :, index], fitted[:, index, 0]
        c = torch.linalg.solve(matrix, vector)
        judged_vector, judged_matrix = judged[:, index, 0], judged[:, index][:, :, index]
        return (
            judged[:, 0, 0]
            - 2.0 * (c * judged_vector).sum(dim=1)
            + torch.einsum("ni,nij,nj->n", c, judged_matrix, c)
        )

    with_k, with_both = error([1]), error([1, 2])
    return (
        float((with_k / with_both).log().sum() * dim / 2.0),
        float((with_k / with_both).log().max() * dim / 2.0),
    )


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("systems", nargs="*", default=["gmm2-50", "dw4", "lj13"])
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--samples", type=int, default=2_000)
    parser.set_defaults(progress=False)
    options = parser.parse_args()
    for name in options.systems:
        case = make_case(name)
        bench, gen = Bench(case, options), case.gen
        for n_steps in options.steps:
            process = bench.ddpm(n_steps, "adaptive")
            tables = []
            for frames, seed in ((case.train, FIT_SEED), (case.test, TEST_SEED)):
                index = torch.randint(
                    len(frames), (options.samples,), generator=torch.Generator().manual_seed(seed)
                )
                x = gen.space.project(frames[index] / gen.coordinates.length)
                tables.append(products(process, x, seed, gen.batch_size()))
            total, largest = gain(*tables, gen.space.dim)
            print(
                f"{name} @ {n_steps}: remembering gains {total:+.4f} nats a trajectory held out, "
                f"{largest:+.4f} at the step where most",
                flush=True,
            )


if __name__ == "__main__":
    main()
