"""The parts of a generator, and the checks of its input.

:class:`GeneratorBase` has the parts (target, coordinates, network, tuned process), and checks
frames and settings; :class:`~openmm_vtdis.generator.generator.DiffusionBoltzmannGenerator` has the
methods that users call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from openmm import app
from torch import Tensor

from openmm_vtdis.coordinates import Cartesian, Coordinates, ModelEnergy, check_coordinates_of
from openmm_vtdis.core import checks
from openmm_vtdis.core.defaults import keeps_to_the_cpu
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import (
    Denoiser,
    PreconditionedDenoiser,
    check_mirror_symmetry,
    check_network,
)
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.generator.archive import warn_if_not_storable
from openmm_vtdis.networks import NETWORKS, Network, network_for
from openmm_vtdis.runtime import allocator
from openmm_vtdis.sampling import FlowSampler, PathSampler
from openmm_vtdis.targets import Target, check_is_target
from openmm_vtdis.topology import Handedness, Particles, Stereocentre
from openmm_vtdis.topology.frames import Frames, read_frames
from openmm_vtdis.training.config import TrainingLog

_STEREOCHEMISTRY = ("reference", "any")


class GeneratorBase:
    """The parts of a generator.

    Attributes
    ----------
    target, space
        The density, and the space of its configurations.
    coordinates
        Map between nm and what the network diffuses; None before training.
    network, device
        Network of the denoiser, and the device that it runs on.
    particles, stereochemistry
        Labels and features from the topology, and whether samples are of one stereoisomer.
    process
        The tuned diffusion process; None before tuning.
    training_log
        Log of the last training in this process.
    """

    @keeps_to_the_cpu
    def _set_up(
        self,
        target: Target,
        network: str | torch.nn.Module | None,
        labels: Sequence[int] | None,
        stereochemistry: str,
        device: torch.device | str,
        seed: int | None,
        coordinates: Coordinates | None = None,
    ) -> None:
        self.stereochemistry = checks.choice("stereochemistry", stereochemistry, _STEREOCHEMISTRY)
        check_is_target(target)
        self.target = target
        self.space = target.space
        self.device = checks.device(device)
        self.particles = Particles.of(self.topology, self.space, labels, alike=target.alike)
        if coordinates is not None:
            check_coordinates_of(coordinates, self.space)
        self.coordinates = coordinates
        space = self.space if coordinates is None else coordinates.space
        features = self.particles.features if space == self.space else {}
        network = network_for(network, self.model_labels(space), space, seed, features)
        warn_if_not_storable(target, network)
        self.network = network.to(self.device)
        self.process: DiffusionProcess | None = None
        self.training_log: TrainingLog | None = None
        width = self.network.width if isinstance(self.network, Network) else 64
        self._batch_size = allocator.batch_size(self.device, self.space.n_particles, width)
        self._denoiser: Denoiser = PreconditionedDenoiser(self.network, space)
        if NETWORKS.kind_of(network) is None and any(True for _ in network.parameters()):
            check_network(self._denoiser, self.device)

    # -- other ways in ------------------------------------------------------------------------
    @classmethod
    def from_target(
        cls,
        target: Target,
        network: str | torch.nn.Module | None = None,
        labels: Sequence[int] | None = None,
        stereochemistry: str = "reference",
        device: torch.device | str = "cpu",
        seed: int | None = None,
        coordinates: Coordinates | None = None,
    ) -> Self:
        """An untrained generator for any :class:`~openmm_vtdis.targets.Target`.

        ``coordinates``: what the network diffuses; None: positions, in units in which the frames of
        the training have unit variance. An archive holds those targets and coordinates that
        describe themselves (:meth:`~openmm_vtdis.targets.Target.describe`); a generator of others
        can be pickled.
        """
        self = cls.__new__(cls)
        self._set_up(target, network, labels, stereochemistry, device, seed, coordinates)
        return self

    @classmethod
    @keeps_to_the_cpu
    def from_denoiser(
        cls,
        target: Target,
        denoiser: Denoiser,
        coordinates: Coordinates | None = None,
        labels: Sequence[int] | None = None,
    ) -> Self:
        """A generator around a known denoiser, which needs no training.

        ``coordinates``: those of the denoiser; None: positions in nm.
        """
        if coordinates is None:
            coordinates = Cartesian(target.space)
        if denoiser.space != coordinates.space:
            raise ValueError(
                f"denoiser: expected one on the coordinates' space, {coordinates.space}, got one "
                f"on {denoiser.space}"
            )
        self = cls.from_target(target, network=torch.nn.Identity(), labels=labels)
        self._denoiser = denoiser
        self.coordinates = coordinates
        return self

    # -- properties ---------------------------------------------------------------------------
    def __repr__(self) -> str:
        state = self.process or ("untrained" if self.coordinates is None else "not tuned")
        return f"{type(self).__name__}({self.target!r}, {state})"

    @property
    def topology(self) -> app.Topology | None:
        """The Topology given at construction."""
        return self.target.topology

    @property
    def labels(self) -> list[int]:
        """(M,) class of each particle."""
        return self.particles.labels

    @property
    def temperature(self) -> float | None:
        """Temperature in kelvin."""
        return self.target.temperature

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser D(x, t) in model coordinates."""
        return self._denoiser

    @property
    def handedness(self) -> Handedness | None:
        """Handedness of the samples; None: all stereoisomers, or not known yet."""
        return None if self.coordinates is None else self.coordinates.handedness

    @property
    def model_energy(self) -> ModelEnergy:
        """Minus the log density of model coordinates, up to log Z, with derivatives."""
        return ModelEnergy(self.target, self._trained("model_energy"))

    def path_sampler(self, n_steps: int | None = None) -> PathSampler:
        """The sampler behind ``sample`` and ``log_weights``, with the given number of steps."""
        return self._path_sampler(n_steps, "path_sampler")

    def flow_sampler(
        self,
        divergence: str = "exact",
        solver: str = "heun",
        n_steps: int | None = None,
    ) -> FlowSampler:
        """The sampler behind ``sample_ode`` and ``log_weights_ode``, with that many steps."""
        return self._flow_sampler(divergence, solver, n_steps, "flow_sampler")

    # -- internals ----------------------------------------------------------------------------
    def _path_sampler(self, n_steps: int | None, action: str) -> PathSampler:
        process, coordinates = self._tuned(action), self._trained(action)
        if n_steps is not None:
            process = process.with_n_steps(n_steps)
        return PathSampler(process, self.target, coordinates)

    def _flow_sampler(
        self, divergence: str, solver: str, n_steps: int | None, action: str
    ) -> FlowSampler:
        grid, coordinates = self._tuned(action).flow_schedule(n_steps), self._trained(action)
        return FlowSampler(self._denoiser, grid, self.target, coordinates, divergence, solver)

    def model_labels(self, space: Space) -> list[int]:
        """Classes of the particles of a model's space: those of the atoms if it has as many."""
        same = space.n_particles == self.space.n_particles
        return self.labels if same else list(range(space.n_particles))

    def _trained(self, action: str) -> Coordinates:
        if self.coordinates is None:
            raise ValueError(f"{action}: expected a trained generator; call train() first")
        return self.coordinates

    def _tuned(self, action: str) -> DiffusionProcess:
        self._trained(action)
        if self.process is None:
            raise ValueError(f"{action}: expected a tuned generator; call tune() first")
        return self.process

    def _frames(self, name: str, traj: Frames, minimum: int = 1) -> Tensor:
        kelvin = self.target.temperature
        frames = read_frames(name, traj, self.space, self.topology, minimum, kelvin)
        if self.handedness is not None:
            self.handedness.check(name, frames)
        return frames

    def _reference(self, name: str, frames: Tensor) -> Handedness | None:
        """The handedness of the target: the known one, or that of the frames."""
        found = self.handedness
        if found is None and self.stereochemistry == "reference":
            found = self.particles.handedness(name, frames)
            if found is not None:
                check_mirror_symmetry(self._denoiser)
        return found

    def _size(self, batch_size: int | None, divisor: int = 1) -> int:
        """The user's batch size, checked, or the default over ``divisor``."""
        if batch_size is None:
            return max(1, self.batch_size() // divisor)
        return checks.positive_integer("batch_size", batch_size)

    def batch_size(self) -> int:
        """Default batch size; see :func:`~openmm_vtdis.runtime.allocator.batch_size`."""
        return self._batch_size


def stereocentres_of(target: Target, labels: Sequence[int]) -> tuple[Stereocentre, ...]:
    """Find the stereocentres of a target's topology, whose atoms have these labels."""
    return Particles.of(target.topology, target.space, labels, alike=target.alike).stereocentres
