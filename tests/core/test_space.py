"""The zero-CoM subspace: projection, basis, Gaussian density against dense linear algebra."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_vtdis.core.space import Space

SPACES = [Space(4, 2), Space(13, 3), Space(5, 1, centred=False)]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_basis_is_orthonormal_and_spans_the_space(space: Space) -> None:
    v = space.basis
    torch.testing.assert_close(v @ v.mT, torch.eye(space.rank, dtype=torch.float64))
    projector = v.mT @ v
    x = torch.randn(6, space.n_particles, space.n_dims, dtype=torch.float64)
    torch.testing.assert_close(projector @ x, space.project(x))


@pytest.mark.parametrize("n_particles", [2, 4, 13])
def test_a_laplacian_in_reduced_coordinates_takes_no_product_of_matrices(n_particles: int) -> None:
    space = Space(n_particles, 3)
    half = torch.randn(n_particles, n_particles, dtype=torch.float64)
    springs = (half + half.mT).fill_diagonal_(0.0)

    def by_entries(matrix: torch.Tensor) -> torch.Tensor:
        last, c = matrix[:-1, -1], space.corner
        return matrix[:-1, :-1] - c * (last[:, None] + last) + c**2 * matrix[-1, -1]

    laplacian = torch.diag(springs.sum(dim=1)) - springs
    v = space.basis
    torch.testing.assert_close(by_entries(laplacian), v @ laplacian @ v.mT)
    # Control: a matrix that does not vanish on (1, ..., 1)
    assert not torch.allclose(by_entries(half @ half.mT), v @ half @ half.mT @ v.mT)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_reduce_and_expand_are_inverse_isometries(space: Space) -> None:
    x = space.project(torch.randn(6, space.n_particles, space.n_dims, dtype=torch.float64))
    z = space.reduce(x)
    torch.testing.assert_close(space.expand(z), x)
    torch.testing.assert_close(z.square().sum(), x.square().sum())
    assert z[0].numel() == space.dim


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_log_prob_is_the_dense_density_of_reduced_coordinates(space: Space) -> None:
    variance = 0.37
    x = space.project(torch.randn(3, space.n_particles, space.n_dims, dtype=torch.float64))
    dense = torch.distributions.MultivariateNormal(
        torch.zeros(space.dim, dtype=torch.float64),
        variance * torch.eye(space.dim, dtype=torch.float64),
    )
    torch.testing.assert_close(
        space.isotropic_log_prob(x, variance), dense.log_prob(space.reduce(x).flatten(1))
    )


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_standard_normal_has_the_projector_as_covariance(space: Space) -> None:
    x = space.standard_normal(20_000, torch.Generator().manual_seed(0))
    square = x.square().sum(dim=(1, 2))
    z = (square.mean() - space.dim) / math.sqrt(2.0 * space.dim / len(x))
    assert abs(float(z)) < 4.0
    if space.centred:
        assert float(x.sum(dim=1).abs().max()) < 1e-12


def test_a_single_centred_particle_is_refused() -> None:
    with pytest.raises(ValueError, match="n_particles: expected an integer >= 2"):
        Space(1, 3)
