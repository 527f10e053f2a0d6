"""A baseline: the same network and sampler as one would first write them.

    python -m benchmarks.baseline

:class:`EdgeListEGNN` keeps a list of edges, as graph libraries do: node features are gathered
along it and concatenated with those of the edge, messages are scattered back to the nodes. It takes
its weights from an :class:`~openmm_vtdis.networks.EGNN` and gives the same displacements. Training
step and sampling are timed in alternating rounds beside those of the package, on the shipped
networks; on a GPU those of the package also with compiled layers and in bfloat16. Writes
``docs/tables/baseline.md``.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.forms import FORMS, WARM_UP, half_precision, in_form, training_step
from benchmarks.harness import (
    NETWORKS,
    MarkdownTable,
    command_line,
    in_turns,
    spread,
    write_table,
)
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import reverse_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.networks import EGNN
from openmm_vtdis.networks.egnn import EGNNLayer

STEPS = {"cpu": 4, "cuda": 40}
"""Steps of sampling. On a GPU the first few are not recorded."""


class EdgeListLayer(nn.Module):
    """One round of messages along a list of edges."""

    def __init__(self, dense: EGNNLayer) -> None:
        super().__init__()
        n_hidden, n_edge = dense.message.in_features, dense.edge.in_features
        self.first = nn.Linear(3 * n_hidden + n_edge, n_hidden)
        with torch.no_grad():
            parts = (dense.sender, dense.receiver, dense.edge, dense.noise)
            self.first.weight.copy_(torch.cat([part.weight for part in parts], dim=1))
            self.first.bias.copy_(dense.noise.bias)
        self.message, self.attention = copy.deepcopy(dense.message), copy.deepcopy(dense.attention)
        self.displacement = copy.deepcopy(dense.displacement)
        self.noise, self.update = copy.deepcopy(dense.noise), copy.deepcopy(dense.update)

    def forward(
        self, x: Tensor, h: Tensor, edges: Tensor, tau: Tensor, row: Tensor, col: Tensor, n: int
    ) -> tuple[Tensor, Tensor]:
        """Nodes (V, D) and (V, H), edges (E, F), noise (V, H), ends (E,): new x and h."""
        difference = x[row] - x[col]
        square = difference.square().sum(dim=-1, keepdim=True)
        inputs = torch.cat([h[row], h[col], edges, square, tau[row]], dim=-1)
        message = nn.functional.silu(self.message(nn.functional.silu(self.first(inputs))))
        gate = torch.sigmoid(self.attention(message))
        direction = difference / ((square + 1e-12).sqrt() + 1.0)
        shift = direction * (gate * self.displacement(message)) / max(n - 1, 1)
        x = torch.zeros_like(x).index_add(0, row, shift) + x
        received = torch.zeros_like(h).index_add(0, row, gate * message)
        h = h + self.update(torch.cat([h + self.noise(tau), received], dim=-1))
        return x, h


class EdgeListEGNN(nn.Module):
    """The displacement network with the weights of a dense one."""

    def __init__(self, dense: EGNN) -> None:
        super().__init__()
        self.labels, self.nodes, self.static = dense.labels, dense.nodes, dense.edges
        self.embedding, self.node_input = (
            copy.deepcopy(part) for part in (dense.embedding, dense.node_input)
        )
        self.noise, self.radial = copy.deepcopy(dense.noise), dense.radial
        self.layers = nn.ModuleList([EdgeListLayer(layer) for layer in dense.layers])  # type: ignore[arg-type]

    def forward(self, x: Tensor, log_t: Tensor) -> Tensor:
        """(B, M, D), (B,) -> (B, M, D)."""
        n_graphs, n, n_dims = x.shape
        i, j = (1 - torch.eye(n, device=x.device)).nonzero(as_tuple=True)
        offset = n * torch.arange(n_graphs, device=x.device)[:, None]
        row, col = (offset + i).flatten(), (offset + j).flatten()
        tau = self.noise(log_t).repeat_interleave(n, dim=0)
        features = torch.cat([self.embedding(self.labels), self.nodes], dim=-1)
        h = self.node_input(features).repeat(n_graphs, 1)
        flat = x.reshape(-1, n_dims)
        start, square = flat, (flat[row] - flat[col]).square().sum(dim=-1)
        static = self.static[i, j].repeat(n_graphs, 1)
        edges = torch.cat([self.radial((square + 1e-12).sqrt()), static], dim=-1)
        for layer in self.layers:
            flat, h = layer(flat, h, edges, tau, row, col, n)
        return (flat - start).reshape(x.shape)


def sample(
    denoiser: PreconditionedDenoiser, schedule: Schedule, n: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample the reverse process with DDPM's variance, step by step as in the paper's equations.

    Returns x_0 (n, M, D) and the log ratio of the path densities (n,).
    """
    space: Space = denoiser.space
    times = schedule.times
    x = times[-1] * space.standard_normal(n, rng)
    log_ratio = -space.isotropic_log_prob(x, times[-1] ** 2)
    for t, s in zip(times[:0:-1], times[-2::-1], strict=True):
        ratio = (s / t) ** 2
        variance = s**2 * (1.0 - ratio)
        with torch.no_grad():
            denoised = space.project(denoiser(x, torch.full((n,), t).to(x)))
        mean = ratio * x + (1.0 - ratio) * denoised
        before = mean + variance**0.5 * space.standard_normal(n, rng)
        log_ratio += space.isotropic_log_prob(x - before, t**2 - s**2)
        log_ratio -= space.isotropic_log_prob(before - mean, variance)
        x = before
    return x, log_ratio


def measure(
    name: str, form: str, n_rounds: int, batch_size: int, device: torch.device
) -> list[str]:
    """Measure a row of the table: the package's seconds, and how much longer the baseline takes."""
    torch.compiler.reset()
    gen, trained = (in_form(name, form, device) for _ in range(2))
    plain, plain_trained = (
        PreconditionedDenoiser(EdgeListEGNN(gen.network).to(device), gen.space)  # type: ignore[arg-type]
        for _ in range(2)
    )
    grid = Schedule.geometric(STEPS[device.type], 0.1, 10.0)
    process = DiffusionProcess.ddpm(gen.denoiser, grid)

    def samples() -> None:
        with half_precision(form, device):
            seeded = torch.Generator(device).manual_seed(0)
            reverse_paths(process, batch_size, seeded, batch_size, False)

    work = {
        "training": (
            training_step(trained.denoiser.train(), batch_size, device, form.split(",")[0]),  # type: ignore[attr-defined, arg-type]
            training_step(plain_trained.train(), batch_size, device),
        ),
        "sampling": (
            samples,
            lambda: sample(plain.eval(), grid, batch_size, torch.Generator(device).manual_seed(0)),
        ),
    }
    cells = [name, form]
    for ours, theirs in work.values():
        for _ in range(WARM_UP[device.type] - 1):
            ours()
        ours_took, theirs_took = in_turns([ours, theirs], n_rounds, device).T
        unit = 1e3 * np.median(ours_took) / batch_size
        cells += [f"{unit:.3g} ms", spread(theirs_took / ours_took)]
    return cells


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, systems=NETWORKS, rounds=9, batch_size=64, device=True)
    options = parser.parse_args()
    device = options.device
    table = MarkdownTable(
        "network",
        "as",
        "a training step, per configuration",
        "baseline takes",
        f"{STEPS[device.type]} steps of sampling, per sample",
        "baseline takes",
    )
    for name in options.systems:
        for form in FORMS[device.type]:
            table.add(*measure(name, form, options.rounds, options.batch_size, device))
    note = (
        f"The package's time, and the baseline's as a multiple of it: median and range of "
        f"{options.rounds} alternating rounds, batches of {options.batch_size}, on "
    )
    write_table("baseline", table, note, device)


if __name__ == "__main__":
    main()
