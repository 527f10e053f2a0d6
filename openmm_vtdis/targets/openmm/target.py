r"""The Boltzmann density of an ``openmm.System``. Two backends give the same numbers:

``"batched"``
    the System translated to batched torch: thousands of configurations per call, on any device;
``"contexts"``
    a pool of OpenMM Contexts: any force that OpenMM has, at OpenMM's speed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_vtdis.core import checks, units
from openmm_vtdis.core.defaults import keeps_to_the_cpu, package_defaults
from openmm_vtdis.core.space import Space
from openmm_vtdis.storage.documents import mentions
from openmm_vtdis.targets.base import TARGETS, Description, Rebuilding, Target, check_same_code
from openmm_vtdis.targets.binding import check_bound
from openmm_vtdis.targets.openmm import validation
from openmm_vtdis.targets.openmm.contexts import ContextPool
from openmm_vtdis.targets.openmm.probing import (
    ForceProbe,
    probe_configurations,
    random_configurations,
)
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy, Untranslatable, pad
from openmm_vtdis.targets.openmm.user_code import (
    check_importable,
    copied,
    of_a_script,
    system_fingerprint,
    user_forces,
)
from openmm_vtdis.targets.openmm.user_code_checks import (
    check_forces,
    check_functions,
    check_threads,
)
from openmm_vtdis.topology import topology_from_json, topology_to_json

logger = logging.getLogger(__name__)

_BACKENDS = ("auto", "batched", "contexts")


@TARGETS.register
class OpenMMTarget(Target):
    """The Boltzmann density of an OpenMM System at one temperature.

    Parameters
    ----------
    system
        A System without constraints, virtual sites and periodic boundaries, and with an energy that
        is invariant under translation and rotation. It is copied.
    topology
        The topology that the System was built from. None: the particles are identical, which is
        checked.
    temperature
        An openmm.unit quantity, or a number in kelvin.
    backend
        "batched", "contexts", or "auto": batched where every force can be translated to torch.
    n_dims
        3, or 2: configurations are (B, M, 2) and the particles live at z = 0.
    platform, platform_properties, n_threads
        Options of the "contexts" backend; see
        :class:`~openmm_vtdis.targets.openmm.contexts.ContextPool`.
    positions
        Configurations, (M, D) or (n, M, D) in nm, near which the System is tried when the target is
        built. None: random ones, which some potentials are not defined for.

    Raises
    ------
    ValueError
        If the System is not of this kind, or ``backend="batched"`` is asked for and impossible.

    Notes
    -----
    Targets can be pickled and copied: Contexts are made anew on the other side.
    """

    kind: ClassVar[str | None] = "openmm"
    alike: ClassVar[bool] = True

    temperature: float

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology | None = None,
        temperature: unit.Quantity | float = 300.0 * unit.kelvin,
        backend: str = "auto",
        *,
        n_dims: int = 3,
        platform: str = "Reference",
        platform_properties: Mapping[str, str] | None = None,
        n_threads: int | None = None,
        positions: object = None,
    ) -> None:
        if not isinstance(system, openmm.System):
            raise ValueError(f"system: expected an openmm.System, got {type(system).__name__}")
        self.temperature = checks.temperature(temperature)
        checks.choice("backend", backend, _BACKENDS)
        if n_dims not in (2, 3):
            raise ValueError(f"n_dims: expected 2 or 3, got {n_dims!r}")
        validation.check_structure(system, topology)
        self._system = copied(system)
        self._topology = copy.deepcopy(topology)  # which the caller may change
        self._thermal_energy = units.thermal_energy(self.temperature)
        self.space = Space(system.getNumParticles(), int(n_dims), centred=True)
        self._fingerprint = system_fingerprint(self._system)
        self._is_bound = False
        self._options = (platform, dict(platform_properties or {}), n_threads)

        with package_defaults():
            x = probe_configurations(self.space, positions)
            check_functions(self._system, x)
            probe = ForceProbe(self._system)
            if of_a_script(self._system):
                logger.warning(
                    "system: its PythonForce has a function of this script; put it in a module, or "
                    "no other program will be able to read what save() writes"
                )
            validation.check_invariance(probe, x, self._thermal_energy)
            check_forces(self._system, probe, x)
            if topology is None:
                validation.check_identical(probe, x, self._thermal_energy)
            self.runs_user_code = bool(user_forces(system))
            self._probes = x if positions is not None or self.runs_user_code else None
            self._batched = None if backend == "contexts" else self._translate(backend, probe, x)
            self._contexts = None if self._batched is not None else self._new_pool()
            if self._contexts is not None:
                check_threads(self._system, self._contexts, x)

    def _new_pool(self) -> ContextPool:
        return ContextPool(self._system, *self._options)

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_batched": self.backend, "_contexts": None}
        return {**self.__dict__, **left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        batched = state["_batched"] == "batched"
        with package_defaults():
            self._batched = BatchedEnergy(self._system) if batched else None
        self._contexts = None if batched else self._new_pool()

    @property
    def system(self) -> openmm.System:
        """The System; the target's own copy, to be read only: energies do not follow changes."""
        return self._system

    @property
    def fingerprint(self) -> str | None:
        """A digest of the System (:mod:`~openmm_vtdis.targets.openmm.user_code`).

        It stays the same in copies, pickles and archives of the target. None for a subclass, of
        whose energies nothing is known.
        """
        return self._fingerprint if type(self) is OpenMMTarget else None

    @property
    def probes(self) -> Tensor | None:
        """Configurations (S, M, D), nm, whose energies show whether the user's code has changed.

        None for a System without such code that was not built with ``positions``.
        """
        return self._probes

    def describe(self) -> Description:
        """Describe the System as XML, with probe energies if it runs code of the user's."""
        settings = {
            "system": openmm.XmlSerializer.serialize(self._system),
            "topology": None if self._topology is None else topology_to_json(self._topology),
            "temperature": self.temperature,
            "n_dims": self.space.n_dims,
            "fingerprint": self.fingerprint if self.runs_user_code else None,
        }
        if self._probes is None:
            return Description(settings)
        energies = self.reduced_energy(self._probes)
        return Description(settings, {"probes": self._probes, "probe_energies": energies})

    @classmethod
    def rebuild(cls, description: Description, how: Rebuilding) -> Self:
        settings, tensors = description.settings, description.tensors
        xml, document = settings["system"], settings["topology"]
        if not how.allow_pickle and mentions(xml, "PythonForce"):
            raise ValueError(
                "the System holds a PythonForce, whose XML is unpickled and can run any code; pass "
                "allow_pickle=True (--allow-pickle) only if you trust it"
            )
        check_importable(xml)
        try:
            system = openmm.XmlSerializer.deserialize(xml)
        except openmm.OpenMMException as error:
            raise ValueError(f"expected the XML of a System: {error}") from error
        self = cls(
            system,
            None if document is None else topology_from_json(document),
            settings["temperature"],
            how.backend,
            n_dims=settings["n_dims"],
            n_threads=how.n_threads,
            positions=tensors.get("probes"),
        )
        probes, energies = tensors.get("probes"), tensors.get("probe_energies")
        if probes is not None and energies is not None:
            what = ", ".join(user_forces(system)) or "the System"
            check_same_code(what, energies, self.reduced_energy(probes))
            self._probes = probes
        if self.runs_user_code and settings.get("fingerprint") is not None:
            self._fingerprint = settings["fingerprint"]
        return self

    @property
    def topology(self) -> app.Topology | None:
        """The topology, or None for identical particles."""
        return self._topology

    @property
    def backend(self) -> str:
        """The backend in use: "batched" or "contexts"."""
        return "contexts" if self._batched is None else "batched"

    @property
    def twice_differentiable(self) -> bool:
        """Whether :meth:`reduced_energy` has second derivatives: only on the batched backend."""
        return self._batched is not None

    @property
    def masses(self) -> Tensor:
        """Masses of the particles in dalton, (M,) float64."""
        masses = [
            self._system.getParticleMass(i).value_in_unit(unit.dalton)
            for i in range(self.space.n_particles)
        ]
        return torch.tensor(masses, dtype=torch.float64)

    @keeps_to_the_cpu
    def reduced_energy(self, x: Tensor) -> Tensor:
        """Energies in kT: x (B, M, D) in nm -> (B,), float64, on x's device.

        Differentiable in x: to any order on the batched backend, once on the other.
        """
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        padded = pad(x)
        if self._batched is not None:
            energy = self._batched.energy(padded)
            energy = torch.where(_finite(x), energy, torch.nan)
        else:
            energy = _ContextEnergy.apply(padded, self._pool())
        return energy / self._thermal_energy

    @keeps_to_the_cpu
    def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) in kT and forces -du/dx (B, M, D) in kT/nm; both float64 and detached."""
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        padded = pad(x)
        if self._batched is not None:
            energy, force = self._batched.energy_and_force(padded)
            finite = _finite(x)
            energy = torch.where(finite, energy, torch.nan)
            force = torch.where(finite[:, None, None], force, torch.nan)
        else:
            energy, force = self._pool().energy_and_force(padded)
        force = force[:, :, : self.space.n_dims]
        return energy / self._thermal_energy, force / self._thermal_energy

    @keeps_to_the_cpu
    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) in kT/nm and Hessian (B, M, D, M, D) in kT/nm^2 of the energy at x.

        Both float64, detached and on x's device.

        Raises
        ------
        ValueError
            On the "contexts" backend: OpenMM has no second derivatives.
        """
        if self._batched is None:
            return super().derivatives(x)
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        n_dims = self.space.n_dims
        gradient, hessian = self._batched.derivatives(pad(x))
        gradient, hessian = gradient[:, :, :n_dims], hessian[:, :, :n_dims, :, :n_dims]
        finite = _finite(x)
        gradient = torch.where(finite[:, None, None], gradient, torch.nan)
        hessian = torch.where(finite[:, None, None, None, None], hessian, torch.nan)
        return gradient / self._thermal_energy, hessian / self._thermal_energy

    def check_bound(self) -> None:
        """Check that the energy holds all particles together, so that Z is finite.

        Raises
        ------
        ValueError
            If parts that no bond joins can fly apart (:mod:`~openmm_vtdis.targets.binding`).
        """
        if self._is_bound:
            return
        probes = self._probes
        x = random_configurations(self.space) if probes is None else probes
        check_bound(self._known_energies, x[:2], self._system, self._topology)
        self._is_bound = True

    def _known_energies(self, x: Tensor) -> Tensor:
        """(B, M, D) nm -> (B,) kT; NaN where a force raises an exception, be it everywhere."""
        try:
            return self.reduced_energy(x)
        except ValueError:
            return x.new_full((len(x),), torch.nan)

    def close(self) -> None:
        """Release the Contexts and threads, if there are any."""
        if self._contexts is not None:
            self._contexts.close()

    def __repr__(self) -> str:
        return (
            f"OpenMMTarget({self.space.n_particles} particles in {self.space.n_dims} dimensions, "
            f"{self.temperature:.6g} K, backend={self.backend!r})"
        )

    def _translate(self, backend: str, probe: ForceProbe, x: Tensor) -> BatchedEnergy | None:
        """The batched energy, checked against OpenMM; None where "auto" falls back."""
        reason: str | None
        try:
            batched = BatchedEnergy(self._system)
        except Untranslatable as error:
            reason = str(error)
        else:
            reason = validation.disagreement(batched, probe, x, self._thermal_energy)
            if reason is None:
                return batched
        if backend == "batched":
            raise ValueError(
                f"backend='batched': expected forces that can be translated to torch, got {reason};"
                " use backend='contexts' or 'auto'"
            )
        logger.warning("no batched energy (%s): using OpenMM Contexts, which is slower", reason)
        return None

    def _pool(self) -> ContextPool:
        if self._contexts is None:
            raise RuntimeError("this target uses the batched backend and has no Contexts")
        return self._contexts


class _ContextEnergy(torch.autograd.Function):
    """OpenMM energies (B,) kJ/mol of positions (B, M, 3) nm, with OpenMM's forces as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: ContextPool) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return pool.energy(x)
        energy, force = pool.energy_and_force(x)
        ctx.save_for_backward(x, force)
        return energy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ContextGradient.apply(*ctx.saved_tensors, gradient), None


class _ContextGradient(torch.autograd.Function):
    """The gradient as a function of x, which has no derivatives of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, force: Tensor, gradient: Tensor) -> Tensor:
        return (-gradient[:, None, None] * force).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None]:
        raise ValueError(
            "expected an energy with second derivatives, got that of OpenMM Contexts; use a System "
            "that backend='batched' can translate"
        )


def _finite(x: Tensor) -> Tensor:
    """Whether all coordinates of a sample are finite: (B, M, D) -> (B,) bool."""
    return torch.isfinite(x).all(dim=2).all(dim=1)
