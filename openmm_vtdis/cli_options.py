"""Options of the command line, and of TOML files in their place."""

from __future__ import annotations

import argparse
import contextlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from openmm import unit

from openmm_vtdis import pretrained
from openmm_vtdis._version import __version__
from openmm_vtdis.core import checks
from openmm_vtdis.interop.system_files import IMPLICIT_SOLVENTS

ENERGY_UNITS: dict[str, unit.Unit | None] = {
    "kJ/mol": unit.kilojoule_per_mole,
    "kcal/mol": unit.kilocalorie_per_mole,
    "eV": unit.elementary_charge * unit.volt * unit.AVOGADRO_CONSTANT_NA,
    "hartree": unit.hartree / unit.item,
    "kT": None,
}
"""Units of a torch function's energy, by their names as options."""
Run = Callable[[argparse.Namespace], None]
_DESCRIPTION = "Unbiased Boltzmann samples from diffusion models, for OpenMM."


def temperature(text: str) -> float:
    """Temperature in kelvin from "300", "300K" or "300 kelvin"."""
    match = re.fullmatch(r"\s*(\S*?)\s*(?:k|kelvin)?\s*", text, re.IGNORECASE)
    try:
        return checks.temperature(float(match[1] if match else text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a temperature in kelvin, got {text!r}"
        ) from error


def make_parser(
    runs: Mapping[str, Run],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by its name."""
    parser = argparse.ArgumentParser(prog="openmm-vtdis", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    by_name: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str, help: str, draws: bool = True, energies: bool = True
    ) -> argparse.ArgumentParser:
        one = by_name[name] = subparsers.add_parser(name, help=help)
        one.set_defaults(run=runs[name])
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
                help="read files with code of their makers' (--energy, a PythonForce), which can "
                "do anything: those that you trust",
            )
        return one

    def frames(one: argparse.ArgumentParser, required: bool) -> None:
        what = "files that mdtraj reads, or .npy"
        one.add_argument("-t", "--trajectory", nargs="+", required=required, help=what)

    one = command("train", "fit a network to MD")
    one.add_argument(
        "-s", "--system", help="OpenMM System XML, or AMBER prmtop, CHARMM psf, "
        "GROMACS top",
    )  # fmt: skip
    one.add_argument(
        "--energy", help="in place of a System: a batched torch function, my_module:my_energy"
    )
    one.add_argument("--energy-unit", choices=sorted(ENERGY_UNITS), default="kJ/mol")
    one.add_argument("--n-particles", type=int, help="with --energy, without a topology")
    one.add_argument(
        "--not-centred", action="store_true", help="with --energy: positions in space matter"
    )
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
        "-T",
        "--temperature",
        type=temperature,
        help="of the MD: 300 or 300K; not with energies in kT",
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

    one = command("tune", "choose grid and covariance; the archive is written again")
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

    one = command("sample", "draw weighted samples, shard by shard")
    one.add_argument("archive", help="file, or name of a shipped generator")
    one.add_argument("-n", type=int, default=10_000)
    one.add_argument("-o", "--output", default="samples.nc", help=".nc or .npz")
    one.add_argument("--steps", type=int, help="if other than the tuned number")
    one.add_argument(
        "--shard-size", type=int, default=500, help="samples at once, and what a kill can lose"
    )
    one.add_argument("--device", default="cpu")

    one = command("analyze", "what weighted samples say, alone or together with MD")
    one.add_argument("samples", help=".nc or .npz")
    one.add_argument("--archive", help="with --trajectory: forward ESS and BAR")
    frames(one, required=False)
    one.add_argument("--device", default="cpu")

    one = command("info", "what an archive holds", draws=False)
    one.add_argument("archive", help="file, or name of a shipped generator")

    one = command("demo", "weighted samples of a shipped generator", energies=False)
    one.add_argument("name", nargs="?", default="dw4", help=", ".join(pretrained.names()))
    one.add_argument("-n", type=int, default=1_000)
    return parser, by_name


def parse(arguments: list[str], runs: Mapping[str, Run]) -> argparse.Namespace:
    """Read the options: the command line first, then a ``--config`` file, then the defaults.

    Raises
    ------
    ValueError
        If the file is not TOML, has anything but tables named after commands, an option that the
        command does not know, or a value of another kind than it takes.
    """
    parser, by_name = make_parser(runs)
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
    """Check that a value from a configuration file has the type that its option takes."""
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
