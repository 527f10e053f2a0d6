"""Command line: ``openmm-vtdis train | tune | sample | analyze | info | demo``.

From the files that an OpenMM user has (System XML, PDB, trajectory) to weighted samples::

    openmm-vtdis train -s system.xml -p top.pdb -t md.dcd -T 300 -o model.vtdis
    openmm-vtdis tune model.vtdis -t md.dcd --steps 100
    openmm-vtdis sample model.vtdis -n 10000 -o samples.nc
    openmm-vtdis analyze samples.nc

A batched torch function takes the place of the System by its name, ``--energy
my_module:my_energy``. AMBER's prmtop (``-s molecule.prmtop --implicit-solvent OBC2``), CHARMM's psf
and GROMACS's top are System and topology both, see :mod:`~openmm_vtdis.interop.system_files`.

Options can stand in a TOML file, one table a command, given by ``--config``; those on the command
line go first. Exit codes: 0; 1 for a training that diverged, or a device without room for a single
configuration; 2 for bad input, with one line that says what was expected; 130 after Ctrl-C, with
one that says what was kept and how to go on.

``train`` and ``sample`` work over several processes where ``torchrun`` starts them, ``sample``
under ``srun`` too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_vtdis.cli_options import ENERGY_UNITS, parse
from openmm_vtdis.core import checks
from openmm_vtdis.core.forks import from_environment
from openmm_vtdis.ensemble import Estimate, WeightedEnsemble, forward_ess
from openmm_vtdis.ensemble.consistency import check_as_drawn
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.interop.system_files import (
    has_topology,
    read_system,
    read_topology,
)
from openmm_vtdis.networks import Network
from openmm_vtdis.runtime.distributed import group, own_device
from openmm_vtdis.targets import CallableTarget, OpenMMTarget, Target
from openmm_vtdis.targets.callable import imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        options = parse(sys.argv[1:] if arguments is None else list(arguments), RUNS)
        if os.getcwd() not in sys.path:  # where a user's own modules are
            sys.path.append(os.getcwd())
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"openmm-vtdis: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"openmm-vtdis: a single configuration does not fit: {error}", file=sys.stderr)
        return 1
    except ArithmeticError as error:
        print(f"openmm-vtdis: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\nopenmm-vtdis: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
    return 0


# -- commands ----------------------------------------------------------------------------------
def train(options: argparse.Namespace) -> None:
    """Fit a network to MD."""
    output = checks.output_file("--output", options.output)
    checkpoint = output.with_suffix(".ckpt") if options.checkpoint is None else options.checkpoint
    gen = DiffusionBoltzmannGenerator.from_target(
        target_of(options),
        network=options.network,
        device=own_device(options.device),
        seed=options.seed,
    )
    has_messages = isinstance(gen.network, Network) and gen.network.edge_messages is not None
    if options.pairs < 0 or (options.pairs and not has_messages):
        raise ValueError(
            f"--pairs: expected a number >= 0, and a network that has messages if it is not 0, got "
            f"{options.pairs} with {options.network}"
        )
    settings: dict[str, Any] = {"seed": options.seed, "progress": options.progress}
    with group(options.device):
        try:
            log = gen.train(
                options.trajectory,
                options.iterations,
                checkpoint=checkpoint,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                **settings,
            )
            if options.pairs:
                pairs = output.with_suffix(".pairs.ckpt")
                gen.train_pair_head(options.trajectory, options.pairs, checkpoint=pairs, **settings)
        except KeyboardInterrupt as interrupt:
            sentences = filter(None, [str(interrupt), "The same command goes on."])
            raise KeyboardInterrupt(". ".join(sentences)) from None
    if from_environment()[0] > 0:
        return
    if is_tuned(output, gen):
        print(f"{output} has this network already, and its tuning: left as it is")
        return
    gen.save(output)
    print(f"held-out denoising loss {log.held_out_losses[-1]:.4f}; wrote {output}")
    trust = trusted(gen)
    print(f"next: openmm-vtdis tune {output} -t {' '.join(options.trajectory)}{trust}")


def tune(options: argparse.Namespace) -> None:
    """Choose grid and covariance; the archive is written again."""
    if options.output is None and not Path(options.archive).exists():
        raise ValueError(
            f"tune: expected --output, since {options.archive} is no file: a shipped generator "
            "stays as it is"
        )
    output = checks.output_file("--output", options.output or options.archive)
    gen = load(options)
    try:
        report = gen.tune(
            options.trajectory,
            options.steps,
            options.covariance,
            options.objective,
            options.schedule,
            options.trajectories,
            seed=options.seed,
            progress=options.progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{options.archive} is as it was. The same command begins again."
        ) from None
    gen.save(output)
    print(f"{report}\nwrote {output}")
    samples = output.with_suffix(".nc")
    print(f"next: openmm-vtdis sample {output} -n 10000 -o {samples}{trusted(gen)}")


def sample(options: argparse.Namespace) -> None:
    """Draw weighted samples, shard by shard."""
    output, process, gen = Path(options.output), from_environment(), load(options)
    if gen.process is None:
        raise ValueError(
            f"{options.archive}: expected a tuned generator; first: openmm-vtdis tune "
            f"{options.archive} -t ..., with frames of its MD"
        )
    try:
        complete = sample_to_file(
            gen,
            output,
            options.n,
            n_steps=options.steps,
            seed=options.seed,
            shard_size=options.shard_size,
            process=process,
            progress=options.progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Whole shards are kept in {output.resolve()}.shards. The same command goes on."
        ) from None
    if not complete:
        print(
            f"process {process[0]} of {process[1]}: its shards are done; {output} is written when "
            "those of the others are"
        )
        return
    print(f"{WeightedEnsemble.load(output).diagnostics()}\nwrote {output}")
    print(f"next: openmm-vtdis analyze {output}")


def analyze(options: argparse.Namespace) -> None:
    """Report what weighted samples say, alone or together with MD."""
    if (options.archive is None) != (options.trajectory is None):
        raise ValueError("analyze: expected --archive and --trajectory together, got one of them")
    ensemble = WeightedEnsemble.load(options.samples)
    print(ensemble.diagnostics())
    raw = ensemble.unweighted()
    print(f"<u> raw          {raw.expectation(ensemble.reduced_energies)} kT")
    print(f"<u> reweighted   {ensemble.expectation(ensemble.reduced_energies)} kT")
    log_z = ensemble.log_z()
    print(f"-log Z one-sided {Estimate(-log_z.value, log_z.stderr)} kT")
    if options.archive is not None:
        check_as_drawn("analyze", ensemble.provenance)
        gen, n_steps = load(options), ensemble.provenance.n_steps
        n_particles, n_dims = ensemble.positions.shape[1:]
        if (n_particles, n_dims) != (gen.space.n_particles, gen.space.n_dims):
            raise ValueError(
                f"analyze: expected the generator of these samples, of {n_particles} particles in "
                f"{n_dims} dimensions, got one of {gen.space.n_particles} in {gen.space.n_dims}"
            )
        log_w = gen.log_weights(
            options.trajectory,
            n_steps=n_steps,
            seed=options.seed,
            progress=options.progress,
        )
        print(f"forward ESS      {forward_ess(log_w):.2%} of {len(log_w)} frames")
        print(f"-log Z by BAR    {ensemble.free_energy(log_w, seed=options.seed)}")
    else:
        print("next: with --archive and -t, frames of MD show what these samples may have missed")


def info(options: argparse.Namespace) -> None:
    """Describe what an archive holds."""
    gen = load(options)
    space, process = gen.space, gen.process
    parameters = sum(p.numel() for p in gen.network.parameters())
    print(f"particles     {space.n_particles} in {space.n_dims} dimensions")
    print(f"classes       {len(set(gen.labels))}")
    kelvin = "none" if gen.temperature is None else f"{gen.temperature:.6g} K"
    print(f"temperature   {kelvin}")
    if gen.coordinates is not None:
        settings = [f"{k} {v}" for k, v in gen.coordinates.describe().items()]
        print(f"coordinates   {', '.join([gen.coordinates.kind, *settings])}")
    print(f"network       {type(gen.network).__name__}, {parameters:,} parameters")
    if process is None:
        print("tuning        none yet: openmm-vtdis tune")
        return
    times = process.schedule.times
    print(f"covariance    {process.covariance.kind}")
    print(f"grid          {len(times) - 1} steps, t from {times[0]:.4g} to {times[-1]:.4g}")


def demo(options: argparse.Namespace) -> None:
    """Draw weighted samples from a shipped generator."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(options.name)
    ensemble = gen.sample(options.n, seed=options.seed, progress=options.progress)
    print(ensemble.diagnostics())
    print(f"log Z            {ensemble.log_z()}")
    print(f"<u> reweighted   {ensemble.expectation(ensemble.reduced_energies)} kT")
    print("next: openmm-vtdis train --help")


RUNS = {run.__name__: run for run in (train, tune, sample, analyze, info, demo)}
"""Commands by their names."""


# -- files -------------------------------------------------------------------------
def target_of(options: argparse.Namespace) -> Target:
    """The target that a training's options name: a System, or a function of torch.

    Raises
    ------
    ValueError
        If they name both, or neither.
    """
    if (options.system is None) == (options.energy is None):
        raise ValueError("train: expected one of --system and --energy, got both or neither")
    if options.system is not None and (options.temperature is None or options.not_centred):
        what = "--temperature" if options.temperature is None else "no --not-centred"
        raise ValueError(f"train: expected {what} with --system")
    pdb = options.pdb
    if pdb is None and options.system is not None and has_topology(options.system):
        pdb = options.system
    topology = None if pdb is None else read_topology(pdb, options.include_dir)
    if options.energy is not None:
        return CallableTarget(
            imported(options.energy),
            topology,
            options.temperature,
            energy_unit=ENERGY_UNITS[options.energy_unit],
            n_particles=options.n_particles,
            n_dims=options.n_dims,
            centred=not options.not_centred,
        )
    system = read_system(
        options.system,
        implicit_solvent=options.implicit_solvent,
        parameters=options.parameters or (),
        include_dir=options.include_dir,
        allow_pickle=options.allow_pickle,
    )
    return OpenMMTarget(
        system, topology, options.temperature, n_dims=options.n_dims, n_threads=options.n_threads
    )


def load(options: argparse.Namespace) -> DiffusionBoltzmannGenerator:
    """Load a generator from a file, or a shipped one by its name."""
    name, device = options.archive, own_device(vars(options).get("device", "cpu"))
    if not Path(name).exists() and Path(name).stem == str(name):  # no folder, no ending
        return DiffusionBoltzmannGenerator.from_pretrained(name, device=device)
    return DiffusionBoltzmannGenerator.load(
        name, device=device, n_threads=options.n_threads, allow_pickle=options.allow_pickle
    )


def trusted(gen: DiffusionBoltzmannGenerator) -> str:
    """The option that commands need which read a generator with code of the user's."""
    return " --allow-pickle" if gen.target.runs_user_code else ""


def is_tuned(path: Path, gen: DiffusionBoltzmannGenerator) -> bool:
    """Whether an archive holds this very network, with a tuning that would be lost."""
    trusted = gen.target.runs_user_code
    try:
        there = DiffusionBoltzmannGenerator.load(path, allow_pickle=trusted)
    except (FileNotFoundError, ValueError):  # nothing there, or something else: to be replaced
        return False
    ours, theirs = gen.network.state_dict(), there.network.state_dict()
    same = ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].cpu(), theirs[name]) for name in ours
    )
    return there.process is not None and same and gen.coordinates == there.coordinates


if __name__ == "__main__":
    raise SystemExit(main())
