"""Products with a Jacobian, against the dense one and in every mode a caller may be in."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import Linearised
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.posteriors.jacobian import denoiser_jacobian


def function(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0] * x[:, 1], x[:, 1].sin(), x.prod(dim=1)], dim=1)


def points() -> Tensor:
    return torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__
)
def test_products_are_those_of_the_dense_jacobian(mode: type) -> None:
    dense = torch.func.vmap(torch.func.jacfwd(lambda x: function(x[None])[0]))(points())
    with mode():
        found = Linearised(function, points())
        rows = [found.product(torch.eye(3, dtype=torch.float64)[k].expand(5, 3)) for k in range(3)]
        rows.append(found.product(torch.ones(5, 3, dtype=torch.float64)))
    torch.testing.assert_close(found.value, function(points()))
    torch.testing.assert_close(torch.stack(rows[:3], dim=1), dense)
    torch.testing.assert_close(rows[3], dense.sum(dim=1))
    assert not any(row.requires_grad for row in [found.value, *rows])


def test_a_constant_has_no_slope() -> None:
    found = Linearised(lambda x: torch.ones(len(x), 3, dtype=x.dtype), points())
    assert not found.product(torch.ones(5, 3, dtype=torch.float64)).any()
    half = Linearised(lambda x: torch.stack([x[:, 0], torch.ones_like(x[:, 0])], dim=1), points())
    expected = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(5, 2)
    torch.testing.assert_close(half.product(torch.ones(5, 2, dtype=torch.float64)), expected)


@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__
)
def test_a_denoiser_may_multiply_by_its_noise_level(mode: type) -> None:
    """A level that was made in inference mode could not be saved for the pass backwards."""
    space = Space(3, 2)
    x = space.standard_normal(5, torch.Generator().manual_seed(0))
    for points in (x, x.float()):
        with mode():
            _, jacobian = denoiser_jacobian(lambda y, t: y * t[:, None, None], space, points, 0.5)
        torch.testing.assert_close(jacobian, 0.5 * torch.eye(4).double().expand(5, -1, -1))
