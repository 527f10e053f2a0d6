"""Numbers of the shipped generators, to be compared after the code around them has changed.

``python -m tests.pretrained_numbers`` writes them anew: do that only for a change that is meant to
change them, and say so.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, pretrained
from recipes.settings import build_system

FILE = Path(__file__).with_suffix(".json")
N, N_STEPS = 4, 12


def numbers(name: str) -> dict[str, list[float]]:
    """Log weights both ways, of the reverse process and the flow, and energies, for fixed seeds."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    assert gen.process is not None
    ensemble = gen.sample(N, n_steps=N_STEPS, seed=5, batch_size=N, progress=False)
    x = np.repeat(build_system(name).positions[None], N, axis=0)
    found = {
        "sample": ensemble.log_weights.tolist(),
        "energies": ensemble.reduced_energies.tolist(),
        "noise": gen.log_weights(x, n_steps=N_STEPS, seed=7, batch_size=N, progress=False).tolist(),
        "tuning": gen.process.covariance.parameters.flatten()[:8].tolist(),
        "grid": list(gen.process.schedule.times[:3]),
        "length": [gen.coordinates.length],
    }
    if gen.space.dim < 40:
        flow = gen.sample_ode(N, n_steps=N_STEPS, seed=8, batch_size=N, progress=False)
        found["flow"] = flow.log_weights.tolist()
    return found


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    table = {name: numbers(name) for name in pretrained.names()}
    FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
