r"""Pair coefficients from the messages of a network: what an elastic network is made of.

For every pair of particles i, j, four non-negative numbers, from the sum of the two messages that
the last layer sent between them, their distance in the denoised configuration, and log t. They are
symmetric in i and j, invariant under rotation and reflection, and permute with the particles.
"""

from __future__ import annotations

from torch import Tensor, nn

from openmm_vtdis import checks
from openmm_vtdis.networks.embedding import NoiseEmbedding, RadialBasis

N_COEFFICIENTS = 4
_LARGEST_LOG = 8.0
"""Coefficients lie between exp(-12) and exp(8)."""


class PairHead(nn.Module):
    """A small network on the edges of another.

    Parameters
    ----------
    n_messages
        Width H of the messages.
    n_hidden
        Width of the head.
    n_radial, cutoff
        Radial basis of the denoised distance.
    """

    def __init__(
        self, n_messages: int, n_hidden: int = 64, n_radial: int = 16, cutoff: float = 6.0
    ) -> None:
        super().__init__()
        checks.positive_integer("n_hidden", n_hidden)
        self.radial = RadialBasis(n_radial, cutoff)
        self.noise = NoiseEmbedding(n_hidden)
        self.message = nn.Linear(n_messages, n_hidden)
        self.distance = nn.Linear(n_radial, n_hidden, bias=False)
        self.hidden = nn.Linear(n_hidden, n_hidden)
        self.exit = nn.Linear(n_hidden, N_COEFFICIENTS)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def forward(self, messages: Tensor, denoised: Tensor, log_t: Tensor) -> Tensor:
        """Messages (B, M, M, H), D (B, M, D) and log t (B,) -> coefficients (B, M, M, 4) > 0."""
        square = (denoised[:, :, None] - denoised[:, None]).square().sum(dim=-1)
        edge = self.message(messages + messages.transpose(1, 2))
        edge = edge + self.distance(self.radial((square + 1e-12).sqrt()))
        edge = nn.functional.silu(edge + self.noise(log_t)[:, None, None])
        edge = nn.functional.silu(self.hidden(edge))
        return self.exit(edge).clamp(-12.0, _LARGEST_LOG).exp()
