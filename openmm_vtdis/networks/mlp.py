"""A residual multilayer perceptron for targets without symmetry (GMM-2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks.base import NETWORKS, Network
from openmm_vtdis.networks.embedding import NoiseEmbedding


@NETWORKS.register
class MLP(Network):
    """Residual MLP on flattened coordinates: x (B, M, D), log noise level (B,) -> (B, M, D).

    Parameters
    ----------
    n_particles, n_dims
        M and D of the configurations.
    n_layers, n_hidden
        Number of hidden layers and their width; the paper uses 7 x 512.
    """

    kind: ClassVar[str] = "mlp"
    graph_safe: ClassVar[bool] = True

    def __init__(
        self, n_particles: int, n_dims: int, n_layers: int = 7, n_hidden: int = 512
    ) -> None:
        super().__init__()
        checks.positive_integer("n_layers", n_layers)
        checks.positive_integer("n_hidden", n_hidden)
        self.config: dict[str, Any] = {
            "n_particles": n_particles,
            "n_dims": n_dims,
            "n_layers": n_layers,
            "n_hidden": n_hidden,
        }
        size = n_particles * n_dims
        self.noise = NoiseEmbedding(n_hidden)
        self.entry = nn.Linear(size, n_hidden)
        self.hidden = nn.ModuleList([nn.Linear(n_hidden, n_hidden) for _ in range(n_layers)])
        self.modulation = nn.ModuleList([nn.Linear(n_hidden, n_hidden) for _ in range(n_layers)])
        self.exit = nn.Linear(n_hidden, size)

    @classmethod
    def from_size(
        cls,
        n_layers: int,
        n_hidden: int,
        labels: Sequence[int],
        space: Space,
        features: Mapping[str, Any],
    ) -> Self:
        return cls(space.n_particles, space.n_dims, n_layers, n_hidden)

    def forward(self, x: Tensor, log_t: Tensor) -> Tensor:
        tau = self.noise(log_t)
        h = self.entry(x.flatten(1))
        for hidden, modulation in zip(self.hidden, self.modulation, strict=True):
            h = h + hidden(nn.functional.silu(h + modulation(tau)))
        return self.exit(nn.functional.silu(h)).reshape(x.shape).to(x.dtype)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
