"""Samples in shards: drawn by any number of processes, joined once, and the same in the end."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.core.space import Space
from openmm_vtdis.ensemble import files
from openmm_vtdis.generator import sharded
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.targets import OpenMMTarget, double_well
from tests.conftest import exact_generator
from tests.faults import killed_at_random, made_for_double_well, same, with_room_for


@pytest.fixture(scope="module")
def gen() -> DiffusionBoltzmannGenerator:
    return made_for_double_well()


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
