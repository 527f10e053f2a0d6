"""Archives: atomic, JSON and tensors only, and clear about what is wrong with a file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openmm_vtdis import storage

TENSORS = {"a": torch.arange(6).reshape(2, 3), "b.c": torch.randn(4, dtype=torch.float64)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return storage.write_archive(tmp_path / "x.vtdis", "generator", TENSORS, {"answer": [1, None]})


def test_round_trip_is_exact(archive: Path) -> None:
    tensors, metadata = storage.read_archive(archive, "generator")
    assert metadata["answer"] == [1, None]
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_archive_is_refused(archive: Path, keep: int) -> None:
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or foreign"):
        storage.read_archive(archive, "generator")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.vtdis"
    path.write_text("hello")
    with pytest.raises(ValueError, match="truncated or foreign"):
        storage.read_archive(path, "generator")
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="foreign safetensors file"):
        storage.read_archive(path, "generator")
    save_file({"a": torch.ones(2)}, path, metadata={"openmm_vtdis": "[1]"})
    with pytest.raises(ValueError, match="foreign header"):
        storage.read_archive(path, "generator")


def test_newer_versions_and_other_kinds_are_refused(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint archive, got a 'generator' one"):
        storage.read_archive(archive, "checkpoint")
    monkeypatch.setattr(storage.archive, "FORMAT_VERSION", 99)
    storage.write_archive(archive, "generator", TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format version <= 2, got 99.*upgrade"):
        storage.read_archive(archive, "generator")


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = archive.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.atomic.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        storage.write_archive(archive, "generator", TENSORS, {"new": True})
    assert archive.read_bytes() == before
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]


def test_metadata_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_archive(tmp_path / "x", "generator", {}, {"nan": float("nan")})
    assert json.loads("{}") == {}


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such archive"):
        storage.read_archive(tmp_path / "nothing.vtdis", "generator")


def test_select_prefix() -> None:
    flat = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    assert list(storage.select_prefix(flat, "a.")) == ["b"]


def test_an_altered_archive_is_refused(tmp_path: Path) -> None:
    """A digit of the document, and a byte of a tensor."""
    path = tmp_path / "a.vtdis"
    storage.write_archive(path, "generator", {"x": torch.arange(50.0)}, {"k": 3000})
    whole = path.read_bytes()
    for where in (whole.index(b"3000"), len(whole) - 30):
        changed = bytearray(whole)
        changed[where] ^= 0b0001
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="expected a whole archive, got one that was altered"):
            storage.read_archive(path, "generator")
    path.write_bytes(whole)
    assert storage.read_archive(path, "generator")[1]["k"] == 3000


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "x.vtdis"):
        with pytest.raises(ValueError, match="expected the name of a file in a folder that exists"):
            storage.write_archive(path, "generator", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for name in ("old", "new"):
        link, there = tmp_path / name, tmp_path / "scratch" / name
        if name == "old":
            there.write_bytes(b"before")
        link.symlink_to(there)
        storage.write_atomically(link, b"after")
        assert link.is_symlink()
        assert there.read_bytes() == b"after"
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["new", "old"]


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device: '.*/x'"), storage.replacing(path):
        raise full
    for other in (
        OSError(errno.ENOENT, "No such file", "elsewhere"),
        ConnectionResetError(104, "x"),
    ):
        with pytest.raises(OSError, match="elsewhere|x$"), storage.replacing(path):
            raise other  # control: has nothing to do with the file
    assert not list(tmp_path.iterdir())


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "away").symlink_to(tmp_path / "nowhere" / "x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in before:
        with pytest.raises(ValueError, match="expected the name of a file in a folder that exists"):
            storage.write_atomically(tmp_path / name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo()


def test_an_older_archive_says_how_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.vtdis"
    monkeypatch.setattr(storage.archive, "FORMAT_VERSION", 1)
    storage.write_archive(path, "generator", TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match=r"format version 2, got 1, which an older .* python -m recipes.convert .*old.vtdis",
    ):
        storage.read_archive(path, "generator")
