"""What torch.compile makes of the networks' layers, and how long it takes itself.

    python -m benchmarks.compiled

Eager and compiled code are timed in alternating rounds; on a GPU the steps of training of both are
recorded, as they are in use. Writes ``docs/tables/compiled.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.baseline import WARM_UP, in_form, seconds, training_step
from benchmarks.tables import write_table
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser


def works(
    denoiser: PreconditionedDenoiser, batch_size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """An evaluation of the network, and a training step."""
    rng = torch.Generator(device).manual_seed(0)
    x = denoiser.space.standard_normal(batch_size, rng)
    t = torch.ones(batch_size, dtype=x.dtype, device=device)

    @torch.no_grad()
    def evaluation() -> None:
        denoiser(x, t)

    return {
        "an evaluation": evaluation,
        "a training step": training_step(denoiser, batch_size, device),
    }


def measure(name: str, n_rounds: int, batch_size: int, device: torch.device) -> str:
    """The lines of one network."""
    torch.compiler.reset()
    eager, compiled = (in_form(name, form, device).denoiser for form in ("eager", "compiled"))
    candidates = [works(denoiser, batch_size, device) for denoiser in (eager, compiled)]  # type: ignore[arg-type]
    text = ""
    for what in candidates[0]:
        _, first = (seconds(work[what], device) for work in candidates)
        for _ in range(WARM_UP[device.type]):
            for work in candidates:
                work[what]()
        rounds = np.array(
            [[seconds(work[what], device) for work in candidates] for _ in range(n_rounds)]
        )
        gain = rounds[:, 0] / rounds[:, 1]
        cells = [
            f"{1e3 * np.median(rounds[:, 0]) / batch_size:.3g} ms",
            f"{np.median(gain):.2f} ({gain.min():.2f}-{gain.max():.2f})",
            f"{first:.0f} s",
        ]
        text += f"| {name} | {what} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("systems", nargs="*", default=["dw4", "lj13", "aldp-800K"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    text = "| network | | eager, per configuration | compiled: faster by | its first call |\n"
    text += f"|{'---|' * 5}\n"
    for name in options.systems:
        text += measure(name, options.rounds, options.batch_size, device)
        print("\n".join(text.splitlines()[-2:]), flush=True)
    text += (
        f"\nMedian and range of {options.rounds} alternating rounds, batches of "
        f"{options.batch_size}, on "
    )
    write_table("compiled", text, device)


if __name__ == "__main__":
    main()
