r"""The posterior's covariance as a learned elastic network, for little more than the mean costs.

Where forces act between pairs, the Hessian of the energy is an elastic network: a sum over pairs of
springs along and across the line that joins them. With e_i the unit vector of particle i and r_ij
the direction from j to i in the denoised configuration, the *pair Laplacian*

    L(alpha, beta) = sum_{i<j} (e_i - e_j)(e_i - e_j)^T (x) (alpha_ij I + beta_ij r_ij r_ij^T)

is positive semi-definite for alpha, beta >= 0, blind to translations, and turns and permutes with
the configuration, whatever network gives the coefficients. Two of them make the covariance of the
posterior over t^2:

    C = (I + t^2 / M  L_1)^-1  +  t^2 / (M (1 + t^2)^2)  L_2 / 10.

The first is a precision: t^2 Hess u at low noise, t^2 over the variance of the data at large
noise, which coefficients that do not depend on t can follow. It cannot be wider than the noise; the
second, a covariance, adds the width of posteriors with more than one mode.

A head on the frozen denoiser's messages gives the coefficients. It is trained by the Gaussian
likelihood of x_0 - D in noised data, for which no grid is needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import Denoiser, check_pairs
from openmm_vtdis.diffusion.posteriors.base import DefinitePosterior
from openmm_vtdis.networks.pair_head import pair_indices

_WIDTH = 0.1
"""Scale of the second part of C for coefficients of one, so that it starts out small."""


def pair_laplacian(space: Space, alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """L in reduced coordinates: alpha, beta (..., B, P) over pairs, x (B, M, D) -> (..., B, d, d).

    Pairs stand in the order of :func:`~openmm_vtdis.networks.pair_head.pair_indices`. Entries of
    the matrix are made in that order too, each once, and are put in their places last of all.
    """
    layout = _layout(space, x.device)
    (i, j), (row, column) = layout.pairs, layout.axes
    line = (x.index_select(1, i) - x.index_select(1, j)).mT.contiguous()
    directions = line.index_select(1, row) * line.index_select(1, column)
    directions = directions / (line.square().sum(dim=1, keepdim=True) + 1e-12)
    identity = (row == column).to(x.dtype)[:, None]
    springs = torch.addcmul(alpha[..., None, :] * identity, beta[..., None, :], directions)
    shares, diagonal = (springs @ layout.sums.to(x.dtype)).chunk(2, dim=-1)
    first, second = layout.inner
    off = _picked(shares, first) + _picked(shares, second) - springs[..., : len(first)]
    entries = torch.cat([off, diagonal], dim=-1).flatten(-2)
    return _picked(entries, layout.places).unflatten(-1, (space.dim, space.dim))


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """Pick from the last axis: (..., n) and (k,) -> (..., k). (index_select is slower.)"""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


@dataclass(frozen=True)
class _Layout:
    """Positions of the entries of a pair Laplacian: constants of a space.

    With A the Laplacian of springs a, c the corner of the space (zero where it is not centred) and
    w_k = c a_kM + c^2 / 2 A_MM, its reduced entries are w_k + w_l - a_kl, and A_kk + 2 w_k.

    Attributes
    ----------
    pairs, inner
        The two particles of each pair, and those of each pair of reduced particles: (2, P) each.
    axes
        The two axes of each entry of a symmetric (D, D) matrix.
    sums
        (P, 2 rank): springs times these are w, and the diagonal.
    places
        (d d,): which of the entries stands at each place of the matrix, row by row. Entries are
        numbered axes first, xx, xy, ...; for each of these pairs come before particles.
    """

    pairs: Tensor
    inner: Tensor
    axes: Tensor
    sums: Tensor
    places: Tensor


@functools.lru_cache(maxsize=64)
def _layout(space: Space, device: torch.device) -> _Layout:
    m, r, n_dims = space.n_particles, space.rank, space.n_dims
    with torch.inference_mode(False):
        i, j = pair_indices(m)
        ends = (torch.nn.functional.one_hot(i, m) + torch.nn.functional.one_hot(j, m)).double()
        shares = torch.zeros(len(i), r, dtype=torch.float64)
        if space.centred:
            to_last = ends[:, -1:]
            shares += to_last * (space.corner * ends[:, :-1] + 0.5 * space.corner**2)
        sums = torch.cat([shares, ends[:, :r] + 2.0 * shares], dim=1)
        first, second = pair_indices(r)
        same = torch.arange(r)
        particles = _numbered(torch.cat([first, same]), torch.cat([second, same]))
        axes = torch.triu_indices(n_dims, n_dims)
        places = _numbered(*axes)[None, :, None, :] * (len(first) + r) + particles[:, None, :, None]
        ends_of = torch.stack([i, j]), torch.stack([first, second])
        parts = (*ends_of, axes, sums, places.flatten())
        return _Layout(*(part.to(device) for part in parts))


def _numbered(row: Tensor, column: Tensor) -> Tensor:
    """Numbers of the entries of a symmetric matrix, (n, n), given in this order."""
    n = int(row.max()) + 1
    numbers = torch.zeros(n, n, dtype=torch.int64)
    numbers[row, column] = numbers[column, row] = torch.arange(len(row))
    return numbers


def posterior_shape(space: Space, pairs: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """C from pair coefficients (B, P, 4), D (B, M, D) and noise levels (B,): (B, d, d).

    It is the identity where any of them is NaN or infinite.
    """
    finite = torch.isfinite(pairs.sum(dim=(1, 2)) + denoised.sum(dim=(1, 2)))[:, None, None]
    pairs, denoised = pairs.where(finite, 0.0), denoised.where(finite, 0.0)
    square, m = t.square(), space.n_particles
    scales = torch.stack([square, _WIDTH * square / (1.0 + square).square()]) / m
    springs = pairs.permute(2, 0, 1).contiguous().unflatten(0, (2, 2)) * scales[:, None, :, None]
    laplacians = pair_laplacian(space, springs[:, 0], springs[:, 1], denoised)
    laplacians[0].diagonal(dim1=1, dim2=2).add_(1.0)
    return spd_inverse(laplacians[0]) + laplacians[1]


def spd_inverse(matrices: Tensor) -> Tensor:
    """Inverses of positive definite matrices (B, d, d)."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices).L)


@dataclass(frozen=True)
class PairwiseEstimator:
    """C from the pair coefficients of the denoiser's head."""

    denoiser: Denoiser

    def __post_init__(self) -> None:
        check_pairs(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor) -> DefinitePosterior:
        """Estimate the posterior; C is the identity where the network's output is not finite."""
        denoised, pairs = check_pairs(self.denoiser).with_pairs(x, t)
        space = self.denoiser.space
        denoised = space.project(denoised)
        matrix = posterior_shape(
            space, pairs.to(torch.float64), denoised.to(torch.float64), t.to(torch.float64)
        )
        return DefinitePosterior(denoised, matrix)
