"""The class that users meet: train, tune, sample, reweight.

:class:`DiffusionBoltzmannGenerator` wires targets, networks, diffusion and ensembles together, and
holds no mathematics of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openmm
import torch
from openmm import app, unit

from openmm_vtdis import pretrained
from openmm_vtdis.coordinates import Cartesian, ModelEnergy
from openmm_vtdis.core import checks
from openmm_vtdis.core.defaults import keeps_to_the_cpu
from openmm_vtdis.core.derivatives import differentiation
from openmm_vtdis.core.rng import Seed, make_rng
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule, make_schedule
from openmm_vtdis.ensemble import FrameLogWeights, WeightedEnsemble
from openmm_vtdis.generator.archive import GeneratorArchive
from openmm_vtdis.generator.base import GeneratorBase, stereocentres_of
from openmm_vtdis.targets import OpenMMTarget, Rebuilding, frame_checks
from openmm_vtdis.topology.frames import Frames, split_in_time
from openmm_vtdis.training.config import TrainingConfig, TrainingLog
from openmm_vtdis.training.pair_head import forget_pair_head, new_pair_head
from openmm_vtdis.training.trainer import Trainer
from openmm_vtdis.tuning import tune
from openmm_vtdis.tuning.noise_range import noise_range
from openmm_vtdis.tuning.select_covariance import candidates
from openmm_vtdis.tuning.tune import TuningConfig, TuningReport


class DiffusionBoltzmannGenerator(GeneratorBase):
    """Unbiased, weighted samples of a Boltzmann distribution from a diffusion model (VT-DIS).

    Frames, ``traj`` of the methods, are an mdtraj Trajectory, files that mdtraj reads, or an array
    (n, M, D) in nm. ``seed`` is an integer, a torch.Generator or None; ``batch_size`` says how many
    configurations are treated at once (None: what suits the device); ``progress`` shows a bar.

    Parameters
    ----------
    system
        OpenMM System without constraints, virtual sites or periodic boundaries.
    topology
        Its Topology. Optional if all particles are identical.
    temperature
        Temperature quantity, or a number in kelvin.
    n_dims
        3, or 2 for a System that lives at z = 0.
    network
        A size such as "egnn-4x128" (the default of particles in a space without a centre is
        "mlp-7x512"), or a torch module (x (B, M, D), log t (B,)) -> (B, M, D), which :meth:`save`
        can store if it is one of the package's own.
    labels
        (M,) integers overriding the symmetry labels: particles with one label are interchangeable.
    stereochemistry
        "reference": the target is the density of the stereoisomer that the training frames show,
        and mirror images are folded onto it (:mod:`~openmm_vtdis.topology.stereochemistry`).
        "any": all stereoisomers.
    backend, n_threads, positions
        Evaluation of energies, and configurations on which the System is tried; see
        :class:`~openmm_vtdis.targets.OpenMMTarget`.
    device
        Device that the network runs on.
    seed
        Seed of the network's first weights. None: torch's global rng.

    Raises
    ------
    ValueError
        For a System that the method cannot treat, or one that :meth:`save` could not store; the
        message says what to change.

    Notes
    -----
    Generators can be pickled and copied, also those that :meth:`save` cannot store.
    """

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology | None = None,
        temperature: unit.Quantity | float = 300.0 * unit.kelvin,
        *,
        n_dims: int = 3,
        network: str | torch.nn.Module | None = None,
        labels: Sequence[int] | None = None,
        stereochemistry: str = "reference",
        backend: str = "auto",
        n_threads: int | None = None,
        positions: object = None,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        options: dict[str, Any] = {"n_threads": n_threads, "positions": positions}
        target = OpenMMTarget(system, topology, temperature, backend, n_dims=n_dims, **options)
        self._set_up(target, network, labels, stereochemistry, device, seed)

    # -- other ways in ------------------------------------------------------------------------
    @classmethod
    def from_thermodynamic_state(
        cls, state: Any, topology: app.Topology | None = None, **options: Any
    ) -> DiffusionBoltzmannGenerator:
        """An untrained generator for an ``openmmtools.states.ThermodynamicState``."""
        if not hasattr(state, "get_system"):
            got = type(state).__name__
            raise ValueError(f"state: expected an openmmtools ThermodynamicState, got {got}")
        system = state.get_system(remove_thermostat=True)
        return cls(system, topology, state.temperature, **options)

    @classmethod
    def from_pretrained(
        cls, name: str, device: torch.device | str = "cpu"
    ) -> DiffusionBoltzmannGenerator:
        """A shipped generator, tuned; ``openmm_vtdis.pretrained.names()`` lists them."""
        return cls.load(pretrained.path(name), device=device)

    # -- training -----------------------------------------------------------------------------
    @keeps_to_the_cpu
    @differentiation()
    def train(
        self,
        traj: Frames,
        n_iterations: int = 20_000,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        held_out: float = 0.2,
        checkpoint_seconds: float = 120.0,
        evaluate_every: int = 500,
        progress: bool = True,
        **settings: Any,
    ) -> TrainingLog:
        """Fit the denoiser to equilibrium configurations by denoising score matching.

        Parameters
        ----------
        traj
            Unweighted samples at this generator's temperature.
        n_iterations
            Optimiser steps.
        checkpoint
            File to write every ``checkpoint_seconds`` and to resume from if it exists.
        held_out
            Fraction of the frames, the last ones in time, kept for the held-out loss, which is
            logged every ``evaluate_every`` steps. The default keeps those ``tune`` reports on.
        settings
            Further fields of :class:`~openmm_vtdis.training.config.TrainingConfig`.

        Returns
        -------
        TrainingLog
            Loss history. Training discards an earlier tuning and pair head, and keeps an earlier
            length unit. If it fails or is interrupted the generator is what it was before, and the
            checkpoint, if there is one, holds the rest.

        Raises
        ------
        ValueError
            If the frames are of another molecule or not finite, have more than one handedness or
            rigid bonds, or some are exploded.
        """
        frames = self._frames("train", traj, minimum=10)
        handedness = self._reference("train", frames)
        frame_checks.check_equilibrium("train", self.target, frames, self.particles.bonds)
        frame_checks.check_exchangeable(self.target, frames, self.particles.pairs)
        config = TrainingConfig.of("train", n_iterations=n_iterations, **settings)
        if not isinstance(self._denoiser, PreconditionedDenoiser):
            raise ValueError("train: expected a network, got a generator of a fixed denoiser")
        fitted, test = split_in_time(frames, held_out)
        coordinates = self.coordinates or Cartesian.of(self.space, fitted)
        z, z_test = (coordinates.to_model(some)[0] for some in (fitted, test))
        trainer = Trainer(self._denoiser, z, z_test, config)
        log = trainer.run(checkpoint, checkpoint_seconds, evaluate_every, progress)
        self.coordinates, self.training_log = coordinates.restricted_to(handedness), log
        self.process = None
        forget_pair_head(self.network)
        return log

    @keeps_to_the_cpu
    @differentiation()
    def train_pair_head(
        self,
        traj: Frames,
        n_iterations: int = 3_000,
        *,
        n_hidden: int = 64,
        checkpoint: str | os.PathLike[str] | None = None,
        held_out: float = 0.2,
        progress: bool = True,
        **settings: Any,
    ) -> TrainingLog:
        """Fit the pair head for ``tune(..., covariance="pairwise")``; the denoiser stays as it is.

        Parameters
        ----------
        traj, checkpoint, held_out, settings
            See :meth:`train`; the batch size is 256 and the learning rate 2e-3 by default.
        n_iterations
            Optimiser steps, far fewer than the denoiser needs.
        n_hidden
            Width of the head.

        Returns
        -------
        TrainingLog
            History of the loss, see :mod:`~openmm_vtdis.training.pair_head`. If it fails or is
            interrupted the generator is what it was before.
        """
        coordinates = self._trained("train_pair_head")
        frames = self._frames("train_pair_head", traj, minimum=10)
        settings = {"batch_size": 256, "learning_rate": 2e-3, **settings}
        config = TrainingConfig.of("train_pair_head", n_iterations=n_iterations, **settings)
        with new_pair_head(self._denoiser, n_hidden, config.seed) as objective:
            z = coordinates.to_model(frames)[0]
            trainer = Trainer(objective, *split_in_time(z, held_out), config)
            log = trainer.run(checkpoint, progress=progress)
        self.process = None
        return log

    # -- tuning -------------------------------------------------------------------------------
    @keeps_to_the_cpu
    @differentiation()
    def tune(
        self,
        traj: Frames,
        n_steps: int | None = None,
        covariance: str = "auto",
        objective: str = "alpha2",
        schedule: str | Schedule | Sequence[float] = "adaptive",
        n_trajectories: int = 10_000,
        *,
        t_min: float | None = None,
        t_max: float | None = None,
        rho: float = 7.0,
        rank: int = 4,
        laplace: bool = True,
        tune_mean: bool = False,
        method: str = "convex",
        sgd_iterations: int = 5000,
        sgd_batch_size: int = 512,
        batch_size: int | None = None,
        seed: Seed = 0,
        progress: bool = True,
    ) -> TuningReport:
        """Choose the grid and fit the reverse covariance, so that importance weights stay flat.

        Parameters
        ----------
        traj
            Equilibrium configurations. The last fifth in time is held out for the report (and, if
            the same frames went to ``train`` with its default, unseen by the network too).
        n_steps
            N >= 2, network evaluations per sample. None: 100, or what an explicit schedule says.
        covariance
            "auto" (most effective samples for the work,
            :mod:`~openmm_vtdis.tuning.select_covariance`), "isotropic", "diagonal", "block",
            "full", "low-rank" (``rank``), "time-network", "tweedie" (the denoiser's Jacobian: d
            times the cost), "hessian" (the energy's), or "pairwise" (after
            :meth:`train_pair_head`).
        objective
            "alpha2" (largest forward ESS), "kl", or "ddpm" (no tuning: the baseline).
        schedule
            "adaptive" (measured: every step costs the same), "geometric", "karras" (with ``rho``),
            or the N + 1 noise levels in model coordinates.
        n_trajectories
            Forward trajectories in all, at least 100: 2/10 are for the report, 1/10 stop the fit.
        t_min, t_max
            Ends of the grid in model coordinates; by default from the forces on the data.
        laplace
            Whether "tweedie", "hessian" and "pairwise" go by the energy, not the network, where
            that is measured to be better (:mod:`~openmm_vtdis.diffusion.posteriors.laplace`).
        tune_mean, method, sgd_iterations, sgd_batch_size
            See :class:`~openmm_vtdis.tuning.tune.TuningConfig`.
        """
        self._trained("tune")
        config = TuningConfig(
            objective, n_trajectories, tune_mean, method, sgd_iterations, sgd_batch_size
        )
        differentiable = self.target.twice_differentiable
        labels = self.model_labels(self._denoiser.space)
        families = candidates(covariance, objective, self._denoiser, labels, differentiable, rank)
        rng, size = make_rng(seed, self.device), self._size(batch_size)
        frames = self._frames("tune", traj, minimum=10)
        frame_checks.check_equilibrium("tune", self.target, frames, self.particles.bonds)
        coordinates = self._trained("tune").restricted_to(self._reference("tune", frames))
        z, held_out = split_in_time(coordinates.to_model(frames)[0], 0.2)
        energy = ModelEnergy(self.target, coordinates)
        ends, name = (t_min, t_max), schedule if isinstance(schedule, str) else None
        if name and None in ends:
            ends = noise_range(energy, coordinates.space, z, *ends)
        grid = make_schedule(schedule, n_steps, *ends, rho)
        process = DiffusionProcess.ddpm(self._denoiser, grid, energy)
        laplace = checks.boolean("laplace", laplace) and differentiable
        process, report = tune.tune(
            process, families, energy, z, held_out, rng, config, name, laplace, size, progress
        )
        self.coordinates, self.process = coordinates, process
        return report

    # -- sampling -----------------------------------------------------------------------------
    @keeps_to_the_cpu
    def sample(
        self,
        n: int,
        *,
        n_steps: int | None = None,
        seed: Seed = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> WeightedEnsemble:
        """Draw n weighted samples by the tuned reverse diffusion.

        ``n_steps`` other than the tuned number: at least 2 (3 if the grid begins with a jump of the
        Laplace approximation), and not with "block", "full" or "low-rank".

        A sample whose energy is NaN or infinite gets log w = -inf and is counted by
        ``diagnostics()``; it never gets weight and never ends a batch. The same seed gives the same
        samples for the same ``batch_size``.
        """
        sampler = self._path_sampler(n_steps, "sample")
        rng, size = make_rng(seed, self.device), self._size(batch_size)
        return sampler.sample(n, rng=rng, batch_size=size, progress=progress)

    @keeps_to_the_cpu
    def sample_ode(
        self,
        n: int,
        divergence: str = "exact",
        *,
        solver: str = "heun",
        n_steps: int | None = None,
        seed: Seed = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> WeightedEnsemble:
        """Draw n weighted samples by the probability-flow ODE, the costly baseline.

        Parameters
        ----------
        divergence
            "exact" (d products with the Jacobian a step) or "hutchinson" (one; biased weights).
            Both are off by the solver's error, which no diagnostic sees: take enough ``n_steps``.
        solver
            "heun" or "rk4", on the tuned grid or one of ``n_steps`` with the same ends.
        """
        sampler = self._flow_sampler(divergence, solver, n_steps, "sample_ode")
        rng, size = make_rng(seed, self.device), self._size(batch_size, 4)
        return sampler.sample(n, rng=rng, batch_size=size, progress=progress)

    @keeps_to_the_cpu
    def log_weights(
        self,
        traj: Frames,
        *,
        n_steps: int | None = None,
        seed: Seed = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> FrameLogWeights:
        """Trajectory log weights of target configurations, noised by q: an array (n,) float64.

        ``openmm_vtdis.ensemble.forward_ess`` of the result is the forward ESS; together with
        ``sample()``, of the same ``n_steps``, they give log Z by BAR (``ensemble.free_energy``).
        """
        sampler = self._path_sampler(n_steps, "log_weights")
        x = self._frames("log_weights", traj)
        frame_checks.check_exploded("log_weights", self.target, x)
        rng, size = make_rng(seed, self.device), self._size(batch_size)
        return sampler.log_weights(x, rng=rng, batch_size=size, progress=progress)

    @keeps_to_the_cpu
    def log_weights_ode(
        self,
        traj: Frames,
        divergence: str = "exact",
        *,
        solver: str = "heun",
        n_steps: int | None = None,
        seed: Seed = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> FrameLogWeights:
        """Log weights of target configurations under the probability-flow ODE: (n,) float64."""
        sampler = self._flow_sampler(divergence, solver, n_steps, "log_weights_ode")
        x = self._frames("log_weights_ode", traj)
        rng, size = make_rng(seed, self.device), self._size(batch_size, 4)
        return sampler.log_weights(x, rng=rng, batch_size=size, progress=progress)

    # -- archive ------------------------------------------------------------------------------
    @keeps_to_the_cpu
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file with the System, Topology, network and tuning.

        See :mod:`~openmm_vtdis.generator.archive`.
        """
        self._trained("save")
        return GeneratorArchive.of(self).write(path)

    @classmethod
    @keeps_to_the_cpu
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        backend: str = "auto",
        n_threads: int | None = None,
        allow_pickle: bool = False,
    ) -> DiffusionBoltzmannGenerator:
        """Read an archive written by :meth:`save`.

        Parameters
        ----------
        backend, n_threads
            See the constructor.
        allow_pickle
            A System that holds a PythonForce is unpickled by OpenMM, which can run any code, and is
            refused unless this is set.

        Raises
        ------
        ValueError
            For a truncated or foreign file, a newer format, a PythonForce, or one whose code
            computes other energies than when it was saved.
        """
        archive = GeneratorArchive.read(path)
        device = checks.device(device)
        try:
            target = archive.rebuilt_target(Rebuilding(allow_pickle, backend, n_threads))
            centres = stereocentres_of(target, archive.labels)
            coordinates = archive.rebuilt_coordinates(target.space, centres)
            self = cls.from_target(
                target, archive.network, archive.labels, archive.stereochemistry, device,
                coordinates=coordinates,
            )  # fmt: skip
            self.process = archive.rebuilt_process(self._denoiser, self.model_energy)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return self
