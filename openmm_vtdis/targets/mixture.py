r"""Gaussian mixtures: targets about which everything is known.

    pi(x) = sum_k w_k N_x(x; m_k, v_k I),          u(x) = -log pi(x)

N_x is the Gaussian of a :class:`~openmm_vtdis.core.space.Space`. The density is normalised, so that
log Z = 0 exactly; it can be sampled exactly; and noised by a Gaussian it stays a mixture (v_k grows
by t^2), which makes its denoiser exact as well. That makes it the oracle of the tests.

GMM-2, :func:`gaussian_mixture`, is the two-component benchmark in R^d: no particles, no symmetry.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import Seed, make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.storage.fingerprint import fingerprint
from openmm_vtdis.targets.base import TARGETS, Description, Rebuilding, Target

_ArrayLike = Tensor | np.ndarray | list[float]


@TARGETS.register
class GaussianMixture(Target):
    """A normalised mixture of isotropic Gaussians on a space of configurations.

    Parameters
    ----------
    means
        (K, M, D), nm; projected onto the space.
    variances
        (K,), nm^2, positive.
    weights
        (K,), positive; normalised here.
    space
        Space of the density. None: all of R^{M x D}. With a centred space the energy is that of the
        projection of x, so that it is invariant under translation.

    Attributes
    ----------
    weights, means, variances
        The given ones, normalised and projected; float64.
    """

    kind: ClassVar[str | None] = "gaussian-mixture"

    def __init__(
        self,
        means: Tensor | np.ndarray,
        variances: _ArrayLike,
        weights: _ArrayLike,
        space: Space | None = None,
    ) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 3 or 0 in means.shape:
            raise ValueError(f"means: expected shape (K, M, D), got {tuple(means.shape)}")
        k, m, d = means.shape
        self.space = Space(m, d, centred=False) if space is None else space
        if (self.space.n_particles, self.space.n_dims) != (m, d):
            raise ValueError(
                f"means: expected shape (K, {self.space.n_particles}, {self.space.n_dims}) on this "
                f"space, got {tuple(means.shape)}"
            )
        checks.configurations("means", means, m, d)
        self.means: Tensor = self.space.project(means)
        self.variances: Tensor = _positive("variances", variances, k)
        weights = _positive("weights", weights, k)
        self.weights: Tensor = weights / weights.sum()
        self.temperature = None

    @property
    def fingerprint(self) -> str | None:
        """Digest of the space and all numbers; None for a subclass, of which nothing is known."""
        if type(self) is not GaussianMixture:
            return None
        return fingerprint(self.space, self.means, self.variances, self.weights)

    def describe(self) -> Description:
        """Describe the space and all numbers."""
        tensors = {"means": self.means, "variances": self.variances, "weights": self.weights}
        return Description(dataclasses.asdict(self.space), tensors)

    @classmethod
    def rebuild(cls, description: Description, how: Rebuilding) -> Self:
        self = cls(**description.tensors, space=Space(**description.settings))
        self.means = description.tensors["means"]  # projected and normalised before
        self.weights = description.tensors["weights"]
        return self

    def reduced_energy(self, x: Tensor) -> Tensor:
        """-log pi(x): x (B, M, D) nm -> (B,), float64, on x's device."""
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        x = self.space.project(x.to(torch.float64))
        components = [
            self.space.isotropic_log_prob(x - mean, variance) + weight.log()
            for mean, variance, weight in zip(
                self.means.to(x.device),
                self.variances.to(x.device),
                self.weights.to(x.device),
                strict=True,
            )
        ]
        energy = -torch.logsumexp(torch.stack(components), dim=0)
        return torch.where(torch.isfinite(x).all(dim=2).all(dim=1), energy, torch.nan)

    def sample(self, n: int, seed: Seed = None) -> Tensor:
        """Draw n exact, independent samples: (n, M, D) nm, float64."""
        n = checks.positive_integer("n", n)
        rng = make_rng(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = self.space.standard_normal(n, rng)
        return self.means[k] + self.variances[k].sqrt()[:, None, None] * noise

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.weights)} components on {self.space})"


def gaussian_mixture(dim: int = 50) -> GaussianMixture:
    """GMM-2 in R^dim: means 1 and -2 in all coordinates, variance 0.15, weights 2/3 and 1/3.

    Configurations are (B, dim, 1): "particles" in one dimension, without the zero-CoM constraint.
    """
    dim = checks.positive_integer("dim", dim)
    means = torch.tensor([1.0, -2.0], dtype=torch.float64)[:, None, None].expand(2, dim, 1)
    return GaussianMixture(means, [0.15, 0.15], [2.0 / 3.0, 1.0 / 3.0])


def _positive(name: str, values: _ArrayLike, k: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64)
    if tuple(tensor.shape) != (k,) or not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise ValueError(f"{name}: expected {k} finite numbers > 0, got {tensor.tolist()}")
    return tensor
