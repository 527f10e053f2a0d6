"""How large a network does DW-4 need? Effective samples a second of two that ship and two smaller.

    python -m benchmarks.network_size

Each is trained and tuned by the recipe of the shipped generator ``dw4``, on the same frames, and
judged by frames of an independent run and by fresh samples, with several numbers of steps. Networks
that do not ship stay under ``runs/``; rows in ``benchmarks/results/network-size.json`` are not
measured again (nor those of the shipped ones, which stand in ``dw4.json`` and ``dw4-small.json``),
but for the times, which are taken in alternating rounds over all networks. Writes
``docs/tables/network-size.md``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.baseline import seconds
from benchmarks.effective import most_effective, per_step
from benchmarks.run import (
    AS_SHIPPED,
    RESULTS,
    SAMPLE_SEED,
    TEST_SEED,
    Row,
    forward_part,
    reverse_part,
)
from benchmarks.tables import write_table
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.storage.atomic import write_atomically
from recipes.reference import reference_frames
from recipes.settings import MODEL_SEED, RECIPES, build_system

NAME, RECIPE = "dw4", RECIPES["dw4"]
SHIPPED = {RECIPES[name].network: name for name in ("dw4-small", NAME)}
NETWORKS = ("egnn-2x32", "egnn-3x32", *SHIPPED)
STEPS = (15, 25, 50, 100)
N_SAMPLES, BATCH_SIZE, ROUNDS = 20_000, 256, 7
RESULT = RESULTS / "network-size.json"


def trained(network: str) -> DiffusionBoltzmannGenerator:
    """By the recipe, or from where it was left; or a shipped one."""
    if network in SHIPPED:
        return DiffusionBoltzmannGenerator.from_pretrained(SHIPPED[network])
    path = Path("runs") / f"{NAME}-{network}.vtdis"
    if path.exists():
        return DiffusionBoltzmannGenerator.load(path)
    bench, frames = build_system(NAME), reference_frames(NAME, "train")
    torch.manual_seed(MODEL_SEED)
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=bench.n_dims, network=network
    )
    common = {"held_out": 0.1, "batch_size": RECIPE.batch_size, "seed": MODEL_SEED}
    gen.train(
        frames,
        RECIPE.n_iterations,
        checkpoint=path.with_suffix(".ckpt"),
        learning_rate=RECIPE.learning_rate,
        **common,
    )
    gen.train_pair_head(
        frames,
        RECIPE.head_iterations,
        n_hidden=RECIPE.head_width,
        checkpoint=path.with_suffix(".pairs"),
        **common,
    )
    gen.tune(
        frames,
        RECIPE.n_steps,
        RECIPE.covariance,
        schedule=RECIPE.schedule,
        n_trajectories=RECIPE.n_trajectories,
        seed=MODEL_SEED,
    )
    gen.save(path)
    return gen


def measure(gen: DiffusionBoltzmannGenerator, n_steps: int, frames: np.ndarray) -> Row:
    """ESS in both directions."""
    log_w = gen.log_weights(frames, n_steps=n_steps, seed=TEST_SEED)
    ensemble = gen.sample(N_SAMPLES, n_steps=n_steps, seed=SAMPLE_SEED)
    return {"n_steps": n_steps, **forward_part(log_w), **reverse_part(ensemble)}


def times(generators: list[DiffusionBoltzmannGenerator]) -> np.ndarray:
    """Seconds of a step and sample, the median of alternating rounds: one a generator."""
    rounds = []
    for _ in range(ROUNDS + 1):
        works = [
            functools.partial(
                gen.sample, BATCH_SIZE, n_steps=25, batch_size=BATCH_SIZE, progress=False
            )
            for gen in generators
        ]
        rounds.append([seconds(work, torch.device("cpu")) for work in works])
    return np.median(rounds[1:], axis=0) / (25 * BATCH_SIZE)


def main() -> None:
    """Measure what is missing; write the table."""
    rows: dict[str, Row] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    generators = [trained(network) for network in NETWORKS]
    pool = reference_frames(NAME, "test")
    frames = pool[np.random.default_rng(TEST_SEED).integers(len(pool), size=N_SAMPLES)]
    for network, gen in zip(NETWORKS, generators, strict=True):
        for n_steps in STEPS:
            if network not in SHIPPED and f"{network} @ {n_steps}" not in rows:
                rows[f"{network} @ {n_steps}"] = measure(gen, n_steps, frames)
                write_atomically(RESULT, (json.dumps(rows, indent=1) + "\n").encode())
    text = "| network | µs a step and sample | "
    text += " | ".join(f"ESS, {n} steps: forward | reverse" for n in STEPS)
    text += f" | effective / s, the most |\n|{'---|' * (2 * len(STEPS) + 3)}\n"
    for network, second in zip(NETWORKS, times(generators), strict=True):
        where, label = rows, network
        if network in SHIPPED:
            path, label = RESULTS / f"{SHIPPED[network]}.json", AS_SHIPPED
            where = json.loads(path.read_text())["rows"]
        found = [where[f"{label} @ {n}"] for n in STEPS]
        cells = [network.removeprefix("egnn-").replace("x", " x "), f"{1e6 * second:.3g}"]
        for row in found:
            for value, error in (row["forward_ess"], row["reverse_ess"]):
                cells.append(f"{100 * value:.1f} ± {100 * error:.1f} %")
        best = most_effective(found)
        cells.append(f"{per_step(best) / second:.3g} ({best['n_steps']} steps)")
        text += f"| {' | '.join(cells)} |\n"
        print(text.splitlines()[-1], flush=True)
    text += (
        f"\nDW-4, {N_SAMPLES:,} in each direction; times: the median of {ROUNDS} alternating "
        f"rounds, batches of {BATCH_SIZE}, on "
    )
    write_table("network-size", text, torch.device("cpu"))


if __name__ == "__main__":
    main()
