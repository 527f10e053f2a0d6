r"""The space that configurations live in, and its standard Gaussian.

A molecule's energy does not change when it is translated, so its Boltzmann density cannot be
normalised over all of R^{MD}. It is defined on the zero-centre-of-mass (zero-CoM) subspace

    X_0 = { x in R^{M x D} : sum_i x_i = 0 },      dim X_0 = d = (M - 1) D,

with the Lebesgue measure that X_0 inherits from R^{MD} (paper, Sec. 3.2 and App. B). With V an
(M-1, M) matrix of orthonormal rows that span { z : 1^T z = 0 }, the map x -> V x is an isometry of
X_0 onto R^{(M-1) x D}: densities on X_0 are densities of the *reduced coordinates* V x (Eq. 23).

A target without this symmetry (GMM-2) lives in all of R^{M x D}; then V = I and d = M D. Both are a
:class:`Space`, and nothing downstream asks which one it has been given.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.core import checks

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Space:
    """Configurations of M particles in D dimensions, with or without the zero-CoM constraint.

    Attributes
    ----------
    n_particles
        M.
    n_dims
        D.
    centred
        True: the zero-CoM subspace. False: all of R^{M x D}.

    Examples
    --------
    >>> Space(13, 3).dim
    36
    """

    n_particles: int
    n_dims: int
    centred: bool = True

    def __post_init__(self) -> None:
        checks.positive_integer("n_particles", self.n_particles, minimum=2 if self.centred else 1)
        checks.positive_integer("n_dims", self.n_dims)

    @property
    def rank(self) -> int:
        """Number of reduced particles: M - 1 (zero CoM) or M."""
        return self.n_particles - 1 if self.centred else self.n_particles

    @property
    def dim(self) -> int:
        """Dimension d of the space: ``rank * n_dims``."""
        return self.rank * self.n_dims

    @functools.cached_property
    def basis(self) -> Tensor:
        """V, shape (rank, M), float64: orthonormal rows spanning the allowed particle vectors.

        For the zero-CoM subspace the first M - 1 rows of the reflection that takes the last unit
        vector to the direction of -(1, ..., 1): row k is e_k and constants, the same in all rows.
        Where A 1 = 0, as of a Laplacian, an entry of V A V^T is therefore A's own and three others
        in fixed proportions (:attr:`corner`), and no product of matrices is needed.
        """
        m = self.n_particles
        if not self.centred:
            return torch.eye(m, dtype=torch.float64)
        rows = torch.eye(m - 1, m, dtype=torch.float64)
        rows[:, -1] = -1.0 / math.sqrt(m)
        rows[:, :-1] -= 1.0 / (m + math.sqrt(m))
        return rows

    @property
    def corner(self) -> float:
        """c of (V A V^T)_kl = A_kl - c (A_kM + A_Ml) + c^2 A_MM, for the zero-CoM subspace.

        For any symmetric (M, M) matrix A with A 1 = 0.
        """
        m = self.n_particles
        return 1.0 / math.sqrt(m) - 1.0 / (m + math.sqrt(m))

    def basis_like(self, x: Tensor) -> Tensor:
        """V with x's type and on its device, where it is copied once."""
        return _basis(self, x.device, x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """Orthogonal projection onto the space: subtract the mean over particles. (..., M, D)."""
        return x - x.mean(dim=-2, keepdim=True) if self.centred else x

    def reduce(self, x: Tensor) -> Tensor:
        """Reduced coordinates V x: (..., M, D) -> (..., rank, D)."""
        return self.basis_like(x) @ x

    def expand(self, z: Tensor) -> Tensor:
        """V^T z: (..., rank, D) -> (..., M, D), the inverse of :meth:`reduce` on the space."""
        return self.basis_like(z).mT @ z

    def standard_normal(
        self,
        n: int,
        rng: torch.Generator,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Draw n standard Gaussians N_x(0, I): (n, M, D) on the device of ``rng``."""
        shape = (n, self.n_particles, self.n_dims)
        noise = torch.randn(shape, generator=rng, device=rng.device, dtype=dtype)
        return self.project(noise)

    def isotropic_log_prob(self, residual: Tensor, variance: Tensor | float) -> Tensor:
        """log N_x(residual; 0, variance I) in float64: (B, M, D) -> (B,).

        ``residual`` must lie in the space already; ``variance`` is a positive scalar.
        """
        variance = float(variance)
        square = residual.to(torch.float64).square().sum(dim=(-2, -1))
        return -0.5 * (square / variance + self.dim * (math.log(variance) + LOG_2PI))


@functools.lru_cache(maxsize=64)
def _basis(space: Space, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return space.basis.to(device, dtype)


def random_rotations(n: int, n_dims: int, rng: torch.Generator) -> Tensor:
    """n rotation matrices (n, D, D), float64: Q of a Gaussian matrix, with determinant +1."""
    gaussian = torch.randn(n, n_dims, n_dims, generator=rng, dtype=torch.float64)
    q, _ = torch.linalg.qr(gaussian)
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q
