r"""Pair coefficients of an elastic network from the messages of a denoising network.

For every pair of particles i, j, four non-negative numbers, from the sum of the two messages that
the last layer sent between them, their distance in the denoised configuration, and log t. They are
symmetric in i and j, invariant under rotation and reflection, and permute with the particles.

A configuration of M particles has P = M (M - 1) / 2 pairs, in the order of :func:`pair_indices`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_vtdis.core import checks
from openmm_vtdis.networks.embedding import NoiseEmbedding, RadialBasis

N_COEFFICIENTS = 4
_LARGEST_LOG = 8.0
"""Coefficients lie between exp(-12) and exp(8)."""


def pair_indices(n_particles: int) -> tuple[Tensor, Tensor]:
    """The two particles i < j of every pair, (P,) each: by j first, so that the last come last."""
    second, first = torch.tril_indices(n_particles, n_particles, -1)
    return first, second


class PairHead(nn.Module):
    """A small network on the edges of another network.

    Parameters
    ----------
    n_particles
        M.
    n_messages
        Width H of the messages.
    n_hidden
        Width of the head.
    n_radial, cutoff
        Radial basis of the denoised distance.
    """

    first: Tensor
    second: Tensor
    there: Tensor
    back: Tensor

    def __init__(
        self,
        n_particles: int,
        n_messages: int,
        n_hidden: int = 64,
        n_radial: int = 16,
        cutoff: float = 6.0,
    ) -> None:
        super().__init__()
        checks.positive_integer("n_hidden", n_hidden)
        first, second = pair_indices(n_particles)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.register_buffer("there", first * n_particles + second, persistent=False)
        self.register_buffer("back", second * n_particles + first, persistent=False)
        self.radial = RadialBasis(n_radial, cutoff)
        self.noise = NoiseEmbedding(n_hidden)
        self.message = nn.Linear(n_messages, n_hidden)
        self.distance = nn.Linear(n_radial, n_hidden, bias=False)
        self.hidden = nn.Linear(n_hidden, n_hidden)
        self.exit = nn.Linear(n_hidden, N_COEFFICIENTS)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def forward(self, messages: Tensor, denoised: Tensor, log_t: Tensor) -> Tensor:
        """Messages (B, M, M, H), D (B, M, D) and log t (B,) -> coefficients (B, P, 4) > 0."""
        flat = messages.flatten(1, 2)
        both = flat.index_select(1, self.there)
        both += flat.index_select(1, self.back)
        line = denoised.index_select(1, self.first) - denoised.index_select(1, self.second)
        distance = (line.square().sum(dim=-1) + 1e-12).sqrt()
        edge = self.message(both)
        edge += self.distance(self.radial(distance))
        edge = nn.functional.silu(edge + self.noise(log_t)[:, None])
        edge = nn.functional.silu(self.hidden(edge))
        return self.exit(edge).clamp(-12.0, _LARGEST_LOG).exp()
