"""Shipped generators, each beside its card and the training log of the script that made it."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names that :meth:`~openmm_vtdis.DiffusionBoltzmannGenerator.from_pretrained` takes."""
    return sorted(path.stem for path in _FOLDER.glob("*.vtdis"))


def path(name: str) -> Path:
    """Path of a shipped archive; ValueError that lists the names for an unknown one."""
    if name not in names():
        raise ValueError(f"pretrained: expected one of {', '.join(names())}, got {name!r}")
    return _FOLDER / f"{name}.vtdis"
