"""Processes that are killed or run out of room, and a generator that is made in a moment."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.targets import double_well


def made_for_double_well() -> DiffusionBoltzmannGenerator:
    """Untrained but tuned: weights are exact for any network."""
    system = double_well()
    made = DiffusionBoltzmannGenerator(
        system.system, None, system.temperature, n_dims=2, network="egnn-1x8", seed=0
    )
    spread = 0.3 * np.random.default_rng(0).normal(size=(400, 4, 2))
    made.train(system.positions + spread, 3, batch_size=16, progress=False)
    made.tune(
        system.positions + spread, 4, "isotropic", schedule="geometric", n_trajectories=200, seed=0,
        progress=False,
    )  # fmt: skip
    return made


def same(a: Path, b: Path) -> None:
    one, other = WeightedEnsemble.load(a), WeightedEnsemble.load(b)
    for name in ("positions", "log_weights", "reduced_energies"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.metadata == other.metadata


def killed_at_random(work: Callable[[], object], longest: float, rng: random.Random) -> bool:
    """Run in a child that gets SIGKILL within ``longest`` seconds; whether it was done before."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    end = time.monotonic() + rng.uniform(0.0, longest)
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def with_room_for(n_bytes: int, work: Callable[[], object]) -> str:
    """What an OSError says that ``work`` raises where no file can have more bytes; "" if none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "another error"
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
            work()
            said = ""
        except OSError as error:
            said = str(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said
