"""Archives of format version 1 become those of the present one, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_vtdis import DiffusionBoltzmannGenerator, pretrained, storage
from recipes import convert

_BACK = {new: old for old, new in convert._RENAMED.items()}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """dw4-small, as version 1 wrote it."""
    tensors, metadata = storage.read_archive(pretrained.path("dw4-small"), "generator")
    target, coordinates = metadata["target"], metadata["coordinates"]
    document = {
        **{name: target[name] for name in convert._TARGET},
        "length": coordinates["length"],
        **{name: metadata[name] for name in ("labels", "stereochemistry", "handedness")},
        **{name: metadata[name] for name in ("network", "tuning")},
    }
    monkeypatch.setattr(storage.archive, "FORMAT_VERSION", 1)
    named = {_BACK.get(name, name): tensor for name, tensor in tensors.items()}
    path = storage.write_archive(tmp_path / "old.vtdis", "generator", named, document)
    monkeypatch.undo()
    return path


def test_the_same_samples_and_weights(old: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipes\.convert"):
        DiffusionBoltzmannGenerator.load(old)
    convert.convert(old, tmp_path / "new.vtdis")
    new = DiffusionBoltzmannGenerator.load(tmp_path / "new.vtdis")
    shipped = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
    a, b = (gen.sample(20, seed=1, progress=False) for gen in (new, shipped))
    np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    with pytest.raises(ValueError, match=r"expected a generator archive of version 1, got .* 2"):
        convert.convert(tmp_path / "new.vtdis", tmp_path / "newer.vtdis")


def test_altered_and_foreign_files_are_refused(old: Path, tmp_path: Path) -> None:
    content = bytearray(old.read_bytes())
    content[-5] ^= 1
    altered, foreign = tmp_path / "altered.vtdis", tmp_path / "foreign.vtdis"
    altered.write_bytes(content)
    foreign.write_bytes(b"no archive")
    for path, match in ((altered, "one that was altered"), (foreign, "truncated or foreign")):
        with pytest.raises(ValueError, match=match):
            convert.convert(path, tmp_path / "new.vtdis")
    assert not (tmp_path / "new.vtdis").exists()


def test_the_command_says_in_one_line_what_is_wrong(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "none"), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="2"):
        convert.main()
    assert "none: no such archive" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["convert", str(old), str(tmp_path / "new.vtdis")])
    convert.main()
    DiffusionBoltzmannGenerator.load(tmp_path / "new.vtdis")
