"""What a generator's file holds: the System, the Topology, the network and the tuning.

One :mod:`~openmm_vtdis.storage.archive` archive of kind "generator". The System is OpenMM's XML,
the rest of the description JSON; network weights, covariance parameters and mean coefficients are
tensors. Nothing is unpickled: a System that holds a PythonForce, whose XML carries a pickle that
OpenMM would execute, is refused unless the caller trusts it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import openmm
import torch
from openmm import app
from torch import Tensor, nn

from openmm_vtdis import storage
from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.covariance import Energy, make_covariance
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionKernel
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import build_network, can_describe, describe_network
from openmm_vtdis.targets import OpenMMTarget, Target
from openmm_vtdis.targets.openmm.user_code import check_importable
from openmm_vtdis.topology import Handedness, Stereocentre, topology_from_json, topology_to_json

logger = logging.getLogger(__name__)


def _check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity in {broken}")


class Storable(Protocol):
    """What an archive reads of a generator."""

    target: Target
    network: nn.Module
    stereochemistry: str
    handedness: Handedness | None
    length: float | None
    kernel: DiffusionKernel | None

    @property
    def labels(self) -> list[int]:
        """Class of each particle."""


@dataclass(frozen=True)
class GeneratorArchive:
    """Everything that makes a trained generator.

    Attributes
    ----------
    system, topology, temperature, n_dims, labels, stereochemistry
        As its constructor takes them; temperature in kelvin.
    handedness
        Reference sign of every stereocentre; None if there is none.
    network
        With its weights.
    length
        Length unit of the model in nm.
    tuning
        Grid, covariance family and more, see :func:`describe_kernel`; None if not tuned.
    parameters, gains
        Of the covariance, and of the mean if it was tuned.
    fingerprint, probes, probe_energies
        Of a System that runs code of the user's: its identity, which its XML does not tell, and
        configurations (S, M, D) in nm with their energies (S,) in kT, by which a change of that
        code is seen. ``probes`` also of a System that was built with real positions.
    """

    system: openmm.System
    topology: app.Topology | None
    temperature: float
    n_dims: int
    labels: list[int]
    stereochemistry: str
    handedness: Sequence[int] | None
    network: nn.Module
    length: float
    tuning: dict[str, Any] | None = None
    parameters: Tensor | None = None
    gains: Tensor | None = None
    fingerprint: str | None = None
    probes: Tensor | None = None
    probe_energies: Tensor | None = None

    @classmethod
    def of(cls, gen: Storable) -> GeneratorArchive:
        """What an archive of a trained generator holds.

        Raises
        ------
        ValueError
            If its target is not an OpenMM System.
        """
        target, kernel = gen.target, gen.kernel
        if not isinstance(target, OpenMMTarget):
            raise ValueError(
                "save: expected a generator of an OpenMM System, got one of "
                f"{type(target).__name__}; pickle it instead"
            )
        probes = target.probes
        return cls(
            system=target.system,
            topology=target.topology,
            temperature=target.temperature,
            n_dims=target.space.n_dims,
            labels=gen.labels,
            stereochemistry=gen.stereochemistry,
            handedness=None if gen.handedness is None else gen.handedness.signs,
            network=gen.network,
            length=gen.length,  # type: ignore[arg-type]
            tuning=None if kernel is None else describe_kernel(kernel),
            parameters=None if kernel is None else kernel.covariance.parameters,
            gains=None if kernel is None else kernel.gains,
            fingerprint=target.fingerprint if target.runs_user_code else None,
            probes=probes,
            probe_energies=None if probes is None else target.reduced_energy(probes),
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all.

        Raises
        ------
        ValueError
            If a weight of the network, or a number of its tuning, is NaN or infinite.
        """
        tensors = {f"network.{k}": v for k, v in _compact(self.network.state_dict()).items()}
        held = {"covariance": self.parameters, "gains": self.gains, "probes": self.probes}
        tensors |= {name: tensor for name, tensor in held.items() if tensor is not None}
        _check_finite(path, tensors)
        if self.probe_energies is not None:
            tensors["probe_energies"] = self.probe_energies
        metadata = {
            "system": openmm.XmlSerializer.serialize(self.system),
            "topology": None if self.topology is None else topology_to_json(self.topology),
            "temperature": self.temperature,
            "n_dims": self.n_dims,
            "labels": self.labels,
            "stereochemistry": self.stereochemistry,
            "handedness": self.handedness,
            "network": describe_network(self.network),
            "length": self.length,
            "tuning": self.tuning,
            "fingerprint": self.fingerprint,
        }
        return storage.write_archive(path, "generator", tensors, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str], allow_pickle: bool = False) -> GeneratorArchive:
        """Read a file.

        Raises
        ------
        ValueError
            If it is truncated, foreign, newer or incomplete, or holds a PythonForce, or numbers
            that are not finite.
        """
        tensors, metadata = storage.read_archive(path, "generator")
        energies = tensors.pop("probe_energies", None)
        _check_finite(path, tensors)
        try:
            xml, document = metadata["system"], metadata["topology"]
            if not allow_pickle and storage.mentions(xml, "PythonForce"):
                raise ValueError(
                    f"{path}: the System holds a PythonForce, whose XML is unpickled and can run "
                    "any code; pass allow_pickle=True (--allow-pickle) only if you trust it"
                )
            check_importable(xml)
            network = build_network(metadata["network"])
            state = storage.select_prefix(tensors, "network.")
            network.to(_precision(state)).load_state_dict(state)
            return cls(
                system=openmm.XmlSerializer.deserialize(xml),
                topology=None if document is None else topology_from_json(document),
                temperature=metadata["temperature"],
                n_dims=metadata["n_dims"],
                labels=metadata["labels"],
                stereochemistry=metadata["stereochemistry"],
                handedness=metadata["handedness"],
                network=network.eval(),
                length=checks.positive_number("length", metadata["length"]),
                tuning=metadata["tuning"],
                parameters=None if metadata["tuning"] is None else tensors["covariance"],
                gains=tensors.get("gains"),
                fingerprint=metadata.get("fingerprint"),
                probes=tensors.get("probes"),
                probe_energies=energies,
            )
        except (KeyError, TypeError, RuntimeError, openmm.OpenMMException) as error:
            raise ValueError(f"{path}: expected a complete generator archive: {error}") from error

    def target(self, **options: Any) -> OpenMMTarget:
        """The System and the temperature; ``options`` go to :class:`OpenMMTarget`."""
        options = {"n_dims": self.n_dims, "positions": self.probes, **options}
        target = OpenMMTarget(self.system, self.topology, self.temperature, **options)
        if None not in (self.fingerprint, self.probe_energies):
            target.identify(self.fingerprint, self.probes, self.probe_energies)  # type: ignore[arg-type]
        return target

    def reference(self, centres: Sequence[Stereocentre]) -> Handedness | None:
        """The handedness of the target, for the stereocentres that the topology has.

        Raises
        ------
        ValueError
            If there are centres without a sign, or signs without a centre.
        """
        if self.handedness is None and (self.stereochemistry == "any" or not centres):
            return None
        if not isinstance(self.handedness, list | tuple):
            raise ValueError(
                f"expected a complete generator archive, got the handedness {self.handedness!r} "
                f"for {len(centres)} stereocentres"
            )
        return Handedness(tuple(centres), tuple(self.handedness))

    def kernel(self, denoiser: Denoiser, energy: Energy) -> DiffusionKernel | None:
        """The tuned kernel around the generator's denoiser and energy."""
        if self.tuning is None:
            return None
        try:
            family = make_covariance(
                self.tuning["covariance"], denoiser.space, self.tuning["labels"], self.parameters,
                **self.tuning["options"],
            )  # fmt: skip
            schedule = Schedule(tuple(self.tuning["times"]))
            described = self.tuning.get("laplace")
            laplace = None if described is None else LaplaceRange(**described)
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a complete generator archive: {error}") from error
        return DiffusionKernel(denoiser, schedule, family, self.gains, energy, laplace)


def warn_if_not_storable(target: Target, network: nn.Module) -> None:
    """Say before the work that there will be no archive of it."""
    if not (isinstance(target, OpenMMTarget) and can_describe(network)):
        logger.warning(
            "save() will not be able to store this generator, since its target, a %s, and its "
            "network, a %s, are not both the package's own; it can be pickled instead",
            type(target).__name__, type(network).__name__,
        )  # fmt: skip


def describe_kernel(kernel: DiffusionKernel) -> dict[str, Any]:
    """Grid, covariance family and more as JSON: what :meth:`GeneratorArchive.kernel` reads."""
    return {
        "times": list(kernel.schedule.times),
        "covariance": kernel.covariance.kind,
        "labels": list(kernel.covariance.labels),
        "options": kernel.covariance.options,
        "laplace": None if kernel.laplace is None else dataclasses.asdict(kernel.laplace),
    }


def _compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Single-precision weights in half precision, where that loses nothing."""
    single = {name: v for name, v in state.items() if v.dtype == torch.float32}
    if not all(torch.equal(v.half().float(), v) for v in single.values()):
        return state
    return state | {name: v.half() for name, v in single.items()}


def _precision(state: dict[str, Tensor]) -> torch.dtype:
    """The floating-point type of a network, from what was stored of it."""
    stored = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    return torch.float32 if stored == torch.float16 else stored
