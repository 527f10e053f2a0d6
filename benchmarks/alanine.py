"""Alanine dipeptide before and after reweighting, beside MD: the paper's section 5.3.

    python -m benchmarks.alanine --samples 5000

Samples of a shipped generator are compared with the held-out reference run, which neither
training nor tuning has seen: energies, Ramachandran plots, the free energy along phi, and the
weights of frames in rare basins. Writes ``docs/tables/<name>-observables.md`` and
``docs/figures/<name>-*.png``; the samples stay under ``runs/`` and are used again when they are
there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mdtraj
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.cases import SAMPLE_SEED, TEST_SEED, fingerprint_of
from benchmarks.harness import (
    MarkdownTable,
    cached,
    command_line,
    new_figure,
    write_figure,
    write_page,
)
from openmm_vtdis import DiffusionBoltzmannGenerator, Estimate, WeightedEnsemble
from openmm_vtdis.plotting import energy_histogram, free_energy_profile, ramachandran
from recipes.reference import (
    between_chains,
    chain_lengths,
    cis,
    dihedrals,
    left_handed,
    reference_frames,
)

LEAST = 10
"""Fewest samples in a region from which its share is estimated."""
EDGES = np.linspace(-180.0, 180.0, 19)


class Reference:
    """The held-out run, with errors from the spread between its independent chains.

    All chains begin with both peptide bonds trans, so that the first fifth of each is left out.
    """

    def __init__(self, name: str, gen: DiffusionBoltzmannGenerator) -> None:
        lengths = chain_lengths(name, "test")
        starts = np.cumsum(lengths) - lengths
        used = np.concatenate(
            [np.arange(start + n // 5, start + n) for start, n in zip(starts, lengths, strict=True)]
        )
        self.lengths = lengths - lengths // 5
        self.frames = reference_frames(name, "test")[used]
        self.energies = gen.target.reduced_energy(torch.tensor(self.frames)).numpy()
        traj = mdtraj.Trajectory(self.frames, mdtraj.Topology.from_openmm(gen.topology))
        self.phi, self.psi = dihedrals(traj)
        self.cis = cis(traj)

    def mean(self, values: np.ndarray) -> Estimate:
        """The average of an observable over frames (n,)."""
        return between_chains(values, self.lengths)

    def histogram(self, values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Density and its standard error, (k,) each."""
        inside = (edges[:-1, None] <= values) & (values < edges[1:, None])
        shares = [self.mean(bin_) for bin_ in inside]
        density, stderr = np.array([[s.value, s.stderr] for s in shares]).T / np.diff(edges)
        return density, stderr


def samples(
    name: str, gen: DiffusionBoltzmannGenerator, n: int, progress: bool
) -> WeightedEnsemble:
    """Draw n weighted samples, or read those that were drawn before."""
    about = f"{gen.process.schedule.n_steps}-{n}-{fingerprint_of(gen):.6f}"
    path = cached(f"{name}-samples-{about}.nc")
    if not path.exists():
        gen.sample(n, seed=SAMPLE_SEED, progress=progress).save(path)
    return WeightedEnsemble.load(path)


def observables(ensemble: WeightedEnsemble, reference: Reference) -> str:
    """Table of averages: raw, reweighted, MD, and how many standard errors they are apart.

    It includes the free energy of the left-handed basin relative to the rest, in kT.
    """
    traj = ensemble.to_mdtraj()
    phi, psi = dihedrals(traj)
    bonds = cis(traj)
    rows: list[tuple[str, np.ndarray, np.ndarray]] = [
        ("energy / kT", ensemble.reduced_energies, reference.energies),
        ("share with 0 < phi < 120°", left_handed(phi), left_handed(reference.phi)),
        ("share with psi > 0", (psi > 0.0) * 1.0, (reference.psi > 0.0) * 1.0),
        ("share of cis, first peptide bond", bonds[:, 0], reference.cis[:, 0]),
        ("share of cis, second peptide bond", bonds[:, 1], reference.cis[:, 1]),
    ]
    table = MarkdownTable("", "raw", "z", "reweighted", "z", "MD", quiet=True)
    for label, values, md_values in rows:
        md, n_inside = reference.mean(md_values), np.count_nonzero(values)
        if n_inside < LEAST:
            table.add(label, f"{n_inside} samples: too few", "", "", "", str(md))
            continue
        estimates = [w.expectation(values) for w in (ensemble.unweighted(), ensemble)]
        table.add(label, *compared(estimates, md))
        if "phi" in label:
            differences = [free_energy(share) for share in estimates]
            table.add("its free energy over the rest / kT", *compared(differences, free_energy(md)))
    about, n_steps = ensemble.diagnostics(), len(ensemble.metadata["times"]) - 1
    return (
        f"{table}\n{len(ensemble):,} samples at {n_steps} steps: reverse ESS "
        f"{about.ess:.2%}, Pareto k {about.pareto_k:.2f}, largest weight "
        f"{about.largest_weight_share:.2%}.\n"
    )


def compared(estimates: list[Estimate], truth: Estimate) -> list[str]:
    """Cells of estimates, with their distances from the truth in standard errors, and the truth."""
    cells = []
    for estimate in estimates:
        cells += [str(estimate), f"{estimate.z(truth.value, truth.stderr):+.1f}"]
    return [*cells, str(truth)]


def free_energy(share: Estimate) -> Estimate:
    """-log(p / (1 - p)) of a share p."""
    p, error = float(share.value), float(share.stderr)
    return Estimate(-np.log(p / (1.0 - p)), error / (p * (1.0 - p)))


def coverage(gen: DiffusionBoltzmannGenerator, reference: Reference, n: int, progress: bool) -> str:
    """Table of the log weights of held-out frames in rare basins, above those of all others.

    It takes at most n frames of each basin; the generator makes those far above zero too rarely.
    """
    left, bonds = left_handed(reference.phi), reference.cis
    basins = {
        "none of these": (left + bonds.sum(axis=1)) == 0,
        "left-handed phi": left > 0,
        "cis, first peptide bond": bonds[:, 0] > 0,
        "cis, second peptide bond": bonds[:, 1] > 0,
    }
    rng = np.random.default_rng(TEST_SEED)
    chosen = [rng.permutation(np.nonzero(inside)[0])[:n] for inside in basins.values()]
    log_w = gen.log_weights(
        reference.frames[np.concatenate(chosen)], seed=TEST_SEED, progress=progress
    )
    parts = np.split(log_w, np.cumsum([len(index) for index in chosen])[:-1])
    columns = "held-out frames", "", "log w above the first row's (quartiles)"
    table = MarkdownTable(*columns, quiet=True)
    for (label, inside), part in zip(basins.items(), parts, strict=True):
        if len(part) < LEAST:
            table.add(label, f"{len(part)}: too few", "")
            continue
        low, median, high = np.percentile(part, [25, 50, 75]) - np.median(parts[0])
        counts = f"{len(part)} of {np.count_nonzero(inside):,}"
        table.add(label, counts, f"{median:+.1f} ({low:+.1f} to {high:+.1f})")
    return str(table)


def draw_energy(ensemble: WeightedEnsemble, reference: Reference, figure: Figure) -> None:
    """Draw energies, Fig. 3 of the paper."""
    energy_histogram(ensemble, reference.energies, ax=figure.subplots(), bins=24)


def draw_ramachandran(ensemble: WeightedEnsemble, reference: Reference, figure: Figure) -> None:
    """Draw Ramachandran plots, Fig. 4 of the paper."""
    phi, psi = dihedrals(ensemble.to_mdtraj())
    left, middle, right = figure.subplots(1, 3)
    ramachandran(phi, psi, ax=left, bins=15).set_title("generated, raw")
    ramachandran(phi, psi, ensemble.weights, ax=middle, bins=15).set_title("generated, reweighted")
    ramachandran(reference.phi, reference.psi, ax=right, bins=15).set_title("MD")


def draw_profile(ensemble: WeightedEnsemble, reference: Reference, figure: Figure) -> None:
    """Draw the free energy along phi with one standard error."""
    ax = figure.subplots()
    degrees = np.rad2deg(dihedrals(ensemble.to_mdtraj())[0])
    density, stderr = reference.histogram(np.rad2deg(reference.phi), EDGES)
    free_energy_profile(density, EDGES, stderr, ax, label="MD")
    for label, weighted in (("raw", ensemble.unweighted()), ("reweighted", ensemble)):
        density, _, stderr = weighted.histogram(degrees, EDGES)
        free_energy_profile(density, EDGES, stderr, ax, label=f"generated, {label}")
    ax.set(xlabel=r"$\phi$ / degrees", xticks=[-180, -90, 0, 90, 180])


FIGURES: dict[str, tuple[tuple[float, float], Callable[..., None]]] = {
    "energy": ((6.0, 4.2), draw_energy),
    "ramachandran": ((12.0, 3.8), draw_ramachandran),
    "phi": ((6.0, 4.2), draw_profile),
}


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, progress=True)
    parser.add_argument("--name", default="aldp-800K", choices=["aldp-300K", "aldp-800K"])
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--frames", type=int, default=60, help="noised of each basin, at most")
    parser.add_argument("--archive", type=Path, help="instead of the shipped generator")
    parser.add_argument("--bfloat16", action="store_true", help="the network, not the weights")
    options = parser.parse_args()
    if options.archive is None:
        gen = DiffusionBoltzmannGenerator.from_pretrained(options.name)
    else:
        gen = DiffusionBoltzmannGenerator.load(options.archive)
    reference = Reference(options.name, gen)
    with torch.autocast(gen.device.type, torch.bfloat16, enabled=options.bfloat16):
        ensemble = samples(options.name, gen, options.samples, options.progress)
    text = observables(ensemble, reference)
    text += "\n" + coverage(gen, reference, options.frames, options.progress)
    print(text)
    write_page(f"{options.name}-observables", text)
    for name, (size, draw) in FIGURES.items():
        figure = new_figure(*size)
        draw(ensemble, reference, figure)
        write_figure(f"{options.name}-{name}", figure)


if __name__ == "__main__":
    main()
