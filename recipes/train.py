"""Make a shipped generator: reference data, training, tuning, archive, card and log.

    python -m recipes.train dw4
    python -m recipes.train aldp-800K --data-only
    python -m recipes.train lj13 --keep-network    # only what comes after it

Everything is seeded. An interrupted script continues where it was when it is called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.training.pair_head import forget_pair_head
from recipes.reference import basin_frames, basin_report, reference_frames, reports, training_frames
from recipes.settings import MODEL_SEED, RECIPES, TEST_SEED, TRAIN_SEED, Recipe, build_system

FOLDER = Path(__file__).parent
FINE_LEVELS: dict[str, Any] = {"log_t_mean": -0.3, "log_t_std": 1.1}
"""Noise levels of a second training: log t in units of the data."""


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
        if recipe.basins:
            basin_frames(options.name)
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
    first = {"log": history, "fine": [], "data": reports(options.name)}
    finish(options.name, gen, recipe, first, options.precision)


def compile_layers(network: torch.nn.Module) -> None:
    """Compile the layers one by one, so that they share code; stored weights do not change."""
    for layer in network.layers:  # type: ignore[union-attr]
        layer.compile()


def first_network(name: str) -> torch.nn.Module:
    """The network of a shipped generator, without its pair head."""
    network = DiffusionBoltzmannGenerator.from_pretrained(name).network
    forget_pair_head(network)
    return network


@torch.no_grad()
def round_weights(network: torch.nn.Module) -> None:
    """Round weights to half precision (1 part in 2,000 at most), kept in single precision."""
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
    with_basins = training_frames(name) if recipe.basins else frames
    fine = list(first["fine"])
    for k in range(len(fine), len(recipe.fine_iterations)):
        last = k + 1 == len(recipe.fine_iterations)
        everywhere = last and recipe.last_at_all_levels
        log = gen.train(
            with_basins if last else frames,
            recipe.fine_iterations[k],
            checkpoint=f"runs/{name}-fine-{k}.ckpt",
            held_out=0.1,
            batch_size=recipe.fine_batch_size or recipe.batch_size,
            learning_rate=recipe.fine_learning_rate,
            precision=precision,
            seed=MODEL_SEED + 1 + k,
            **({} if everywhere else FINE_LEVELS),
        )
        fine.append(dataclasses.asdict(log))
    logs: dict[str, Any] = {"log": first["log"], "fine": fine, "head": None}
    if recipe.head_iterations:
        head = gen.train_pair_head(
            with_basins,
            recipe.head_iterations,
            n_hidden=recipe.head_width,
            held_out=0.1,
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
        "later_data": reports(name, recipe.later_frames),
        "basins": basin_report(name) if recipe.basins else [],
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
