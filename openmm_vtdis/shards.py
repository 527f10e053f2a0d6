"""Many samples into one file: in bounded memory, by any number of processes, and never lost.

The samples are cut into shards. Shard k has a seed of its own, made of the run's seed and k, so
that it is the same whoever draws it and whenever. It is written under its final name once whole, in
a folder beside the output (``samples.nc.shards``); a run that was killed finds what is there and
draws the rest. Process i of N draws the shards i, i + N, ...; the one that finds all shards there
joins them, and takes the folder away. The result does not depend on how many processes there were,
or on how often they were killed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from torch import nn

from openmm_vtdis import checks
from openmm_vtdis.archive import describe_kernel
from openmm_vtdis.diffusion.training import digest
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.ensemble.io import join_ensembles
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.progress import progress_bar
from openmm_vtdis.storage import write_atomically

_PLAN = "plan.json"


def sample_to_file(
    gen: DiffusionBoltzmannGenerator,
    path: str | os.PathLike[str],
    n: int,
    *,
    n_steps: int | None = None,
    seed: int = 0,
    shard_size: int | None = None,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> bool:
    """Draw n weighted samples into ``path`` (.nc or .npz); the same call goes on where it stopped.

    Parameters
    ----------
    gen
        A tuned generator.
    n_steps
        As for ``gen.sample``.
    shard_size
        Samples in a shard: what is in memory at once (all of them are while an .npz is joined), and
        what a killed run can lose. Default: 200, or the generator's batch if that is larger.
    process
        (i, N): this is process i of N. All need the same folder.

    Returns
    -------
    bool
        Whether the file is complete; False where other processes still draw.

    Raises
    ------
    ValueError
        If ``path`` exists, or the shards beside it are those of another run (generator, seed,
        sizes).
    """
    path = Path(path)
    n = checks.positive_integer("n", n)
    shard_size = checks.positive_integer("shard_size", shard_size or max(200, gen.batch_size()))
    i, n_processes = process
    if not 0 <= i < n_processes:
        raise ValueError(f"process: expected (i, N) with 0 <= i < N, got {process}")
    if path.suffix.lower() not in (".nc", ".npz"):
        raise ValueError(f"{path}: expected a file name that ends in .nc or .npz")
    n_shards = -(-n // shard_size)
    if i >= n_shards:
        return path.exists()
    folder = Path(f"{path}.shards")
    if path.exists() and not (folder / _PLAN).exists():
        raise ValueError(f"{path}: exists; give another name")
    _check_plan(folder, _plan(gen, n, n_steps, seed, shard_size))
    if path.exists():  # killed when the shards were joined but still there
        _clear(folder)
        return True
    files = [folder / f"{k:06d}{path.suffix}" for k in range(n_shards)]
    with progress_bar(n_shards, "sampling", progress and i == 0, "shard") as bar:
        bar.update(sum(file.exists() for file in files))
        for k in range(i, n_shards, n_processes):
            if not files[k].exists():
                size = min(shard_size, n - k * shard_size)
                own = int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
                gen.sample(size, n_steps=n_steps, seed=own, progress=False).save(files[k])
                bar.update()
    if not all(file.exists() for file in files):
        return path.exists()
    try:
        _join(path, files)
    except FileNotFoundError:
        if not path.exists():
            raise
        return True  # another process has joined them meanwhile
    _clear(folder)
    return True


def _clear(folder: Path) -> None:
    """Remove the shards, and their plan last: as long as it is there they are known."""
    for file in folder.iterdir():
        if file.name != _PLAN:
            file.unlink(missing_ok=True)
    (folder / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _join(path: Path, files: list[Path]) -> None:
    if path.suffix.lower() == ".nc":
        join_ensembles(path, files)
    else:
        WeightedEnsemble.concatenate([WeightedEnsemble.load(file) for file in files]).save(path)


def _plan(
    gen: DiffusionBoltzmannGenerator, n: int, n_steps: int | None, seed: int, shard_size: int
) -> dict[str, object]:
    """What the shards of one run have in common."""
    kernel = gen.kernel
    if kernel is None:
        raise ValueError("sample_to_file: expected a tuned generator, got one without tuning")
    tensors = [kernel.covariance.parameters, kernel.mean_gains]
    if isinstance(kernel.denoiser, nn.Module):
        tensors += kernel.denoiser.state_dict().values()
    return {
        "n": n,
        "n_steps": n_steps or kernel.schedule.n_steps,
        "seed": seed,
        "shard_size": shard_size,
        "generator": digest(json.dumps(describe_kernel(kernel)), *tensors),
    }


def _check_plan(folder: Path, plan: dict[str, object]) -> None:
    """Write the plan, or compare it with the one that is there."""
    file = folder / _PLAN
    if file.exists():
        there = json.loads(file.read_text())
        changed = [
            f"{k} ({there.get(k)} there, {v} here)" for k, v in plan.items() if there.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"{folder}: expected shards of this run, got some that differ in "
                f"{', '.join(changed)}; give another output, or remove the folder"
            )
        return
    folder.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(plan).encode())
