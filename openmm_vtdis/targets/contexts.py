"""A pool of OpenMM Contexts: the energies of many configurations, by OpenMM itself.

OpenMM evaluates one configuration at a time. The pool keeps one Context for each of its threads
(OpenMM releases Python's global lock while it computes) and hands every thread a contiguous share
of the batch. Contexts and threads are made once, at the first call.

A configuration with NaN or infinite coordinates never reaches OpenMM: its energy is NaN.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_vtdis import checks

_ABOUT_NAN = re.compile(r"\bnan\b", re.IGNORECASE)


class ContextPool:
    """Evaluate a System on batches of configurations with plain OpenMM.

    Parameters
    ----------
    system
        Copied.
    platform
        Name of an OpenMM platform. "Reference" computes in double precision.
    properties
        Platform properties, {"Precision": "mixed"}.
    n_threads
        Contexts working at the same time. None: the number of usable CPU cores on the Reference
        platform, and 1 on the others, which use all of the machine by themselves.
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str = "Reference",
        properties: Mapping[str, str] | None = None,
        n_threads: int | None = None,
    ) -> None:
        known = [
            openmm.Platform.getPlatform(i).getName()
            for i in range(openmm.Platform.getNumPlatforms())
        ]
        checks.choice("platform", platform, tuple(known))
        if n_threads is None:
            n_threads = _usable_cores() if platform == "Reference" else 1
        self.n_threads = checks.positive_integer("n_threads", n_threads)
        self._system = copy.deepcopy(system)
        self._platform = platform
        self._properties = dict(properties or {})
        self._local = threading.local()
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    def energy(self, x: Tensor) -> Tensor:
        """Potential energies: x (B, M, 3) nm -> (B,) kJ/mol, float64, on x's device."""
        return self._evaluate(x, forces=False)[0]

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, 3) nm -> energies (B,) kJ/mol and forces (B, M, 3) kJ/mol/nm."""
        return self._evaluate(x, forces=True)

    def close(self) -> None:
        """Stop the threads and drop their Contexts; using the pool afterwards is an error."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    def __enter__(self) -> ContextPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _evaluate(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor]:
        if self._closed:
            raise RuntimeError("this ContextPool has been closed")
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.n_threads, thread_name_prefix="openmm-vtdis")
        positions = x.detach().to("cpu", torch.float64).numpy()
        energies = np.full(len(positions), np.nan)
        gradients = np.full(positions.shape, np.nan) if forces else np.empty((0, 0, 0))
        finite = np.flatnonzero(np.isfinite(positions).all(axis=(1, 2)))
        shares = [
            self._executor.submit(self._share, positions, share, energies, gradients, forces)
            for share in np.array_split(finite, self.n_threads)
            if len(share)
        ]
        for share in shares:
            share.result()
        return torch.from_numpy(energies).to(x.device), torch.from_numpy(gradients).to(x.device)

    def _share(
        self,
        positions: np.ndarray,
        indices: np.ndarray,
        energies: np.ndarray,
        forces: np.ndarray,
        want_forces: bool,
    ) -> None:
        """Evaluate the configurations ``indices``, writing the results where they belong."""
        context = self._context()
        for index in indices:
            context.setPositions(positions[index])
            try:
                state = context.getState(energy=True, forces=want_forces)
            except openmm.OpenMMException as error:
                if not _ABOUT_NAN.search(str(error)):
                    raise
                continue  # OpenMM met a NaN in this configuration; its results stay NaN
            energies[index] = state.getPotentialEnergy()._value
            if want_forces:
                forces[index] = state.getForces(asNumpy=True)._value

    def _context(self) -> openmm.Context:
        """The Context of the calling thread, made at its first use."""
        if not hasattr(self._local, "context"):
            with self._lock:
                self._local.context = openmm.Context(
                    self._system,
                    openmm.VerletIntegrator(0.001),
                    openmm.Platform.getPlatformByName(self._platform),
                    self._properties,
                )
        return self._local.context


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
