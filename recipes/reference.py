"""Reference configurations of the shipped generators' systems, made by Hamiltonian Monte Carlo.

They are made in shards of independent chains, each kept under ``runs/`` with a report of its
convergence. An interrupted shard continues where it was when it is asked for again.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app

from openmm_vtdis.ensemble import Estimate
from openmm_vtdis.mcmc import ReferenceData, sample_hmc
from openmm_vtdis.storage.atomic import replacing, write_atomically
from openmm_vtdis.targets import BenchmarkSystem, OpenMMTarget
from recipes.settings import RECIPES, TEST_SEED, TRAIN_SEED, build_system

BARRIER, ROUND = 34.0, 4.0
"""Height of a flattened peptide bond's barrier, and the width of its rounding, in kJ/mol."""


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


def reports(name: str, n_frames: int | None = None) -> list[str]:
    """Lines of the convergence reports of the training data."""
    shards = _shards(name, "train", n_frames)
    paths = [_shard_path(name, "train", k).with_suffix(".txt") for k in shards]
    return "\n".join(path.read_text() for path in paths).splitlines()


def basin_report(name: str, folder: Path = Path("runs")) -> list[str]:
    """Lines of the report of :func:`basin_frames`."""
    basin_frames(name, folder)
    return _basins_path(name, folder).with_suffix(".txt").read_text().splitlines()


def _basins_path(name: str, folder: Path) -> Path:
    return folder / f"{RECIPES[name].data_of or name}-basins.npy"


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


def training_frames(name: str, folder: Path = Path("runs")) -> np.ndarray:
    """The training data with frames of rare basins: nine tenths of each, then the rest, shuffled.

    The last tenth, which training holds out and of which it may look at a part, has both.
    """
    frames = reference_frames(name, "train", folder, RECIPES[name].later_frames)
    parts = frames, basin_frames(name, folder)
    begins, ends = zip(*(np.split(part, [9 * len(part) // 10]) for part in parts), strict=True)
    last = np.random.default_rng(TRAIN_SEED).permutation(np.concatenate(ends))
    return np.concatenate([*begins, last])


def basin_frames(name: str, folder: Path = Path("runs")) -> np.ndarray:
    """Frames of a recipe's rare basins from chains that begin in them: (n, M, 3) float64 nm.

    Few chains cross between basins in the time that they have. What share of the frames a basin has
    is therefore arbitrary: it says how much of its training a network spends on it.

    Raises
    ------
    ValueError
        If there is no frame in one of them to begin with.
    """
    recipe, path = RECIPES[name], _basins_path(name, folder)
    if not path.exists():
        system = build_system(name)
        hot = reference_frames(recipe.basins_of or name, "train", folder)
        where = basins(mdtraj.Trajectory(hot, mdtraj.Topology.from_openmm(system.topology)))
        rng, starts = np.random.default_rng(TRAIN_SEED), []
        for basin in recipe.basins:
            (inside,) = np.nonzero((where == basin).all(axis=1))
            if not len(inside):
                raise ValueError(f"{recipe.basins_of}: expected frames in {basin}, got none")
            starts.append(
                rng.choice(inside, recipe.basin_chains, len(inside) < recipe.basin_chains)
            )
        initial = torch.tensor(hot[np.stack(starts, axis=1).reshape(-1)])  # basins take turns
        checkpoint = path.with_suffix(".ckpt")
        data = sample_hmc(
            system.target(),
            n_chains=len(initial),
            n_samples=recipe.basin_samples,
            burn_in=recipe.burn_in,
            thin=recipe.basin_thin,
            n_leapfrog=recipe.n_leapfrog,
            step_size=2e-3,
            initial=initial,
            seed=TRAIN_SEED,
            checkpoint=checkpoint,
        )
        frames = data.positions.numpy()
        text = f"rare basins\n{data.report}\n"
        lengths = np.full(len(initial), recipe.basin_samples)
        text += backbone_report(frames, lengths, system)
        write_atomically(path.with_suffix(".txt"), text.encode())
        with replacing(path) as partial, partial.open("wb") as stream:
            np.save(stream, frames)
        checkpoint.unlink()
    return np.load(path)


def peptide_bonds(topology: app.Topology) -> list[list[int]]:
    """Atoms O-C-N-H of each peptide bond, between a residue and the next."""
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


def dihedrals(traj: mdtraj.Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """phi and psi, (n,) each, in radians."""
    phi, psi = (f(traj)[1][:, 0] for f in (mdtraj.compute_phi, mdtraj.compute_psi))
    return phi, psi


def left_handed(phi: np.ndarray) -> np.ndarray:
    """1 where phi is between 0 and 120 degrees, else 0."""
    return ((phi > 0.0) & (phi < 2.0 * np.pi / 3.0)).astype(float)


def cis(traj: mdtraj.Trajectory) -> np.ndarray:
    """1 where a peptide bond is cis, else 0: (n, bonds)."""
    omega = mdtraj.compute_dihedrals(traj, peptide_bonds(traj.topology.to_openmm()))
    return (np.abs(omega) < np.pi / 2.0).astype(float)


def basins(traj: mdtraj.Trajectory) -> np.ndarray:
    """Left-handed, and cis of either bond, 1 or 0: (n, 3)."""
    return np.column_stack([left_handed(dihedrals(traj)[0]), cis(traj)])


def backbone_report(frames: np.ndarray, lengths: np.ndarray, system: BenchmarkSystem) -> str:
    """Energy, backbone angles and transitions of frames (n, M, 3), with errors between chains.

    ``lengths`` (C,) are the frames of each chain. phi > 0 is the left-handed region, between 0 and
    120 degrees.
    """
    traj = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(system.topology))
    phi, psi = dihedrals(traj)
    target = system.target()
    u = np.concatenate(
        [target.reduced_energy(x).numpy() for x in torch.tensor(frames).split(10_000)]
    )

    def chains(values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(lengths)[:-1])

    def changes(states: np.ndarray) -> str:
        """Number of changes of a state between successive frames of a chain."""
        counts = np.array([np.count_nonzero(c[1:] != c[:-1]) for c in chains(states)])
        return f"{counts.sum()} changes in {np.count_nonzero(counts)} of {len(counts)} chains"

    def fifths(values: np.ndarray, digits: int) -> str:
        """Averages over the first to the last fifth of all chains."""
        pieces = zip(*(np.array_split(c, 5) for c in chains(values)), strict=True)
        return ", ".join(f"{np.concatenate(piece).mean():.{digits}f}" for piece in pieces)

    left = left_handed(phi)
    rows = {
        "<u>": f"{between_chains(u, lengths)} kT",
        "<u> by fifths": fifths(u, 3),
        "phi > 0": f"{between_chains(left, lengths)}; {changes(left)}",
        "psi > 0": f"{between_chains(psi > 0.0, lengths)}",
    }
    for k, bond in enumerate(cis(traj).T, start=1):
        rows[f"cis, bond {k}"] = f"{between_chains(bond, lengths)}; {changes(bond)}"
        rows[f"  by fifths, {k}"] = fifths(bond, 4)
    return "".join(f"{key:<18}{value}\n" for key, value in rows.items())


def between_chains(values: np.ndarray, lengths: np.ndarray) -> Estimate:
    """The mean of values (n,) with the jackknife over chains of ``lengths`` (C,) frames."""
    sums = np.array([chain.sum() for chain in np.split(values, np.cumsum(lengths)[:-1])])
    without = (sums.sum() - sums) / (lengths.sum() - lengths)
    error = np.sqrt((len(sums) - 1) * without.var())
    return Estimate(sums.sum() / lengths.sum(), error)
