"""Make a shipped generator: reference data, training, tuning, archive, card and log.

    python -m openmm_vtdis.pretrained.train dw4
    python -m openmm_vtdis.pretrained.train aldp-800K --data-only
    python -m openmm_vtdis.pretrained.train lj13 --keep-network    # only what comes after it

Everything is seeded. Reference data are made in shards of independent chains, each kept under
``runs/`` with a convergence report; interrupted, the script goes on where it was when called again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app

from openmm_vtdis.diffusion.pair_training import forget_pair_head
from openmm_vtdis.ensemble import Estimate
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.storage import replacing, write_atomically
from openmm_vtdis.targets import (
    BenchmarkSystem,
    OpenMMTarget,
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
BARRIER, ROUND = 34.0, 4.0
"""Of a flattened peptide bond, kJ/mol."""


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
    ladder: tuple[float, ...] = (1.0,)
    """Temperatures of parallel tempering, in units of the system's."""
    n_shards: int = 1
    """Shards of the training data; held-out data are one."""
    data_of: str | None = None
    """The recipe whose system and reference data these are."""
    learning_rate: float = 1e-3
    """Of the first training, at its peak."""
    fine_learning_rate: float = 5e-4
    fine_batch_size: int | None = None
    """Of further trainings; None: as in the first."""
    network_of: str | None = None
    """The shipped generator whose network stands for a first training, without iterations."""
    fine_iterations: tuple[int, ...] = ()
    """Of further trainings, on those noise levels where the energy does not know better."""
    head_iterations: int = 0
    """Of the training of the pair head, without which "pairwise" is not to be had."""
    later_frames: int | None = None
    """Frames, the first ones, of all that follows the first training; None: all."""
    covariance: str = "isotropic"
    schedule: str = "geometric"
    n_trajectories: int = 10_000
    """Of the tuning."""
    half_precision: bool = False
    """Round the weights, last of all, to what 16 bits hold: for large networks."""


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
        400,
        150,
        1,
        80,
        200,
        n_shards=2,
        fine_iterations=(5_000, 5_000),
        head_iterations=1_000,
        covariance="pairwise",
        schedule="adaptive",
        n_trajectories=600,
    ),
    "aldp-300K": Recipe(
        "egnn-5x64",
        0,
        128,
        40,
        1_000,
        200,
        1,
        40,
        200,
        ladder=(1.0, 1.2, 1.45, 1.75, 2.15, 2.67),
        network_of="aldp-800K",
        fine_iterations=(6_000,),
        head_iterations=1_000,
        covariance="pairwise",
        schedule="adaptive",
        n_trajectories=600,
    ),
}

RECIPES["aldp-800K-7x256"] = dataclasses.replace(
    RECIPES["aldp-800K"],
    network="egnn-7x256",
    n_iterations=5_300,
    batch_size=512,
    data_of="aldp-800K",
    learning_rate=5e-4,
    fine_learning_rate=7e-4,
    fine_batch_size=256,
    fine_iterations=(4_900,),
    head_iterations=1_200,
    n_trajectories=1_000,
    half_precision=True,
)


SYSTEMS: dict[str, Callable[[], BenchmarkSystem]] = {
    "dw4": double_well,
    "lj13": lennard_jones,
    "aldp-800K": functools.partial(alanine_dipeptide, 800.0),
    "aldp-300K": functools.partial(alanine_dipeptide, 300.0),
}


def build_system(name: str) -> BenchmarkSystem:
    """The benchmark system of a recipe's name."""
    return SYSTEMS[RECIPES[name].data_of or name]()


def reference_frames(
    name: str, split: str, folder: Path = Path("runs"), n_frames: int | None = None
) -> np.ndarray:
    """Reference configurations, made once and kept under ``folder``: (n, M, D) float64 nm.

    ``n_frames``: the first ones, for which only their shards are made. None: all.
    """
    shards = [_shard(name, split, k, folder) for k in _shards(name, split, n_frames, folder)]
    return np.concatenate(shards)[:n_frames]


def chain_lengths(name: str, split: str, folder: Path = Path("runs")) -> np.ndarray:
    """Frames of each independent chain of :func:`reference_frames`, in their order: (C,)."""
    shards = _shards(name, split, None, folder)
    return np.concatenate([np.load(_chains_path(name, split, k, folder)) for k in shards])


def _shards(name: str, split: str, n_frames: int | None, folder: Path = Path("runs")) -> list[int]:
    """Shards that hold the first n_frames (None: all), made if need be."""
    n_shards = RECIPES[name].n_shards if split == "train" else 1
    needed, missing = [], n_frames
    for k in range(n_shards):
        needed.append(k)
        if missing is not None:
            missing -= len(_shard(name, split, k, folder))
            if missing <= 0:
                break
    return needed


def _reports(name: str, n_frames: int | None = None) -> list[str]:
    """Lines of the convergence reports of the training data."""
    shards = _shards(name, "train", n_frames)
    paths = [_shard_path(name, "train", k).with_suffix(".txt") for k in shards]
    return "\n".join(path.read_text() for path in paths).splitlines()


def _shard_path(name: str, split: str, k: int, folder: Path = Path("runs")) -> Path:
    name = RECIPES[name].data_of or name
    return folder / (f"{name}-{split}-{k}.npy" if k else f"{name}-{split}.npy")


def _chains_path(name: str, split: str, k: int, folder: Path = Path("runs")) -> Path:
    return _shard_path(name, split, k, folder).with_suffix(".chains.npy")


def _shard(name: str, split: str, k: int, folder: Path) -> np.ndarray:
    """Frames of shard k, chain by chain, with their report in a text file beside them."""
    path = _shard_path(name, split, k, folder)
    if not path.exists():
        recipe, system = RECIPES[name], build_system(name)
        bias = None if system.topology is None else peptide_bias(system)
        seed = (TRAIN_SEED if split == "train" else TEST_SEED) + 1_000 * k
        folder.mkdir(exist_ok=True)
        checkpoint = path.with_suffix(".ckpt")
        data = sample_hmc(
            system.target() if bias is None else biased(system, bias).target(),
            n_chains=recipe.n_chains,
            n_samples=recipe.n_samples,
            burn_in=recipe.burn_in,
            thin=recipe.thin,
            n_leapfrog=recipe.n_leapfrog,
            ladder=recipe.ladder,
            step_size=0.1 if system.topology is None else 2e-3,
            initial=None if system.topology is None else torch.tensor(system.positions),
            seed=seed,
            checkpoint=checkpoint,
        )
        text, frames = f"{data.report}\n", data.positions.numpy()
        lengths = np.full(recipe.n_chains, recipe.n_samples)
        if bias is not None:
            kept = unbiased(data, bias, system, seed)
            frames, lengths = frames[kept], kept.reshape(recipe.n_chains, -1).sum(axis=1)
            text = f"with flattened peptide bonds\n{text}frames kept       {kept.mean():.1%}\n"
            text += backbone_report(frames, lengths, system)
        write_atomically(path.with_suffix(".txt"), text.encode())
        for file, array in ((_chains_path(name, split, k, folder), lengths), (path, frames)):
            with replacing(file) as partial, partial.open("wb") as stream:
                np.save(stream, array)
        checkpoint.unlink()
    return np.load(path)


def peptide_bonds(topology: app.Topology) -> list[list[int]]:
    """Atoms O-C-N-H of the bond between each residue and the next."""
    residues = [{atom.name: atom.index for atom in r.atoms()} for r in topology.residues()]
    return [[a["O"], a["C"], b["N"], b["H"]] for a, b in itertools.pairwise(residues)]


def peptide_bias(system: BenchmarkSystem) -> openmm.CustomTorsionForce:
    """A force that takes away what a peptide bond's barrier has above ``BARRIER``.

    At 800 K a chain does not cross the 84 kJ/mol between trans and cis in any affordable time. With
    V = 84 sin^2(omega) kJ/mol, the torsions' own energy, and e = max(0, V - BARRIER), the energy is
    ``-e^2 / (e + ROUND)``: never positive, zero in both wells, with a continuous force.
    """
    force = openmm.CustomTorsionForce(
        f"-excess^2 / (excess + {ROUND}); excess = max(0, 83.68 * sin(theta)^2 - {BARRIER})"
    )
    for atoms in peptide_bonds(system.topology):
        force.addTorsion(*atoms, [])
    return force


def biased(system: BenchmarkSystem, bias: openmm.Force) -> BenchmarkSystem:
    """The system with one more force."""
    with_bias = copy.deepcopy(system.system)
    with_bias.addForce(copy.deepcopy(bias))
    return dataclasses.replace(system, system=with_bias)


def unbiased(
    data: ReferenceData, bias: openmm.Force, system: BenchmarkSystem, seed: int
) -> np.ndarray:
    """Frames that belong to the unbiased distribution, (n,) bool.

    The bias b is never positive, so that keeping a frame of exp(-u - b) with probability exp(b) is
    exact rejection sampling of exp(-u).
    """
    alone = openmm.System()
    for atom in range(system.system.getNumParticles()):
        alone.addParticle(system.system.getParticleMass(atom))
    alone.addForce(copy.deepcopy(bias))
    target = OpenMMTarget(alone, system.topology, system.temperature)
    log_keep = target.reduced_energy(data.positions).numpy()
    if log_keep.max() > 0.0:
        raise ValueError(f"bias: expected energies of at most 0, got {log_keep.max()} kT")
    return np.log(np.random.default_rng(seed).random(len(log_keep))) < log_keep


def backbone_report(frames: np.ndarray, lengths: np.ndarray, system: BenchmarkSystem) -> str:
    """Energy, backbone angles and transitions of frames (n, M, 3), with errors between chains.

    ``lengths`` (C,) are the frames of each chain. phi > 0 is the left-handed region, between 0 and
    120 degrees.
    """
    traj = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(system.topology))
    phi, psi = (f(traj)[1][:, -1] for f in (mdtraj.compute_phi, mdtraj.compute_psi))
    omega = mdtraj.compute_dihedrals(traj, peptide_bonds(system.topology))
    target = system.target()
    u = np.concatenate(
        [target.reduced_energy(x).numpy() for x in torch.tensor(frames).split(10_000)]
    )

    def chains(values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(lengths)[:-1])

    def changes(states: np.ndarray) -> str:
        """Of a state, between frames that follow each other in a chain."""
        counts = np.array([np.count_nonzero(c[1:] != c[:-1]) for c in chains(states)])
        return f"{counts.sum()} changes in {np.count_nonzero(counts)} of {len(counts)} chains"

    def fifths(values: np.ndarray, digits: int) -> str:
        """Averages over the first to the last fifth of all chains."""
        pieces = zip(*(np.array_split(c, 5) for c in chains(values)), strict=True)
        return ", ".join(f"{np.concatenate(piece).mean():.{digits}f}" for piece in pieces)

    left = (phi > 0.0) & (phi < 2.0 * np.pi / 3.0)
    rows = {
        "<u>": f"{between_chains(u, lengths)} kT",
        "<u> by fifths": fifths(u, 3),
        "phi > 0": f"{between_chains(left, lengths)}; {changes(left)}",
        "psi > 0": f"{between_chains(psi > 0.0, lengths)}",
    }
    for k, bond in enumerate((np.abs(omega) < np.pi / 2.0).T, start=1):
        rows[f"cis, bond {k}"] = f"{between_chains(bond, lengths)}; {changes(bond)}"
        rows[f"  by fifths, {k}"] = fifths(bond, 4)
    return "".join(f"{key:<18}{value}\n" for key, value in rows.items())


def between_chains(values: np.ndarray, lengths: np.ndarray) -> Estimate:
    """The mean of values (n,) with the jackknife over chains of ``lengths`` (C,) frames."""
    sums = np.array([chain.sum() for chain in np.split(values, np.cumsum(lengths)[:-1])])
    without = (sums.sum() - sums) / (lengths.sum() - lengths)
    error = np.sqrt((len(sums) - 1) * without.var())
    return Estimate(sums.sum() / lengths.sum(), error)


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
    parser.add_argument(
        "--compile", action="store_true", help="the layers of the network: for large ones on a GPU"
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
        if options.compile:
            compile_layers(gen.network)
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
        network=recipe.network if recipe.network_of is None else first_network(recipe.network_of),
        device=options.device,
    )
    if options.compile:
        compile_layers(gen.network)
    log = None
    if recipe.n_iterations:
        log = gen.train(
            train,
            recipe.n_iterations,
            checkpoint=f"runs/{options.name}.ckpt",
            held_out=0.1,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            precision=options.precision,
            seed=MODEL_SEED,
        )
    history = None if log is None else dataclasses.asdict(log)
    first = {"log": history, "fine": [], "data": _reports(options.name)}
    finish(options.name, gen, recipe, first, options.precision)


def compile_layers(network: torch.nn.Module) -> None:
    """One by one, so that all share their code; what is stored does not change."""
    for layer in network.layers:  # type: ignore[union-attr]
        layer.compile()


def first_network(name: str) -> torch.nn.Module:
    """The network of a shipped generator, without its pair head."""
    network = DiffusionBoltzmannGenerator.from_pretrained(name).network
    forget_pair_head(network)
    return network


@torch.no_grad()
def round_weights(network: torch.nn.Module) -> None:
    """To half precision, 1 part in 2,000 at most; they stay single-precision numbers."""
    for weight in network.parameters():
        weight.copy_(weight.half().float())


def finish(
    name: str,
    gen: DiffusionBoltzmannGenerator,
    recipe: Recipe,
    first: dict[str, Any],
    precision: str,
) -> None:
    """Everything after the first training, to archive and record.

    ``first`` is the record of that training: its history ("log", None without one), those of the
    further ones that the network has had ("fine"), and the reports of its data. Data that are made
    again, elsewhere, have the same distribution but not the same numbers: those of the later fits
    have their own reports.
    """
    frames = reference_frames(name, "train", n_frames=recipe.later_frames)
    fine = list(first["fine"])
    for k in range(len(fine), len(recipe.fine_iterations)):
        log = gen.train(
            frames,
            recipe.fine_iterations[k],
            checkpoint=f"runs/{name}-fine-{k}.ckpt",
            held_out=0.1,
            batch_size=recipe.fine_batch_size or recipe.batch_size,
            learning_rate=recipe.fine_learning_rate,
            precision=precision,
            seed=MODEL_SEED + 1 + k,
            **FINE_LEVELS,
        )
        fine.append(dataclasses.asdict(log))
    logs: dict[str, Any] = {"log": first["log"], "fine": fine, "head": None}
    if recipe.head_iterations:
        head = gen.train_covariance(
            frames,
            recipe.head_iterations,
            checkpoint=f"runs/{name}-pairs.ckpt",
            batch_size=recipe.fine_batch_size or recipe.batch_size,
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
    if recipe.half_precision:
        round_weights(gen.network)
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
