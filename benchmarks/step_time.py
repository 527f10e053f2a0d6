"""What a step of each covariance costs, next to the isotropic one in the same run.

    python -m benchmarks.step_time

The three shipped systems, one thread: seconds of a step of the reverse process (network,
covariance, a draw and its log density), for steps that go by the network and for those, at low
noise, that go by the Laplace approximation. Rounds over all methods alternate and the median
counts, so that a busy machine hits all alike. Writes ``docs/tables/step-time.md``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.baseline import seconds
from benchmarks.tables import write_table
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.laplace import LaplaceRange
from openmm_vtdis.diffusion.schedule import Schedule

METHODS = ("isotropic", "pairwise", "hessian", "Laplace", "krylov 4", "tweedie")
MOST = 1_024
"""Configurations in a batch: a Jacobian keeps all of an evaluation."""
GRID = Schedule((0.1, 0.3, 0.33, 10.0))
"""The step that is timed is the second: t = 0.33."""


def kernels(gen: DiffusionBoltzmannGenerator) -> dict[str, DiffusionKernel]:
    """One kernel a method, all untuned."""
    plain = DiffusionKernel.ddpm(gen.denoiser, GRID, gen.model_energy)
    found = {"isotropic": plain}
    for name in METHODS[1:]:
        kind, _, rank = ("hessian" if name == "Laplace" else name).partition(" ")
        options = {"rank": int(rank)} if rank else {}
        family = make_covariance(kind, gen.space, gen.labels, **options)  # type: ignore[arg-type]
        kernel = plain.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
        if name == "Laplace":
            kernel = kernel.with_laplace(LaplaceRange(1.0), jump=False)
        found[name] = kernel
    return found


def one_step(kernel: DiffusionKernel, x: torch.Tensor) -> None:
    """For configurations (B, M, D)."""
    step = kernel.step(2, x)
    scatter = kernel.covariance.at(step)
    residual = scatter.sample(len(x), torch.Generator(x.device).manual_seed(0))
    scatter.log_prob(residual)


def timed(kernel: DiffusionKernel, x: torch.Tensor, device: torch.device) -> float:
    """Seconds of a step that follows another of its kind, as in a chain."""
    one_step(kernel, x)
    return seconds(lambda: one_step(kernel, x), device)


@torch.no_grad()
def measure(name: str, n_rounds: int, device: torch.device) -> str:
    """One line of the table."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device=str(device))
    if gen.network.pair_head is None:
        gen.network.add_pair_head()  # type: ignore[operator]  # untrained: it takes as long
    found = kernels(gen)
    size = min(gen.batch_size(), MOST)
    noise = gen.space.standard_normal(size, torch.Generator(device).manual_seed(1))
    x = (1.0 + GRID.times[2] ** 2) ** 0.5 * noise
    rounds = [[timed(kernel, x, device) for kernel in found.values()] for _ in range(n_rounds + 1)]
    ratios = np.array(rounds[1:])
    base = float(np.median(ratios[:, 0]))
    spread = ratios / ratios[:, :1]
    cells = [
        f"{np.median(spread[:, k]):.2f} ({spread[:, k].min():.2f}-{spread[:, k].max():.2f})"
        for k in range(1, len(METHODS))
    ]
    return f"| {name} | {1e6 * base / size:.0f} µs | {' | '.join(cells)} |\n"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("systems", nargs="*", default=["dw4", "lj13", "aldp-800K"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    text = f"| | isotropic | {' | '.join(METHODS[1:])} |\n|{'---|' * (len(METHODS) + 1)}\n"
    for name in options.systems:
        text += measure(name, options.rounds, device)
        print(text.splitlines()[-1], flush=True)
    text += (
        "\nSeconds of a step and configuration, then multiples of it: the median (and range) over "
        f"{options.rounds} alternating rounds, on "
    )
    write_table("step-time", text, device)


if __name__ == "__main__":
    main()
