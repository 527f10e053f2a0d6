r"""Gradients and Hessians of a batched energy, added up term by term.

Differentiating the gradient of the whole energy takes one pass for each of 3 M coordinates. But a
term of k particles has second derivatives between these only, and all tuples of a term can be
differentiated at once, each with respect to its own copy of its points: 3 k passes do. A function
of a distance takes one, since with r = |a - b| and e = (a - b) / r ::

    d phi / da = phi' e,
    d2 phi / da da = -d2 phi / da db = phi'' e e^T + phi' / r (I - e e^T).
"""

from __future__ import annotations

import torch
from torch import Tensor


class TermHessians:
    """Sum of the gradients and Hessians of terms for B configurations of M particles.

    Attributes
    ----------
    gradient
        (M, 3, B) in kJ/mol/nm.
    hessian
        (M * M, 3, 3, B) in kJ/mol/nm^2: the block of particles i and j at row i M + j.
    """

    def __init__(self, coordinates: Tensor) -> None:
        """Begin with zeros, sized for ``coordinates`` (3, M, B)."""
        _, m, n_samples = coordinates.shape
        self.n_particles = m
        self.gradient = coordinates.new_zeros(m, 3, n_samples)
        self.hessian = coordinates.new_zeros(m * m, 3, 3, n_samples)

    def add_points(self, particles: Tensor, first: Tensor, second: Tensor) -> None:
        """Add P functions of k points each.

        ``particles`` (k, P), ``first`` (k, 3, P, B), ``second`` (k, 3, k, 3, P, B).
        """
        for a, i in enumerate(particles):
            self.gradient.index_add_(0, i, first[a].transpose(0, 1))
            for b, j in enumerate(particles):
                block = second[a, :, b].permute(2, 0, 1, 3)
                self.hessian.index_add_(0, i * self.n_particles + j, block)

    def add_distances(self, pairs: Tensor, apart: Tensor, first: Tensor, second: Tensor) -> None:
        """Add P functions of a distance each.

        ``pairs`` (2, P), ``apart`` (3, P, B) from the second particle to the first, ``first`` and
        ``second`` derivatives (P, B).
        """
        i, j = pairs
        r = apart.square().sum(dim=0).sqrt()
        counts = (first != 0.0) | (second != 0.0)  # a constant has no slope at r = 0 either
        e = torch.where(counts, apart / r, 0.0).transpose(0, 1)  # (P, 3, B)
        force, transverse = first[:, None] * e, torch.where(counts, first / r, 0.0)
        block = ((second - transverse)[:, None] * e)[:, :, None] * e[:, None]
        block.diagonal(dim1=1, dim2=2).add_(transverse[:, :, None])
        self.gradient.index_add_(0, i, force).index_add_(0, j, -force)
        m = self.n_particles
        for sign, rows in ((1, i * m + i), (1, j * m + j), (-1, i * m + j), (-1, j * m + i)):
            self.hessian.index_add_(0, rows, block, alpha=sign)

    def add_outer(self, a: Tensor, b: Tensor) -> None:
        """Add the sum over k of a_k b_k^T and its transpose, for a and b (k, M, 3, B)."""
        m, n_samples = self.n_particles, self.gradient.shape[2]
        left, right = (y.flatten(1, 2).permute(2, 0, 1) for y in (a, b))
        outer = left.mT @ right
        blocks = (outer + outer.mT).reshape(n_samples, m, 3, m, 3).permute(1, 3, 2, 4, 0)
        self.hessian += blocks.flatten(0, 1)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, 3) and Hessian (B, M, 3, M, 3)."""
        m = self.n_particles
        blocks = self.hessian.reshape(m, m, 3, 3, -1)
        return self.gradient.permute(2, 0, 1), blocks.permute(4, 0, 2, 1, 3)
