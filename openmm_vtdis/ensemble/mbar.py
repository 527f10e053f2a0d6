r"""Generated samples and MD in several states, pooled into one estimate by MBAR.

The generator's paths and those of the forward process from MD frames live in one extended space
(see :mod:`~openmm_vtdis.ensemble.bar`). Divided by the density of the noising, which all
states share, the generator is one more state there, with the reduced energy

    u_p = u_0(x) + log w,          u_k(x) in state k,

where log w is relative to state 0: the weight of a generated sample, or what ``log_weights()``
gives for a frame. MBAR (Shirts and Chodera 2008) gives all log Z at once, since that of the
generator is zero, and expectations in which every sample counts for what it is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from openmm_vtdis.core import checks
from openmm_vtdis.core.defaults import keeps_to_the_cpu
from openmm_vtdis.core.ess import Array, quiet
from openmm_vtdis.core.units import nanometers
from openmm_vtdis.ensemble.bar import LEAST_COMMON, check_overlap, statistical_inefficiency
from openmm_vtdis.ensemble.consistency import check_as_drawn, check_same_proposal
from openmm_vtdis.ensemble.diagnostics import Estimate
from openmm_vtdis.ensemble.states import as_target, check_space, state_energies
from openmm_vtdis.ensemble.weighted import WeightedEnsemble
from openmm_vtdis.runtime.optional_imports import quiet_pymbar

_NOTHING = 700.0
"""Reduced energy above all others that stands for infinity: no weight in double precision."""


@dataclass(frozen=True, eq=False, repr=False)
class PooledEnsemble:
    """Samples of the generator and of K states, with all their energies.

    Attributes
    ----------
    positions
        (N, M, D) in nm: generated samples, then MD of state 0, 1, ...
    n_samples
        (K + 1,) number of samples of each, after subsampling.
    reduced_energies
        (K + 1, N) in kT, row 0 of the generator in the extended space.
    statistical_inefficiencies
        (K,) frames given for each one used; NaN for a state without MD.
    """

    positions: Array
    n_samples: Array
    reduced_energies: Array
    statistical_inefficiencies: Array
    _solution: Any

    def __repr__(self) -> str:
        parts = ", ".join(str(n) for n in self.n_samples[1:])
        return f"PooledEnsemble({self.n_samples[0]} generated samples, MD frames: {parts})"

    @property
    @quiet
    def overlap(self) -> Array:
        """(K + 1, K + 1) overlap matrix, generator first; each row sums to one."""
        return np.asarray(self._solution.compute_overlap()["matrix"])

    def log_z(self, state: int = 0) -> Estimate:
        """log Z of a state and its standard error, configurations in nm."""
        k = 1 + self._state(state)
        found = self._differences()
        return Estimate(-found["Delta_f"][0, k], found["dDelta_f"][0, k])

    def free_energy_difference(self, start: int, end: int) -> Estimate:
        """Reduced free energy of state ``end`` minus that of ``start`` (-log of Z over Z)."""
        i, j = 1 + self._state(start), 1 + self._state(end)
        found = self._differences()
        return Estimate(found["Delta_f"][i, j], found["dDelta_f"][i, j])

    @quiet
    def expectation(self, f: Callable[[Array], ArrayLike] | ArrayLike, state: int = 0) -> Estimate:
        """Mean of a scalar observable in a state, from all samples that have weight there.

        Parameters
        ----------
        f
            A function of positions (N, M, D) in nm -> (N,), or its values.
        """
        k = 1 + self._state(state)
        values = checks.real_array("expectation", f(self.positions) if callable(f) else f)
        if values.shape != (len(self.positions),):
            raise ValueError(
                f"expectation: expected one value for each of {len(self.positions)} samples, got "
                f"shape {values.shape}"
            )
        alive = np.isfinite(self.reduced_energies[k])
        if not np.isfinite(values[alive]).all():
            raise ValueError("expectation: expected finite values wherever a sample has weight")
        # pymbar takes logarithms of values, of which some, or all, may be zero
        low, width = values[alive].min(), np.ptp(values[alive])
        if width == 0.0:
            return Estimate(low, 0.0)
        shift = low - width
        with quiet_pymbar():
            found = self._solution.compute_expectations(np.where(alive, values - shift, width))
        return Estimate(shift + found["mu"][k], found["sigma"][k])

    @quiet
    def _differences(self) -> Any:
        with quiet_pymbar():
            return self._solution.compute_free_energy_differences()

    def _state(self, state: int) -> int:
        whole = isinstance(state, int | np.integer) and not isinstance(state, bool)
        if not whole or not 0 <= state < len(self.n_samples) - 1:
            raise ValueError(
                f"state: expected one of 0 to {len(self.n_samples) - 2}, got {state!r}"
            )
        return state


@keeps_to_the_cpu
@quiet
def mbar(
    generated: WeightedEnsemble,
    states: Sequence[Any],
    frames: Sequence[Any],
    log_weights: Sequence[ArrayLike | None],
    *,
    subsample: bool | Sequence[float] = True,
) -> PooledEnsemble:
    """Pool generated samples with MD in one or more states.

    Parameters
    ----------
    generated
        n samples from ``sample()``.
    states
        K targets with ``reduced_energy(x)``, or openmmtools ThermodynamicStates. The first is the
        one that ``generated`` is weighted for.
    frames
        MD of each state in the order of time: an mdtraj Trajectory, an array (n_k, M, D) in nm, or
        None if there is none.
    log_weights
        Log weights of those frames, (n_k,) for each state, or None: from the generator's
        ``log_weights()``, relative to its own state throughout, with the tuning that ``generated``
        was drawn with.
    subsample
        Use one frame in as many as count as one. True: their number g is measured on the energies
        of the frames in their state and on their log weights, which do not see every slow motion.
        If an observable changes more slowly, its errors come out too small: give a number g for
        each state instead. False uses all frames.

    Raises
    ------
    ValueError
        If the first state is not that of the ensemble, shapes differ, a frame has no weight, some
        states overlap with no other, or a state is reached by hardly any sample.
    """
    if not isinstance(generated, WeightedEnsemble):
        raise ValueError(
            "mbar: expected a WeightedEnsemble of generated samples, got "
            f"{type(generated).__name__}"
        )
    check_as_drawn("mbar", generated.provenance)
    for name, values in {"states": states, "frames": frames, "log_weights": log_weights}.items():
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"mbar: expected a list of {name}, one for each state, got {type(values).__name__}"
            )
    if not len(states) == len(frames) == len(log_weights) or not len(states):
        raise ValueError(
            "mbar: expected frames and log weights (or None) for each state, got "
            f"{len(states)} states, {len(frames)} and {len(log_weights)}"
        )
    if not isinstance(subsample, list | tuple):
        checks.boolean("subsample", subsample)
    elif len(subsample) != len(states):
        raise ValueError(f"mbar: expected a g for each of {len(states)} states, got {subsample}")
    n_dims = generated.positions.shape[2]
    targets = [as_target("mbar", state, generated.topology, n_dims) for state in states]
    for target in targets:
        check_space("mbar", target, generated.provenance.centred)
    positions, proposal, counts = [generated.positions], [generated.log_weights], [len(generated)]
    inefficiencies = []
    for k, (traj, lw) in enumerate(zip(frames, log_weights, strict=True)):
        if (traj is None) != (lw is None):
            raise ValueError(f"mbar: expected frames and log weights of state {k}, got only one")
        x, weights, g = generated.positions[:0], np.zeros(0), math.nan
        if traj is not None and lw is not None:
            check_same_proposal(f"mbar, state {k}", generated, lw)
            x, weights = _frames(k, traj, lw, generated.positions.shape[1:])
            g = 1.0
            if isinstance(subsample, list | tuple):
                g = max(1.0, checks.positive_number("subsample", subsample[k]))
            elif subsample:
                series = (state_energies("mbar", targets[k], x), weights)
                g = max(map(statistical_inefficiency, series))
            if g > 1.0:
                keep = np.unique(np.round(np.arange(0.0, len(x) - 0.5, g)).astype(int))
                x, weights = x[keep], weights[keep]
        positions.append(x)
        proposal.append(weights)
        counts.append(len(x))
        inefficiencies.append(g)
    pooled, n_samples = np.concatenate(positions), np.asarray(counts)
    u = np.stack([state_energies("mbar", target, pooled) for target in targets])
    u[np.isnan(u)] = math.inf
    _check_first_state(generated, u[0, : len(generated)])
    # A generated sample without weight is nowhere but in the generator
    lw = np.concatenate(proposal)
    alive = np.isfinite(lw)
    u[:, ~alive] = math.inf
    row = np.zeros(len(lw))
    row[alive] = u[0, alive] + lw[alive]
    if not np.isfinite(row).all():
        raise ValueError("mbar: expected frames with a finite energy in the first state")
    u = np.concatenate([row[None], u])
    solution = _solve(u, n_samples)
    _check_connected(solution, n_samples)
    _check_reached(solution)
    return PooledEnsemble(pooled, n_samples, u, np.asarray(inefficiencies), solution)


def _solve(u: Array, n_samples: Array) -> Any:
    """``pymbar.MBAR`` of reduced energies (K + 1, N), +inf allowed, and numbers (K + 1,).

    It starts from the generated samples' own -log Z of each state: from elsewhere it can take long.
    """
    log_w = u[0, : n_samples[0]] - u[:, : n_samples[0]]
    one_sided = math.log(n_samples[0]) - logsumexp(log_w, axis=1)
    finite = np.isfinite(u)
    u = np.where(finite, u, u[finite].max() + _NOTHING)
    with quiet_pymbar() as pymbar:
        try:
            return pymbar.MBAR(
                u, n_samples, initial_f_k=np.where(np.isfinite(one_sided), one_sided, 0.0)
            )
        except (pymbar.utils.ParameterError, pymbar.utils.ConvergenceError) as error:
            raise ValueError(f"mbar: expected states that overlap, got {error}") from error


def _frames(
    k: int, traj: Any, log_weights: ArrayLike, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Positions (n, M, D) and log weights (n,) of the MD of state k."""
    if isinstance(traj, md.Trajectory):
        traj = traj.xyz[..., : shape[1]]
    x = checks.real_array(f"frames of state {k}", nanometers(traj))
    lw = checks.log_weights(log_weights)
    if x.shape != (len(lw), *shape):
        raise ValueError(
            f"mbar: expected frames of state {k} of shape {(len(lw), *shape)}, one for each log "
            f"weight, got {x.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))
    if len(bad):
        raise ValueError(
            f"mbar: expected finite positions, got NaN or infinity in {len(bad)} frames of state "
            f"{k}, the first at index {bad[0]}"
        )
    lost = int(np.isneginf(lw).sum())
    if lost:
        raise ValueError(f"mbar: expected frames of state {k} with weight, got {lost} without")
    return x, lw


def _check_first_state(generated: WeightedEnsemble, u: Array) -> None:
    alive = np.isfinite(generated.log_weights)
    gap = np.abs(u[alive] - generated.reduced_energies[alive])
    if not (gap <= 1e-6 * (1.0 + np.abs(u[alive]))).all():
        raise ValueError(
            "mbar: expected as the first state the one that the ensemble is weighted for, got "
            f"energies that differ by up to {gap.max():.3g} kT"
        )


def _check_connected(solution: Any, n_samples: Array) -> None:
    """No group of states may stand apart: the second eigenvalue of the overlap matrix is one then.

    States without samples of their own are not asked.
    """
    sampled = np.flatnonzero(n_samples)
    matrix = np.asarray(solution.compute_overlap()["matrix"])[np.ix_(sampled, sampled)]
    if len(sampled) > 1:
        second = np.sort(np.linalg.eigvals(matrix).real)[-2]
        check_overlap("mbar", float(1.0 - second), int(n_samples[sampled].min()))


def _check_reached(solution: Any) -> None:
    """Every state must be met by more than a handful of samples: 1 / sum W^2 of them."""
    reached = 1.0 / np.square(np.asarray(solution.W_nk)[:, 1:]).sum(axis=0)
    for k, number in enumerate(reached):
        if not number >= LEAST_COMMON:
            raise ValueError(
                f"mbar: expected samples that reach state {k}, got {number:.1f} effective ones of "
                f"{LEAST_COMMON:.0f} needed"
            )
