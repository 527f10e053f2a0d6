"""Alanine dipeptide: changes of basin a second, with the generator's move and without it.

    python -m benchmarks.moves --minutes 10

Markov chains at 800 K through openmmtools, the same wall time each, in turns: Langevin dynamics
alone, and with a :class:`~openmm_vtdis.interop.DiffusionMove` of so many proposals between its
pieces. Counted are changes between the left-handed region, 0 < phi < 120 degrees, and the rest, and
changes of a peptide bond between cis and trans, which dynamics hardly has; both are looked at once
a piece. Writes ``docs/tables/moves.md``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field

import mdtraj
import numpy as np
from openmm import unit
from openmmtools import mcmc, states

from benchmarks.alanine import NAME, left_handed
from benchmarks.tables import DOCS
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.pretrained.train import peptide_bonds
from openmm_vtdis.storage import write_atomically
from openmm_vtdis.targets import alanine_dipeptide


@dataclass
class Chain:
    """A sampler, the time it took, and where it was after each piece."""

    sampler: mcmc.MCMCSampler
    bonds: list[list[int]]
    seconds: float = 0.0
    basins: list[list[bool]] = field(default_factory=list)
    """Left-handed, and cis of either peptide bond."""

    def run(self, seconds: float, topology: mdtraj.Topology) -> None:
        """Go on for so long."""
        end = self.seconds + seconds
        while self.seconds < end:
            began = time.perf_counter()
            self.sampler.run(n_iterations=1)
            self.seconds += time.perf_counter() - began
            x = self.sampler.sampler_state.positions.value_in_unit(unit.nanometer)
            frame = mdtraj.Trajectory(x[None], topology)
            left = left_handed(mdtraj.compute_phi(frame)[1][0]) > 0.0
            omega = mdtraj.compute_dihedrals(frame, self.bonds)[0]
            self.basins.append([*left, *(np.abs(omega) < np.pi / 2.0)])

    @property
    def changes(self) -> np.ndarray:
        """Changes of phi's region, and of peptide bonds: (2,)."""
        first, *others = np.abs(np.diff(np.array(self.basins, dtype=int), axis=0)).sum(axis=0)
        return np.array([first, sum(others)])


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10.0, help="of each chain")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--piece", type=int, default=500, help="steps of 1 fs between proposals")
    parser.add_argument("--proposals", type=int, nargs="+", default=[1, 16], help="of each call")
    options = parser.parse_args()
    system = alanine_dipeptide()
    topology = mdtraj.Topology.from_openmm(system.topology)
    with tempfile.TemporaryDirectory() as folder:
        gen = DiffusionBoltzmannGenerator.from_pretrained(NAME)
        archive = gen.save(f"{folder}/{NAME}.vtdis")
        langevin = {"timestep": 1.0 * unit.femtosecond, "n_steps": options.piece}
        moves = {"Langevin dynamics": mcmc.LangevinDynamicsMove(**langevin)}
        for n in options.proposals:
            move = DiffusionMove(archive, n, 64, seed=n)
            both = [move, mcmc.LangevinDynamicsMove(**langevin)]
            moves[f"with {n} proposals a piece"] = mcmc.SequenceMove(both)
        state = states.ThermodynamicState(system.system, system.temperature * unit.kelvin)
        start = states.SamplerState(system.positions * unit.nanometer)
        bonds = peptide_bonds(system.topology)
        chains = {
            name: Chain(mcmc.MCMCSampler(state, start, m), bonds) for name, m in moves.items()
        }
        for _ in range(options.turns):
            for chain in chains.values():
                chain.run(60.0 * options.minutes / options.turns, topology)
    text = "| chain | seconds | pieces | accepted | changes of phi | per 1,000 s "
    text += "| share left-handed | changes of a peptide bond | per 1,000 s | share cis |\n"
    text += f"|{'---|' * 10}\n"
    for name, chain in chains.items():
        move = getattr(chain.sampler.move, "move_list", [None])[0]
        accepted = "" if move is None else f"{move.n_accepted:,} of {move.n_proposed:,}"
        cells = [name, f"{chain.seconds:.0f}", f"{len(chain.basins):,}", accepted]
        left, *cis = np.mean(chain.basins, axis=0)
        for count, share in zip(chain.changes, (left, np.mean(cis)), strict=True):
            rate, error = (1e3 * value / chain.seconds for value in (count, count**0.5))
            cells += [str(count), f"{rate:.1f} ± {error:.1f}", f"{share:.3f}"]
        text += f"| {' | '.join(cells)} |\n"
    text += (
        f"\nPieces of {options.piece} fs; {gen.kernel.schedule.n_steps} network evaluations a "
        "proposal, and as many a call for the path of the configuration that is there. Changes "
        "are counted between ends of pieces; one CPU thread.\n"
    )
    print(text)
    write_atomically(DOCS / "tables" / "moves.md", text.encode())


if __name__ == "__main__":
    main()
