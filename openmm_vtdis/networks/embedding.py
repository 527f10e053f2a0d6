"""Embeddings of scalars: the noise level, and interparticle distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of log t, then a two-layer MLP: (B,) -> (B, n_features).

    The noise levels of a Boltzmann generator span four decades or so; frequencies from 1/4 to 4
    radians per e-fold resolve steps of the finest grids in use without aliasing.
    """

    frequencies: Tensor

    def __init__(self, n_features: int, n_frequencies: int = 16) -> None:
        super().__init__()
        frequencies = torch.logspace(math.log10(0.25), math.log10(4.0), n_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * n_frequencies + 1, n_features),
            nn.SiLU(),
            nn.Linear(n_features, n_features),
            nn.SiLU(),
        )

    def forward(self, log_t: Tensor) -> Tensor:
        phase = log_t[:, None] * self.frequencies
        features = torch.cat([log_t[:, None] / 4.0, phase.sin(), phase.cos()], dim=-1)
        return self.mlp(features)


class RadialBasis(nn.Module):
    """Gaussians on a distance, (...) -> (..., n_basis), centres evenly spaced on [0, cutoff].

    Beyond ``cutoff`` all features fade to zero; the network still sees the squared distance itself.
    """

    centres: Tensor

    def __init__(self, n_basis: int, cutoff: float) -> None:
        super().__init__()
        centres = torch.linspace(0.0, cutoff, n_basis)
        self.register_buffer("centres", centres, persistent=False)
        self.inverse_width = (n_basis - 1) / cutoff

    def forward(self, distance: Tensor) -> Tensor:
        return (-0.5 * ((distance[..., None] - self.centres) * self.inverse_width).square()).exp()
