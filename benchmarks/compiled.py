"""Speed of the networks' layers under torch.compile, and the time of compilation.

    python -m benchmarks.compiled

Eager and compiled code are timed in alternating rounds; on a GPU the steps of training of both are
recorded, as they are in use. Writes ``docs/tables/compiled.md``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.forms import WARM_UP, in_form, training_step
from benchmarks.harness import (
    NETWORKS,
    MarkdownTable,
    command_line,
    in_turns,
    seconds,
    spread,
    write_table,
)
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser


def works(
    denoiser: PreconditionedDenoiser, batch_size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The timed work: an evaluation of the network, and a training step."""
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


def measure(name: str, n_rounds: int, batch_size: int, device: torch.device) -> list[list[str]]:
    """Measure the rows of one network."""
    torch.compiler.reset()
    eager, compiled = (in_form(name, form, device).denoiser for form in ("eager", "compiled"))
    candidates = [works(denoiser, batch_size, device) for denoiser in (eager, compiled)]  # type: ignore[arg-type]
    rows = []
    for what in candidates[0]:
        pair = [work[what] for work in candidates]
        _, first = (seconds(work, device) for work in pair)
        plain, faster = in_turns(pair, n_rounds, device, warm_up=WARM_UP[device.type]).T
        unit = 1e3 * np.median(plain) / batch_size
        rows.append([name, what, f"{unit:.3g} ms", spread(plain / faster), f"{first:.0f} s"])
    return rows


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, systems=NETWORKS, rounds=9, batch_size=64, device=True)
    options = parser.parse_args()
    table = MarkdownTable(
        "network", "", "eager, per configuration", "compiled: faster by", "its first call"
    )
    for name in options.systems:
        for cells in measure(name, options.rounds, options.batch_size, options.device):
            table.add(*cells)
    note = (
        f"Median and range of {options.rounds} alternating rounds, batches of "
        f"{options.batch_size}, on "
    )
    write_table("compiled", table, note, options.device)


if __name__ == "__main__":
    main()
