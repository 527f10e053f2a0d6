"""Make a shipped generator: reference data, training, tuning, archive, card and log.

    python -m openmm_vtdis.pretrained.train dw4
    python -m openmm_vtdis.pretrained.train lj13 --iterations 6000

Everything is seeded. Interrupted, it goes on from the files under ``runs/`` when called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.targets import BenchmarkSystem, double_well, lennard_jones, sample_hmc
from openmm_vtdis.units import temperature_for

FOLDER = Path(__file__).parent
TRAIN_SEED, TEST_SEED, MODEL_SEED = 101, 202, 7
"""Seeds of the training data, of held-out data (which no fit ever sees), and of the model."""


@dataclass(frozen=True)
class Recipe:
    """How a shipped generator is made.

    Attributes
    ----------
    network
        Its size.
    n_iterations, batch_size
        Of the training.
    n_chains, n_samples, burn_in, thin, n_leapfrog
        Of the Hamiltonian Monte Carlo that makes the data.
    n_steps, t_min, t_max
        Of the grid that the archive is tuned for; the ends in model units.
    """

    network: str
    n_iterations: int
    batch_size: int
    n_chains: int
    n_samples: int
    burn_in: int
    thin: int
    n_leapfrog: int
    n_steps: int
    t_min: float | None = None
    t_max: float | None = None


RECIPES: dict[str, Recipe] = {
    "dw4": Recipe("egnn-4x128", 20_000, 256, 5_000, 20, 2_000, 50, 20, 100),
    "lj13": Recipe("egnn-4x64", 18_000, 256, 2_000, 50, 2_000, 20, 20, 200),
}


def build_system(name: str) -> BenchmarkSystem:
    """The benchmark system of a name."""
    return {"dw4": double_well, "lj13": lennard_jones}[name]()


def reference_frames(name: str, split: str, folder: Path = Path("runs")) -> np.ndarray:
    """Reference configurations, made once and kept under ``folder``: (n, M, D) float64 nm."""
    path = folder / f"{name}-{split}.npy"
    if not path.exists():
        recipe = RECIPES[name]
        data = sample_hmc(
            build_system(name).target(),
            n_chains=recipe.n_chains,
            n_samples=recipe.n_samples,
            burn_in=recipe.burn_in,
            thin=recipe.thin,
            n_leapfrog=recipe.n_leapfrog,
            seed=TRAIN_SEED if split == "train" else TEST_SEED,
        )
        folder.mkdir(exist_ok=True)
        frames = data.positions.numpy()
        (folder / f"{name}-{split}.txt").write_text(f"{data.report}\n")
        partial = path.with_suffix(".part.npy")
        np.save(partial, frames)
        partial.replace(path)
    return np.load(path)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--iterations", type=int, help="instead of the recipe's number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--data-only", action="store_true", help="stop after the reference data")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]
    if options.iterations:
        recipe = dataclasses.replace(recipe, n_iterations=options.iterations)
    train = reference_frames(options.name, "train")
    if options.data_only:
        reference_frames(options.name, "test")
        return
    system = build_system(options.name)
    torch.manual_seed(MODEL_SEED)
    gen = DiffusionBoltzmannGenerator(
        system.system,
        system.topology,
        temperature_for(1.0),
        n_dims=system.n_dims,
        network=recipe.network,
        device=options.device,
    )
    log = gen.train(
        train,
        recipe.n_iterations,
        checkpoint=f"runs/{options.name}.ckpt",
        held_out=0.1,
        batch_size=recipe.batch_size,
        precision="bfloat16",
        seed=MODEL_SEED,
    )
    report = gen.tune(
        train,
        recipe.n_steps,
        n_trajectories=10_000,
        t_min=recipe.t_min,
        t_max=recipe.t_max,
        seed=MODEL_SEED,
    )
    gen.save(FOLDER / f"{options.name}.vtdis")
    record = {
        "recipe": dataclasses.asdict(recipe),
        "seeds": {"train": TRAIN_SEED, "test": TEST_SEED, "model": MODEL_SEED},
        "data": Path(f"runs/{options.name}-train.txt").read_text().splitlines(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {options.device}",
        "tuning": str(report),
        "log": dataclasses.asdict(log),
    }
    (FOLDER / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
