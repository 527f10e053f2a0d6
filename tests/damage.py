"""Files of every kind that the package reads, damaged at random in many ways.

``python -m tests.damage 100000`` tries as many, in processes of their own, since readers written in
C may end one; ``--seed`` makes them others. What must come of each is content or a ValueError.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.core.space import Space
from openmm_vtdis.interop import system_files
from openmm_vtdis.topology import placeholder_topology
from openmm_vtdis.topology.frames import read_frames
from tests import potentials

PACKED = "many.xtc"
"""Not among those tried by default: its reader in C believes the packed coordinates themselves, of
which nobody can tell whether they are sound, and a flipped bit there can end the process."""
SECONDS = 300.0
"""For some thousand files."""
PSF = """PSF EXT

         1 !NTITLE
 REMARKS three atoms

         3 !NATOM
         1 W        1        HOH      O        OT      -0.834000       15.9994           0
         2 W        1        HOH      H1       HT       0.417000        1.0080           0
         3 W        1        HOH      H2       HT       0.417000        1.0080           0

         2 !NBOND: bonds
         1         2         1         3

         1 !NTHETA: angles
         2         1         3

         0 !NPHI: dihedrals

         0 !NIMPHI: impropers

         0 !NDON: donors

         0 !NACC: acceptors

         0 !NNB

         0         0         0

         1         0 !NGRP NST2
         0         0         0
"""
PARAMETERS = """* three atoms
*

ATOMS
MASS     1 HT     1.00800
MASS     2 OT    15.99940

BONDS
HT OT 450.0 0.9572

ANGLES
HT OT HT 55.0 104.52

NONBONDED
OT 0.0 -0.1521 1.7682
HT 0.0 -0.0460 0.2245

END
"""
TOP = """[ defaults ]
1 2 yes 0.5 0.8333

[ atomtypes ]
OW 8 15.9994 -0.834 A 0.315 0.636
HW 1 1.008 0.417 A 0.04 0.19

[ moleculetype ]
HOH 2

[ atoms ]
1 OW 1 HOH O 1 -0.834 15.9994
2 HW 1 HOH H1 1 0.417 1.008
3 HW 1 HOH H2 1 0.417 1.008

[ bonds ]
1 2 1 0.09572 502416
1 3 1 0.09572 502416

[ angles ]
2 1 3 1 104.52 628.02

[ system ]
water

[ molecules ]
HOH 1
"""


def originals(folder: Path) -> dict[str, Callable[[str], object]]:
    """Writes a sound file of each kind; its name, and how it is read."""
    topology, x = potentials.water()
    frames = potentials.frames(12)
    with (folder / "top.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, x * unit.nanometer, file)
    with (folder / "top.cif").open("w") as file:
        app.PDBxFile.writeFile(topology, x * unit.nanometer, file)
    (folder / "top.psf").write_text(PSF)
    (folder / "par.prm").write_text(PARAMETERS)
    (folder / "top.top").write_text(TOP)
    (folder / "top.prmtop").write_bytes(prmtop())
    system, force = openmm.System(), openmm.HarmonicBondForce()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    for i, j, r, k in potentials.BONDS:
        force.addBond(i, j, r, k)
    system.addForce(force)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology))
    trajectory.unitcell_lengths = np.full((12, 3), 2.0)  # which some formats insist on
    trajectory.unitcell_angles = np.full((12, 3), 90.0)
    kinds = ("dcd", "xtc", "trr", "nc", "gro", "xyz", "lammpstrj", "mdcrd", "pdb", "cif", "rst7")
    for kind in kinds:
        (trajectory[:1] if kind == "rst7" else trajectory).save(str(folder / f"md.{kind}"))
    rng = np.random.default_rng(0)
    many = mdtraj.Trajectory(
        rng.normal(size=(6, 12, 3)), mdtraj.Topology.from_openmm(placeholder_topology(12))
    )
    for kind in ("xtc", "trr"):  # of more than nine atoms, which are packed
        many.save(str(folder / f"many.{kind}"))
    ensemble = WeightedEnsemble(frames, rng.normal(size=12), rng.normal(size=12), 300.0, topology)
    for kind in ("nc", "npz"):
        ensemble.save(folder / f"samples.{kind}")
        ensemble.resample(9, seed=0).save(folder / f"fair.{kind}")
    gen = DiffusionBoltzmannGenerator(system, topology, network="egnn-1x4", seed=0)
    gen.train(frames, 1, batch_size=4, progress=False)
    gen.save(folder / "model.vtdis")

    space = Space(3, 3, centred=True)

    def md(path: str) -> object:
        return read_frames("train", path, space, topology)

    def packed(path: str) -> object:
        return read_frames("train", path, Space(12, 3, centred=True), None)

    parameters = [str(folder / "par.prm")]
    readers: dict[str, Callable[[str], object]] = {
        "top.pdb": system_files.read_topology,
        "top.cif": system_files.read_topology,
        "top.psf": lambda path: system_files.read_system(path, parameters=parameters),
        "par.prm": lambda path: system_files.read_system(
            str(folder / "top.psf"), parameters=[path]
        ),
        "top.top": system_files.read_system,
        "top.prmtop": system_files.read_system,
        "system.xml": system_files.read_system,
        "samples.nc": WeightedEnsemble.load,
        "samples.npz": WeightedEnsemble.load,
        "fair.nc": md,
        "fair.npz": md,
        "many.xtc": packed,
        "many.trr": packed,
        "model.vtdis": DiffusionBoltzmannGenerator.load,
        **{f"md.{kind}": md for kind in kinds},
    }
    for name, read in readers.items():
        if name not in ("fair.npz", "samples.md.nc"):  # no trajectories
            read(str(folder / name))
    return readers


def prmtop() -> bytes:
    """A ligand of openmmtools'."""
    import openmmtools

    folder = Path(openmmtools.__file__).parent / "data" / "T4-lysozyme-L99A-implicit"
    return (folder / "ligand.prmtop").read_bytes()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """With a few bytes, numbers, lines or blocks changed, lost, added or exchanged."""
    for _ in range(int(rng.integers(1, 4))):
        if not content:
            return b"\0"
        k, length = int(rng.integers(len(content))), int(rng.integers(1, 13))
        what = int(rng.integers(9))
        noise = rng.bytes(length)
        if what == 0:
            content = content[:k] + noise + content[k + length :]
        elif what == 1:
            content = content[:k]
        elif what == 2:
            content = content[:k] + noise + content[k:]
        elif what == 3:
            content = content[:k] + bytes(64) + content[k + 64 :]
        elif what == 4:
            content = content[:k] + content[k + length :]
        elif what == 5:
            digit = str(rng.integers(10)).encode()
            content = content[:k] + digit + content[k + 1 :]
        elif what == 6:
            word = [b"nan", b"-1", b"1e400", b"*****", b"\n", b" ", b"0", b"99999999999"]
            content = content[:k] + word[int(rng.integers(len(word)))] + content[k + length :]
        else:
            lines = content.split(b"\n")
            i, j = rng.integers(len(lines), size=2)
            if what == 7:
                lines[i], lines[j] = lines[j], lines[i]
            else:
                del lines[i]
            content = b"\n".join(lines)
    return content


def attempt(names: list[str], folder: Path, seed: int, n: int) -> None:
    """Tries n damaged files, and writes to ``log`` what comes of each, line by line."""
    warnings.simplefilter("ignore")
    faulthandler.disable()
    for stream in (1, 2):  # readers print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    readers = originals(folder)
    contents = {name: (folder / name).read_bytes() for name in names}
    with (folder / "log").open("w") as log:
        for k in range(n):
            name = names[k % len(names)]
            log.write(json.dumps([k, name, "began"]) + "\n")
            log.flush()
            copy = folder / f"damaged{Path(name).suffix}"
            copy.write_bytes(damaged(contents[name], np.random.default_rng([seed, k])))
            result = "read"
            try:
                readers[name](str(copy))
            except ValueError as error:
                result = "refused" if len(str(error).splitlines()) == 1 else f"lines: {error}"
            except BaseException:
                result = traceback.format_exc()
            log.write(json.dumps([k, name, result]) + "\n")


def run(names: list[str], folder: Path, seed: int, n: int) -> tuple[int, Counter[str], list[str]]:
    """In a process of its own: how many were tried, what came of them, and what is wrong."""
    process = multiprocessing.get_context("fork").Process(
        target=attempt, args=(names, folder, seed, n), daemon=True
    )
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    results: Counter[str] = Counter()
    wrong = []
    for k, name, result in lines:
        if result in ("read", "refused"):
            results[result] += 1
        elif result != "began":
            wrong.append(f"{name} ({k} of seed {seed}): {result}")
    k, name, result = lines[-1]
    if result == "began":
        wrong.append(f"{name} ({k} of seed {seed}): ended the process, {process.exitcode}")
    return k + 1, results, wrong


def main(arguments: list[str] | None = None) -> int:
    """Prints what is wrong; the number of it is the exit code, up to 100."""
    parser = argparse.ArgumentParser()
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not cross a fork
    kinds: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        names = options.only or [n for n in originals(Path(name)) if n != PACKED]
        tried, seed = 0, 1_000_003 * options.seed
        while tried < options.n:
            n, results, wrong = run(names, Path(name), seed, min(5_000, options.n - tried))
            for message in wrong:
                kind = f"{message.split(' (')[0]}: {message.strip().splitlines()[-1][-150:]}"
                kinds[kind] += 1
                if kinds[kind] == 1:
                    print(message, flush=True)
            totals += results
            tried, seed = tried + n, seed + 1
            print(f"{tried} tried: {dict(totals)}, {kinds.total()} wrong", flush=True)
    return min(kinds.total(), 100)


if __name__ == "__main__":
    raise SystemExit(main())
