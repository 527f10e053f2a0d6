"""Registries that other packages can add to: targets, networks, covariances, coordinates.

A class has a ``kind``, under which archives and users know it. One of another package is found
once that package has registered it, or, where it is installed, by an entry point of the group
``openmm_vtdis.<what>`` whose name is the kind::

    [project.entry-points."openmm_vtdis.targets"]
    my-kind = "my_package.module:MyTarget"
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by their ``kind``.

    Parameters
    ----------
    what
        "targets", "networks", ...: for messages, and the name of the group of entry points.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: C) -> C:
        """Register a class under its ``kind``; use as a decorator.

        Raises
        ------
        ValueError
            If another class has that kind.
        """
        kind: str = cls.kind  # type: ignore[attr-defined]
        known: type = self._classes.setdefault(kind, cls)
        if known is not cls:
            raise ValueError(
                f"kind: expected one that no other of the {self.what} has, got {kind!r}, which is "
                f"{self._classes[kind].__qualname__}"
            )
        return cls

    def __getitem__(self, kind: str) -> type[T]:
        """The class of a kind.

        Raises
        ------
        ValueError
            If nobody knows it, with the kinds that are known.
        """
        if kind not in self._classes:
            for entry in metadata.entry_points(group=f"openmm_vtdis.{self.what}", name=kind):
                self.register(entry.load())
        if kind not in self._classes:
            raise ValueError(
                f"expected a kind among the {self.what} {', '.join(map(repr, self))}, got "
                f"{kind!r}; is the package installed that has it?"
            )
        return self._classes[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in list(self)

    def __iter__(self) -> Iterator[str]:
        """Known kinds, those of installed packages last."""
        entries = metadata.entry_points(group=f"openmm_vtdis.{self.what}")
        return iter(dict.fromkeys([*self._classes, *sorted(entries.names)]))

    def kind_of(self, thing: object) -> str | None:
        """Kind under which archives store an object; None if its class is not registered.

        Classes that entry points of the object's own package name are known as well.
        """
        package = type(thing).__module__.partition(".")[0]
        for entry in metadata.entry_points(group=f"openmm_vtdis.{self.what}"):
            if entry.name not in self._classes and entry.module.partition(".")[0] == package:
                self.register(entry.load())
        return next((kind for kind, cls in self._classes.items() if type(thing) is cls), None)
