"""A target made of the user's own batched torch energy.

    >>> from openmm_vtdis.targets.callable import CallableTarget
    >>> def springs(x):
    ...     return 0.5 * (x[:, 0] - x[:, 1]).square().sum(dim=-1)
    >>> target = CallableTarget(springs, n_particles=2)
    >>> float(target.reduced_energy(torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]))[0])
    0.5

An archive keeps the name of the function, not its code: it can hold one that is imported by its
name, from a module, and whoever loads such a file must trust it, since the function is run.
Configurations with their energies tell whether it is still what it was.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.core import checks, units
from openmm_vtdis.core.defaults import keeps_to_the_cpu
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.storage.fingerprint import code_fingerprint, fingerprint
from openmm_vtdis.targets.base import (
    TARGETS,
    Description,
    Rebuilding,
    Target,
    check_same_code,
    same_energy,
)
from openmm_vtdis.topology import check_is_topology, topology_from_json, topology_to_json

BatchedEnergy = Callable[[Tensor], Tensor]
"""An energy function: x (B, M, D) in nm, float64 -> (B,)."""
_N_PROBES = 4


@TARGETS.register
class CallableTarget(Target):
    """The density exp(-u) of a function of batches of configurations.

    Parameters
    ----------
    energy
        Maps x (B, M, D) in nm, float64, to (B,), by torch operations that can be differentiated, on
        x's device. To be stored in an archive it must be a function at the top level of a module.
    topology
        Topology of the particles: labels, stereocentres and features come from it, and samples
        carry it.
    temperature
        Temperature in kelvin, or with a unit; None: a density without one. Needed where ``energy``
        has a unit.
    energy_unit
        Unit of the energy, such as ``openmm.unit.kilojoule_per_mole``; None: it is in kT.
    n_particles
        M, where there is no topology.
    n_dims
        D.
    centred
        Whether the energy stays the same under translation and rotation, and configurations are
        centred: so it is for molecules. False: x is anywhere in R^(M D).
    positions
        Configurations (M, D) or (n, M, D) in nm near which the energy is tried. None: random ones.

    Raises
    ------
    ValueError
        If sizes do not fit, or the energy is not one number a configuration, or is not invariant.
    """

    kind: ClassVar[str | None] = "callable"
    runs_user_code = True

    def __init__(
        self,
        energy: BatchedEnergy,
        topology: app.Topology | None = None,
        temperature: unit.Quantity | float | None = None,
        *,
        energy_unit: unit.Unit | unit.Quantity | None = None,
        n_particles: int | None = None,
        n_dims: int = 3,
        centred: bool = True,
        positions: object = None,
    ) -> None:
        if not callable(energy):
            raise ValueError(
                f"energy: expected a function of configurations, got {type(energy).__name__}"
            )
        if topology is None and n_particles is None:
            raise ValueError("n_particles: expected a number where there is no topology, got None")
        check_is_topology(topology)
        n_atoms = n_particles if topology is None else topology.getNumAtoms()
        if n_particles not in (None, n_atoms):
            raise ValueError(
                f"n_particles: expected {n_atoms}, as of the topology, got {n_particles}"
            )
        self.energy = energy
        self.space = _space(n_atoms, n_dims, centred)
        self.temperature = None if temperature is None else checks.temperature(temperature)
        self._topology = topology
        self._in_kj = None if energy_unit is None else _in_kj(energy_unit)
        self._in_kT = 1.0
        if self._in_kj is not None:
            if self.temperature is None:
                raise ValueError("temperature: expected one where the energy has a unit, got None")
            self._in_kT = self._in_kj / units.thermal_energy(self.temperature)
        self._probes = self._near(positions)
        self._fingerprint = fingerprint(code_fingerprint(energy), self.space, self._in_kj)
        self._check()

    def _near(self, positions: object) -> Tensor:
        """Configurations (S, M, D) to try the energy with."""
        space, rng = self.space, make_rng(0)
        noise = space.standard_normal(_N_PROBES, rng)
        if positions is None:
            return noise
        given = checks.real_array("positions", nanometers(positions))
        frames = given[None] if given.ndim == 2 else given
        x = checks.configurations("positions", frames, space.n_particles, space.n_dims)
        some = x[:: max(1, len(x) // _N_PROBES)][:_N_PROBES]
        return space.project(some + 1e-3 * noise[: len(some)])

    @keeps_to_the_cpu
    def _check(self) -> None:
        """Check that the energy is finite, and the same for configurations that were moved."""
        x, space = self._probes, self.space
        try:
            before = self.reduced_energy(x)
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"energy: expected a function of x {tuple(x.shape)}, float64 (networks need "
                f".double()), got {type(error).__name__}: {error}"
            ) from error
        if not bool(torch.isfinite(before).any()):
            raise ValueError(
                "energy: expected one that is finite near the positions, got "
                f"{before[0].item()}; give positions= of the system"
            )
        if not space.centred:
            return
        rng = make_rng(1)
        turned = x @ random_rotations(len(x), space.n_dims, rng)
        for what, moved in (("translation", x + 3.0), ("rotation", turned)):
            change = (self.reduced_energy(moved) - before).abs()
            if bool((change > 10.0 * same_energy(before)).any()):
                raise ValueError(
                    f"energy: expected one that stays the same under {what}, got a change of "
                    f"{float(change.nan_to_num().max()):.3g} kT; give centred=False if positions "
                    "in space matter"
                )

    @property
    def topology(self) -> app.Topology | None:
        """The given topology."""
        return self._topology

    @property
    def probes(self) -> Tensor:
        """Configurations (S, M, D), nm, whose energies show whether the function has changed."""
        return self._probes

    @property
    def fingerprint(self) -> str | None:
        """Digest of the function's code and its unit; that of the archive which it comes from.

        None for a subclass, of which nothing is known.
        """
        return self._fingerprint if type(self) is CallableTarget else None

    def reduced_energy(self, x: Tensor) -> Tensor:
        """Energies in kT: x (B, M, D) in nm -> (B,), float64, on x's device."""
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        energy = self.energy(x.to(torch.float64))
        if not isinstance(energy, Tensor) or tuple(energy.shape) != (len(x),):
            got = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise ValueError(
                f"energy: expected a tensor of shape ({len(x)},), one number a configuration, got "
                f"{got}"
            )
        finite = torch.isfinite(x).all(dim=2).all(dim=1)
        return torch.where(finite, self._in_kT * energy.to(torch.float64), torch.nan)

    def describe(self) -> Description:
        """Describe the target by the function's name and its energies at a few configurations.

        Raises
        ------
        ValueError
            If the function cannot be imported by its name.
        """
        name = _name_of(self.energy)
        if name is None:
            raise ValueError(
                "save: expected a function at the top level of a module, which an "
                f"archive can name, got {self.energy!r}; pickle the generator instead"
            )
        settings = {
            "function": name,
            "topology": None if self._topology is None else topology_to_json(self._topology),
            "temperature": self.temperature,
            "energy_unit": self._in_kj,
            "n_particles": self.space.n_particles,
            "n_dims": self.space.n_dims,
            "centred": self.space.centred,
            "fingerprint": self.fingerprint,
        }
        energies = self.reduced_energy(self._probes).detach()
        return Description(settings, {"probes": self._probes, "probe_energies": energies})

    @classmethod
    def rebuild(cls, description: Description, how: Rebuilding) -> Self:
        settings = dict(description.settings)
        name, document = settings.pop("function"), settings.pop("topology")
        identity = settings.pop("fingerprint")
        if not how.allow_pickle:
            raise ValueError(
                f"the energy is the function {name}, which would be imported and run; pass "
                "allow_pickle=True (--allow-pickle) only if you trust the file"
            )
        in_kj = settings.pop("energy_unit")
        self = cls(
            imported(name),
            None if document is None else topology_from_json(document),
            energy_unit=None if in_kj is None else in_kj * unit.kilojoule_per_mole,
            positions=description.tensors["probes"],
            **settings,
        )
        self._probes = description.tensors["probes"]
        now = self.reduced_energy(self._probes).detach()
        check_same_code(name, description.tensors["probe_energies"], now)
        self._fingerprint = identity
        return self

    def __repr__(self) -> str:
        kelvin = "" if self.temperature is None else f", {self.temperature:.6g} K"
        name = _name_of(self.energy) or type(self.energy).__name__
        return f"CallableTarget({name}, {self.space.n_particles} particles{kelvin})"


def _space(n_particles: object, n_dims: int, centred: object) -> Space:
    """The space of the configurations; a single particle has none without its centre."""
    centred = checks.boolean("centred", centred)
    n = checks.positive_integer("n_particles", n_particles)
    if centred and n == 1:
        raise ValueError(
            "n_particles: expected at least 2, got 1; give centred=False if its position in space "
            "matters"
        )
    return Space(n, n_dims, centred)


def _in_kj(energy_unit: unit.Unit | unit.Quantity) -> float:
    """Convert a unit of energy to kJ/mol.

    Raises
    ------
    ValueError
        If it is something else.
    """
    try:
        quantity: unit.Quantity = 1.0 * energy_unit
        return float(quantity.value_in_unit(unit.kilojoule_per_mole))
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"energy_unit: expected one of a molar energy, such as kilojoule_per_mole, got "
            f"{energy_unit!r}"
        ) from error


def _name_of(function: Any) -> str | None:
    """Return "module:name" of a function that can be imported so, None for any other."""
    module, name = (vars(type(function)).get(k) for k in ("__module__", "__qualname__"))
    if isinstance(function, type(_name_of)):
        module, name = function.__module__, function.__qualname__
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    try:
        found = imported(f"{module}:{name}")
    except ValueError:
        return None
    return f"{module}:{name}" if found is function else None


def imported(name: str) -> Any:
    """The function "module:name".

    Raises
    ------
    ValueError
        If there is none here.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"expected a function as my_module:my_function, got {name!r}")
    try:
        return vars(importlib.import_module(module))[function]
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"expected the function {name}, which the target's energy is, got {error!r}; put its "
            "module where Python finds it"
        ) from error
