"""Alanine dipeptide: changes of basin a second, with the generator's move and without it.

    python -m benchmarks.moves --name aldp-300K --minutes 10

Markov chains through openmmtools at the temperature of a shipped generator, the same wall time
each, in turns: Langevin dynamics alone, and with a :class:`~openmm_vtdis.interop.DiffusionMove` of
so many proposals between its pieces. Counted are changes between the left-handed region,
0 < phi < 120 degrees, and the rest, between the helical region, -120 < psi < 60 degrees, and the
rest, and those of a peptide bond between cis and trans; all are looked at once a piece. Writes
``docs/tables/moves-<name>.md``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field

import mdtraj
import numpy as np
import openmm
from openmm import unit
from openmmtools import cache, mcmc, states

from benchmarks.harness import MarkdownTable, command_line, write_page
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.interop import DiffusionMove
from recipes.reference import cis, dihedrals, left_handed
from recipes.settings import build_system


@dataclass
class Chain:
    """A sampler, the time it took, and where it was after each piece."""

    sampler: mcmc.MCMCSampler
    seconds: float = 0.0
    basins: list[list[float]] = field(default_factory=list)
    """Whether left-handed, helical, and cis at either peptide bond, after each piece."""

    def run(self, seconds: float, topology: mdtraj.Topology) -> None:
        """Continue for the given seconds."""
        end = self.seconds + seconds
        while self.seconds < end:
            began = time.perf_counter()
            self.sampler.run(n_iterations=1)
            self.seconds += time.perf_counter() - began
            x = self.sampler.sampler_state.positions.value_in_unit(unit.nanometer)
            frame = mdtraj.Trajectory(x[None], topology)
            (phi,), (psi,) = dihedrals(frame)
            helical = -120.0 < np.rad2deg(psi) < 60.0
            self.basins.append([float(left_handed(phi)), float(helical), *cis(frame)[0]])

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Changes and shares of the basins of phi, psi and the peptide bonds, (3,) each."""
        basins = np.array(self.basins)
        phi, psi, *bonds = np.abs(np.diff(basins, axis=0)).sum(axis=0)
        left, helical, *bent = basins.mean(axis=0)
        return np.array([phi, psi, sum(bonds)]), np.array([left, helical, np.mean(bent)])


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__)
    parser.add_argument("--name", default="aldp-300K", choices=["aldp-300K", "aldp-800K"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each chain")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--piece", type=int, default=500, help="steps of 1 fs between proposals")
    parser.add_argument("--proposals", type=int, nargs="+", default=[1, 16], help="of each call")
    options = parser.parse_args()
    platform = openmm.Platform.getPlatformByName("CPU")
    platform.setPropertyDefaultValue("Threads", "1")
    cache.global_context_cache.platform = platform
    system, name = build_system(options.name), options.name
    topology = mdtraj.Topology.from_openmm(system.topology)
    with tempfile.TemporaryDirectory() as folder:
        gen = DiffusionBoltzmannGenerator.from_pretrained(name)
        archive = gen.save(f"{folder}/{name}.vtdis")
        langevin = {"timestep": 1.0 * unit.femtosecond, "n_steps": options.piece}
        moves = {"Langevin dynamics": mcmc.LangevinDynamicsMove(**langevin)}
        for n in options.proposals:
            move = DiffusionMove(archive, n, 64, seed=n)
            both = [move, mcmc.LangevinDynamicsMove(**langevin)]
            moves[f"with {n} proposal{'s' * (n != 1)} a piece"] = mcmc.SequenceMove(both)
        state = states.ThermodynamicState(system.system, system.temperature * unit.kelvin)
        start = states.SamplerState(system.positions * unit.nanometer)
        chains = {label: Chain(mcmc.MCMCSampler(state, start, m)) for label, m in moves.items()}
        for _ in range(options.turns):
            for chain in chains.values():
                chain.run(60.0 * options.minutes / options.turns, topology)
    columns = ["chain", "seconds", "pieces", "accepted"]
    for what, region in (("phi", "left-handed"), ("psi", "helical"), ("a peptide bond", "cis")):
        columns += [f"changes of {what}", "per 1,000 s", f"share {region}"]
    table = MarkdownTable(*columns)
    for label, chain in chains.items():
        move = getattr(chain.sampler.move, "move_list", [None])[0]
        accepted = "" if move is None else f"{move.n_accepted:,} of {move.n_proposed:,}"
        cells = [label, f"{chain.seconds:.0f}", f"{len(chain.basins):,}", accepted]
        for count, share in zip(*chain.rows, strict=True):
            rate, error = (1e3 * value / chain.seconds for value in (count, count**0.5))
            cells += [f"{count:.0f}", f"{rate:.1f} ± {error:.1f}", f"{share:.3f}"]
        table.add(*cells)
    write_page(
        f"moves-{name}",
        f"{table}\n{system.temperature:.0f} K. Pieces of {options.piece} fs; "
        f"{gen.process.schedule.n_steps} network evaluations a proposal, and as many a call for "
        "the path of the configuration that is there. Changes are counted between ends of pieces; "
        "one CPU thread.\n",
    )


if __name__ == "__main__":
    main()
