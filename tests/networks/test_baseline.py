"""The benchmark's edge-list network is the package's network."""

from __future__ import annotations

import torch

from benchmarks.baseline import EdgeListEGNN, sample
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.sampling import reverse_paths
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.geometry import Space
from openmm_vtdis.networks import EGNN


def networks() -> tuple[EGNN, EdgeListEGNN]:
    torch.manual_seed(0)
    flags = torch.randint(2, (5, 5, 3), generator=torch.Generator().manual_seed(1)).float()
    flags = torch.maximum(flags, flags.transpose(0, 1))
    dense = EGNN(
        [0, 1, 1, 2, 2], 3, 3, 24, node_features=[[float(k)] for k in range(5)],
        edge_features=flags.tolist(),
    )  # fmt: skip
    for layer in dense.layers:
        torch.nn.init.normal_(layer.displacement.weight)
    return dense, EdgeListEGNN(dense)


def test_the_baseline_gives_the_same_displacements() -> None:
    dense, plain = networks()
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(2))
    log_t = torch.linspace(-3.0, 3.0, 7)
    expected = dense(x, log_t).detach()
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(plain(x, log_t), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain.layers[1].first.bias += 0.1  # control
    assert float((plain(x, log_t).detach() - expected).abs().max()) > 1e-3


def test_the_baseline_sampler_is_the_same_process() -> None:
    dense, plain = networks()
    space, grid = Space(5, 3), Schedule.geometric(8, 0.05, 12.0)
    kernel = DiffusionKernel.ddpm(PreconditionedDenoiser(dense, space), grid)
    paths = reverse_paths(kernel, 6, torch.Generator().manual_seed(3), progress=False)
    x, log_ratio = sample(
        PreconditionedDenoiser(plain, space), grid, 6, torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(x, paths.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_ratio, paths.log_ratio, rtol=1e-4, atol=1e-3)
