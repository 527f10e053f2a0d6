r"""Reference samples by Hamiltonian Monte Carlo, many independent chains in one batch.

Each chain x is a particle of unit mass in the potential u. With momentum p ~ N_x(0, I) on the
target's space, L leapfrog steps of size h::

    p <- p + h/2 f(x);   x <- x + h p;   p <- p + h/2 f(x),          f = -du/dx,

propose a new configuration, accepted with probability min(1, exp(H_old - H_new)),
``H = u(x) + |p|^2 / 2``. It leaves pi ∝ exp(-u) invariant exactly, whatever h and L. A non-finite
energy is never accepted.

During burn-in h is adapted until 80 % of the proposals are accepted; then it is frozen at its mean
over the second half. Around it h is drawn anew for every proposal of every chain, within 50 %, so
that a chain in a narrow place (two particles in contact) gets out with a small one; and L within
25 % of ``n_leapfrog``, so that no periodic orbit resonates with it. Neither draw looks at x: both
keep pi invariant.

With a ladder of temperatures 1 = T_1 < T_2 < ..., in units of the target's, every chain is one for
each of them, with the density exp(-u / T_k) and the step size h sqrt(T_k). After every proposal
neighbours i and j exchange their configurations with probability

    min(1, exp((1/T_i - 1/T_j) (u_i - u_j)))

(parallel tempering: Swendsen and Wang, Phys. Rev. Lett. 57, 2607, 1986), the first, third, ... pair
and the second, fourth, ... in turns. What is hot crosses barriers; samples are those of T_1.

The samples come with a report, see :mod:`~openmm_vtdis.mcmc.reference`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis import storage
from openmm_vtdis.core import checks
from openmm_vtdis.core.defaults import keeps_to_the_cpu
from openmm_vtdis.core.rng import Seed, make_rng
from openmm_vtdis.mcmc.metropolis import accepted
from openmm_vtdis.mcmc.reference import ReferenceData, convergence_report
from openmm_vtdis.runtime.progress import progress_bar
from openmm_vtdis.targets.base import Target, check_is_target

logger = logging.getLogger(__name__)

_TARGET_ACCEPTANCE = 0.8
_ADAPTATION_RATE = 0.5
_LEAPFROG_SPREAD = 0.25
_STEP_SPREAD = 0.5
_DESCENT_STEPS = 300
_DESCENT_RATE = 1e-2
_DESCENT_LIMIT = 0.02
"""Gradient descent from a random start: step in nm per (kT/nm), and its limit per particle, nm."""


@dataclass
class _State:
    """The chains, of all temperatures: positions (L C, M, D), energies (L C,), forces."""

    x: Tensor
    u: Tensor
    f: Tensor


@dataclass
class _Run:
    """State of a run: the chains, their samples so far, and the step size.

    With C chains on a ladder of L temperatures, row ``k C + c`` of the state is chain c at T_k.
    """

    state: _State
    positions: Tensor
    energies: Tensor
    virials: Tensor
    start: Tensor
    """Energies (L C,) at the start of the chains."""
    exchanged: Tensor
    """Sums of acceptance probabilities (L - 1,) after burn-in."""
    step_size: float
    iteration: int = 0
    n_kept: int = 0
    acceptance: float = 0.0
    """Sum of acceptance probabilities over proposals after burn-in."""
    log_steps: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, state: _State, n_levels: int, n_samples: int, step_size: float) -> _Run:
        shape = (len(state.x) // n_levels, n_samples)
        exchanged = torch.zeros(n_levels - 1, dtype=torch.float64)
        positions = torch.empty(*shape, *state.x.shape[1:], dtype=torch.float64)
        energies, virials = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
        return cls(state, positions, energies, virials, state.u, exchanged, step_size)

    def count(self, probability: float, exchanged: Tensor, burn_in: int, thin: int) -> None:
        """Count a proposal and exchanges (L - 1,) with their acceptance probabilities."""
        self.iteration += 1
        if self.iteration <= burn_in:
            gain = _ADAPTATION_RATE / math.sqrt(self.iteration)
            self.step_size *= math.exp(gain * (probability - _TARGET_ACCEPTANCE))
            if self.iteration > burn_in // 2:
                self.log_steps.append(math.log(self.step_size))
            if self.iteration == burn_in:
                self.step_size = math.exp(sum(self.log_steps) / len(self.log_steps))
            return
        self.acceptance += probability
        self.exchanged += exchanged
        if (self.iteration - burn_in) % thin == 0:
            x, u, f = (values[: len(self.energies)] for values in vars(self.state).values())
            self.positions[:, self.n_kept] = x
            self.energies[:, self.n_kept] = u
            self.virials[:, self.n_kept] = -(x * f).sum(dim=(1, 2))
            self.n_kept += 1

    def save(self, path: Path, rng: torch.Generator, about: dict[str, Any]) -> None:
        """Write the run and the state of the rng, atomically."""
        kept = {name: vars(self)[name][:, : self.n_kept] for name in _KEPT}
        others = {
            "start": self.start,
            "exchanged": self.exchanged,
            "generator": rng.get_state(),
        }
        numbers = {name: vars(self)[name] for name in _NUMBERS}
        storage.write_archive(
            path, "hmc", {**vars(self.state), **kept, **others}, {"run": about, **numbers}
        )

    def restore(self, path: Path, rng: torch.Generator, about: dict[str, Any]) -> None:
        """Go on from a checkpoint of this very run."""
        tensors, metadata = storage.read_archive(path, "hmc")
        changed = storage.differences(metadata["run"], about)
        if not (changed or torch.allclose(tensors["start"], self.start, rtol=1e-6)):
            changed = "the target or the starting configurations"
        if changed:
            raise ValueError(
                f"{path}: expected a checkpoint of this run, got one that differs in {changed}; "
                "give another checkpoint path or the same arguments"
            )
        for name in _NUMBERS:
            setattr(self, name, metadata[name])
        for name in _KEPT:
            vars(self)[name][:, : self.n_kept] = tensors[name]
        self.state = _State(*(tensors[name] for name in ("x", "u", "f")))
        self.exchanged = tensors["exchanged"]
        rng.set_state(tensors["generator"])


_KEPT = ("positions", "energies", "virials")
_NUMBERS = ("step_size", "iteration", "n_kept", "acceptance", "log_steps")


@keeps_to_the_cpu
def sample_hmc(
    target: Target,
    n_chains: int = 2_000,
    n_samples: int = 10,
    *,
    burn_in: int = 500,
    thin: int = 10,
    step_size: float = 0.1,
    n_leapfrog: int = 10,
    ladder: Sequence[float] = (1.0,),
    initial: Tensor | None = None,
    seed: Seed = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
    progress: bool = True,
) -> ReferenceData:
    """Draw reference samples of ``target``.

    Parameters
    ----------
    target
        Any target with forces.
    n_chains
        Independent chains, advanced together.
    n_samples
        Samples kept of each chain.
    burn_in
        Proposals before the first sample, in which the step size adapts.
    thin
        Proposals per sample.
    step_size
        Step size h at the start of its adaptation, nm.
    n_leapfrog
        Mean number of leapfrog steps L of a proposal.
    ladder
        Temperatures of parallel tempering in multiples of the target's, rising from 1. The work
        is that of ``n_chains`` chains for each.
    initial
        Starting configurations (n_chains, M, D), or one (M, D) for all, in nm. None: Gaussian
        clouds of 1 nm, relaxed by gradient descent.
    seed
        Integer, torch.Generator (CPU) or None; an integer where there is a checkpoint.
    checkpoint
        A file to which all is written every ``checkpoint_seconds``, and at the end. If it exists,
        the run goes on from there, and ends in the same samples bit for bit.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        On bad arguments, if a chain starts at a non-finite energy, or if the checkpoint belongs to
        another run (arguments, target or starting configurations differ).
    """
    check_is_target(target)
    n_chains = checks.positive_integer("n_chains", n_chains, minimum=2)
    n_samples = checks.positive_integer("n_samples", n_samples)
    burn_in = checks.positive_integer("burn_in", burn_in, minimum=0)
    thin = checks.positive_integer("thin", thin)
    n_leapfrog = checks.positive_integer("n_leapfrog", n_leapfrog)
    step_size = checks.positive_number("step_size", step_size)
    levels = _levels(ladder)
    path = checks.checkpoint(checkpoint, checkpoint_seconds)
    if path is not None:
        seed = checks.positive_integer("seed", seed, minimum=0)
    rng = make_rng(seed)
    start = _start(target, n_chains, len(levels), initial, rng)
    run = _Run.begin(start, len(levels), n_samples, step_size)
    about = {
        "n_chains": n_chains, "n_samples": n_samples, "burn_in": burn_in, "thin": thin,
        "step_size": step_size, "n_leapfrog": n_leapfrog, "ladder": levels.tolist(), "seed": seed,
    }  # fmt: skip
    if path is not None and path.exists():
        run.restore(path, rng, about)
    saved = time.monotonic()
    total = burn_in + n_samples * thin
    bar = progress_bar(total, "HMC", progress, initial=run.iteration)
    while run.iteration < total:
        probability = _propose(target, run.state, levels, run.step_size, n_leapfrog, rng)
        exchanged = _exchange(run.state, levels, run.iteration % 2, rng)
        run.count(probability, exchanged, burn_in, thin)
        bar.update()
        due = time.monotonic() - saved >= checkpoint_seconds or run.iteration == total
        if path is not None and due:
            run.save(path, rng, about)
            saved = time.monotonic()
    bar.close()
    pairs = range(len(levels) - 1)
    turns = [len(range(burn_in + (burn_in + pair) % 2, total, 2)) for pair in pairs]
    report = convergence_report(
        run.energies,
        run.virials,
        target.space.dim,
        run.acceptance / (n_samples * thin),
        run.step_size,
        tuple((run.exchanged / torch.tensor(turns)).tolist()),
    )
    logger.info("HMC of %r:\n%s", target, report)
    return ReferenceData(run.positions.flatten(0, 1), run.energies.flatten(), report)


def _levels(ladder: Sequence[float]) -> Tensor:
    """Temperatures (L,) in units of the target's, checked."""
    levels = torch.as_tensor(checks.real_array("ladder", ladder))
    rising = levels.ndim == 1 and len(levels) > 0 and bool((levels.diff() > 0.0).all())
    if not (rising and float(levels[0]) == 1.0 and math.isfinite(float(levels[-1]))):
        raise ValueError(
            "ladder: expected temperatures in multiples of the target's that rise from 1, such as "
            f"(1.0, 1.3, 1.7), got {ladder!r}"
        )
    return levels


def _propose(
    target: Target,
    state: _State,
    levels: Tensor,
    step_size: float,
    n_leapfrog: int,
    rng: torch.Generator,
) -> float:
    """Propose once for every chain, in place; return the mean acceptance probability."""
    temperatures = levels.repeat_interleave(len(state.x) // len(levels))
    beta = 1.0 / temperatures
    scale = beta[:, None, None]
    spread = int(_LEAPFROG_SPREAD * n_leapfrog)
    n_steps = n_leapfrog + int(torch.randint(-spread, spread + 1, (), generator=rng))
    x, f = state.x, state.f
    p = target.space.standard_normal(len(x), rng)
    kinetic = 0.5 * p.square().sum(dim=(1, 2))
    jitter = torch.rand(len(x), 1, 1, generator=rng, dtype=torch.float64)
    h = step_size * temperatures.sqrt()[:, None, None] * (1.0 + _STEP_SPREAD * (2.0 * jitter - 1.0))
    p = p + 0.5 * h * scale * f
    for step in range(n_steps):
        x = x + h * p
        u, f = target.reduced_energy_and_force(x)
        f = target.space.project(f)
        p = p + (1.0 if step < n_steps - 1 else 0.5) * h * scale * f
    log_ratio = (beta * state.u + kinetic) - (beta * u + 0.5 * p.square().sum(dim=(1, 2)))
    log_ratio = torch.where(torch.isfinite(u), log_ratio, -torch.inf).nan_to_num(-torch.inf)
    taken = accepted(log_ratio, _uniform(log_ratio, rng))
    state.x = torch.where(taken[:, None, None], target.space.project(x), state.x)
    state.u = torch.where(taken, u, state.u)
    state.f = torch.where(taken[:, None, None], f, state.f)
    return float(log_ratio.clamp(max=0.0).exp().mean())


def _exchange(state: _State, levels: Tensor, first: int, rng: torch.Generator) -> Tensor:
    """Exchange neighbours on the ladder, every second pair from ``first`` on, in place.

    Returns acceptance probabilities (L - 1,), averaged over the chains; 0 where it is not a pair's
    turn.
    """
    probabilities = torch.zeros(len(levels) - 1, dtype=torch.float64)
    lower = torch.arange(len(levels) - 1)[first::2]
    if len(lower) == 0:
        return probabilities
    u = state.u.view(len(levels), -1)
    beta = (1.0 / levels)[:, None]
    log_ratio = (beta[lower] - beta[lower + 1]) * (u[lower] - u[lower + 1])
    taken = accepted(log_ratio, _uniform(log_ratio, rng))
    rows = torch.arange(u.numel()).view_as(u)
    order = rows.clone()
    order[lower] = torch.where(taken, rows[lower + 1], rows[lower])
    order[lower + 1] = torch.where(taken, rows[lower], rows[lower + 1])
    for name, values in list(vars(state).items()):
        setattr(state, name, values[order.flatten()])
    probabilities[lower] = log_ratio.clamp(max=0.0).exp().mean(dim=1)
    return probabilities


def _uniform(like: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform random numbers in the shape of a tensor."""
    return torch.rand(like.shape, generator=rng, dtype=torch.float64)


def _start(
    target: Target,
    n_chains: int,
    n_levels: int,
    initial: Tensor | None,
    rng: torch.Generator,
) -> _State:
    space = target.space
    if initial is None:
        x = _relax(target, space.standard_normal(n_chains, rng))
    else:
        initial = torch.as_tensor(initial, dtype=torch.float64)
        if initial.ndim == 2:
            initial = initial.expand(n_chains, *initial.shape)
        x = checks.configurations("initial", initial, space.n_particles, space.n_dims)
        if len(x) != n_chains:
            raise ValueError(f"initial: expected {n_chains} configurations, got {len(x)}")
        x = space.project(x)
    u, f = target.reduced_energy_and_force(x)
    finite = torch.isfinite(u) & torch.isfinite(f).all(dim=2).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"initial: expected finite energies and forces, got {int((~finite).sum())} of "
            f"{n_chains} chains without; give other starting configurations"
        )
    f = space.project(f)
    return _State(x.repeat(n_levels, 1, 1), u.repeat(n_levels), f.repeat(n_levels, 1, 1))


def _relax(target: Target, x: Tensor) -> Tensor:
    """Walk downhill from (C, M, D), no particle by more than a small distance per step."""
    for _ in range(_DESCENT_STEPS):
        _, f = target.reduced_energy_and_force(x)
        length = f.norm(dim=2, keepdim=True).clamp(min=1e-12)
        move = f * (_DESCENT_LIMIT / length).clamp(max=_DESCENT_RATE)
        x = target.space.project(x + move.nan_to_num(0.0))
    return x
