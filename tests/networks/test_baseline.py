"""The benchmark's edge-list network is the package's network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import EdgeListEGNN, sample
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import reverse_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import EGNN


def networks(n_layers: int = 3) -> tuple[EGNN, EdgeListEGNN]:
    torch.manual_seed(0)
    flags = torch.randint(2, (5, 5, 3), generator=torch.Generator().manual_seed(1)).float()
    flags = torch.maximum(flags, flags.transpose(0, 1))
    dense = EGNN(
        [0, 1, 1, 2, 2], 3, n_layers, 24, node_features=[[float(k)] for k in range(5)],
        edge_features=flags.tolist(),
    )  # fmt: skip
    for layer in dense.layers:
        torch.nn.init.normal_(layer.displacement.weight)
    return dense, EdgeListEGNN(dense)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_baseline_gives_the_same_displacements(n_layers: int) -> None:
    """The first layer's particles are alike in a batch, the last layer's are not made at all."""
    dense, plain = networks(n_layers)
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(2))
    log_t = torch.linspace(-3.0, 3.0, 7)
    expected = dense(x, log_t).detach()
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(plain(x, log_t), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain.layers[-1].first.bias += 0.1  # control
    assert float((plain(x, log_t).detach() - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_baseline_gives_the_same_gradients(n_layers: int) -> None:
    """By positions, noise level, and the weights that every configuration shares."""
    dense, plain = networks(n_layers)
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(2))
    target = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(3))

    def gradients(network: EGNN | EdgeListEGNN) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_(), torch.linspace(-3.0, 3.0, 7).requires_grad_()
        loss = (network(*inputs) * target).sum()
        shared = [p for name, p in network.named_parameters() if name.startswith("node_input")]
        return list(torch.autograd.grad(loss, [*inputs, *shared]))

    ours, theirs = gradients(dense), gradients(plain)
    assert len(ours) == 4
    for here, there in zip(ours, theirs, strict=True):
        assert float(here.abs().max()) > 1e-3
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_what_is_shared_or_unread_is_not_computed(n_layers: int) -> None:
    """Products of matrices in an evaluation, counted by hand."""
    dense, _ = networks(n_layers)
    n, m, width, edge = 16, 5, 24, 16 + 3 + 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dense(torch.randn(n, m, 3), torch.zeros(n))
    per_pair = edge * width + width**2 + 2 * width  # edge, message, attention, displacement
    per_node = 3 * width**2 + m * width  # update, and the sum of messages
    once = m * (width + 1) * width + 2 * m * width**2  # node_input; first sender and receiver
    noise = 33 * width + (1 + n_layers) * width**2
    pairs, updates = n_layers * m * m * per_pair, (n_layers - 1) * m * per_node
    senders = (n_layers - 1) * 2 * m * width**2
    assert counter.get_total_flops() == 2 * (once + n * (noise + pairs + updates + senders))


def test_the_baseline_sampler_is_the_same_process() -> None:
    dense, plain = networks()
    space, grid = Space(5, 3), Schedule.geometric(8, 0.05, 12.0)
    process = DiffusionProcess.ddpm(PreconditionedDenoiser(dense, space), grid)
    paths = reverse_paths(process, 6, torch.Generator().manual_seed(3), progress=False)
    x, log_ratio = sample(
        PreconditionedDenoiser(plain, space), grid, 6, torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(x, paths.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_ratio, paths.log_ratio, rtol=1e-4, atol=1e-3)
