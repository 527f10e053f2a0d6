"""ESS with the network in float32 and in bfloat16, with the weights of the shipped tunings.

    python -m benchmarks.precision

Held-out frames and random numbers are the same for both, so that the difference has a smaller error
than either; all errors are bootstrapped. Densities, covariances and weights are float64 in any
case. Writes ``docs/tables/precision.md``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from benchmarks.cases import SAMPLE_SEED, TEST_SEED, held_out_frames
from benchmarks.harness import MarkdownTable, command_line, percent, write_table
from benchmarks.rows import with_error
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.ensemble import forward_ess, reverse_ess

SIZES = {"dw4": (25, 4_000), "lj13": (50, 1_000), "aldp-800K": (100, 250)}
"""Steps, and samples in each direction, of each system."""
ON_A_GPU = 8
"""Factor by which samples are more on a GPU."""


def measure(name: str, n_steps: int, n: int, device: torch.device) -> list[list[str]]:
    """Measure two rows of the table: forward and reverse."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)
    frames = held_out_frames(name, n)
    log_w: dict[str, list[np.ndarray]] = {"forward": [], "reverse": []}
    for half in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            log_w["forward"].append(gen.log_weights(frames, n_steps=n_steps, seed=TEST_SEED))
            ensemble = gen.sample(n, n_steps=n_steps, seed=SAMPLE_SEED)
        log_w["reverse"].append(ensemble.log_weights)
    rows = []
    for way, estimate in (("forward", forward_ess), ("reverse", reverse_ess)):
        both = [np.asarray(lw) for lw in log_w[way]]
        judged = functools.partial(with_error, estimate, n_draws=200)
        values = [*map(judged, both), judged(*both)]
        rows.append([name, str(n_steps), f"{n:,}", way, *(percent(*v) for v in values)])
    return rows


def main() -> None:
    """Command line entry."""
    options = command_line(__doc__, systems=tuple(SIZES), device=True).parse_args()
    device = options.device
    table = MarkdownTable("", "steps", "samples", "ESS", "float32", "bfloat16", "difference")
    for name in options.systems:
        n_steps, n = SIZES[name]
        n *= 1 if device.type == "cpu" else ON_A_GPU
        for cells in measure(name, n_steps, n, device):
            table.add(*cells)
    write_table("precision", table, "The shipped tunings, on ", device)


if __name__ == "__main__":
    main()
