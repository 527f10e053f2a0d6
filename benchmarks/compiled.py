"""What torch.compile makes of the networks, and how long it takes itself.

    python -m benchmarks.compiled

Eager and compiled code are timed in alternating rounds; on a GPU also the mode that records CUDA
graphs. Writes ``docs/tables/compiled.md``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.baseline import seconds, training_step
from benchmarks.tables import write_table
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser

MODES = {
    "cpu": {"compiled": "default"},
    "cuda": {"compiled": "default", "CUDA graphs": "reduce-overhead"},
}


def works(
    denoiser: PreconditionedDenoiser, batch_size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """An evaluation of the network, and a training step."""
    generator = torch.Generator(device).manual_seed(0)
    x = denoiser.space.standard_normal(batch_size, generator)
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
    eager = copy.deepcopy(DiffusionBoltzmannGenerator.from_pretrained(name, str(device)).denoiser)
    candidates = {"eager": works(eager, batch_size, device)}
    for label, mode in MODES[device.type].items():
        again = copy.deepcopy(eager)
        network: nn.Module = torch.compile(again.network, mode=mode)  # type: ignore[assignment]
        made = PreconditionedDenoiser(network, again.space)
        candidates[label] = works(made, batch_size, device)
    text = ""
    for what in candidates["eager"]:
        first = {label: seconds(w[what], device) for label, w in candidates.items()}
        rounds = np.array(
            [[seconds(w[what], device) for w in candidates.values()] for _ in range(n_rounds + 1)]
        )[1:]
        cells = [f"{1e3 * np.median(rounds[:, 0]) / batch_size:.3g} ms"]
        for k, label in enumerate(candidates):
            if label != "eager":
                gain = rounds[:, 0] / rounds[:, k]
                spread = f"{np.median(gain):.2f} ({gain.min():.2f}-{gain.max():.2f})"
                cells += [spread, f"{first[label]:.0f} s"]
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
    head = [f"{label}: faster by | its first call" for label in MODES[device.type]]
    text = f"| network | | eager, per configuration | {' | '.join(head)} |\n"
    text += f"|{'---|' * (3 + 2 * len(head))}\n"
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
