r"""Dense, batched E(n)-equivariant graph network (Satorras, Hoogeboom & Welling 2021).

Every pair of particles exchanges a message that depends on the two particles' features, on their
squared distance in this layer, and on radial features of their distance in the input:

    m_ij   = SiLU(W_2 SiLU(W_s h_i + W_r h_j + w_d |x_i - x_j|^2 + W_e e_ij + W_t tau))
    m_ij  <- sigmoid(w_a . m_ij) m_ij                                  attention, m_ii = 0
    x_i   <- x_i + (1/(M-1)) sum_j (x_i - x_j) / (|x_i - x_j| + 1)  w_x . m_ij
    h_i   <- h_i + MLP(h_i, sum_j m_ij, tau)

with tau the noise embedding. Since messages see distances only, the output displacement
x^L - x^0 turns with the input (rotations and reflections), ignores translations, and permutes with
particles that carry the same label.

The first layer of the message MLP is split into its sender, receiver and edge parts, so that the
(B, M, M, 2H) tensor of concatenated node features is never made. Node features enter the first
layer once for all of a batch, and do not leave the last.

=======  =======================================  ===================
symbol   meaning                                  shape
=======  =======================================  ===================
B, M, D  batch, particles, dimensions
H        hidden features
h        node features                            (B, M, H)
e        edge features (radial and static)        (B, M, M, E)
tau      noise embedding                          (B, H)
=======  =======================================  ===================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks.base import NETWORKS, Network
from openmm_vtdis.networks.embedding import NoiseEmbedding, RadialBasis

logger = logging.getLogger(__name__)


class EGNNLayer(nn.Module):
    """One round of messages; see the module docstring for the equations."""

    def __init__(self, n_hidden: int, n_edge: int) -> None:
        super().__init__()
        self.sender = nn.Linear(n_hidden, n_hidden, bias=False)
        self.receiver = nn.Linear(n_hidden, n_hidden, bias=False)
        self.edge = nn.Linear(n_edge + 1, n_hidden, bias=False)
        self.noise = nn.Linear(n_hidden, n_hidden)
        self.message = nn.Linear(n_hidden, n_hidden)
        self.attention = nn.Linear(n_hidden, 1)
        self.displacement = nn.Linear(n_hidden, 1, bias=False)
        nn.init.xavier_uniform_(self.displacement.weight, gain=0.1)
        self.update = nn.Sequential(
            nn.Linear(2 * n_hidden, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_hidden)
        )

    def forward(
        self, x: Tensor, h: Tensor, edges: Tensor, tau: Tensor, mask: Tensor, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, M, D), (B or 1, M, H), (B, M, M, E), (B, H), (M, M, 1) -> new x and h, messages.

        The ``last`` layer leaves h as it is: nobody reads it.
        """
        difference = x[:, :, None] - x[:, None]
        square = difference.square().sum(dim=-1, keepdim=True)
        time = self.noise(tau)[:, None]
        nodes = (self.sender(h) + time)[:, :, None] + self.receiver(h)[:, None]
        message = nn.functional.silu(nodes + self.edge(torch.cat([edges, square], dim=-1)))
        message = nn.functional.silu(self.message(message))
        gate = torch.sigmoid(_number(self.attention, message)) * mask
        direction = difference / ((square + 1e-12).sqrt() + 1.0)
        n_others = max(x.shape[1] - 1, 1)
        x = x + (direction * (gate * _number(self.displacement, message))).sum(dim=2) / n_others
        if last:
            return x, h, message
        if torch.compiler.is_compiling():
            received = (gate * message).sum(dim=2)
        else:
            received = (gate.mT @ message).squeeze(2)
        sent = (h + time).expand_as(received)
        h = h + self.update(torch.cat([sent, received], dim=-1))
        return x, h, message


def _number(linear: nn.Linear, message: Tensor) -> Tensor:
    """linear(message) with one output, (B, M, M, 1).

    In compiled code, sums of products fuse into one pass with their neighbours; matrix products,
    which are faster otherwise, would each be a pass of their own.
    """
    if not torch.compiler.is_compiling():
        return linear(message)  # type: ignore[no-any-return]
    total = (message * linear.weight[0]).sum(dim=-1, keepdim=True)
    return total if linear.bias is None else total + linear.bias


@NETWORKS.register
class EGNN(Network):
    """Equivariant displacement network for particles with class labels.

    Parameters
    ----------
    labels
        (M,) integers 0..K-1: particles with one label are interchangeable (the network commutes
        with their permutation), particles with different labels are told apart.
    n_dims
        D, 2 or 3. The parameters do not depend on it.
    n_layers, n_hidden
        Depth and width; the paper uses 4 x 128 (DW-4), 6 x 128 (LJ-13), 7 x 256 (ALDP).
    n_radial, cutoff
        Radial basis on the input distances, in the (scaled) units of the input.
    node_features
        Optional (M, F) constants appended to the label embedding.
    edge_features
        Optional (M, M, E) constants, for example bond flags.
    pair_head
        Width of a head that gives pair coefficients (:mod:`~openmm_vtdis.networks.pair_head`).
        None: no head; :meth:`add_pair_head` adds one.
    """

    kind: ClassVar[str] = "egnn"
    graph_safe: ClassVar[bool] = True

    labels: Tensor
    nodes: Tensor
    edges: Tensor
    mask: Tensor

    def __init__(
        self,
        labels: list[int],
        n_dims: int,
        n_layers: int = 4,
        n_hidden: int = 128,
        n_radial: int = 16,
        cutoff: float = 6.0,
        node_features: list[list[float]] | None = None,
        edge_features: list[list[list[float]]] | None = None,
        pair_head: int | None = None,
    ) -> None:
        super().__init__()
        checks.positive_integer("n_layers", n_layers)
        checks.positive_integer("n_hidden", n_hidden)
        checks.positive_integer("n_radial", n_radial, minimum=2)
        self.config: dict[str, Any] = {
            "labels": [int(label) for label in labels],
            "n_dims": n_dims,
            "n_layers": n_layers,
            "n_hidden": n_hidden,
            "n_radial": n_radial,
            "cutoff": cutoff,
            "node_features": node_features,
            "edge_features": edge_features,
            "pair_head": None,
        }
        n_particles = len(labels)
        nodes = torch.tensor(node_features or [[]] * n_particles, dtype=torch.float32)
        edges = torch.tensor(
            edge_features or [[[]] * n_particles] * n_particles, dtype=torch.float32
        )
        if nodes.shape[0] != n_particles or edges.shape[:2] != (n_particles, n_particles):
            raise ValueError(
                f"node_features, edge_features: expected leading shapes ({n_particles},) and "
                f"({n_particles}, {n_particles}), got {tuple(nodes.shape)} and {tuple(edges.shape)}"
            )
        self.register_buffer("labels", torch.tensor(labels), persistent=False)
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("edges", edges, persistent=False)
        mask = 1.0 - torch.eye(n_particles)
        self.register_buffer("mask", mask[:, :, None], persistent=False)
        self.embedding = nn.Embedding(int(max(labels)) + 1, n_hidden)
        self.node_input = nn.Linear(n_hidden + nodes.shape[1], n_hidden)
        self.noise = NoiseEmbedding(n_hidden)
        self.radial = RadialBasis(n_radial, cutoff)
        n_edge = n_radial + edges.shape[2]
        self.layers = nn.ModuleList([EGNNLayer(n_hidden, n_edge) for _ in range(n_layers)])
        self.edge_messages = n_hidden
        if pair_head is not None:
            self.add_pair_head(pair_head)

    @classmethod
    def from_size(
        cls,
        n_layers: int,
        n_hidden: int,
        labels: Sequence[int],
        space: Space,
        features: Mapping[str, Any],
    ) -> Self:
        if not space.centred:
            logger.warning(
                "network: an EGNN sees differences of positions only, and the target depends on "
                'positions in space; "mlp-7x512" sees them'
            )
        return cls(list(labels), space.n_dims, n_layers, n_hidden, **features)

    def forward(self, x: Tensor, log_t: Tensor) -> Tensor:
        """Displacement of each particle: x (B, M, D), log noise level (B,) -> (B, M, D)."""
        return self.with_messages(x, log_t)[0]

    def with_messages(self, x: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """The displacement, and the messages (B, M, M, H) of the last layer."""
        tau = self.noise(log_t)
        h = self.node_input(torch.cat([self.embedding(self.labels), self.nodes], dim=-1))[None]
        square = (x[:, :, None] - x[:, None]).square().sum(dim=-1)
        edges = self.radial((square + 1e-12).sqrt())
        if self.edges.shape[2]:
            static = self.edges.expand(x.shape[0], -1, -1, -1)
            edges = torch.cat([edges, static], dim=-1)
        start = x
        messages = edges
        for k, layer in enumerate(self.layers, start=1):
            x, h, messages = layer(x, h, edges, tau, self.mask, last=k == len(self.layers))
        return x - start, messages
