r"""Weighted ensembles: samples, their weights, and every estimate that follows from the two.

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
from numpy.typing import ArrayLike
from openmm import app
from scipy.special import logsumexp

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array, quiet, reverse_ess
from openmm_vtdis.core.rng import Seed
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.ensemble import consistency, contents, estimates, exports
from openmm_vtdis.ensemble.bar import FreeEnergy, bar
from openmm_vtdis.ensemble.diagnostics import Diagnostics, Estimate, is_alone, log_mean_weight
from openmm_vtdis.ensemble.files import read_ensemble, write_ensemble
from openmm_vtdis.ensemble.pooling import check_poolable, pooled_metadata
from openmm_vtdis.ensemble.provenance import UNKNOWN, Provenance
from openmm_vtdis.ensemble.states import in_another_state

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
        Temperature in K, or None for a density without one.
    topology
        OpenMM Topology, or None.
    metadata
        JSON-able notes of the user's own.
    provenance
        Where the weights are from (:mod:`~openmm_vtdis.ensemble.provenance`).

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
    provenance: Provenance = UNKNOWN

    def __post_init__(self) -> None:
        x = contents.frozen(checks.real_array("positions", nanometers(self.positions)))
        contents.check_shape(x)
        lw = checks.log_weights(contents.frozen(checks.real_array("log_weights", self.log_weights)))
        u = contents.frozen(checks.real_array("reduced_energies", self.reduced_energies))
        contents.check_arrays(x, lw, u)
        contents.check_kinds(self.topology, self.provenance, x.shape[1])
        t = None if self.temperature is None else checks.temperature(self.temperature)
        metadata = contents.json_copy(self.metadata)
        fields = {"positions": x, "log_weights": lw, "reduced_energies": u, "temperature": t}
        for name, value in {**fields, "metadata": metadata}.items():
            object.__setattr__(self, name, value)

    # -- the container ------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self.log_weights)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightedEnsemble, tuple(vars(self)[f.name] for f in dataclasses.fields(self))

    def __getitem__(self, index: int | slice | ArrayLike) -> WeightedEnsemble:
        """The samples at an index, slice, boolean mask or index array, weights as they are.

        An index array with repetitions gives a resampled ensemble, whose estimates have no error.
        A selection of only the samples with weight has no log Z.
        """
        rows: Any = index
        if isinstance(index, int | np.integer):
            rows = [index]
        elif not isinstance(index, slice):
            rows = np.asarray(index)
        provenance = self.provenance
        if isinstance(rows, np.ndarray):
            chosen, alive = np.arange(len(self))[rows], np.isfinite(self.log_weights)
            if len(np.unique(chosen)) < len(chosen):
                n = provenance.resampled_from or len(self)
                provenance = provenance.replace(resampled_from=n)
            if not alive.all() and np.array_equal(np.sort(chosen), np.flatnonzero(alive)):
                provenance = provenance.replace(selected_by_weight=True)
        return dataclasses.replace(
            self,
            positions=self.positions[rows],
            log_weights=self.log_weights[rows],
            reduced_energies=self.reduced_energies[rows],
            provenance=provenance,
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
        provenance = self.provenance.replace(unweighted=False)
        return dataclasses.replace(
            self, log_weights=checks.real_array("log_weights", log_weights), provenance=provenance
        )

    def unweighted(self) -> WeightedEnsemble:
        """The samples as they came: those with a finite energy have equal weights.

        Use it for averages over the raw output of the generator; weights and log Z are gone.
        """
        finite = np.isfinite(self.reduced_energies)
        return dataclasses.replace(
            self,
            log_weights=np.where(finite, 0.0, -math.inf),
            provenance=self.provenance.replace(unweighted=True),
        )

    def with_metadata(self, metadata: dict[str, Any]) -> WeightedEnsemble:
        """The same samples with other metadata."""
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
        return WeightedEnsemble(
            np.concatenate([ensemble.positions for ensemble in ensembles]),
            np.concatenate([ensemble.log_weights for ensemble in ensembles]),
            np.concatenate([ensemble.reduced_energies for ensemble in ensembles]),
            first.temperature,
            first.topology,
            pooled_metadata([ensemble.metadata for ensemble in ensembles]),
            Provenance.pooled([ensemble.provenance for ensemble in ensembles]),
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
        """Diagnostics of the weights: print them to see whether they can be trusted."""
        about = Diagnostics.of(self.log_weights, self.reduced_energies, self.positions)
        said = self.provenance
        if said.resampled_from is None and not said.unweighted:
            return about
        failed = about.n_failed or said.n_failed
        return dataclasses.replace(about, pareto_k=math.nan, n_failed=failed)

    @property
    def _resampled(self) -> bool:
        return self.provenance.resampled_from is not None

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
        consistency.check_weighted("log_z", self.provenance)
        estimate = log_mean_weight(self.log_weights)
        return Estimate(estimate.value, math.nan) if self._resampled else estimate

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
        unknown = self._resampled or is_alone(self.log_weights)
        return estimates.expectation(self.weights, *self._values(f, "expectation"), unknown)

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
        v, alive = self._values(values, "histogram")
        return estimates.histogram(self.weights, v, alive, bins, range, self._resampled)

    def _values(self, f: Observable, name: str) -> tuple[Array, Array]:
        """Values (n, ...) of an observable, and which samples have weight (n,)."""
        raw = f(self.positions) if callable(f) else f
        return estimates.checked_values(name, raw, self.log_weights)

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
            (m,) log weights of MD frames in their order, from the generator's ``log_weights()``.
        subsample
            Count g correlated frames as one; g is measured and stands in the result.
        n_bootstraps, seed
            Bootstraps of a second error estimate, and their seed; 0 bootstraps leave it out.

        Raises
        ------
        ValueError
            If the two sides hardly overlap, with the overlap; if they are of two tunings; or if
            these samples are not as one proposal drew them: resampled, reweighted, or of several
            proposals.

        Notes
        -----
        Both sides must be of one tuning and number of steps, and of its own Hamiltonian and
        temperature: tune, then call ``sample()`` *and* ``log_weights()``. The provenance of what
        the latter gives is compared; that of plain arrays is not known. For a flow, use
        ``sample_ode`` and ``log_weights_ode``; for other temperatures,
        :func:`~openmm_vtdis.ensemble.mbar.mbar`.
        """
        consistency.check_as_drawn("free_energy", self.provenance)
        consistency.check_same_proposal("free_energy", self, target_log_weights)
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
        index = estimates.systematic(self.weights, n, seed)
        provenance = self.provenance.replace(
            resampled_from=len(self), n_failed=self.diagnostics().n_failed
        )
        return dataclasses.replace(
            self[index],
            log_weights=np.full(n, log_mean_weight(self.log_weights).value),
            provenance=provenance,
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
        what they have not visited, errors included;
        :func:`~openmm_vtdis.ensemble.mbar.mbar` with MD from there does.
        """
        consistency.check_weighted("reweight", self.provenance)
        state = in_another_state("reweight", self, target)
        return dataclasses.replace(
            self,
            log_weights=state.log_weights_of(self),
            reduced_energies=state.reduced_energies,
            temperature=state.temperature,
            provenance=self.provenance.replace(reweighted=True, hamiltonian=state.hamiltonian),
        )

    # -- elsewhere ----------------------------------------------------------------------------
    def to_mdtraj(self) -> md.Trajectory:
        """The positions as an mdtraj Trajectory; missing dimensions are padded with zeros.

        mdtraj holds float32 and no weights: use it for observables, and never compute energies or
        weights again from it. Without a topology the atoms are argon.
        """
        return exports.to_mdtraj(self.positions, self.topology)

    def to_sampler_states(self, n: int | None = None, seed: Seed = None) -> list[Any]:
        """n fair samples as openmmtools SamplerStates, to start replicas from.

        They are resampled in proportion to the weights (default: as many as there are), without
        velocities; missing dimensions are padded with zeros.
        """
        return exports.to_sampler_states(self.resample(n, seed).positions)

    def save_colvar(self, path: str | os.PathLike[str], **columns: Observable) -> Path:
        """Write collective variables and log weights for PLUMED.

        See :func:`~openmm_vtdis.ensemble.exports.write_colvar`.

        ``ensemble.save_colvar("COLVAR", phi=phi)``: values (n,), or a function of positions.
        """
        x = self.positions
        values = {name: f(x) if callable(f) else f for name, f in columns.items()}
        return exports.write_colvar(path, self.log_weights, values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file: .nc, a trajectory for other programs too, or .npz.

        See :mod:`~openmm_vtdis.ensemble.files`.
        """
        everything: Any = vars(self)
        return write_ensemble(path, everything)

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
        return cls(**read_ensemble(path))
