r"""The sampler protocol: draw weighted samples, and weigh given configurations.

A sampler knows a proposal density of trajectories that end in model coordinates z. Of either kind
of trajectory, drawn or given, it has the log ratio of the two path densities, and

    log w = -u(x) + log ratio + log det dx/dz.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Coordinates
from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.ensemble.frame_weights import FrameLogWeights
from openmm_vtdis.ensemble.provenance import Provenance, Stream
from openmm_vtdis.ensemble.weighted import WeightedEnsemble
from openmm_vtdis.storage.fingerprint import fingerprint, stream_fingerprint
from openmm_vtdis.targets import Target, energies_of

_N_PROBES = 8


@dataclass(frozen=True)
class Drawn:
    """Ends of generated trajectories.

    Attributes
    ----------
    z
        (n, M, D) model coordinates, float64.
    log_ratio
        (n,) float64; not finite where the network has failed.
    """

    z: Tensor
    log_ratio: Tensor


class Sampler(abc.ABC):
    """Weighted samples of a target, and log weights of frames, by one proposal density.

    Attributes
    ----------
    target
        The target, in nm and kT.
    coordinates
        Map between nm and what the model diffuses.
    """

    target: Target
    coordinates: Coordinates

    @abc.abstractmethod
    def draw(self, n: int, rng: torch.Generator, batch_size: int, progress: bool) -> Drawn:
        """Draw n trajectories from the prior."""

    @abc.abstractmethod
    def log_ratios(
        self, z: Tensor, rng: torch.Generator, batch_size: int, progress: bool
    ) -> Tensor:
        """Log ratios (n,) of trajectories that are noised from z (n, M, D)."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe how samples are drawn, as JSON for people to read."""

    @property
    @abc.abstractmethod
    def n_steps(self) -> int:
        """Steps of a trajectory."""

    @abc.abstractmethod
    def _identity(self) -> Any:
        """Whatever identifies the proposal density of z, for :attr:`fingerprint`."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights: of the proposal in nm, and of the target.

        It is computed anew each time, since a network may have been trained on.
        """
        hand = self.coordinates.handedness
        described = type(self.coordinates), self.coordinates.describe()
        signs = None if hand is None else list(hand.signs)
        target = self.target.temperature, self.target.fingerprint or self._energies()
        return fingerprint(self._identity(), described, signs, target)

    def _energies(self) -> list[str]:
        """A few energies, which tell targets apart that have no fingerprint."""
        z = self.coordinates.space.standard_normal(_N_PROBES, make_rng(0))
        x = self.coordinates.to_configurations(z).x
        return [f"{energy:.4g}" for energy in energies_of(self.target, x).tolist()]

    def sample(
        self, n: int, *, rng: torch.Generator, batch_size: int = 1024, progress: bool = True
    ) -> WeightedEnsemble:
        """Draw n weighted samples.

        Raises
        ------
        ValueError
            If n is no positive integer, or ``rng`` no torch.Generator.
        """
        n, batch_size = _sizes(n, batch_size)
        checks.torch_generator("rng", rng)
        identity = self.fingerprint
        stream = Stream(
            stream_fingerprint(rng), n, batch_size, fingerprint(identity, self.describe())
        )
        provenance = self._provenance(identity, stream)
        return self.weighed(self.draw(n, rng, batch_size, progress), provenance)

    def weighed(self, drawn: Drawn, provenance: Provenance) -> WeightedEnsemble:
        """Weigh the ends of trajectories."""
        failed = ~torch.isfinite(drawn.log_ratio)
        z = torch.where(failed[:, None, None], math.nan, drawn.z)
        found = self.coordinates.to_configurations(z)
        energies = energies_of(self.target, found.x)
        log_w = _log_weights(energies, drawn.log_ratio, found.log_det)
        log_w = torch.where(found.inside, log_w, -math.inf)
        return WeightedEnsemble(
            found.x.cpu().numpy(),
            log_w.cpu().numpy(),
            energies.cpu().numpy(),
            temperature=self.target.temperature,
            topology=self.target.topology,
            metadata=self.describe(),
            provenance=provenance,
        )

    def log_weights(
        self,
        x: Tensor,
        *,
        rng: torch.Generator,
        batch_size: int = 1024,
        progress: bool = True,
    ) -> FrameLogWeights:
        """Weigh target configurations x (n, M, D) in nm, by fresh trajectories from each.

        They are moved to the origin first where the target's space is centred.

        Raises
        ------
        ValueError
            If x has another shape, is not finite or of another stereoisomer than the samples, or
            ``rng`` is no torch.Generator.
        """
        space, hand = self.target.space, self.coordinates.handedness
        x = checks.configurations("log_weights", x, space.n_particles, space.n_dims)
        x = space.project(x)
        if hand is not None:
            hand.check("log_weights", x)
        checks.torch_generator("rng", rng)
        _, batch_size = _sizes(len(x), batch_size)
        z, log_det = self.coordinates.to_model(x)
        ratios = self.log_ratios(z, rng, batch_size, progress).cpu()
        energies = energies_of(self.target, x.to(rng.device)).cpu()
        log_w = _log_weights(energies, ratios, log_det.cpu())
        return FrameLogWeights(log_w.numpy(), self._provenance(self.fingerprint))

    def _provenance(self, identity: str, *streams: Stream) -> Provenance:
        return Provenance(
            proposal=identity,
            hamiltonian=self.target.fingerprint,
            centred=self.target.space.centred,
            n_steps=self.n_steps,
            streams=streams,
        )


def _sizes(n: object, batch_size: object) -> tuple[int, int]:
    """Check a number of samples, and how many are made at once."""
    sizes = checks.positive_integer("n", n), checks.positive_integer("batch_size", batch_size)
    return sizes


def _log_weights(energies: Tensor, log_ratio: Tensor, log_det: Tensor) -> Tensor:
    """log w (n,); -inf where an energy is NaN or infinite."""
    log_w = -energies + log_ratio + log_det
    return torch.where(torch.isfinite(energies) & torch.isfinite(log_w), log_w, -math.inf)
