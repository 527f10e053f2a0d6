r"""Estimates of p(x_0 | x_n): a mean, and a covariance where there is one.

The covariance is kept in units of the noise, C = Cov[x_0 | x_n] / t_n^2, in reduced coordinates. An
estimator makes a posterior from x_n and t_n; which one a process asks is up to its covariance
(:meth:`~openmm_vtdis.diffusion.covariance.base.Fittable.estimator`), or the level of noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from openmm_vtdis.core.eigh import eigh, finite_or_zero
from openmm_vtdis.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Posterior:
    """The mean of p(x_0 | x_n) for B configurations.

    Attributes
    ----------
    mean
        (B, M, D) float64.
    """

    mean: Tensor

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, d), not negative, and eigenvectors (B, d, d) of C, in the columns.

        Raises
        ------
        ValueError
            If the estimate has no covariance.
        """
        raise ValueError(
            "covariance: expected an estimate of the posterior with a covariance, got its mean"
        )

    def split(self, sizes: list[int]) -> list[Self]:
        """Split into posteriors of the given numbers of configurations."""
        parts = (tensor.split(sizes) for tensor in self._tensors())
        return [type(self)(*part) for part in zip(*parts, strict=True)]

    def _tensors(self) -> tuple[Tensor, ...]:
        """All fields, with a first axis B."""
        return (self.mean,)


@dataclass(frozen=True)
class EigenPosterior(Posterior):
    """A posterior whose C is given by its eigenvectors.

    Attributes
    ----------
    values, vectors
        (B, d), not negative, and (B, d, d).
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, mean: Tensor, matrix: Tensor) -> EigenPosterior:
        """Make a posterior of the positive part of C (B, d, d); zero where C is not finite."""
        values, vectors = eigh(finite_or_zero(matrix))
        return cls(mean, values.clamp_min(0.0), vectors)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        return self.values, self.vectors

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.mean, self.values, self.vectors


@dataclass(frozen=True)
class DefinitePosterior(Posterior):
    """A posterior whose C is positive definite by construction, so that Cholesky factors exist.

    Attributes
    ----------
    matrix
        C, (B, d, d).
    """

    matrix: Tensor

    def spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(finite_or_zero(self.matrix))
        return values.clamp_min(0.0), vectors

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.mean, self.matrix


class Estimator(Protocol):
    """Makes posteriors of x (B, M, D) float64 at noise levels t (B,)."""

    def __call__(self, x: Tensor, t: Tensor) -> Posterior: ...


@dataclass(frozen=True)
class MeanEstimator:
    """The denoiser's prediction, with nothing else."""

    denoiser: Denoiser

    def __call__(self, x: Tensor, t: Tensor) -> Posterior:
        """D(x, t) on the space."""
        return Posterior(self.denoiser.space.project(self.denoiser(x, t)))
