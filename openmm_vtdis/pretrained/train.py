"""Make a shipped generator: reference data, training, tuning, archive, card and log.

    python -m openmm_vtdis.pretrained.train dw4
    python -m openmm_vtdis.pretrained.train aldp-800K --data-only
    python -m openmm_vtdis.pretrained.train lj13 --keep-network    # only what comes after it

Everything is seeded. Reference data are made in shards of independent chains, each kept under
``runs/`` with a convergence report; interrupted, the script goes on from there when called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from openmm import app

from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.targets import (
    BenchmarkSystem,
    ReferenceData,
    alanine_dipeptide,
    double_well,
    lennard_jones,
    sample_hmc,
)

FOLDER = Path(__file__).parent
TRAIN_SEED, TEST_SEED, MODEL_SEED = 101, 202, 7
"""Seeds of the training data, of held-out data (which no fit ever sees), and of the model."""
FINE_LEVELS: dict[str, Any] = {"log_t_mean": -0.3, "log_t_std": 1.1}
"""Noise levels of a second training: log t in units of the data."""


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
        Of the Hamiltonian Monte Carlo that makes a shard of the data.
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
    n_shards: int = 1
    """Shards of the training data; held-out data are one."""
    fine_iterations: int = 0
    """Of a second training, on those noise levels where the energy does not know better."""
    head_iterations: int = 0
    """Of the training of the pair head, without which "pairwise" is not to be had."""
    later_frames: int | None = None
    """Frames, the first ones, of all that follows the first training; None: all."""
    covariance: str = "isotropic"
    schedule: str = "geometric"
    n_trajectories: int = 10_000
    """Of the tuning."""


RECIPES: dict[str, Recipe] = {
    "dw4": Recipe(
        "egnn-4x128",
        20_000,
        256,
        5_000,
        20,
        2_000,
        50,
        20,
        100,
        head_iterations=3_000,
        covariance="pairwise",
        schedule="adaptive",
    ),
    "lj13": Recipe(
        "egnn-4x64",
        18_000,
        256,
        2_000,
        50,
        2_000,
        20,
        20,
        200,
        head_iterations=3_000,
        covariance="pairwise",
        schedule="adaptive",
        n_trajectories=4_000,
    ),
    "aldp-800K": Recipe(
        "egnn-5x64",
        20_000,
        128,
        100,
        200,
        150,
        2,
        80,
        200,
        n_shards=5,
        fine_iterations=5_000,
        head_iterations=1_000,
        later_frames=40_000,
        covariance="pairwise",
        schedule="adaptive",
        n_trajectories=600,
    ),
}


def build_system(name: str) -> BenchmarkSystem:
    """The benchmark system of a name."""
    builders = {"dw4": double_well, "lj13": lennard_jones, "aldp-800K": alanine_dipeptide}
    return builders[name]()  # type: ignore[operator]


def reference_frames(
    name: str, split: str, folder: Path = Path("runs"), n_frames: int | None = None
) -> np.ndarray:
    """Reference configurations, made once and kept under ``folder``: (n, M, D) float64 nm.

    ``n_frames``: the first ones, for which only their shards are made. None: all.
    """
    n_shards = _n_shards(RECIPES[name], n_frames) if split == "train" else 1
    return np.concatenate([_shard(name, split, k, folder) for k in range(n_shards)])[:n_frames]


def _n_shards(recipe: Recipe, n_frames: int | None) -> int:
    """Shards of the training data that hold the first n_frames."""
    if n_frames is None:
        return recipe.n_shards
    return min(recipe.n_shards, -(-n_frames // (recipe.n_chains * recipe.n_samples)))


def _reports(name: str, n_frames: int | None = None) -> list[str]:
    """Lines of the convergence reports of the training data."""
    shards = range(_n_shards(RECIPES[name], n_frames))
    paths = [_shard_path(name, "train", k).with_suffix(".txt") for k in shards]
    return "\n".join(path.read_text() for path in paths).splitlines()


def _shard_path(name: str, split: str, k: int, folder: Path = Path("runs")) -> Path:
    return folder / (f"{name}-{split}-{k}.npy" if k else f"{name}-{split}.npy")


def _shard(name: str, split: str, k: int, folder: Path) -> np.ndarray:
    """Frames of shard k, chain by chain, with their report in a text file beside them."""
    path = _shard_path(name, split, k, folder)
    if not path.exists():
        recipe, system = RECIPES[name], build_system(name)
        data = sample_hmc(
            system.target(),
            n_chains=recipe.n_chains,
            n_samples=recipe.n_samples,
            burn_in=recipe.burn_in,
            thin=recipe.thin,
            n_leapfrog=recipe.n_leapfrog,
            step_size=0.1 if system.topology is None else 2e-3,
            initial=None if system.topology is None else torch.tensor(system.positions),
            seed=(TRAIN_SEED if split == "train" else TEST_SEED) + 1_000 * k,
        )
        folder.mkdir(exist_ok=True)
        text = f"{data.report}\n"
        if system.topology is not None:
            text += backbone_report(data, system.topology)
        path.with_suffix(".txt").write_text(text)
        partial = path.with_suffix(".part.npy")
        np.save(partial, data.positions.numpy())
        partial.replace(path)
    return np.load(path)


def backbone_report(data: ReferenceData, topology: app.Topology) -> str:
    """How often a peptide's phi changed sign, where it is, and how much chains differ.

    phi > 0 is the left-handed region, between 0 and 120 degrees.
    """
    traj = mdtraj.Trajectory(data.positions.numpy(), mdtraj.Topology.from_openmm(topology))
    shape = (data.report.n_chains, data.report.n_samples)
    phi, psi = (f(traj)[1][:, -1].reshape(shape) for f in (mdtraj.compute_phi, mdtraj.compute_psi))
    residues = [{atom.name: atom.index for atom in r.atoms} for r in traj.topology.residues]
    bonds = [[a["O"], a["C"], b["N"], b["H"]] for a, b in itertools.pairwise(residues)]
    omega = mdtraj.compute_dihedrals(traj, bonds)
    left = (phi > 0.0) & (phi < 2.0 * np.pi / 3.0)
    share = left.mean(axis=1)
    blocks = data.reduced_energies.reshape(shape).numpy()
    blocks = np.stack([block.mean() for block in np.array_split(blocks, 5, axis=1)])
    rows = {
        "phi > 0": f"{share.mean():.4f} ± {share.std(ddof=1) / np.sqrt(len(share)):.4f} of frames",
        "phi transitions": f"{int((left[:, 1:] != left[:, :-1]).sum())} between samples",
        "chains with one": f"{int((left.any(axis=1) & ~left.all(axis=1)).sum())} of {len(left)}",
        "psi > 0": f"{(psi > 0.0).mean():.4f} of frames",
        "cis": f"{(np.abs(omega) < np.pi / 2.0).mean():.5f} of peptide bonds (O-C-N-H)",
        "<u> by fifths": ", ".join(f"{value:.3f}" for value in blocks),
    }
    return "".join(f"{key:<18}{value}\n" for key, value in rows.items())


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--iterations", type=int, help="instead of the recipe's number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the network's training; float32 where the processor has no bfloat16 products",
    )
    parser.add_argument("--data-only", action="store_true", help="stop after the reference data")
    parser.add_argument(
        "--keep-network", action="store_true", help="the shipped one, instead of training"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]
    if options.iterations:
        recipe = dataclasses.replace(recipe, n_iterations=options.iterations)
    if options.keep_network:
        gen = DiffusionBoltzmannGenerator.from_pretrained(options.name, options.device)
        before = json.loads((FOLDER / f"{options.name}.json").read_text())
        first = {key: before[key] for key in ("log", "fine", "data")}
        finish(options.name, gen, recipe, first, options.precision)
        return
    train = reference_frames(options.name, "train")
    if options.data_only:
        reference_frames(options.name, "test")
        return
    system = build_system(options.name)
    torch.manual_seed(MODEL_SEED)
    gen = DiffusionBoltzmannGenerator(
        system.system,
        system.topology,
        system.temperature,
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
        precision=options.precision,
        seed=MODEL_SEED,
    )
    first = {"log": dataclasses.asdict(log), "fine": None, "data": _reports(options.name)}
    finish(options.name, gen, recipe, first, options.precision)


def finish(
    name: str,
    gen: DiffusionBoltzmannGenerator,
    recipe: Recipe,
    first: dict[str, Any],
    precision: str,
) -> None:
    """Everything after the first training, to archive and record.

    ``first`` is the record of that training: its history ("log"), that of the second training
    ("fine") if the network has had it, and the reports of its data. Data that are made again,
    elsewhere, have the same distribution but not the same numbers: those of the later fits have
    their own reports.
    """
    frames = reference_frames(name, "train", n_frames=recipe.later_frames)
    logs: dict[str, Any] = {"log": first["log"], "fine": first["fine"], "head": None}
    if recipe.fine_iterations and first["fine"] is None:
        fine = gen.train(
            frames,
            recipe.fine_iterations,
            checkpoint=f"runs/{name}-fine.ckpt",
            held_out=0.1,
            batch_size=recipe.batch_size,
            learning_rate=5e-4,
            precision=precision,
            seed=MODEL_SEED + 1,
            **FINE_LEVELS,
        )
        logs["fine"] = dataclasses.asdict(fine)
    if recipe.head_iterations:
        head = gen.train_covariance(
            frames,
            recipe.head_iterations,
            checkpoint=f"runs/{name}-pairs.ckpt",
            batch_size=recipe.batch_size,
            seed=MODEL_SEED,
            **(FINE_LEVELS if recipe.fine_iterations else {}),
        )
        logs["head"] = dataclasses.asdict(head)
    report = gen.tune(
        frames,
        recipe.n_steps,
        recipe.covariance,
        schedule=recipe.schedule,
        n_trajectories=recipe.n_trajectories,
        t_min=recipe.t_min,
        t_max=recipe.t_max,
        seed=MODEL_SEED,
    )
    gen.save(FOLDER / f"{name}.vtdis")
    record = {
        "recipe": dataclasses.asdict(recipe),
        "seeds": {"train": TRAIN_SEED, "test": TEST_SEED, "model": MODEL_SEED},
        "data": first["data"],
        "later_data": _reports(name, recipe.later_frames),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {gen.device}, "
        f"{precision}",
        "tuning": str(report),
        **logs,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
