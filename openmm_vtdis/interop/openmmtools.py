"""A Monte Carlo move for openmmtools that proposes independent samples of a generator.

:mod:`~openmm_vtdis.mcmc.renoising` has the theory. Velocities are independent of positions and stay
as they are. (Those of OpenMM's leapfrog integrators stand half a step behind, and then only nearly
so: between proposals, pieces of dynamics of a few steps have an error of the first order in the
time step.)

A move is copied and stored often: it holds the path and the fingerprint of the generator's file,
while the generator itself, with its batch of proposals, is kept once per process.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from mpiplus import get_mpicomm
from openmm import unit

from openmm_vtdis import pretrained
from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import fork_entropy, make_rng
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.mcmc.metropolis import accepted_one
from openmm_vtdis.mcmc.renoising import IndependentProposals
from openmm_vtdis.runtime.optional_imports import quiet_pymbar
from openmm_vtdis.sampling import PathSampler
from openmm_vtdis.storage.fingerprint import file_fingerprint
from openmm_vtdis.topology.frames import check_flat

with quiet_pymbar():  # which openmmtools imports
    from openmmtools.mcmc import MCMCMove

logger = logging.getLogger(__name__)


_COUNTS = ("n_proposed", "n_accepted", "n_outside")


@dataclass
class _Kept:
    """Proposals and rng, shared by all copies of a move in this process."""

    proposals: IndependentProposals
    rng: np.random.Generator


_KEPT: dict[tuple[Any, ...], _Kept] = {}
"""Shared state by process, file and settings: a forked process ignores its parent's entries."""
_SAMPLERS: dict[str, PathSampler] = {}
"""Samplers that moves of this process were made with, by their fingerprints."""


class DiffusionMove(MCMCMove):  # type: ignore[misc]
    """Independence Metropolis-Hastings move with a generator's trajectory weights.

    Use it alone, in a ``SequenceMove`` between Langevin moves, or in a ``MultiStateSampler`` or
    ``ReplicaExchangeSampler``, whose storage and resuming it supports.

    Parameters
    ----------
    archive
        File of a tuned generator (``gen.save``), or the name of a shipped one. It has to stay where
        it is. Or a sampler (``gen.path_sampler()``): such a move cannot be stored and resumed.
    n_proposals
        Proposals tried in each call, one after the other. The current configuration is noised
        once a call, at all noise levels together. That takes as long as one or two proposals,
        which are drawn in batches: a price that several of them share.
    batch_size
        Proposals drawn at once, and used in turn.
    n_steps
        Network evaluations of a proposal, if other than the tuned number.
    device
        Device that an archive's network runs on; None: "cpu". A sampler's is where it is.
    seed
        Seed of the random numbers, which all copies of the move in a process share; processes that
        share replicas by MPI draw their own, and so do a resumed run and a forked process.
    allow_pickle
        See :meth:`~openmm_vtdis.DiffusionBoltzmannGenerator.load`; stored with the move.

    Attributes
    ----------
    n_proposed, n_accepted
        Proposals since the move was made.
    n_outside
        Calls that proposed nothing and left the configuration as it was, since it was of another
        stereoisomer than the generator's samples. The first one of a move is logged as a warning.

    Raises
    ------
    ValueError
        If the archive is not one of a tuned generator, or, on applying it, has changed; or if a
        state is of other particles, has constraints, or, for a generator in two dimensions, has
        left the plane, as OpenMM's dynamics does.
    """

    def __init__(
        self,
        archive: str | os.PathLike[str] | PathSampler,
        n_proposals: int = 1,
        batch_size: int = 256,
        *,
        n_steps: int | None = None,
        device: str | None = None,
        seed: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        self.archive, self.sha256 = _identified(archive)
        self.n_proposals = checks.positive_integer("n_proposals", n_proposals)
        self.batch_size = checks.positive_integer("batch_size", batch_size)
        if n_steps is not None:
            checks.positive_integer("n_steps", n_steps, minimum=2)
        if seed is not None:
            checks.positive_integer("seed", seed, minimum=0)
        if isinstance(archive, PathSampler):
            if device is not None:
                raise ValueError(f"device: expected none with a sampler, got {device!r}")
            device = str(archive.device)
        self.n_steps, self.device, self.seed = n_steps, device or "cpu", seed
        self.allow_pickle = checks.boolean("allow_pickle", allow_pickle)
        self.n_proposed = self.n_accepted = self.n_outside = 0
        self._kept()

    def apply(
        self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None
    ) -> None:
        """Try ``n_proposals`` replacements of the configuration of ``sampler_state``."""
        kept = self._kept()
        proposals = kept.proposals
        space = proposals.sampler.target.space
        _check_state(thermodynamic_state, sampler_state, space.n_particles)
        before = np.asarray(sampler_state.positions.value_in_unit(unit.nanometer))
        centre = before.mean(axis=0)
        check_flat("DiffusionMove", before - centre, space.n_dims)
        if not proposals.is_inside(before[:, : space.n_dims]):
            self._count_outside()
            return
        context, _ = self._get_context_cache(context_cache).get_context(thermodynamic_state)
        sampler_state.apply_to_context(context, ignore_velocities=True)
        current = thermodynamic_state.reduced_potential(context)
        log_w = proposals.renewed(before[:, : space.n_dims]).log_ratio - current
        chosen = None
        for _ in range(self.n_proposals):
            proposal = proposals.draw()
            self.n_proposed += 1
            if proposal.log_ratio == -math.inf:
                continue
            positions = np.broadcast_to(centre, before.shape).copy()
            positions[:, : space.n_dims] += proposal.x
            context.setPositions(positions)
            new = proposal.log_ratio - _reduced_potential(thermodynamic_state, context)
            if math.isfinite(new) and accepted_one(new - log_w, 1.0 - kept.rng.random()):
                log_w, chosen = new, positions
                self.n_accepted += 1
        if chosen is not None:
            context.setPositions(chosen)
            sampler_state.positions = chosen * unit.nanometer
        else:
            context.setPositions(before)
        sampler_state.update_from_context(context, ignore_velocities=True)

    def _count_outside(self) -> None:
        """Count a configuration of another stereoisomer, and warn of the first."""
        if self.n_outside == 0:
            logger.warning(
                "DiffusionMove: a stereocentre has another handedness than the samples of %s, so "
                "that nothing is proposed; the move leaves such configurations as they are and "
                "counts them in n_outside. If another move inverts stereocentres, lower the "
                'temperature, or use a generator of stereochemistry="any"',
                self.archive,
            )
        self.n_outside += 1

    # -- statistics, copies and storage ---------------------------------------------------------
    @property
    def statistics(self) -> dict[str, int]:
        """``n_proposed``, ``n_accepted`` and ``n_outside``, as openmmtools stores them."""
        return {name: vars(self)[name] for name in _COUNTS}

    @statistics.setter
    def statistics(self, value: dict[str, int]) -> None:
        for name in _COUNTS:
            setattr(self, name, value[name])

    @property
    def fraction_accepted(self) -> float:
        """Accepted over proposed; NaN before the first proposal."""
        return self.n_accepted / self.n_proposed if self.n_proposed else math.nan

    def __getstate__(self) -> dict[str, Any]:
        return {
            "archive": self.archive,
            "sha256": self.sha256,
            "n_proposals": self.n_proposals,
            "batch_size": self.batch_size,
            "n_steps": self.n_steps,
            "device": self.device,
            "seed": self.seed,
            "allow_pickle": self.allow_pickle,
            **self.statistics,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _kept(self) -> _Kept:
        """The proposals of this process, made when they are first asked for."""
        settings = (self.batch_size, self.n_steps, self.seed, self.allow_pickle)
        key = (os.getpid(), self.archive, self.sha256, self.device, *settings)
        if self.archive is None:
            self._check_unchanged()
        if key not in _KEPT:
            sampler = self._sampler()
            # A run that is resumed must not propose again what its states have come from, nor a
            # replica what one in another process is offered: exchanges would see the two as alike
            unlike = [self.n_proposed, _mpi_rank(), *fork_entropy()]
            sequence = np.random.SeedSequence(None if self.seed is None else [self.seed, *unlike])
            rng = make_rng(int(sequence.generate_state(1)[0]), checks.device(self.device))
            proposals = IndependentProposals(sampler, rng, self.batch_size)
            _KEPT[key] = _Kept(proposals, np.random.default_rng(sequence))
        return _KEPT[key]

    def _check_unchanged(self) -> None:
        """Raise ValueError if the sampler is of another process, or another one by now."""
        if self.sha256 not in _SAMPLERS:
            raise ValueError(
                "DiffusionMove: expected the sampler that this move was made with, which only "
                "the process that made it has; give the path of an archive (gen.save) instead"
            )
        if _SAMPLERS[self.sha256].fingerprint != self.sha256:
            raise ValueError(
                "DiffusionMove: expected the sampler that this move was made with, got one whose "
                "network has changed since; make a new move"
            )

    def _sampler(self) -> PathSampler:
        if self.archive is None:
            sampler = _SAMPLERS[self.sha256]
            return sampler if self.n_steps is None else sampler.with_n_steps(self.n_steps)
        if file_fingerprint(self.archive) != self.sha256:
            raise ValueError(
                f"{self.archive}: expected the generator that this move was made with, got a file "
                "that has changed since; make a new move"
            )
        gen = DiffusionBoltzmannGenerator.load(
            self.archive, device=self.device, allow_pickle=self.allow_pickle
        )
        if gen.process is None:
            raise ValueError(
                f"{self.archive}: expected a tuned generator; call tune() before save()"
            )
        return gen.path_sampler(self.n_steps)


def _identified(archive: object) -> tuple[str | None, str]:
    """The path of an archive (None for a sampler), and the fingerprint of either."""
    if isinstance(archive, PathSampler):
        _SAMPLERS[archive.fingerprint] = archive
        return None, archive.fingerprint
    if not isinstance(archive, str | os.PathLike):
        raise ValueError(
            "archive: expected the path of a generator's file, as save() writes it, or a path "
            f"sampler (gen.path_sampler()), got {type(archive).__name__}"
        )
    if not Path(archive).is_file():
        if str(archive) not in pretrained.names():
            raise FileNotFoundError(
                f"{archive}: no such archive; save() of a generator writes one, and the names "
                f"{', '.join(pretrained.names())} stand for those that ship"
            )
        archive = pretrained.path(str(archive))
    path = str(Path(archive).resolve())
    return path, file_fingerprint(path)


def _reduced_potential(thermodynamic_state: Any, context: openmm.Context) -> float:
    """u of a proposal; infinite where a force raises an exception: it is rejected then."""
    try:
        return float(thermodynamic_state.reduced_potential(context))
    except openmm.OpenMMException as error:
        logger.warning("DiffusionMove: a proposal without an energy is rejected: %s", error)
        return math.inf


def _mpi_rank() -> int:
    """Number of this process among those that openmmtools spreads replicas over."""
    communicator = get_mpicomm()
    return 0 if communicator is None else int(communicator.rank)


def _check_state(thermodynamic_state: Any, sampler_state: Any, n_particles: int) -> None:
    """Raise ValueError for other particles, constraints, or a pressure."""
    if sampler_state.n_particles != n_particles:
        raise ValueError(
            f"DiffusionMove: expected a state of {n_particles} particles, those of the generator, "
            f"got {sampler_state.n_particles}"
        )
    if thermodynamic_state.pressure is not None:
        raise ValueError("DiffusionMove: expected a state without pressure, got one with")
    n = thermodynamic_state.get_system(remove_thermostat=True).getNumConstraints()
    if n:
        raise ValueError(
            f"DiffusionMove: expected a System without constraints, got {n}; build it with "
            "constraints=None"
        )
