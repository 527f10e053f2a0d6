r"""Weighted ensembles: samples, what each is worth, and every estimate that follows from the two.

Sample i, drawn from a proposal p, has the unnormalised weight w_i = exp(-u(x_i)) / p(x_i), kept as
log w_i in float64. With normalised weights W_i = w_i / sum_j w_j,

    log Z  = log mean_i w_i                standard error  std(w) / (mean(w) sqrt n)
    <f>    = sum_i W_i f(x_i)              standard error  sqrt( sum_i W_i^2 (f(x_i) - <f>)^2 )

and changing the Hamiltonian or the temperature adds u_old(x_i) - u_new(x_i) to log w_i.

A sample of zero weight (log w = -inf: its energy overflowed, or it is of the wrong handedness) is
still a draw: it counts in n and in :meth:`WeightedEnsemble.diagnostics`, and is never dropped. Its
coordinates may be anything.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import torch
from numpy.typing import ArrayLike
from openmm import app, unit
from scipy.special import logsumexp

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array, check_log_weights, quiet, reverse_ess
from openmm_vtdis.core.rng import Seed, make_generator
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.ensemble.bar import FreeEnergy, bar
from openmm_vtdis.ensemble.diagnostics import Diagnostics, Estimate, is_alone, log_mean_weight
from openmm_vtdis.ensemble.files import Contents, read_ensemble, write_colvar, write_ensemble
from openmm_vtdis.ensemble.notes import json_copy, kept, parts, pooled, says
from openmm_vtdis.ensemble.pooling import check_poolable
from openmm_vtdis.ensemble.states import as_target, check_space, state_energies
from openmm_vtdis.runtime.optional_imports import quiet_pymbar
from openmm_vtdis.topology import mdtraj_topology, placeholder_topology

_OF_ALL_DRAWS = ("log_z", "free_energy", "mbar", "analyze")
"""Estimates to which samples without weight matter."""
Observable = Callable[[Array], ArrayLike] | ArrayLike
"""A function of positions (n, M, D) in nm, or its values: (n,) or (n, ...), one per sample."""


@dataclass(frozen=True, eq=False, repr=False)
class WeightedEnsemble:
    """Importance-weighted configurations of one system. Immutable; arrays are read-only float64.

    Attributes
    ----------
    positions
        (n, M, D) in nm.
    log_weights
        (n,) log of the unnormalised weights target / proposal; -inf is a sample of no weight.
    reduced_energies
        (n,) u(x) in kT, of the Hamiltonian and temperature that the weights are for.
    temperature
        In K, or None for a density without one.
    topology
        OpenMM Topology, or None.
    metadata
        JSON-able notes on where the samples are from.

    Raises
    ------
    ValueError
        If shapes differ, a log weight is NaN or +inf, or a sample with weight has a position or
        an energy that is not finite.

    Examples
    --------
    Samples of a Gaussian with mean 0, weighted to be those of one with mean 1/2:

    >>> x = np.random.default_rng(0).normal(size=(1000, 1, 1))
    >>> u = 0.5 * (x[:, 0, 0] - 0.5) ** 2
    >>> ensemble = WeightedEnsemble(x, 0.5 * x[:, 0, 0] ** 2 - u, u)
    >>> mean = ensemble.expectation(lambda x: x[:, 0, 0])
    >>> bool(abs(mean.z(0.5)) < 3.0 and ensemble.diagnostics().ess > 0.7)
    True
    """

    positions: Array
    log_weights: Array
    reduced_energies: Array
    temperature: float | None = None
    topology: app.Topology | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x = _frozen("positions", nanometers(self.positions))
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(
                f"positions: expected shape (n, M, D) in nm with at least one sample, got {x.shape}"
            )
        lw = check_log_weights(_frozen("log_weights", self.log_weights))
        u = _frozen("reduced_energies", self.reduced_energies)
        for name, array in {"log_weights": lw, "reduced_energies": u}.items():
            if array.shape != (len(x),):
                raise ValueError(
                    f"{name}: expected shape ({len(x)},), one per sample, got {array.shape}"
                )
        for name, finite in {
            "positions": np.isfinite(x).all(axis=(1, 2)),
            "reduced_energies": np.isfinite(u),
        }.items():
            bad = np.flatnonzero(~finite & np.isfinite(lw))
            if len(bad):
                raise ValueError(
                    f"{name}: expected finite values wherever the log weight is, got NaN or "
                    f"infinity in {len(bad)} of {len(x)} samples, the first at index {bad[0]}"
                )
        if self.topology is not None:
            if not isinstance(self.topology, app.Topology):
                raise ValueError(
                    "topology: expected an openmm.app.Topology or None, got "
                    f"{type(self.topology).__name__}"
                )
            if self.topology.getNumAtoms() != x.shape[1]:
                raise ValueError(
                    f"topology: expected {x.shape[1]} atoms as in the positions, got "
                    f"{self.topology.getNumAtoms()}"
                )
        t = None if self.temperature is None else checks.temperature(self.temperature)
        fields = {"positions": x, "log_weights": lw, "reduced_energies": u, "temperature": t}
        for name, value in {**fields, "metadata": json_copy(self.metadata)}.items():
            object.__setattr__(self, name, value)

    # -- the container ------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self.log_weights)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightedEnsemble, tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def __getitem__(self, index: int | slice | ArrayLike) -> WeightedEnsemble:
        """The samples at an index, slice, boolean mask or index array, weights as they are.

        An index array with repetitions gives a resampled ensemble, whose estimates have no error.
        Of those with weight, without the others, log Z is not to be had.
        """
        rows: Any = index
        if isinstance(index, int | np.integer):
            rows = [index]
        elif not isinstance(index, slice):
            rows = np.asarray(index)
        notes: dict[str, Any] = {}
        if isinstance(rows, np.ndarray):
            chosen, alive = np.arange(len(self))[rows], np.isfinite(self.log_weights)
            if len(np.unique(chosen)) < len(chosen):
                notes["resampled_from"] = says("resampled_from", self.metadata) or len(self)
            if not alive.all() and np.array_equal(np.sort(chosen), np.flatnonzero(alive)):
                notes["selected_by_weight"] = True
        return dataclasses.replace(
            self,
            positions=self.positions[rows],
            log_weights=self.log_weights[rows],
            reduced_energies=self.reduced_energies[rows],
            metadata={**self.metadata, **notes},
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Array:
        raise TypeError(
            "a WeightedEnsemble, whose weights an array does not have; give its "
            "resample().positions as frames, or its positions, log_weights or reduced_energies"
        )

    def __repr__(self) -> str:
        n, n_particles, n_dims = self.positions.shape
        at = "" if self.temperature is None else f", {self.temperature:.6g} K"
        return (
            f"WeightedEnsemble({n} samples of {n_particles} particles in {n_dims} dimensions{at}, "
            f"ESS {self.ess:.2%})"
        )

    def with_log_weights(self, log_weights: ArrayLike) -> WeightedEnsemble:
        """The same samples with other log weights (n,)."""
        notes = {"unweighted": False} if self._is("unweighted") else {}
        return dataclasses.replace(
            self,
            log_weights=log_weights,  # type: ignore[arg-type]
            metadata={**self.metadata, **notes},
        )

    def unweighted(self) -> WeightedEnsemble:
        """The samples as they came: those with a finite energy have equal weights.

        For means of what the generator gives by itself; weights and log Z are gone.
        """
        finite = np.isfinite(self.reduced_energies)
        equal = self.with_log_weights(np.where(finite, 0.0, -math.inf))
        return equal.with_metadata({**self.metadata, "unweighted": True})

    def with_metadata(self, metadata: dict[str, Any]) -> WeightedEnsemble:
        """The same samples with other notes; what these say of the weights stays."""
        if isinstance(metadata, dict) and not parts(metadata):
            metadata = {**kept(self.metadata), **metadata}
        return dataclasses.replace(self, metadata=metadata)

    @staticmethod
    def concatenate(ensembles: Sequence[WeightedEnsemble]) -> WeightedEnsemble:
        """Pool ensembles of one system: raw weights stay as they are.

        Each may have a proposal of its own, since each raw weight estimates the same Z, that of one
        Hamiltonian and temperature.

        Raises
        ------
        ValueError
            If they are of several systems or Hamiltonians; or if samples stand in two of them, as
            those of two runs with one seed do. (Resampled ones may: their estimates have no error.)
        """
        ensembles = list(ensembles)
        check_poolable(ensembles)
        first = ensembles[0]
        notes = [ensemble.metadata for ensemble in ensembles]
        return WeightedEnsemble(
            np.concatenate([ensemble.positions for ensemble in ensembles]),
            np.concatenate([ensemble.log_weights for ensemble in ensembles]),
            np.concatenate([ensemble.reduced_energies for ensemble in ensembles]),
            first.temperature,
            first.topology,
            pooled(notes),
        )

    # -- weights ------------------------------------------------------------------------------
    @property
    @quiet
    def weights(self) -> Array:
        """Normalised weights (n,), which sum to 1.

        Raises
        ------
        ValueError
            If no sample has any weight.
        """
        total = logsumexp(self.log_weights)
        if total == -math.inf:
            raise ValueError(
                f"weights: expected a sample with weight, but all {len(self)} log weights are -inf"
            )
        return np.exp(self.log_weights - total)

    @property
    def ess(self) -> float:
        """Reverse effective sample size as a fraction of n (Eq. 12); 0 if no sample has weight."""
        return reverse_ess(self.log_weights)

    def diagnostics(self) -> Diagnostics:
        """Whether these weights can be trusted; print it."""
        about = Diagnostics.of(self.log_weights, self.reduced_energies, self.positions)
        if not (self._is("resampled_from") or self._is("unweighted")):
            return about
        failed = about.n_failed or says("n_failed", self.metadata) or 0
        return dataclasses.replace(about, pareto_k=math.nan, n_failed=failed)

    def _is(self, what: str) -> bool:
        """Whether the notes say "resampled_from", "reweighted" or "unweighted" of any part."""
        return bool(says(what, self.metadata))

    def _check_weighted(self, name: str) -> None:
        if self._is("unweighted"):
            raise ValueError(f"{name}: expected samples with their weights, got unweighted ones")
        if name in _OF_ALL_DRAWS and self._is("selected_by_weight"):
            raise ValueError(
                f"{name}: expected all samples, got those that have weight: the others count as "
                "draws; estimate before selecting"
            )

    def check_as_drawn(self, name: str) -> None:
        """Raise ValueError unless these are samples as one kernel of the generator drew them."""
        self._check_weighted(name)
        if self._is("resampled_from"):
            raise ValueError(f"{name}: expected samples as drawn, got resampled ones")
        if self._is("reweighted"):
            raise ValueError(
                f"{name}: expected samples weighted for the generator's own Hamiltonian and "
                "temperature, as noise() is, got reweighted ones; give those as drawn, and other "
                "states to mbar()"
            )
        if parts(self.metadata):
            raise ValueError(f"{name}: expected samples of one kernel, got several concatenated")

    def check_same_proposal(self, name: str, log_weights: object) -> None:
        """Raise ValueError if log weights of frames say that they are against another proposal.

        Or if they are the samples' own.
        """
        values = check_log_weights(log_weights)  # type: ignore[arg-type]
        if np.ptp(values) > 0.0 and np.isin(values, self.log_weights).all():
            raise ValueError(
                f"{name}: expected log weights of frames of MD, as noise() gives them, got those "
                "of the generated samples themselves"
            )
        theirs, ours = getattr(log_weights, "proposal", None), self.metadata.get("proposal")
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(
                f"{name}: expected log weights of frames against the proposal that drew the "
                "samples, got those against another; noise() them with the same generator, System, "
                "tuning and n_steps as sample(), or draw the samples again"
            )

    # -- estimates ----------------------------------------------------------------------------
    def log_z(self) -> Estimate:
        """log Z, the log of the integral of exp(-u) over configurations (in nm), and its error.

        The error is NaN if only one sample has weight, or nearly so, and that of a resampled
        ensemble: its weights no longer know.

        Raises
        ------
        ValueError
            If no sample has weight, or the ensemble is an unweighted one.
        """
        self._check_weighted("log_z")
        estimate = log_mean_weight(self.log_weights)
        return Estimate(estimate.value, math.nan) if self._is("resampled_from") else estimate

    @quiet
    def expectation(self, f: Observable) -> Estimate:
        """Mean of an observable under the target, and its error.

        Parameters
        ----------
        f
            A function of positions (n, M, D) in nm, or an array of values with first axis n. One
            number per sample gives floats; (n, k) gives arrays of shape (k,). Values for samples
            of zero weight do not matter, and may be NaN.

        Notes
        -----
        The error is the weights' own account: trust it no further than :meth:`diagnostics`. It is
        NaN if only one sample has weight, or nearly so (fewer than 1.5 effective ones), and that of
        a resampled ensemble, whose duplicates it would count as samples.
        """
        weights = self.weights
        values, alive = self._values(f, "expectation")
        v = values[alive]
        w = weights[alive].reshape(-1, *[1] * (v.ndim - 1))
        mean = (w * v).sum(axis=0)
        error = np.sqrt((w * w * (v - mean) ** 2).sum(axis=0))
        unknown = self._is("resampled_from") or is_alone(self.log_weights)
        return Estimate(mean, np.full_like(error, np.nan) if unknown else error)

    @quiet
    def histogram(
        self,
        values: Observable,
        bins: int | Sequence[float] | Array = 50,
        range: tuple[float, float] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Probability density of a scalar observable under the target.

        Parameters
        ----------
        values
            A function of positions (n, M, D) in nm -> (n,), or an array (n,).
        bins, range
            As for ``numpy.histogram``. What lies outside keeps its probability: the density
            integrates to the probability of the range.

        Returns
        -------
        density, edges, stderr
            (k,), (k + 1,), (k,). An empty bin has a standard error of zero, not of certainty; nor
            does one of few samples know how much it lacks.
        """
        weights = self.weights
        v, alive = self._values(values, "histogram")
        if v.ndim != 1:
            raise ValueError(f"histogram: expected one value per sample, got {v.shape}")
        v, w = v[alive], weights[alive]
        probability, edges = np.histogram(v, bins, range, weights=w)
        square, _ = np.histogram(v, edges, weights=w * w)
        rest = np.maximum((w * w).sum() - square, 0.0)
        variance = square * (1.0 - probability) ** 2 + rest * probability**2
        if self._is("resampled_from"):
            variance = np.full_like(variance, np.nan)
        widths = np.diff(edges)
        return probability / widths, edges, np.sqrt(variance) / widths

    def _values(self, f: Observable, name: str) -> tuple[Array, Array]:
        """Values (n, ...) of an observable, and which samples have weight (n,)."""
        raw = f(self.positions) if callable(f) else f
        values = checks.real_array(name, raw)
        if values.ndim == 0 or len(values) != len(self):
            raise ValueError(
                f"{name}: expected one value per sample, first axis {len(self)}, got an array of "
                f"shape {values.shape}"
            )
        alive = np.isfinite(self.log_weights)
        finite = np.isfinite(values).reshape(len(self), -1).all(axis=1)
        bad = np.flatnonzero(~finite & alive)
        if len(bad):
            raise ValueError(
                f"{name}: expected finite values wherever the log weight is, got NaN or infinity "
                f"in {len(bad)} of {len(self)} samples, the first at index {bad[0]}"
            )
        return values, alive

    def free_energy(
        self,
        target_log_weights: ArrayLike,
        *,
        subsample: bool = True,
        n_bootstraps: int = 100,
        seed: int = 0,
    ) -> FreeEnergy:
        """-log Z in kT by BAR, from these samples and noised MD; better than :meth:`log_z`.

        Parameters
        ----------
        target_log_weights
            (m,) what ``noise()`` of the generator gives for frames of MD, in their order.
        subsample
            Count g correlated frames as one; g is measured and stands in the result.
        n_bootstraps, seed
            Of a second error estimate; 0 leaves it out.

        Raises
        ------
        ValueError
            If the two sides hardly overlap, with the overlap; if they are of two tunings; or if
            these samples are not as one kernel of the generator drew them: resampled, reweighted,
            or of several kernels.

        Notes
        -----
        Both sides must be of one tuning and number of steps, and of its own Hamiltonian and
        temperature: tune, then sample *and* noise. What ``noise()`` gives is compared; arrays from
        elsewhere cannot be. For a flow, ``sample_ode`` and ``noise_ode``. For other temperatures
        there is :func:`mbar`.
        """
        self.check_as_drawn("free_energy")
        self.check_same_proposal("free_energy", target_log_weights)
        return bar(
            self.log_weights,
            target_log_weights,
            subsample=subsample,
            n_bootstraps=n_bootstraps,
            seed=seed,
        )

    # -- other weights ------------------------------------------------------------------------
    @quiet
    def resample(self, n: int | None = None, seed: Seed = None) -> WeightedEnsemble:
        """Draw n samples (default: as many as there are) in proportion to their weights.

        Systematic resampling: sample i appears floor(n W_i) or ceil(n W_i) times, in random order,
        so that any slice of the result is itself a fair subset. All log weights of the result
        equal log mean w, so that its ``log_z()`` has the same value. Its weights know nothing of
        the duplicates: estimates have no error and ``diagnostics()`` no Pareto k any more. Estimate
        before resampling.
        """
        n = checks.positive_integer("n", len(self) if n is None else n)
        generator = make_generator(seed)
        offset = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
        cumulative = np.cumsum(self.weights)
        points = np.minimum((np.arange(n) + offset) / n, np.nextafter(1.0, 0.0))
        index = np.searchsorted(cumulative / cumulative[-1], points, side="right")
        index = index[torch.randperm(n, generator=generator, device="cpu").numpy()]
        failed = self.diagnostics().n_failed
        notes = {"resampled_from": len(self)} | ({"n_failed": failed} if failed else {})
        return dataclasses.replace(
            self[index],
            log_weights=np.full(n, log_mean_weight(self.log_weights).value),
            metadata={**self.metadata, **notes},
        )

    def reweight(self, target: Any) -> WeightedEnsemble:
        """The same samples, weighted for another Hamiltonian or temperature.

        Parameters
        ----------
        target
            Anything with ``reduced_energy(x)``, x (n, M, D) torch float64 in nm -> (n,) kT, such
            as an :class:`~openmm_vtdis.targets.OpenMMTarget`; an openmmtools ThermodynamicState,
            which is evaluated with this ensemble's topology; or a temperature, as an
            ``openmm.unit`` quantity, at which the Hamiltonian stays as it is.

        Notes
        -----
        A sample of zero weight stays so, even if the new energy is finite. A new energy that is
        NaN or infinite gives zero weight. Far from where they were drawn, samples know nothing of
        what they have not visited, errors included: :func:`mbar` with MD from there does.
        """
        self._check_weighted("reweight")
        temperature: float | None
        if isinstance(target, unit.Quantity):
            if self.temperature is None:
                raise ValueError(
                    "reweight: expected samples that have a temperature, got those of a density "
                    "without one"
                )
            temperature = checks.temperature(target)
            hamiltonian = says("hamiltonian", self.metadata)
            u_new = self.reduced_energies * (self.temperature / temperature)
        else:
            target = as_target("reweight", target, self.topology, self.positions.shape[2])
            check_space("reweight", target, says("centred", self.metadata))
            temperature = getattr(target, "temperature", None)
            hamiltonian = getattr(target, "fingerprint", None)
            u_new = state_energies("reweight", target, self.positions)
        alive = np.isfinite(self.log_weights) & np.isfinite(u_new)
        log_weights = np.full(len(self), -math.inf)
        change = self.reduced_energies[alive] - u_new[alive]
        log_weights[alive] = self.log_weights[alive] + change
        return dataclasses.replace(
            self,
            log_weights=log_weights,
            reduced_energies=u_new,
            temperature=temperature,
            metadata={**self.metadata, "reweighted": True, "hamiltonian": hamiltonian},
        )

    # -- elsewhere ----------------------------------------------------------------------------
    def to_mdtraj(self) -> md.Trajectory:
        """The positions as an mdtraj Trajectory; missing dimensions are padded with zeros.

        mdtraj holds float32 and no weights: use it for observables, and never compute energies or
        weights again from it. Without a topology the atoms are argon.
        """
        n, n_particles, n_dims = self.positions.shape
        if n_dims > 3:
            raise ValueError(f"to_mdtraj: expected at most 3 dimensions, got {n_dims}")
        topology = self.topology
        if topology is None:
            topology = placeholder_topology(n_particles)
        xyz = np.zeros((n, n_particles, 3), dtype=np.float32)
        with np.errstate(over="ignore"):  # positions of zero weight may be anything
            xyz[..., :n_dims] = self.positions
        return md.Trajectory(xyz, mdtraj_topology(topology))

    def to_sampler_states(self, n: int | None = None, seed: Seed = None) -> list[Any]:
        """n fair samples as openmmtools SamplerStates, to start replicas from.

        They are resampled in proportion to the weights (default: as many as there are), without
        velocities; missing dimensions are padded with zeros.
        """
        with quiet_pymbar():  # which openmmtools imports
            from openmmtools.states import SamplerState

        x = self.resample(n, seed).positions
        if x.shape[2] > 3:
            raise ValueError(f"to_sampler_states: expected at most 3 dimensions, got {x.shape[2]}")
        padded = np.pad(x, [(0, 0), (0, 0), (0, 3 - x.shape[2])])
        return [SamplerState(frame * unit.nanometer) for frame in padded]

    def save_colvar(self, path: str | os.PathLike[str], **columns: Observable) -> Path:
        """Write collective variables and log weights for PLUMED, see :func:`io.write_colvar`.

        ``ensemble.save_colvar("COLVAR", phi=phi)``: values (n,), or a function of positions.
        """
        x = self.positions
        values = {name: f(x) if callable(f) else f for name, f in columns.items()}
        return write_colvar(path, self.log_weights, values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file that ends in .nc (a trajectory for others too) or .npz; see :mod:`io`."""
        names = (f.name for f in dataclasses.fields(self))
        contents: Any = {name: getattr(self, name) for name in names}
        return write_ensemble(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightedEnsemble:
        """Read what :meth:`save` wrote, exactly.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated or foreign.
        """
        contents: Contents = read_ensemble(path)
        return cls(**contents)


def _frozen(name: str, values: object) -> Array:
    """A read-only float64 array; a copy unless it is one that nobody else can write to."""
    array = checks.real_array(name, values)
    if array.flags.writeable or not array.flags.owndata:
        array = array.copy()
        array.flags.writeable = False
    return array
