"""Files: exact round trips, what other programs read, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import mdtraj as md
import netCDF4
import numpy as np
import pytest

from openmm_vtdis import storage
from openmm_vtdis.ensemble import WeightedEnsemble
from openmm_vtdis.ensemble.files import _checksum
from openmm_vtdis.topology import placeholder_topology, topology_to_json
from tests.ensemble.stored import some_molecules, some_particles


@pytest.fixture(scope="module")
def molecules() -> WeightedEnsemble:
    return some_molecules()


@pytest.fixture(scope="module")
def particles() -> WeightedEnsemble:
    return some_particles()


SUFFIXES = (".nc", ".npz")


def assert_same(a: WeightedEnsemble, b: WeightedEnsemble) -> None:
    for name in ("positions", "log_weights", "reduced_energies"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    assert a.temperature == b.temperature
    assert a.metadata == b.metadata
    if a.topology is None or b.topology is None:
        assert a.topology is b.topology
    else:
        assert topology_to_json(a.topology) == topology_to_json(b.topology)


# -- what is written --------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["molecules", "particles"])
def test_round_trips_are_exact(
    name: str, suffix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ensemble = request.getfixturevalue(name)
    path = ensemble.save(tmp_path / f"ensemble{suffix}")
    assert path == tmp_path / f"ensemble{suffix}"
    again = WeightedEnsemble.load(str(path))
    assert_same(ensemble, again)
    assert os.listdir(tmp_path) == [path.name]
    first = path.read_bytes()
    again.save(path)  # over itself
    assert path.read_bytes() == first


def test_mdtraj_reads_the_trajectory(molecules: WeightedEnsemble, tmp_path: Path) -> None:
    path = molecules.save(tmp_path / "x.nc")
    traj = md.load(str(path), top=md.Topology.from_openmm(molecules.topology))
    assert traj.n_frames == 20
    np.testing.assert_allclose(traj.xyz, molecules.positions, atol=1e-5)
    np.testing.assert_array_equal(
        md.load(str(path), top=traj.topology, stride=3).xyz, traj.xyz[::3]
    )


def test_flat_particles_are_padded_for_mdtraj(particles: WeightedEnsemble, tmp_path: Path) -> None:
    path = particles.save(tmp_path / "x.nc")
    traj = md.load(str(path), top=md.Topology.from_openmm(placeholder_topology(4)))
    np.testing.assert_allclose(traj.xyz[..., :2], particles.positions, atol=1e-5)
    assert (traj.xyz[..., 2] == 0.0).all()


def test_netcdf_follows_the_amber_convention(molecules: WeightedEnsemble, tmp_path: Path) -> None:
    path = molecules.save(tmp_path / "x.nc")
    with netCDF4.Dataset(path) as file:
        assert file.data_model == "NETCDF3_64BIT_OFFSET"
        assert (file.Conventions, file.ConventionVersion) == ("AMBER", "1.0")
        assert file.program == "openmm-vtdis"
        assert file.dimensions["frame"].isunlimited()
        assert file["coordinates"].dtype == np.float32
        assert file["coordinates"].dimensions == ("frame", "atom", "spatial")
        assert file["coordinates"].units == "angstrom"
        assert b"".join(file["spatial"][:]) == b"xyz"
        for name in ("log_weight", "reduced_energy"):
            assert file[name].dtype == np.float64
            assert file[name].dimensions == ("frame",)
        np.testing.assert_array_equal(file["log_weight"][:], molecules.log_weights)


def test_many_dimensions_need_npz(tmp_path: Path) -> None:
    mixture = WeightedEnsemble(np.ones((2, 1, 50)), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"at most 3 dimensions .* got 50; save to .* \.npz"):
        mixture.save(tmp_path / "x.nc")
    assert os.listdir(tmp_path) == []
    assert_same(mixture, WeightedEnsemble.load(mixture.save(tmp_path / "x.npz")))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_the_old_file(
    suffix: str, particles: WeightedEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = particles.save(tmp_path / f"x{suffix}")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage.atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        particles[:2].save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(particles, WeightedEnsemble.load(path))


# -- what is refused --------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["x.pdb", "x", "nc"])
def test_other_suffixes_are_refused(name: str, particles: WeightedEnsemble, tmp_path: Path) -> None:
    for use in (particles.save, WeightedEnsemble.load):
        with pytest.raises(ValueError, match=r"expected a file name that ends in \.nc or \.npz"):
            use(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such ensemble"):
        WeightedEnsemble.load(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["molecules", "particles"])
def test_a_file_cut_anywhere_is_refused(
    name: str, suffix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name).save(tmp_path / f"whole{suffix}")
    content = path.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    lengths = {0, 1, 50, 300, *np.linspace(0, len(content) - 1, 25, dtype=int).tolist()}
    for length in sorted({*lengths, len(content) - 9, len(content) - 1}):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut") as caught:
            WeightedEnsemble.load(cut)
        assert "expected" in str(caught.value), length


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_altered_number_is_refused(
    suffix: str, particles: WeightedEnsemble, tmp_path: Path
) -> None:
    path = particles.save(tmp_path / f"x{suffix}")
    big_endian = particles.log_weights[2:3].astype(">f8").tobytes()
    needle = big_endian if suffix == ".nc" else particles.log_weights[2:3].tobytes()
    content = path.read_bytes()
    assert content.count(needle) == 1
    path.write_bytes(content.replace(needle, b"\0" * 8))
    with pytest.raises(ValueError, match="expected an ensemble written by openmm-vtdis"):
        WeightedEnsemble.load(path)


def test_a_foreign_trajectory_is_refused(molecules: WeightedEnsemble, tmp_path: Path) -> None:
    path = tmp_path / "md.nc"
    molecules[:2].to_mdtraj().save(str(path))
    with pytest.raises(ValueError, match=r"without positions, log_weight, .*variables: .*coordin"):
        WeightedEnsemble.load(path)


def garbage(path: Path) -> None:
    path.write_bytes(b"not a file of any kind" * 100)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2, 3]))


def other_arrays(path: Path) -> None:
    np.savez(path, a=np.zeros(3), positions=np.zeros(3))


def object_array(path: Path) -> None:
    arrays = {k: np.zeros(1) for k in ("log_weights", "reduced_energies", "document")}
    np.savez(path, positions=np.array([{}], dtype=object), **arrays)  # type: ignore[arg-type]


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("positions.npy", b"text")


@pytest.mark.parametrize(
    ("suffix", "make", "message"),
    [
        (".nc", garbage, "a truncated or foreign file"),
        (".nc", pickled, "a truncated or foreign file"),
        (".npz", garbage, "not a zip archive"),
        (".npz", pickled, "not a zip archive"),
        (".npz", other_arrays, "without document, log_weights, reduced_energies"),
        (".npz", object_array, "a truncated or foreign file"),
        (".npz", other_zip, r"without document, log_weights, reduced_energies \(arrays: \["),
    ],
)
def test_foreign_files_are_refused(
    suffix: str, make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        WeightedEnsemble.load(path)
    assert str(caught.value).startswith(f"{path}: expected an ensemble written by openmm-vtdis")


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the JSON document of an npz ensemble, and its checksum with it if it knows that."""
    with np.load(path) as file:
        arrays = dict(file)
    document = json.loads(arrays["document"].tobytes())
    before = document["crc32"]
    text = change(document)
    if not text and document["crc32"] == before:
        document["crc32"] = _checksum(document, [arrays])
    text = text or json.dumps(document)
    buffer = io.BytesIO()
    arrays["document"] = np.frombuffer(str(text).encode(), dtype=np.uint8)
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), r"format version <= 2, got 99; a newer .* wrote it"),
        (lambda d: d.update(version="1"), "format version <= 2, got '1'"),
        (lambda d: d.update(format="x"), "got a foreign document"),
        (lambda d: "[]", "got a foreign document"),
        (lambda d: "{", "got an unreadable document"),
        (lambda d: d.pop("topology") and "", "got a document without topology"),
        (lambda d: d.update(crc32=0), "does not match its checksum: truncated or altered"),
        (lambda d: d.update(topology={}), "expected a document written by topology_to_json"),
        (lambda d: d.update(temperature=-3), "temperature: expected a positive"),
    ],
)
def test_documents_are_checked(
    change: Callable[[dict[str, object]], object],
    message: str,
    molecules: WeightedEnsemble,
    tmp_path: Path,
) -> None:
    path = molecules.save(tmp_path / "x.npz")
    rewrite(path, lambda document: None)
    assert_same(molecules, WeightedEnsemble.load(path))
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        WeightedEnsemble.load(path)


def test_an_exploded_sample_is_stored_without_complaint(tmp_path: Path) -> None:
    x = np.zeros((2, 1, 3))
    x[1] = 1e300
    ensemble = WeightedEnsemble(x, [0.0, -np.inf], [0.0, np.inf])
    with np.errstate(all="raise"):
        path = ensemble.save(tmp_path / "x.nc")
        ensemble.to_mdtraj()
    assert_same(ensemble, WeightedEnsemble.load(path))
