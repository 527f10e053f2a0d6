"""Settings of the shipped generators: their systems, data, networks and tunings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from openmm_vtdis.targets import BenchmarkSystem, alanine_dipeptide, double_well, lennard_jones

TRAIN_SEED, TEST_SEED, MODEL_SEED = 101, 202, 7
"""Seeds of the training data, of held-out data (which no fit ever sees), and of the model."""


Basin = tuple[bool, bool, bool]
"""A basin of alanine dipeptide: whether left-handed, and whether either peptide bond is cis."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a shipped generator.

    Attributes
    ----------
    network
        Size of the network.
    n_iterations, batch_size
        Settings of the training.
    n_chains, n_samples, burn_in, thin, n_leapfrog
        Settings of the Hamiltonian Monte Carlo that makes a shard of the data.
    n_steps, t_min, t_max
        Grid that the archive is tuned for; the ends are in model coordinates.
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
    """Recipe whose system and reference data are used; None: its own."""
    learning_rate: float = 1e-3
    """Peak learning rate of the first training."""
    fine_learning_rate: float = 5e-4
    fine_batch_size: int | None = None
    """Batch size of further trainings; None: as in the first."""
    network_of: str | None = None
    """Shipped generator whose network replaces a first training."""
    fine_iterations: tuple[int, ...] = ()
    """Iterations of further trainings, on noise levels where the energy does not know better."""
    last_at_all_levels: bool = False
    """Whether the last of these is at the noise levels of the first training instead."""
    basins: tuple[Basin, ...] = ()
    """Rare basins, of which the last training gets additional frames."""
    basins_of: str | None = None
    """Recipe whose training data show these basins."""
    basin_chains: int = 0
    """Chains in each basin, from different frames; the rest is as in a shard, but for:"""
    basin_samples: int = 100
    basin_thin: int = 3
    head_iterations: int = 0
    """Iterations of the training of the pair head, which "pairwise" needs."""
    head_width: int = 64
    later_frames: int | None = None
    """Number of frames, the first ones, for all that follows the first training; None: all."""
    covariance: str = "isotropic"
    schedule: str = "geometric"
    n_trajectories: int = 10_000
    """Forward trajectories of the tuning."""
    half_precision: bool = False
    """Whether the weights are rounded to 16 bits at the end, for large networks."""


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
        head_width=32,
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
        fine_iterations=(5_000, 5_000, 5_000),
        basins=((False, True, False), (False, False, True), (False, True, True)),
        basins_of="aldp-800K",
        basin_chains=40,
        basin_thin=2,
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
        fine_iterations=(6_000, 5_000),
        basins=((True, False, False), (False, True, False), (False, False, True)),
        basins_of="aldp-800K",
        basin_chains=40,
        head_iterations=1_000,
        covariance="pairwise",
        schedule="adaptive",
        n_trajectories=600,
    ),
}

RECIPES["dw4-small"] = dataclasses.replace(RECIPES["dw4"], network="egnn-3x64", data_of="dw4")

RECIPES["aldp-800K-7x256"] = dataclasses.replace(
    RECIPES["aldp-800K"],
    network="egnn-7x256",
    n_iterations=5_300,
    batch_size=512,
    data_of="aldp-800K",
    learning_rate=5e-4,
    fine_learning_rate=7e-4,
    fine_batch_size=256,
    fine_iterations=(4_900, 7_900),
    last_at_all_levels=True,
    head_iterations=1_200,
    n_trajectories=600,
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
