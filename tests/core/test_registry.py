"""Classes of other packages: found by their kind, and known by their objects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openmm_vtdis.core.registry import Registry

MODULE = """
class Ring:
    kind = "ring"
"""


def installed(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an entry point, which nobody has asked for."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(MODULE)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    entry = f"[openmm_vtdis.shapes]\nring = {package}:Ring\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(folder))


def test_an_object_of_an_entry_points_class_is_known_before_its_kind_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, "shapely_things", monkeypatch)
    import shapely_things  # type: ignore[import-not-found]

    class Subclass(shapely_things.Ring):  # type: ignore[misc]
        pass

    shapes: Registry[object] = Registry("shapes")
    assert shapes.kind_of(shapely_things.Ring()) == "ring"
    assert shapes.kind_of(Subclass()) is None
    assert shapes.kind_of(3) is None
    assert Registry("others").kind_of(shapely_things.Ring()) is None  # control
    del sys.modules["shapely_things"]
