r"""Proposals by noising and denoising.

In the extended space of a configuration and its noising path, a state k has the density
``exp(-u_k(x)) q(path | x)``, and a sampler draws from a density p of both. With the log ratio

    log w_k = log q - log p - u_k(x),

a new path for the current x is a Gibbs step, and replacing both by what the sampler drew, with the
probability min(1, w' / w), is an independence Metropolis-Hastings step: together they leave
``exp(-u_k)`` invariant, for any network. The sampler knows log w of its own Hamiltonian and
temperature; u_0(x) - u_k(x) makes it that of any other state, so that one sampler serves all
replicas of a temperature ladder.

A sampler of one stereoisomer proposes no other, and dynamics, which knows nothing of that, may
invert a stereocentre. A configuration outside of the isomer must be left as it is. So the densities
inside and outside both stay as they are, and with them that of *all* stereoisomers, which dynamics
samples; configurations that are inside are samples of the isomer. (In the density of the isomer, a
proposal is worth infinitely more than what is outside. But taking it would be a flow into the
isomer that balances nothing: together with dynamics, which leads out, it would leave neither
density as it is.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from openmm_vtdis.sampling import Sampler

_LEVELS_AT_ONCE = 64
"""Noise levels of one configuration's path that are evaluated together."""


@dataclass(frozen=True)
class Proposal:
    """A configuration with its noising path.

    Attributes
    ----------
    x
        (M, D) in nm.
    log_ratio
        log w_k + u_k(x), whatever the state k; -inf for one that is never accepted.
    """

    x: np.ndarray
    log_ratio: float


class IndependentProposals:
    """Independent proposals: samples drawn in batches, and proposed one after the other.

    Parameters
    ----------
    sampler
        A sampler of whole paths.
    rng
        Random number generator on the device of the sampler's network.
    batch_size
        Proposals drawn at once.
    """

    def __init__(self, sampler: Sampler, rng: torch.Generator, batch_size: int) -> None:
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        self.sampler, self.rng, self.batch_size = sampler, rng, batch_size
        self._stock: list[Proposal] = []

    def draw(self) -> Proposal:
        """A fresh configuration, independent of all others."""
        if not self._stock:
            ensemble = self.sampler.sample(
                self.batch_size, rng=self.rng, batch_size=self.batch_size, progress=False
            )
            with np.errstate(invalid="ignore"):
                ratio = ensemble.log_weights + ensemble.reduced_energies
            ratio[~np.isfinite(ensemble.log_weights)] = -math.inf
            self._stock = [
                Proposal(x, float(r)) for x, r in zip(ensemble.positions, ratio, strict=True)
            ]
        return self._stock.pop()

    def renewed(self, x: np.ndarray) -> Proposal:
        """A configuration (M, D) in nm with a fresh noising path."""
        frame = self.sampler.target.space.project(torch.tensor(x[None], dtype=torch.float64))
        log_w = self.sampler.log_weights(
            frame, rng=self.rng, batch_size=_LEVELS_AT_ONCE, progress=False
        )
        energy = self.sampler.target.reduced_energy(frame)
        return Proposal(x, float(log_w[0] + energy[0]))

    def is_inside(self, x: np.ndarray) -> bool:
        """Whether a configuration (M, D) in nm is of the stereoisomer that is drawn, if of one."""
        handedness = self.sampler.coordinates.handedness
        return handedness is None or int(handedness.agreement(torch.tensor(x[None]))) == 1
