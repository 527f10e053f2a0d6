"""A generator's archive: the target, the coordinates, the network and the tuning.

One :mod:`~openmm_vtdis.storage.archive` archive of kind "generator". Every part describes itself as
JSON and tensors, and is rebuilt by the class whose kind it names: a System is OpenMM's XML, network
weights, covariance parameters and mean coefficients are tensors. Nothing is unpickled, and no code
that a file names is run, unless the caller trusts the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openmm_vtdis import storage
from openmm_vtdis.coordinates import COORDINATES, Coordinates, Energy
from openmm_vtdis.core.registry import Registry
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.networks import build_network, can_describe, describe_network
from openmm_vtdis.targets import TARGETS, Description, Rebuilding, Target
from openmm_vtdis.topology import Handedness, Stereocentre

logger = logging.getLogger(__name__)

_UNCHECKED = ("target.probe_energies",)
"""Tensors that may hold NaN, for configurations without an energy."""


class Storable(Protocol):
    """The parts of a generator that an archive stores."""

    target: Target
    network: nn.Module
    stereochemistry: str
    process: DiffusionProcess | None

    @property
    def labels(self) -> list[int]:
        """Class of each particle."""

    @property
    def coordinates(self) -> Coordinates | None:
        """The map between nm and model coordinates."""


@dataclass(frozen=True)
class GeneratorArchive:
    """Contents of a trained generator's file.

    Attributes
    ----------
    target
        Kind and description of the target.
    labels, stereochemistry
        Arguments of the generator's constructor.
    handedness
        Reference sign of every stereocentre; None if there is none.
    network
        The network with its weights.
    coordinates
        Kind and settings of the coordinates.
    tuning
        Grid, covariance family and more
        (:meth:`~openmm_vtdis.diffusion.process.DiffusionProcess.describe`); None if not tuned.
    parameters, mean_coefficients
        Parameters of the covariance, and mean coefficients if they were tuned.
    """

    target: tuple[str, Description]
    labels: list[int]
    stereochemistry: str
    handedness: Sequence[int] | None
    network: nn.Module
    coordinates: tuple[str, dict[str, Any]]
    tuning: dict[str, Any] | None = None
    parameters: Tensor | None = None
    mean_coefficients: Tensor | None = None

    @classmethod
    def of(cls, gen: Storable) -> GeneratorArchive:
        """Collect the contents of a trained generator's archive.

        Raises
        ------
        ValueError
            If archives do not know the class of its target or its coordinates, or it is not
            trained.
        """
        process, coordinates = gen.process, gen.coordinates
        if coordinates is None:
            raise ValueError("save: expected a trained generator; call train() first")
        known = _kind("target", TARGETS, gen.target), _kind("coordinates", COORDINATES, coordinates)
        hand = coordinates.handedness
        return cls(
            target=(known[0], gen.target.describe()),
            labels=gen.labels,
            stereochemistry=gen.stereochemistry,
            handedness=None if hand is None else hand.signs,
            network=gen.network,
            coordinates=(known[1], coordinates.describe()),
            tuning=None if process is None else process.describe(),
            parameters=None if process is None else process.covariance.parameters,
            mean_coefficients=None if process is None else process.mean_coefficients,
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all.

        Raises
        ------
        ValueError
            If a weight of the network, or a number of its tuning, is NaN or infinite.
        """
        kind, described = self.target
        tensors = {f"target.{name}": tensor for name, tensor in described.tensors.items()}
        tensors |= {f"network.{k}": v for k, v in _compact(self.network.state_dict()).items()}
        held = {"covariance": self.parameters, "mean_coefficients": self.mean_coefficients}
        tensors |= {name: tensor for name, tensor in held.items() if tensor is not None}
        _check_finite(path, tensors)
        coordinates, settings = self.coordinates
        metadata = {
            "target": {"kind": kind, **described.settings},
            "labels": self.labels,
            "stereochemistry": self.stereochemistry,
            "handedness": self.handedness,
            "network": describe_network(self.network),
            "coordinates": {"kind": coordinates, **settings},
            "tuning": self.tuning,
        }
        return storage.write_archive(path, "generator", tensors, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GeneratorArchive:
        """Read a file.

        Raises
        ------
        ValueError
            If it is truncated, foreign, of another version or incomplete, or holds numbers that are
            not finite.
        """
        tensors, metadata = storage.read_archive(path, "generator")
        _check_finite(path, tensors)
        try:
            target, coordinates = dict(metadata["target"]), dict(metadata["coordinates"])
            network = build_network(metadata["network"])
            state = storage.select_prefix(tensors, "network.")
            network.to(_precision(state)).load_state_dict(state)
            held = storage.select_prefix(tensors, "target.")
            return cls(
                target=(target.pop("kind"), Description(target, held)),
                labels=metadata["labels"],
                stereochemistry=metadata["stereochemistry"],
                handedness=metadata["handedness"],
                network=network.eval(),
                coordinates=(coordinates.pop("kind"), coordinates),
                tuning=metadata["tuning"],
                parameters=None if metadata["tuning"] is None else tensors["covariance"],
                mean_coefficients=tensors.get("mean_coefficients"),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: expected a complete generator archive: {error}") from error

    def rebuilt_target(self, how: Rebuilding) -> Target:
        """Rebuild the target.

        Raises
        ------
        ValueError
            If the file is not trusted and would run code, or the target's energies are others now.
        """
        kind, described = self.target
        try:
            return TARGETS[kind].rebuild(described, how)
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a complete generator archive: {error}") from error

    def rebuilt_coordinates(self, space: Space, centres: Sequence[Stereocentre]) -> Coordinates:
        """Rebuild the coordinates for a space, with the stereocentres of a topology.

        Raises
        ------
        ValueError
            If there are centres without a sign, or signs without a centre.
        """
        kind, settings = self.coordinates
        try:
            return COORDINATES[kind].rebuild(settings, space, self._reference(centres))
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a complete generator archive: {error}") from error

    def _reference(self, centres: Sequence[Stereocentre]) -> Handedness | None:
        """The handedness of the target."""
        if self.handedness is None and (self.stereochemistry == "any" or not centres):
            return None
        if not isinstance(self.handedness, list | tuple):
            raise ValueError(
                f"expected a complete generator archive, got the handedness {self.handedness!r} "
                f"for {len(centres)} stereocentres"
            )
        return Handedness(tuple(centres), tuple(self.handedness))

    def rebuilt_process(self, denoiser: Denoiser, energy: Energy) -> DiffusionProcess | None:
        """Rebuild the tuned process around a denoiser and an energy; None if not tuned."""
        if self.tuning is None or self.parameters is None:
            return None
        try:
            return DiffusionProcess.rebuild(
                self.tuning, self.parameters, self.mean_coefficients, denoiser, energy
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a complete generator archive: {error}") from error


def _kind(what: str, registry: Registry[Any], thing: object) -> str:
    """The kind of an object; a subclass is another class, with other numbers."""
    kind = registry.kind_of(thing)
    if kind is None:
        raise ValueError(
            f"save: expected a {what} that archives know, got one of {type(thing).__name__}; give "
            "the class a kind, describe() and rebuild(), and register it (CONTRIBUTING, "
            '"Extending"), or pickle the generator instead'
        )
    return kind


def warn_if_not_storable(target: Target, network: nn.Module) -> None:
    """Warn before the work if its result cannot be saved."""
    if TARGETS.kind_of(target) is None or not can_describe(network):
        logger.warning(
            "save() will not be able to store this generator, since its target, a %s, and its "
            "network, a %s, are not both of a class that archives know; it can be pickled instead",
            type(target).__name__, type(network).__name__,
        )  # fmt: skip


def _check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    broken = [
        name
        for name, tensor in tensors.items()
        if name not in _UNCHECKED and not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity in {broken}")


def _compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Single-precision weights in half precision, where that loses nothing."""
    single = {name: v for name, v in state.items() if v.dtype == torch.float32}
    if not all(torch.equal(v.half().float(), v) for v in single.values()):
        return state
    return state | {name: v.half() for name, v in single.items()}


def _precision(state: dict[str, Tensor]) -> torch.dtype:
    """The floating-point type of a network, from its stored tensors."""
    stored = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    return torch.float32 if stored == torch.float16 else stored
