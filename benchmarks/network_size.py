"""How large a network does DW-4 need? Effective samples a second of two shipped and two smaller.

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
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import SAMPLE_SEED, TEST_SEED, held_out_frames
from benchmarks.harness import (
    MarkdownTable,
    command_line,
    in_turns,
    percent,
    read_result,
    system_rows,
    write_result,
    write_table,
)
from benchmarks.methods import AS_SHIPPED
from benchmarks.rows import Row, forward_part, most_effective, per_step, reverse_part
from openmm_vtdis import DiffusionBoltzmannGenerator
from recipes.reference import reference_frames
from recipes.settings import MODEL_SEED, RECIPES, build_system

NAME, RECIPE = "dw4", RECIPES["dw4"]
SHIPPED = {RECIPES[name].network: name for name in ("dw4-small", NAME)}
NETWORKS = ("egnn-2x32", "egnn-3x32", *SHIPPED)
STEPS = (15, 25, 50, 100)
N_SAMPLES, BATCH_SIZE, ROUNDS = 20_000, 256, 7
CPU = torch.device("cpu")
RESULT = "network-size"


def trained(network: str) -> DiffusionBoltzmannGenerator:
    """Train by the recipe, or continue an interrupted training; or load a shipped generator."""
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
    """Measure ESS in both directions."""
    log_w = gen.log_weights(frames, n_steps=n_steps, seed=TEST_SEED)
    ensemble = gen.sample(N_SAMPLES, n_steps=n_steps, seed=SAMPLE_SEED)
    return {"n_steps": n_steps, **forward_part(log_w), **reverse_part(ensemble)}


def times(generators: list[DiffusionBoltzmannGenerator]) -> np.ndarray:
    """Median seconds of a step and sample in alternating rounds, for each generator."""
    options = {"n_steps": 25, "batch_size": BATCH_SIZE, "progress": False}
    works = [functools.partial(gen.sample, BATCH_SIZE, **options) for gen in generators]
    return np.median(in_turns(works, ROUNDS, CPU), axis=0) / (25 * BATCH_SIZE)


def main() -> None:
    """Measure what is missing; write the table."""
    command_line(__doc__).parse_args()
    rows: dict[str, Row] = read_result(RESULT, {})
    generators = [trained(network) for network in NETWORKS]
    frames = held_out_frames(NAME, N_SAMPLES)
    for network, gen in zip(NETWORKS, generators, strict=True):
        for n_steps in STEPS:
            if network not in SHIPPED and f"{network} @ {n_steps}" not in rows:
                rows[f"{network} @ {n_steps}"] = measure(gen, n_steps, frames)
                write_result(RESULT, rows)
    ways = (column for n in STEPS for column in (f"ESS, {n} steps: forward", "reverse"))
    table = MarkdownTable("network", "µs a step and sample", *ways, "effective / s, the most")
    for network, second in zip(NETWORKS, times(generators), strict=True):
        where, label = rows, network
        if network in SHIPPED:
            where, label = system_rows(SHIPPED[network]), AS_SHIPPED
        found = [where[f"{label} @ {n}"] for n in STEPS]
        cells = [network.removeprefix("egnn-").replace("x", " x "), f"{1e6 * second:.3g}"]
        for row in found:
            cells += [percent(*row["forward_ess"]), percent(*row["reverse_ess"])]
        best = most_effective(found)
        table.add(*cells, f"{per_step(best) / second:.3g} ({best['n_steps']} steps)")
    note = (
        f"DW-4, {N_SAMPLES:,} in each direction; times: the median of {ROUNDS} alternating "
        f"rounds, batches of {BATCH_SIZE}, on "
    )
    write_table(RESULT, table, note, CPU)


if __name__ == "__main__":
    main()
