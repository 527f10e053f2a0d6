"""Killed, or out of space: what was written is whole, the rest is made the same."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, cli, storage
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import OpenMMTarget, double_well
from recipes import reference
from tests.faults import killed_at_random, made_for_double_well, with_room_for
from tests.training.test_trainer import make_trainer


@pytest.fixture(scope="module")
def gen() -> DiffusionBoltzmannGenerator:
    return made_for_double_well()


@pytest.mark.parametrize("name", ["model.vtdis", "samples.nc", "samples.npz"])
def test_no_room_for_a_file_leaves_the_old_one(
    name: str, gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    path = tmp_path / name
    ensemble = gen.sample(200, seed=0, progress=False)
    save = gen.save if path.suffix == ".vtdis" else ensemble.save
    save(path)
    before = path.read_bytes()
    assert "File too large" in with_room_for(len(before) - 1, lambda: save(path))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    assert with_room_for(len(before), lambda: save(path)) == ""


def test_no_room_for_a_checkpoint_keeps_the_last_one(tmp_path: Path) -> None:
    path, whole = tmp_path / "run.ckpt", tmp_path / "whole.ckpt"
    make_trainer(12).run(whole, progress=False)
    make_trainer(12).save(path)
    before = path.read_bytes()
    said = with_room_for(
        len(before) - 1,
        lambda: make_trainer(12).run(path, checkpoint_seconds=0.0, progress=False),
    )
    assert "File too large" in said
    assert path.read_bytes() == before
    make_trainer(12).run(path, progress=False)
    (one, _), (other, _) = (storage.read_archive(p, "checkpoint") for p in (path, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- a place that cannot be written -------------------------------------------------------------
UNWRITABLE = Path("/sys")


@pytest.mark.skipif(not UNWRITABLE.is_dir(), reason="needs a folder that not even root can write")
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a step is trained, a sample drawn, or a trajectory tuned."""
    trainer, ensemble = make_trainer(5), gen.sample(10, seed=0, progress=False)
    for name in ("sample", "tune", "train"):
        monkeypatch.delattr(DiffusionBoltzmannGenerator, name)
    system, archive = double_well(), tmp_path / "model.vtdis"
    gen.save(archive)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system.system))
    no = str(UNWRITABLE / "file")
    works: list[Callable[[], object]] = [
        lambda: gen.save(f"{no}.vtdis"),
        lambda: ensemble.save(f"{no}.nc"),
        lambda: ensemble.save(f"{no}.npz"),
        lambda: trainer.run(f"{no}.ckpt", progress=False),
        lambda: sample_to_file(gen, f"{no}.nc", 10, progress=False),
        lambda: sample_hmc(gen.target, 4, 2, seed=0, checkpoint=f"{no}.ckpt", progress=False),
    ]
    for work in works:
        with pytest.raises(OSError, match="cannot write there"):
            work()
    assert trainer.iteration == 0
    frames = ["-t", str(tmp_path / "none.nc")]
    for command in (
        ["train", "-s", str(tmp_path / "system.xml"), "-T", "300", *frames, "-o", f"{no}.vtdis"],
        ["tune", str(archive), *frames, "-o", f"{no}.vtdis"],
        ["sample", str(archive), "-o", f"{no}.nc"],
    ):
        assert cli.main(command) == 2


# -- tuning ------------------------------------------------------------------------------------
def test_tuning_that_is_killed_leaves_the_archive_whole(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    """It begins again, and ends in the same archive, tuned or not before."""
    system = double_well()
    spread = 0.3 * np.random.default_rng(5).normal(size=(400, 4, 2))

    def tune(path: Path) -> None:
        one = DiffusionBoltzmannGenerator.load(path)
        one.tune(system.positions + spread, 6, n_trajectories=400, seed=1, progress=False)
        one.save(path)

    whole, killed = tmp_path / "whole.vtdis", tmp_path / "killed.vtdis"
    for path in (whole, killed):
        gen.save(path)
    began = time.monotonic()
    tune(whole)
    longest, rng, n_kills = 0.25 * (time.monotonic() - began), random.Random(4), 0
    while not killed_at_random(lambda: tune(killed), longest, rng):
        n_kills, longest = n_kills + 1, 1.1 * longest
        assert n_kills < 100
        assert DiffusionBoltzmannGenerator.load(killed).process is not None
    assert n_kills >= 2
    (one, about), (other, about_other), (old, _) = (
        storage.read_archive(path, "generator")
        for path in (whole, killed, gen.save(tmp_path / "old.vtdis"))
    )
    assert about == about_other
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["covariance"].shape != old["covariance"].shape


# -- reference data ----------------------------------------------------------------------------
def test_reference_data_that_are_killed_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that makes them, with a checkpoint a proposal: the same frames and report."""
    small = dataclasses.replace(
        reference.RECIPES["dw4"],
        n_chains=20,
        n_samples=5,
        burn_in=40,
        thin=12,
        n_leapfrog=10,
        ladder=(1.0, 1.3, 1.7),
    )
    monkeypatch.setitem(reference.RECIPES, "dw4", small)
    often = functools.partial(reference.sample_hmc, checkpoint_seconds=0.0, progress=False)
    monkeypatch.setattr(reference, "sample_hmc", often)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    frames = reference.reference_frames("dw4", "train", folder=whole)
    longest, rng, n_kills = 0.25 * (time.monotonic() - began), random.Random(3), 0
    while not killed_at_random(
        lambda: reference.reference_frames("dw4", "train", folder=killed), longest, rng
    ):
        n_kills, longest = n_kills + 1, 1.05 * longest
        assert n_kills < 100
        for path in killed.glob("*.ckpt"):
            storage.read_archive(path, "hmc")
        for path in killed.glob("*.npy"):
            np.load(path)
    assert n_kills >= 2
    assert frames.shape == (100, 4, 2)
    np.testing.assert_array_equal(reference.reference_frames("dw4", "train", folder=killed), frames)
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["dw4-train.chains.npy", "dw4-train.npy", "dw4-train.txt"]
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_checkpoint_of_other_reference_data_is_refused(tmp_path: Path) -> None:
    """Other arguments, another Hamiltonian and another start; a generator as seed; no folder."""
    target, warm = double_well().target(), double_well()
    warm = OpenMMTarget(warm.system, None, 2.0 * warm.temperature, n_dims=2)
    options = {"n_samples": 2, "burn_in": 5, "thin": 1, "seed": 4, "progress": False}
    options |= {"checkpoint": tmp_path / "hmc.ckpt"}
    first = sample_hmc(target, 10, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(
        sample_hmc(target, 10, **options).positions,
        first.positions,
        rtol=0.0,
        atol=0.0,  # type: ignore[arg-type]
    )
    for changed, message in (
        ({"seed": 5}, r"differs in seed \(4 there, 5 here\)"),
        ({"thin": 2}, r"differs in thin \(1 there, 2 here\)"),
        ({"ladder": (1.0, 2.0)}, "differs in ladder"),
        ({"target": warm}, "differs in the target or the starting configurations"),
        ({"initial": torch.tensor(double_well().positions)}, "or the starting configurations"),
        ({"seed": torch.Generator()}, "seed: expected an integer"),
        ({"checkpoint": tmp_path / "no" / "hmc.ckpt"}, "in a folder that exists"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds: expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_hmc(**{"target": target, "n_chains": 10, **options, **changed})  # type: ignore[arg-type]


# -- training ----------------------------------------------------------------------------------
def test_training_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path: Path) -> None:
    def train(path: Path) -> None:
        make_trainer(40).run(path, checkpoint_seconds=0.0, progress=False)

    whole, killed = tmp_path / "whole.ckpt", tmp_path / "killed.ckpt"
    began = time.monotonic()
    train(whole)
    longest, rng, n_kills = 0.25 * (time.monotonic() - began), random.Random(2), 0
    while not killed_at_random(lambda: train(killed), longest, rng):
        n_kills, longest = n_kills + 1, 1.05 * longest
        assert n_kills < 100
        if killed.exists():
            storage.read_archive(killed, "checkpoint")
    assert n_kills >= 2
    (one, about), (other, about_other) = (
        storage.read_archive(path, "checkpoint") for path in (whole, killed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert about["log"]["losses"] == about_other["log"]["losses"]
