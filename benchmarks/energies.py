"""Conformations per second: batched torch against one OpenMM Context, on one thread.

    python -m benchmarks.energies

Alanine dipeptide in several force fields; Contexts of the platforms Reference and CPU (CUDA, where
OpenMM has it, with ``--device cuda``). All are timed in turn, in the same run, on the same
conformations, and the median of the turns counts. So are Hessians, of all shipped systems, term by
term and by differentiating the gradient once for every coordinate. Writes
``docs/tables/energies.md`` and ``hessians.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import openmm
import torch
from openmm import app

from benchmarks.harness import MarkdownTable, command_line, in_turns, spread, write_table
from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.targets import BenchmarkSystem, alanine_dipeptide, double_well, lennard_jones
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy

N_CONTEXT = 100
FORCE_FIELDS = {
    "ff14SB, OBC2": ("amber14/protein.ff14SB.xml", "implicit/obc2.xml"),
    "ff99SB-ILDN, GBn2": ("amber99sbildn.xml", "implicit/gbn2.xml"),
    "ff19SB in vacuum (CMAP)": ("amber19/protein.ff19SB.xml",),
    "ff99SB, GBSAOBCForce": ("amber99sb.xml", "amber99_obc.xml"),
}


def systems() -> dict[str, openmm.System]:
    """The Systems that are timed."""
    shipped = alanine_dipeptide()
    built = {"ff96, OBC (the benchmark system)": shipped.system}
    for name, files in FORCE_FIELDS.items():
        field = app.ForceField(*files)
        built[name] = field.createSystem(shipped.topology, constraints=None)
    return built


def contexts(system: openmm.System, device: torch.device) -> dict[str, openmm.Context]:
    """A Context of each platform that is compared, with one thread where it has threads."""
    found = {}
    count = openmm.Platform.getNumPlatforms()
    installed = {openmm.Platform.getPlatform(i).getName() for i in range(count)}
    wanted = ("Reference", "CPU") if device.type == "cpu" else ("Reference", "CUDA")
    for name in (name for name in wanted if name in installed):
        platform = openmm.Platform.getPlatformByName(name)
        properties = {"Threads": "1"} if name == "CPU" else {}
        integrator = openmm.VerletIntegrator(0.001)
        found[name] = openmm.Context(system, integrator, platform, properties)
    return found


def evaluate(context: openmm.Context, frames: np.ndarray, forces: bool) -> None:
    """Compute energies, and forces if asked, frame by frame."""
    for frame in frames:
        context.setPositions(frame)
        state = context.getState(energy=True, forces=forces)
        state.getPotentialEnergy()
        if forces:
            state.getForces(asNumpy=True)


def measure(
    system: openmm.System, x: torch.Tensor, n_turns: int, device: torch.device
) -> tuple[list[str], list[str]]:
    """Measure the cells of a row for energies alone, and of one for energies with forces."""
    batched, y, frames = BatchedEnergy(system), x.to(device), x[:N_CONTEXT].numpy()
    made = contexts(system, device)

    @torch.no_grad()
    def energies() -> None:
        batched.energy(y)

    def cells(works: list[Callable[[], object]]) -> list[str]:
        """Rates of the Contexts and, last, of batched torch, with its ratios to them."""
        sizes = np.array([len(frames)] * len(made) + [len(y)])
        rates = sizes / in_turns(works, n_turns, device)
        ratios = rates[:, -1:] / rates[:, :-1]
        return [
            *(f"{value:,.0f}" for value in np.median(rates, axis=0)),
            *(spread(ratio, ".1f") for ratio in ratios.T),
        ]

    def theirs(forces: bool) -> list[Callable[[], object]]:
        return [functools.partial(evaluate, c, frames, forces) for c in made.values()]

    return cells([*theirs(False), energies]), cells(
        [*theirs(True), lambda: batched.energy_and_force(y)]
    )


def hessian_rates(system: BenchmarkSystem, n_turns: int, device: torch.device) -> list[str]:
    """Rates of 64 Hessians at once, by a pass for every coordinate and term by term."""
    target = system.target()
    noise = torch.randn(64, *system.positions.shape, generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(system.positions) + 0.005 * noise.double()).to(device)
    works = (
        lambda: differentiate_twice(target.reduced_energy, x),
        lambda: target.derivatives(x),
    )
    rates = len(x) / in_turns(works, n_turns, device)
    cells = [f"{value:,.0f}" for value in np.median(rates, axis=0)]
    return [*cells, spread(rates[:, 1] / rates[:, 0], ".1f")]


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, device=True)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--frames", type=int, default=3_000, help="in a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    note = f"Median (range of the ratio) of {options.turns} alternating turns, measured on "

    hessians = MarkdownTable("Hessians", "a pass a coordinate / s", "term by term / s", "ratio")
    for system in (double_well(), lennard_jones(), alanine_dipeptide()):
        hessians.add(system.name, *hessian_rates(system, options.turns, device))
    write_table("hessians", hessians, note, device)

    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(options.frames, 22, 3, generator=rng).double()
    x = torch.tensor(alanine_dipeptide().positions) + 0.005 * noise
    names = list(contexts(alanine_dipeptide().system, device))
    rates, ratios = (f"{name} / s" for name in names), (f"to {name}" for name in names)
    energies = MarkdownTable("alanine dipeptide", "", *rates, "batched / s", *ratios)
    for name, system in systems().items():
        for kind, cells in zip(
            ("energy", "with forces"), measure(system, x, options.turns, device), strict=True
        ):
            energies.add(name, kind, *cells)
    write_table("energies", energies, note, device)


if __name__ == "__main__":
    main()
