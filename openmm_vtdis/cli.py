"""Command line: ``openmm-vtdis train | tune | sample | analyze | info | demo``.

From the files that an OpenMM user has (System XML, PDB, trajectory) to weighted samples::

    openmm-vtdis train -s system.xml -p top.pdb -t md.dcd -T 300 -o model.vtdis
    openmm-vtdis tune model.vtdis -t md.dcd --steps 100
    openmm-vtdis sample model.vtdis -n 10000 -o samples.nc
    openmm-vtdis analyze samples.nc

AMBER's prmtop (``-s molecule.prmtop --implicit-solvent OBC2``), CHARMM's psf and GROMACS's top are
System and topology both, see :mod:`~openmm_vtdis.interop.system_files`.

Options can stand in a TOML file, one table a command, given by ``--config``; those on the command
line go first. Exit codes: 0; 1 for a training that diverged, or a device without room for a single
configuration; 2 for bad input, with one line that says what was expected; 130 after Ctrl-C, with
one that says what was kept and how to go on.

``train`` and ``sample`` work over several processes where ``torchrun`` starts them, ``sample``
under ``srun`` too.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_vtdis import pretrained
from openmm_vtdis._version import __version__
from openmm_vtdis.core import checks
from openmm_vtdis.core.forks import from_environment
from openmm_vtdis.ensemble import WeightedEnsemble, forward_ess
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.interop.system_files import (
    IMPLICIT_SOLVENTS,
    has_topology,
    read_system,
    read_topology,
)
from openmm_vtdis.runtime.distributed import group, own_device
from openmm_vtdis.targets import OpenMMTarget

_DESCRIPTION = "Unbiased Boltzmann samples from diffusion models, for OpenMM."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        options = parse(sys.argv[1:] if arguments is None else list(arguments))
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
    if options.pairs < 0 or (options.pairs and not options.network.startswith("egnn")):
        raise ValueError(
            f"--pairs: expected a number >= 0, and a network that has messages if it is not 0, got "
            f"{options.pairs} with {options.network}"
        )
    checkpoint = output.with_suffix(".ckpt") if options.checkpoint is None else options.checkpoint
    system = read_system(
        options.system,
        implicit_solvent=options.implicit_solvent,
        parameters=options.parameters or (),
        include_dir=options.include_dir,
        allow_pickle=options.allow_pickle,
    )
    pdb = options.pdb or (options.system if has_topology(options.system) else None)
    gen = DiffusionBoltzmannGenerator(
        system,
        None if pdb is None else read_topology(pdb, options.include_dir),
        options.temperature,
        n_dims=options.n_dims,
        network=options.network,
        n_threads=options.n_threads,
        device=own_device(options.device),
        seed=options.seed,
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
    print(f"next: openmm-vtdis tune {output} -t {' '.join(options.trajectory)}")


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
    print(f"next: openmm-vtdis sample {output} -n 10000 -o {output.with_suffix('.nc')}")


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
    """What weighted samples say, alone or together with MD."""
    if (options.archive is None) != (options.trajectory is None):
        raise ValueError("analyze: expected --archive and --trajectory together, got one of them")
    ensemble = WeightedEnsemble.load(options.samples)
    print(ensemble.diagnostics())
    raw = ensemble.unweighted()
    print(f"<u> raw          {raw.expectation(ensemble.reduced_energies)} kT")
    print(f"<u> reweighted   {ensemble.expectation(ensemble.reduced_energies)} kT")
    print(f"-log Z one-sided {-ensemble.log_z().value:.4f} ± {ensemble.log_z().stderr:.2g} kT")
    if options.archive is not None:
        ensemble.check_as_drawn("analyze")
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


def info(options: argparse.Namespace) -> None:
    """What an archive holds."""
    gen = load(options)
    space, process = gen.space, gen.process
    parameters = sum(p.numel() for p in gen.network.parameters())
    print(f"particles     {space.n_particles} in {space.n_dims} dimensions")
    print(f"classes       {len(set(gen.labels))}")
    print(f"temperature   {gen.temperature:.6g} K")
    print(f"coordinates   {gen.coordinates}")
    print(f"network       {type(gen.network).__name__}, {parameters:,} parameters")
    if process is None:
        print("tuning        none yet: openmm-vtdis tune")
        return
    times = process.schedule.times
    print(f"covariance    {process.covariance.kind}")
    print(f"grid          {len(times) - 1} steps, {times[0]:.4g} to {times[-1]:.4g} length units")


def demo(options: argparse.Namespace) -> None:
    """Weighted samples of a shipped generator."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(options.name)
    ensemble = gen.sample(options.n, seed=options.seed, progress=options.progress)
    print(ensemble.diagnostics())
    print(f"log Z            {ensemble.log_z()}")
    print(f"<u> reweighted   {ensemble.expectation(ensemble.reduced_energies)} kT")
    print("next: openmm-vtdis train --help")


# -- files and options -------------------------------------------------------------------------
def load(options: argparse.Namespace) -> DiffusionBoltzmannGenerator:
    """A generator from a file, or a shipped one by its name."""
    name, device = options.archive, own_device(getattr(options, "device", "cpu"))
    if not Path(name).exists() and Path(name).stem == str(name):  # no folder, no ending
        return DiffusionBoltzmannGenerator.from_pretrained(name, device=device)
    return DiffusionBoltzmannGenerator.load(
        name, device=device, n_threads=options.n_threads, allow_pickle=options.allow_pickle
    )


def temperature(text: str) -> float:
    """Kelvin from "300", "300K" or "300 kelvin"."""
    match = re.fullmatch(r"\s*(\S*?)\s*(?:k|kelvin)?\s*", text, re.IGNORECASE)
    try:
        return checks.temperature(float(match[1] if match else text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a temperature in kelvin, got {text!r}"
        ) from error


def is_tuned(path: Path, gen: DiffusionBoltzmannGenerator) -> bool:
    """Whether an archive holds this very network, with a tuning that would be lost."""
    trusted = isinstance(gen.target, OpenMMTarget) and gen.target.runs_user_code
    try:
        there = DiffusionBoltzmannGenerator.load(path, allow_pickle=trusted)
    except (FileNotFoundError, ValueError):  # nothing there, or something else: to be replaced
        return False
    ours, theirs = gen.network.state_dict(), there.network.state_dict()
    same = ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].cpu(), theirs[name]) for name in ours
    )
    return there.process is not None and same and gen.coordinates == there.coordinates


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by its name."""
    parser = argparse.ArgumentParser(prog="openmm-vtdis", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    by_name: dict[str, argparse.ArgumentParser] = {}

    def command(
        run: Any, help: str, draws: bool = True, energies: bool = True
    ) -> argparse.ArgumentParser:
        one = by_name[run.__name__] = commands.add_parser(run.__name__, help=help)
        one.set_defaults(run=run)
        one.add_argument("--config", help="TOML file with a table of options for each command")
        if draws:
            one.add_argument("--seed", type=int, default=0)
            one.add_argument("--no-progress", dest="progress", action="store_false")
        if energies:
            one.add_argument(
                "--n-threads", type=int, help="threads of OpenMM Contexts, where those are used"
            )
            one.add_argument(
                "--allow-pickle",
                action="store_true",
                help="read a PythonForce, which can run any code: of files that you trust",
            )
        return one

    def frames(one: argparse.ArgumentParser, required: bool) -> None:
        one.add_argument(
            "-t", "--trajectory", nargs="+", required=required, help="files that mdtraj reads"
        )

    one = command(train, "fit a network to MD")
    one.add_argument(
        "-s", "--system", required=True, help="OpenMM System XML, or AMBER prmtop, CHARMM psf, "
        "GROMACS top",
    )  # fmt: skip
    one.add_argument(
        "-p",
        "--pdb",
        help="its topology with its bonds, if the System is XML: PDB (CONECT), mmCIF, prmtop, psf "
        "or top; not for identical particles",
    )
    one.add_argument(
        "--implicit-solvent", help=f"with prmtop or psf: {', '.join(IMPLICIT_SOLVENTS)}"
    )
    one.add_argument("--parameters", nargs="+", help="CHARMM's files, with a psf")
    one.add_argument("--include-dir", help="of GROMACS, with a top")
    frames(one, required=True)
    one.add_argument(
        "-T", "--temperature", type=temperature, required=True, help="of the MD: 300 or 300K"
    )
    one.add_argument("-o", "--output", default="model.vtdis")
    one.add_argument("--n-dims", type=int, default=3)
    one.add_argument("--network", default="egnn-4x128", help="layers x width")
    one.add_argument("--iterations", type=int, default=20_000)
    one.add_argument("--batch-size", type=int, default=256)
    one.add_argument("--learning-rate", type=float, default=1e-3)
    one.add_argument("--pairs", type=int, default=0, help='iterations for "pairwise"; 0: none')
    one.add_argument("--checkpoint", help="default: the output's name with .ckpt")
    one.add_argument("--device", default="cpu")

    one = command(tune, "choose grid and covariance; the archive is written again")
    one.add_argument("archive", help="file, or with --output the name of a shipped generator")
    frames(one, required=True)
    one.add_argument("-o", "--output", help="default: the archive itself")
    one.add_argument("--steps", type=int, default=100, help="network evaluations a sample")
    one.add_argument("--covariance", default="auto")
    one.add_argument("--objective", default="alpha2")
    one.add_argument("--schedule", default="adaptive")
    one.add_argument(
        "--trajectories", type=int, default=10_000, help="to fit to; fewer take less time"
    )
    one.add_argument("--device", default="cpu")

    one = command(sample, "draw weighted samples, shard by shard")
    one.add_argument("archive", help="file, or name of a shipped generator")
    one.add_argument("-n", type=int, default=10_000)
    one.add_argument("-o", "--output", default="samples.nc", help=".nc or .npz")
    one.add_argument("--steps", type=int, help="if other than the tuned number")
    one.add_argument(
        "--shard-size", type=int, default=500, help="samples at once, and what a kill can lose"
    )
    one.add_argument("--device", default="cpu")

    one = command(analyze, "what weighted samples say, alone or together with MD")
    one.add_argument("samples", help=".nc or .npz")
    one.add_argument("--archive", help="with --trajectory: forward ESS and BAR")
    frames(one, required=False)
    one.add_argument("--device", default="cpu")

    one = command(info, "what an archive holds", draws=False)
    one.add_argument("archive", help="file, or name of a shipped generator")

    one = command(demo, "weighted samples of a shipped generator", energies=False)
    one.add_argument("name", nargs="?", default="dw4", help=", ".join(pretrained.names()))
    one.add_argument("-n", type=int, default=1_000)
    return parser, by_name


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line, before those of a ``--config`` file, before the defaults.

    Raises
    ------
    ValueError
        If the file is not TOML, has anything but tables named after commands, an option that the
        command does not know, or a value of another kind than it takes.
    """
    parser, by_name = make_parser()
    name, path = next((a for a in arguments if a in by_name), None), _config_path(arguments)
    if path is not None and name is not None:
        _set_defaults(by_name[name], _read_config(path, by_name).get(name, {}), name, path)
    options = parser.parse_args(arguments)
    if options.config != path:
        raise ValueError(f"--config: expected it once, and in full, got {options.config}")
    return options


def _read_config(path: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The tables of a configuration file."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from error
    for key, table in document.items():
        if key not in names or not isinstance(table, dict):
            raise ValueError(
                f"{path}: expected a table for each command, got {key} = {table!r}; commands are "
                f"{', '.join(names)}"
            )
    return document


def _set_defaults(
    parser: argparse.ArgumentParser, settings: dict[str, Any], name: str, path: str
) -> None:
    """Put the options of a configuration file in the place of those of a command."""
    actions = {action.dest: action for action in parser._actions}
    for key, value in settings.items():
        action = actions.get(key.replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            known = ", ".join(sorted({*actions} - {"help", "config"}))
            raise ValueError(f"{path}: expected options of {name}, got {key!r}; there are {known}")
        parser.set_defaults(**{action.dest: _typed(action, value, f"{path}: {key}")})
        action.required = False


def _typed(action: argparse.Action, value: Any, where: str) -> Any:
    """A value from a configuration file as an option takes it: no text in place of a number."""
    kind: Any = bool if action.nargs == 0 else action.type or str
    if kind is temperature:
        try:
            return temperature(str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{where}: {error}") from error
    many = action.nargs == "+"
    values = value if many and isinstance(value, list) and value else [value]
    if kind is float:
        with contextlib.suppress(OverflowError):
            values = [float(v) if type(v) is int else v for v in values]
    if not all(type(v) is kind for v in values):
        raise ValueError(f"{where}: expected {kind.__name__}{'s' * many}, got {value!r}")
    return values if many else values[0]


def _config_path(arguments: list[str]) -> str | None:
    for k, argument in enumerate(arguments):
        if argument == "--config" and k + 1 < len(arguments):
            return arguments[k + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
