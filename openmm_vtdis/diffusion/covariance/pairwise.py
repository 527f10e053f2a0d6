r"""Covariance as a learned elastic network: nearly the price of an isotropic one.

Where forces act between pairs, the Hessian of the energy is an elastic network: a sum over pairs of
springs along and across the line that joins them. With e_i the unit vector of particle i and r_ij
the direction from j to i in the denoised configuration, the *pair Laplacian*

    L(alpha, beta) = sum_{i<j} (e_i - e_j)(e_i - e_j)^T (x) (alpha_ij I + beta_ij r_ij r_ij^T)

is positive semi-definite for alpha, beta >= 0, blind to translations, and turns and permutes with
the configuration, whatever network gives the coefficients. Two of them make the covariance of the
posterior over t^2 (see :mod:`~openmm_vtdis.diffusion.covariance.state`):

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
from typing import ClassVar

import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance.base import ReverseStep
from openmm_vtdis.diffusion.covariance.state import StateCovariance
from openmm_vtdis.geometry import Space
from openmm_vtdis.networks.pair_head import pair_indices

_WIDTH = 0.1
"""Of the second part where the network says one: it starts out small."""


def pair_laplacian(space: Space, alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """L in reduced coordinates: alpha, beta (..., B, P) over pairs, x (B, M, D) -> (..., B, d, d).

    Pairs stand in the order of :func:`~openmm_vtdis.networks.pair_head.pair_indices`. Entries of
    the matrix are made in that order too, each once, and are put in their places last of all.
    """
    layout = _layout(space, x.device)
    i, j = pair_indices(space.n_particles, x.device)
    row, column = torch.triu_indices(space.n_dims, space.n_dims, device=x.device)
    line = (x.index_select(1, i) - x.index_select(1, j)).mT.contiguous()
    directions = line.index_select(1, row) * line.index_select(1, column)
    directions = directions / (line.square().sum(dim=1, keepdim=True) + 1e-12)
    identity = (row == column).to(x.dtype)[:, None]
    springs = alpha[..., None, :] * identity + beta[..., None, :] * directions
    sums = springs @ layout.ends.to(x.dtype)
    off = -_picked(springs, layout.inner)
    diagonal = sums[..., : space.rank]
    if space.centred:
        last = space.corner * _picked(springs, layout.last)
        first, second = pair_indices(space.rank, x.device)
        off = off + _picked(last, first) + _picked(last, second)
        diagonal = diagonal + 2.0 * last
    entries = torch.cat([off, diagonal], dim=-1)
    if space.centred:
        entries = entries + space.corner**2 * sums[..., -1:]
    return _picked(entries.flatten(-2), layout.places).unflatten(-1, (space.dim, space.dim))


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """Some of the last axis: (..., n) and (k,) -> (..., k). (index_select is slower there.)"""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


@dataclass(frozen=True)
class _Layout:
    """Where the entries of a pair Laplacian go: constants of a space.

    Attributes
    ----------
    ends
        (P, M), one where a particle is an end of a pair.
    inner, last
        Indices of pairs: of reduced particles, and with the last particle.
    places
        (d d,): which of the entries stands at each place of the matrix, row by row. Entries are
        numbered axes first, xx, xy, ...; for each of these inner pairs come before particles.
    """

    ends: Tensor
    inner: Tensor
    last: Tensor
    places: Tensor


@functools.lru_cache(maxsize=64)
def _layout(space: Space, device: torch.device) -> _Layout:
    m, r, n_dims = space.n_particles, space.rank, space.n_dims
    with torch.inference_mode(False):
        i, j = pair_indices(m, torch.device("cpu"))
        ends = torch.nn.functional.one_hot(i, m) + torch.nn.functional.one_hot(j, m)
        particles, axes = (_symmetric(n, k) for n, k in ((r, 1), (n_dims, 0)))
        n_entries = r * (r + 1) // 2
        places = axes[None, :, None, :] * n_entries + particles[:, None, :, None]
        inner, last = (torch.nonzero(where)[:, 0] for where in (j < r, j >= r))
        parts = ends.to(torch.float64), inner, last, places.flatten()
        return _Layout(*(part.to(device) for part in parts))


def _symmetric(n: int, offset: int) -> Tensor:
    """Numbers of the entries of a symmetric matrix, (n, n): the upper triangle row by row.

    ``offset`` 1: without its diagonal, which is numbered after it.
    """
    row, column = torch.triu_indices(n, n, offset)
    numbers = torch.zeros(n, n, dtype=torch.int64)
    numbers[row, column] = numbers[column, row] = torch.arange(len(row))
    if offset:
        numbers.diagonal().copy_(len(row) + torch.arange(n))
    return numbers


def posterior_shape(space: Space, pairs: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """C from pair coefficients (B, P, 4), D (B, M, D) and noise levels (B,): (B, d, d).

    The identity where any of them is NaN or infinite.
    """
    finite = torch.isfinite(pairs.sum(dim=(1, 2)) + denoised.sum(dim=(1, 2)))[:, None, None]
    pairs, denoised = pairs.where(finite, 0.0), denoised.where(finite, 0.0)
    square, m = t.square(), space.n_particles
    scales = torch.stack([square, _WIDTH * square / (1.0 + square).square()]) / m
    springs = scales[:, None, :, None] * pairs.permute(2, 0, 1).unflatten(0, (2, 2))
    laplacians = pair_laplacian(space, springs[:, 0], springs[:, 1], denoised)
    laplacians[0].diagonal(dim1=1, dim2=2).add_(1.0)
    return spd_inverse(laplacians[0]) + laplacians[1]


def spd_inverse(matrices: Tensor) -> Tensor:
    """Of positive definite (B, d, d)."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices).L)


class Pairwise(StateCovariance):
    """C from the pair coefficients of the denoiser's head."""

    kind = "pairwise"
    uses_pairs: ClassVar[bool] = True
    positive: ClassVar[bool] = True

    def shape(self, step: ReverseStep) -> Tensor:
        """C at x_n."""
        if step.pairs is None:
            raise ValueError("covariance: expected pair coefficients in a step, got none")
        level = torch.full((len(step.x),), step.t, dtype=torch.float64, device=step.x.device)
        return posterior_shape(
            self.space, step.pairs.to(torch.float64), step.denoised.to(torch.float64), level
        )
