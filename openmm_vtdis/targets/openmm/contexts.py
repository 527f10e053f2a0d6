"""A pool of OpenMM Contexts, by which OpenMM evaluates many configurations.

OpenMM evaluates one configuration at a time. The pool keeps one Context for each of its threads
(OpenMM releases Python's global lock while it computes) and hands every thread a contiguous share
of the batch. Contexts and threads are made once, at the first call.

A configuration with NaN or infinite coordinates never reaches OpenMM: its energy is NaN. So is that
of one for which a force raises an exception, as potentials do that need neighbours or have to
converge: the number of them and the first message are logged. Where none of a batch can be
evaluated, that is an error.

Code of the user's (:mod:`~openmm_vtdis.targets.openmm.user_code`) runs in one thread unless more
are asked for; each then has a copy of its own.

A process that was forked makes Contexts and threads anew. The parent's came without their threads,
for which a Context waits when it is destroyed: there they never are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.targets.openmm.user_code import copied, user_forces

logger = logging.getLogger(__name__)

_ABOUT_NAN = re.compile(r"\bnan\b", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
"""Exceptions that are not the configuration's fault."""


class ContextPool:
    """Evaluate a System on batches of configurations with plain OpenMM.

    Parameters
    ----------
    system
        The System, which is copied.
    platform
        Name of an OpenMM platform. "Reference" computes in double precision.
    properties
        Platform properties such as {"Precision": "mixed"}.
    n_threads
        Contexts working at the same time. None: the number of usable CPU cores on the Reference
        platform; 1 on the others, which use all of the machine by themselves, and for Systems that
        run code of the user's, which may not bear more.

    Attributes
    ----------
    n_threads
        Number of Contexts in use.
    n_failed
        Configurations so far for which a force raised an exception.
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
        self._copy_each = bool(user_forces(system))
        if n_threads is None:
            alone = platform != "Reference" or self._copy_each
            n_threads = 1 if alone else _usable_cores()
        self.n_threads = checks.positive_integer("n_threads", n_threads)
        self.n_failed = 0
        self._system = copied(system)
        self._platform = platform
        self._properties = dict(properties or {})
        self._closed = False
        self._begin()
        _watch_forks()
        _POOLS.add(self)

    def _begin(self) -> None:
        """Begin without Contexts and threads in this process."""
        self._made: dict[int, openmm.Context] = {}
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

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
        self._made.clear()

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
        results, stop = (energies, gradients if forces else None), threading.Event()
        shares = [
            self._executor.submit(self._share, positions, share, results, stop)
            for share in np.array_split(finite, self.n_threads)
            if len(share)
        ]
        try:
            messages = [message for share in shares for message in share.result()]
        except BaseException:  # Ctrl-C: the threads need not go on
            stop.set()
            raise
        self._report(messages, len(finite))
        return torch.from_numpy(energies).to(x.device), torch.from_numpy(gradients).to(x.device)

    def _report(self, messages: list[str], n: int) -> None:
        """Count configurations, of n, that could not be evaluated; log the 1st, 10th, 100th, ..."""
        if not messages:
            return
        if len(messages) == n > 1:
            raise ValueError(
                f"system: expected energies, got an exception for each of {n} configurations, the "
                f"first: {messages[0]}"
            )
        before, self.n_failed = self.n_failed, self.n_failed + len(messages)
        if len(str(before)) < len(str(self.n_failed)) or before == 0:
            logger.warning(
                "%d configurations so far have no energy, and so no weight, since a force raised "
                "an exception; now: %s",
                self.n_failed, messages[0],
            )  # fmt: skip

    def _share(
        self,
        positions: np.ndarray,
        indices: np.ndarray,
        results: tuple[np.ndarray, np.ndarray | None],
        stop: threading.Event,
    ) -> list[str]:
        """Evaluate the configurations ``indices``, writing energies and forces where they belong.

        Returns messages of exceptions; the results of those configurations stay NaN.
        """
        context, messages = self._context(), []
        energies, forces = results
        for index in indices:
            if stop.is_set():
                break
            try:
                context.setPositions(positions[index])
                state = context.getState(energy=True, forces=forces is not None)
            except openmm.OpenMMException as error:
                if _NO_MEMORY.search(str(error)):
                    raise
                if self._copy_each or not _ABOUT_NAN.search(str(error)):
                    messages.append(str(error) or "an exception without a message")
                continue
            energies[index] = state.getPotentialEnergy()._value
            if forces is not None:
                forces[index] = state.getForces(asNumpy=True)._value
        return messages

    def _context(self) -> openmm.Context:
        """The Context of the calling thread, made at its first use."""
        thread = threading.get_ident()
        if thread not in self._made:
            with self._lock:
                self._made[thread] = openmm.Context(
                    copied(self._system) if self._copy_each else self._system,
                    openmm.VerletIntegrator(0.001),
                    openmm.Platform.getPlatformByName(self._platform),
                    self._properties,
                )
        return self._made[thread]

    def leave_behind(self) -> None:
        """Begin again in a forked process, without destroying the parent's Contexts."""
        for context in self._made.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
        self._begin()


_POOLS: weakref.WeakSet[ContextPool] = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    """Have every pool begin again in processes that are forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.leave_behind()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
