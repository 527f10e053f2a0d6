"""ESS with the network in float32 and in bfloat16, with the weights of the shipped tunings.

    python -m benchmarks.precision

Held-out frames and random numbers are the same for both, so that the difference has a smaller error
than either; all errors are bootstrapped. Densities, covariances and weights are float64 in any
case. Writes ``docs/tables/precision.md``.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.run import SAMPLE_SEED, TEST_SEED
from benchmarks.tables import write_table
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.ensemble import forward_ess, reverse_ess
from recipes.reference import reference_frames

SIZES = {"dw4": (25, 4_000), "lj13": (50, 1_000), "aldp-800K": (100, 250)}
"""Steps, and samples in each direction."""
ON_A_GPU = 8
"""Times as many samples."""


def with_error(estimate: Callable[[np.ndarray], float], *log_w: np.ndarray) -> tuple[float, float]:
    """An ESS, or the difference of two with common random numbers, and its bootstrap error."""

    def value(index: np.ndarray | slice) -> float:
        found = [estimate(lw[index]) for lw in log_w]
        return found[0] if len(found) == 1 else found[1] - found[0]

    rng, n = np.random.default_rng(0), len(log_w[0])
    again = [value(rng.integers(n, size=n)) for _ in range(200)]
    return value(slice(None)), float(np.std(again))


def measure(name: str, n_steps: int, n: int, device: torch.device) -> str:
    """Two lines of the table: forward and reverse."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device=str(device))
    pool = reference_frames(name, "test")
    frames = pool[np.random.default_rng(TEST_SEED).integers(len(pool), size=n)]
    log_w: dict[str, list[np.ndarray]] = {"forward": [], "reverse": []}
    for half in (False, True):
        mode = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with mode:
            log_w["forward"].append(gen.log_weights(frames, n_steps=n_steps, seed=TEST_SEED))
            ensemble = gen.sample(n, n_steps=n_steps, seed=SAMPLE_SEED)
        log_w["reverse"].append(ensemble.log_weights)
    text = ""
    for way, estimate in (("forward", forward_ess), ("reverse", reverse_ess)):
        both = [np.asarray(lw) for lw in log_w[way]]
        values = [with_error(estimate, lw) for lw in both] + [with_error(estimate, *both)]
        cells = [f"{100 * value:.1f} ± {100 * error:.1f} %" for value, error in values]
        text += f"| {name} | {n_steps} | {n:,} | {way} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("systems", nargs="*", default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    text = "| | steps | samples | ESS | float32 | bfloat16 | difference |\n"
    text += f"|{'---|' * 7}\n"
    for name in options.systems:
        n_steps, n = SIZES[name]
        text += measure(name, n_steps, n if device.type == "cpu" else ON_A_GPU * n, device)
        print("\n".join(text.splitlines()[-2:]), flush=True)
    write_table("precision", f"{text}\nThe shipped tunings, on ", device)


if __name__ == "__main__":
    main()
