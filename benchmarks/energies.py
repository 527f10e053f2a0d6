"""Conformations per second: batched torch against one OpenMM Reference Context, on one thread.

    python -m benchmarks.energies

Alanine dipeptide in several force fields. Both are timed in turn, in the same run, on the same
conformations, and the best of five turns counts. So are Hessians, of all shipped systems, term by
term and by differentiating the gradient once for every coordinate. Writes
``benchmarks/results/energies.json`` and ``docs/tables/energies.md``, ``hessians.md``.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable

import openmm
import torch
from openmm import app

from benchmarks.run import RESULTS
from benchmarks.tables import DOCS
from openmm_vtdis.derivatives import differentiate_twice
from openmm_vtdis.storage import write_atomically
from openmm_vtdis.targets import (
    BenchmarkSystem,
    alanine_dipeptide,
    double_well,
    lennard_jones,
)
from openmm_vtdis.targets.batched import BatchedEnergy

N_BATCHED, N_CONTEXT, TURNS = 3_000, 100, 5
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


def rate(work: Callable[[], object], n: int) -> float:
    """Conformations per second."""
    began = time.perf_counter()
    work()
    return n / (time.perf_counter() - began)


def measure(system: openmm.System, x: torch.Tensor) -> dict[str, list[float]]:
    """Best rates of energies and of energies with forces: [Reference, batched] each."""
    batched = BatchedEnergy(system)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    frames = x[:N_CONTEXT].numpy()

    def reference(forces: bool) -> None:
        for frame in frames:
            context.setPositions(frame)
            state = context.getState(energy=True, forces=forces)
            state.getPotentialEnergy()
            if forces:
                state.getForces(asNumpy=True)

    @torch.no_grad()
    def energies() -> None:
        batched.energy(x)

    best = {"energy": [0.0, 0.0], "with forces": [0.0, 0.0]}
    for _ in range(TURNS):
        for kind, again in (("energy", energies), ("with forces", None)):
            forces = again is None
            now = (
                rate(lambda forces=forces: reference(forces), N_CONTEXT),
                rate(again or (lambda: batched.energy_and_force(x)), len(x)),
            )
            best[kind] = [max(a, b) for a, b in zip(best[kind], now, strict=True)]
    return best


def hessian_rates(system: BenchmarkSystem) -> list[float]:
    """Best rates of Hessians, a pass for every coordinate and term by term, of 64 at once."""
    target = system.target()
    noise = torch.randn(64, *system.positions.shape, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(system.positions) + 0.005 * noise.double()
    best = [0.0, 0.0]
    for _ in range(TURNS):
        now = [
            rate(lambda: differentiate_twice(target.reduced_energy, x), len(x)),
            rate(lambda: target.derivatives(x), len(x)),
        ]
        best = [max(a, b) for a, b in zip(best, now, strict=True)]
    return best


def time_hessians(machine: str) -> None:
    """Those of the benchmark systems."""
    text = "| Hessians | a pass a coordinate / s | term by term / s | ratio |\n|---|---|---|---|\n"
    for system in (double_well(), lennard_jones(), alanine_dipeptide()):
        a, b = hessian_rates(system)
        text += f"| {system.name} | {a:,.0f} | {b:,.0f} | {b / a:.1f} |\n"
        print(text.splitlines()[-1], flush=True)
    write_atomically(DOCS / "tables" / "hessians.md", f"{text}\nMeasured on {machine}.\n".encode())


def time_energies(machine: str) -> None:
    """Those of alanine dipeptide in several force fields."""
    noise = torch.randn(N_BATCHED, 22, 3, generator=torch.Generator().manual_seed(0)).double()
    x = torch.tensor(alanine_dipeptide().positions) + 0.005 * noise
    rows = {}
    for name, system in systems().items():
        rows[name] = measure(system, x)
        print(name, rows[name], flush=True)
    document = {"machine": machine, "rows": rows}
    write_atomically(RESULTS / "energies.json", (json.dumps(document, indent=1) + "\n").encode())
    text = "| alanine dipeptide | | Reference / s | batched / s | ratio |\n|---|---|---|---|---|\n"
    for name, kinds in rows.items():
        for kind, (a, b) in kinds.items():
            text += f"| {name} | {kind} | {a:,.0f} | {b:,.0f} | {b / a:.1f} |\n"
    write_atomically(DOCS / "tables" / "energies.md", f"{text}\nMeasured on {machine}.\n".encode())


def main() -> None:
    """Measure, store and tabulate."""
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, torch {torch.__version__}, one thread"
    time_hessians(machine)
    time_energies(machine)


if __name__ == "__main__":
    main()
