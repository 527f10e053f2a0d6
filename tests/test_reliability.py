"""Killed, out of space, several at once: what was written is whole, the rest is made the same."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import openmm
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, storage
from openmm_vtdis.core.space import Space
from openmm_vtdis.ensemble import files
from openmm_vtdis.generator import sharded
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import OpenMMTarget, double_well
from recipes import reference
from tests.conftest import exact_generator
from tests.training.test_trainer import make_trainer


@pytest.fixture(scope="module")
def gen() -> DiffusionBoltzmannGenerator:
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


# -- samples -----------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_the_number_of_processes_does_not_matter(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, suffix: str
) -> None:
    alone, shared = tmp_path / f"alone{suffix}", tmp_path / f"shared{suffix}"
    options = {"seed": 3, "shard_size": 10, "progress": False}
    assert sample_to_file(gen, alone, 47, **options)  # type: ignore[arg-type]
    done = [
        sample_to_file(gen, shared, 47, process=(i, 3), **options)  # type: ignore[arg-type]
        for i in (2, 0, 1)
    ]
    assert done == [False, False, True]
    same(alone, shared)
    assert len(WeightedEnsemble.load(alone)) == 47
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alone.name, shared.name])
    for late in ((0, 1), (1, 3), (5, 6)):  # started again when all is done
        assert sample_to_file(gen, shared, 47, process=late, **options)  # type: ignore[arg-type]


def test_samples_of_a_run_that_is_killed_again_and_again(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole.nc", tmp_path / "killed.nc"
    began = time.monotonic()
    sample_to_file(gen, whole, 150, shard_size=10, progress=False)
    longest, rng, n_kills = 0.25 * (time.monotonic() - began), random.Random(1), 0
    while not killed_at_random(
        lambda: sample_to_file(gen, killed, 150, shard_size=10, progress=False), longest, rng
    ):
        n_kills, longest = n_kills + 1, 1.05 * longest
        assert n_kills < 100
        assert not killed.exists() or len(WeightedEnsemble.load(killed)) == 150
        for shard in Path(f"{killed}.shards").glob("[0-9]*.nc"):
            assert len(WeightedEnsemble.load(shard)) == 10
    assert n_kills >= 2
    same(whole, killed)
    assert not Path(f"{killed}.shards").exists()


def test_shards_of_another_run_are_refused(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.nc"
    assert not sample_to_file(gen, path, 20, shard_size=10, process=(0, 2), progress=False)
    for options, named in (({"seed": 1}, "seed"), ({"n_steps": 7}, "n_steps")):
        with pytest.raises(ValueError, match=f"differ in {named}"):
            sample_to_file(gen, path, 20, shard_size=10, progress=False, **options)  # type: ignore[arg-type]
    process = gen.process
    assert process is not None
    other = process.with_mean_coefficients(1.01 * process.coefficients)
    with monkeypatch.context() as patch:
        patch.setattr(gen, "process", other)
        with pytest.raises(ValueError, match="differ in generator"):
            sample_to_file(gen, path, 20, shard_size=10, progress=False)
    warm = double_well()
    target = OpenMMTarget(warm.system, None, 2.0 * warm.temperature, n_dims=2)
    monkeypatch.setattr(gen, "target", target)
    with pytest.raises(ValueError, match="differ in generator"):
        sample_to_file(gen, path, 20, shard_size=10, progress=False)


def test_all_shards_of_a_run_have_seeds_of_their_own(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    draw = gen.sample

    def noted(n: int, **options: Any) -> WeightedEnsemble:
        seeds.append(options["seed"])
        return draw(n, **options)

    monkeypatch.setattr(gen, "sample", noted)
    for seed in (0, 1):
        sample_to_file(gen, tmp_path / f"{seed}.nc", 40, shard_size=1, seed=seed, progress=False)
    assert len(set(seeds)) == 80
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_processes_that_end_together_all_succeed(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, suffix: str
) -> None:
    """All shards are there: three processes join and clear at the same time, again and again."""
    path, kept = tmp_path / f"samples{suffix}", tmp_path / "kept"
    options = {"shard_size": 5, "progress": False}
    assert not sample_to_file(gen, path, 30, process=(0, 2), **options)  # type: ignore[arg-type]
    folder = Path(f"{path}.shards")
    shutil.copytree(folder, kept)
    assert sample_to_file(gen, path, 30, process=(1, 2), **options)  # type: ignore[arg-type]
    path.unlink()
    sample_to_file(gen, path, 30, process=(1, 2), **options)  # type: ignore[arg-type]
    for file in kept.iterdir():
        shutil.copy(file, folder)
    shutil.rmtree(kept)
    shutil.copytree(folder, kept)
    for _ in range(6):
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        children = []
        for i in range(3):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    time.sleep(0.01 * i)
                    done = sample_to_file(gen, path, 30, process=(i, 3), **options)  # type: ignore[arg-type]
                    code = 0 if done else 2
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0, 0]
        assert len(WeightedEnsemble.load(path)) == 30
        assert not any(file.suffix == ".part" for file in tmp_path.iterdir())


def test_process_that_finds_its_shards_joined_and_taken_away(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends the run while this one draws a shard, or writes the plan of the run."""
    path, draw, write = tmp_path / "samples.nc", gen.sample, sharded.write_atomically

    def end_it() -> None:
        monkeypatch.undo()
        assert sample_to_file(gen, path, 30, shard_size=10, progress=False)

    def drawn(n: int, **options: Any) -> WeightedEnsemble:
        end_it()
        return draw(n, **options)

    def written(name: Path, content: bytes) -> Path:
        end_it()
        return write(name, content)

    for owner, name, replacement in (
        (gen, "sample", drawn),
        (sharded, "write_atomically", written),
    ):
        monkeypatch.setattr(owner, name, replacement)
        assert sample_to_file(gen, path, 30, shard_size=10, progress=False)
        assert sorted(tmp_path.iterdir()) == [path]
        path.unlink()


def test_bad_input_for_shards(gen: DiffusionBoltzmannGenerator, tmp_path: Path) -> None:
    path = tmp_path / "samples.nc"
    with pytest.raises(ValueError, match=r"expected \(i, N\) with 0 <= i < N"):
        sample_to_file(gen, path, 10, process=(2, 2))
    with pytest.raises(ValueError, match=r"expected \(i, N\) with 0 <= i < N, got 3"):
        sample_to_file(gen, path, 10, process=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends in .nc or .npz"):
        sample_to_file(gen, tmp_path / "samples.dcd", 10)
    path.write_text("")
    with pytest.raises(ValueError, match="exists, and cannot be read; give another name"):
        sample_to_file(gen, path, 10)
    gen.sample(10, seed=0, progress=False).save(path)
    for process in ((0, 1), (7, 8)):
        with pytest.raises(ValueError, match="exists; give another name"):
            sample_to_file(gen, path, 10, process=process)
    path = tmp_path / "other.nc"
    for options, message in (
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"seed": 2**32}, "seed: expected an integer >= 0"),
        ({"seed": None}, "seed: expected an integer, got None"),
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"n_steps": 2.5}, "n_steps: expected an integer"),
        ({"n_steps": 0}, "n_steps: expected an integer"),
        ({"shard_size": 0}, "shard_size: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_to_file(gen, path, 10, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in a folder that exists"):
        sample_to_file(gen, tmp_path / "no" / "such.nc", 10)
    assert not Path(f"{path}.shards").exists()  # bad input leaves no plan
    assert sample_to_file(gen, path, np.int64(10), seed=np.int64(3), progress=False)  # type: ignore[arg-type]


def test_a_damaged_shard_is_named_and_the_others_stay(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    path = tmp_path / "samples.nc"
    sample_to_file(gen, path, 30, shard_size=10, process=(0, 2), progress=False)
    shard = tmp_path / "samples.nc.shards" / "000000.nc"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"000000\.nc: expected an .*; remove that shard"):
        sample_to_file(gen, path, 30, shard_size=10, progress=False)
    shard.unlink()
    assert sample_to_file(gen, path, 30, shard_size=10, progress=False)


@pytest.mark.parametrize("name", ["samples.nc", "samples.npz"])
def test_shards_are_joined_where_a_link_points_to(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, name: str
) -> None:
    (tmp_path / "scratch").mkdir()
    link, there = tmp_path / name, tmp_path / "scratch" / name
    link.symlink_to(there)
    assert sample_to_file(gen, link, 30, shard_size=10, progress=False)
    assert link.is_symlink()
    assert len(WeightedEnsemble.load(there)) == 30
    assert [path.name for path in there.parent.iterdir()] == [name]


def test_joining_holds_one_shard_at_a_time(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest array that is written at once is a shard's."""
    sizes = []
    append = files._append

    def counted(file: netCDF4.Dataset, arrays: dict[str, np.ndarray]) -> None:
        sizes.append(len(arrays["positions"]))
        append(file, arrays)

    monkeypatch.setattr(files, "_append", counted)
    sample_to_file(gen, tmp_path / "samples.nc", 100, shard_size=10, progress=False)
    assert max(sizes) == 10


def test_weights_in_a_file_have_the_known_log_z(tmp_path: Path) -> None:
    """Of an exact mixture, log Z = 0, in units that are not nm; control: a factor in the weight."""
    target, gen = exact_generator(0.7, Space(4, 2))
    frames = target.sample(1_000, seed=1)
    gen.tune(frames, 20, "diagonal", n_trajectories=600, seed=0, progress=False)
    path = tmp_path / "samples.nc"
    assert sample_to_file(gen, path, 3_000, shard_size=700, seed=2, progress=False)
    ensemble = WeightedEnsemble.load(path)
    assert abs(ensemble.log_z().z(0.0)) < 4.0
    assert abs(ensemble.log_z().z(np.log(1.3))) > 4.0
    energies = target.reduced_energy(torch.tensor(ensemble.positions)).numpy()
    np.testing.assert_allclose(ensemble.reduced_energies, energies, rtol=1e-12)


# -- a full disk -------------------------------------------------------------------------------
def test_a_full_disk_is_an_error_and_loses_nothing(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.nc"
    write, calls = Path.write_bytes, []

    def until_full(self: Path, content: bytes) -> int:
        shard = ".nc." in self.name
        calls.extend([self] * shard)
        if shard and len(calls) == 3:
            write(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(OSError, match="No space left"):
        sample_to_file(gen, path, 50, shard_size=10, progress=False)
    folder = tmp_path / "samples.nc.shards"
    assert sorted(p.name for p in folder.iterdir()) == ["000000.nc", "000001.nc", "plan.json"]
    assert sample_to_file(gen, path, 50, shard_size=10, progress=False)


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


def test_no_room_to_join_shards_keeps_them(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    """The NetCDF library has an error of its own for it."""
    path = tmp_path / "samples.nc"
    options = {"shard_size": 400, "progress": False}
    assert not sample_to_file(gen, path, 2_000, process=(0, 2), **options)  # type: ignore[arg-type]
    room = (tmp_path / "samples.nc.shards" / "000000.nc").stat().st_size + 1_000
    said = with_room_for(room, lambda: sample_to_file(gen, path, 2_000, **options))  # type: ignore[arg-type]
    assert "cannot be written: File too large" in said
    assert len(list((tmp_path / "samples.nc.shards").glob("[0-9]*.nc"))) == 5
    assert not path.exists()
    assert sample_to_file(gen, path, 2_000, **options)  # type: ignore[arg-type]


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
