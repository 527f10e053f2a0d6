"""Sampling into one file in shards: bounded memory, any number of processes, nothing lost.

The samples are cut into shards. Shard k has a seed of its own, k after one that is made of the
run's, so that it is the same whoever draws it and whenever. It is written under its final name once
whole, in a folder beside the output (``samples.nc.shards``); a run that was killed finds what is
there and draws the rest. Process i of N draws the shards i, i + N, ...; any that finds all shards
there joins them, and takes the folder away. The result does not depend on how many processes there
were, or on how often they were killed. Every shard, and the result, carries the plan of its run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.ensemble.files import join_ensembles, read_metadata
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.runtime.progress import progress_bar
from openmm_vtdis.storage.atomic import write_atomically
from openmm_vtdis.storage.documents import differences, parse_json

_PLAN = "plan.json"


def sample_to_file(
    gen: DiffusionBoltzmannGenerator,
    path: str | os.PathLike[str],
    n: int,
    *,
    n_steps: int | None = None,
    seed: int = 0,
    shard_size: int = 500,
    batch_size: int | None = None,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> bool:
    """Draw n weighted samples into ``path`` (.nc or .npz); the same call goes on where it stopped.

    Parameters
    ----------
    gen
        A tuned generator.
    path, n
        File to write, and number of samples in it.
    n_steps, batch_size, progress
        See ``gen.sample``.
    seed
        An integer: no run of shards begins without one.
    shard_size
        Samples in a shard: what is in memory at once (all of them are while an .npz is joined), and
        what a killed run can lose.
    process
        Rank and number of processes (i, N). All need the same folder.

    Returns
    -------
    bool
        Whether the file is complete; False where other processes still draw.

    Raises
    ------
    ValueError
        If ``path`` is there and not of this run, or the shards beside it are of another (generator,
        seed, sizes).
    """
    path = Path(os.path.realpath(path))
    n = checks.positive_integer("n", n)
    shard_size = checks.positive_integer("shard_size", shard_size)
    pair = isinstance(process, tuple | list) and len(process) == 2
    i, n_processes = process if pair else (0, 0)
    if not 0 <= i < n_processes:
        raise ValueError(f"process: expected (i, N) with 0 <= i < N, got {process}")
    if path.suffix.lower() not in (".nc", ".npz"):
        raise ValueError(f"{path}: expected a file name that ends in .nc or .npz")
    checks.output_file("path", path)
    if not isinstance(seed, int | np.integer):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
    make_rng(seed)
    size = gen.batch_size() if batch_size is None else batch_size
    size = checks.positive_integer("batch_size", size)
    sizes = {
        "n": n,
        "shard_size": shard_size,
        "batch_size": min(size, shard_size),
        "seed": int(seed),
    }
    plan = _plan(gen, n_steps, sizes)
    folder = Path(f"{path}.shards")
    if path.exists():
        return _finished(path, folder, plan)
    try:
        done = _draw_and_join(gen, path, folder, plan, process, progress)
    except (OSError, ValueError):
        if not path.exists():
            raise
        done = True  # another process has joined the shards, and taken them away meanwhile
    return done and _finished(path, folder, plan)


def _draw_and_join(
    gen: DiffusionBoltzmannGenerator,
    path: Path,
    folder: Path,
    plan: dict[str, Any],
    process: tuple[int, int],
    progress: bool,
) -> bool:
    """Draw the missing shards of this process; join all of them if they are there.

    Returns whether the file is there. Whatever another process that joined them first may have
    taken away is met as an OSError or ValueError.
    """
    _check_plan(folder, plan)
    i, n_processes = process
    n, size = plan["n"], plan["shard_size"]
    n_shards = -(-n // size)
    files = [folder / f"{k:06d}{path.suffix}" for k in range(n_shards)]
    first = int(np.random.SeedSequence(plan["seed"]).generate_state(1)[0])
    with progress_bar(n_shards, "sampling", progress and i == 0, "shard") as bar:
        bar.update(sum(file.exists() for file in files))
        for k in range(i, n_shards, n_processes):
            if path.exists():
                return True
            if not files[k].exists():
                part = gen.sample(
                    min(size, n - k * size), n_steps=plan["n_steps"], seed=(first + k) % 2**32,
                    batch_size=plan["batch_size"], progress=False,
                )  # fmt: skip
                part.with_metadata({**part.metadata, "plan": plan}).save(files[k])
                bar.update()
    if all(file.exists() for file in files):
        _join(path, files)
    return path.exists()


def _finished(path: Path, folder: Path, plan: dict[str, Any]) -> bool:
    """True for a result of this plan, whose shards may go; an error for any other file."""
    try:
        there = read_metadata(path).get("plan")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: exists, and cannot be read; give another name") from error
    if there != plan:
        raise ValueError(f"{path}: exists; give another name")
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _join(path: Path, files: list[Path]) -> None:
    """Join all shards into one file, which is made in their folder first."""
    joined = files[0].with_name(f"joined-{os.getpid()}{path.suffix}")
    try:
        if path.suffix.lower() == ".nc":
            join_ensembles(joined, files)
        else:
            parts = [WeightedEnsemble.load(file) for file in files]
            WeightedEnsemble.concatenate(parts).save(joined)
    except ValueError as error:
        raise ValueError(f"{error}; remove that shard and run again, others are kept") from error
    if not path.exists():
        os.replace(joined, path)


def _plan(
    gen: DiffusionBoltzmannGenerator, n_steps: int | None, sizes: dict[str, int]
) -> dict[str, Any]:
    """The plan of a run as JSON: settings that all of its shards share."""
    if gen.process is None:
        raise ValueError("sample_to_file: expected a tuned generator; call tune() first")
    if n_steps is not None:
        n_steps = checks.positive_integer("n_steps", n_steps)
    sampler = gen.path_sampler(n_steps)
    return {**sizes, "n_steps": sampler.n_steps, "generator": gen.path_sampler().fingerprint}


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that is there."""
    file = folder / _PLAN
    if file.exists():
        try:
            changed = differences(parse_json(file.read_text()), plan)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{file}: expected the plan of a run, got something else ({error}); remove the "
                "folder"
            ) from error
        if changed:
            raise ValueError(
                f"{folder}: expected shards of this run, got some that differ in {changed}; give "
                "another output, or remove the folder"
            )
        return
    folder.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(plan).encode())
