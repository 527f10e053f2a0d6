r"""Denoisers D(x, t) = E[x_0 | x_0 + t xi = x], learned and exact.

*Learned* (Karras et al. 2022, Table 1). With data of unit variance per degree of freedom,

    D(x, t) = c_skip x + c_out F(c_in x, log t),
    c_skip = 1 / (1 + t^2),   c_out = t / sqrt(1 + t^2),   c_in = 1 / sqrt(1 + t^2),

so that the network F has inputs and training targets of unit variance at every noise level.

*Exact*, for a Gaussian mixture sum_k w_k N_x(m_k, s_k I): with total variance V_k = s_k + t^2,

    D(x, t) = sum_k p_k(x) [m_k + s_k / V_k (x - m_k)],   p_k ~ w_k N_x(x; m_k, V_k I),

the oracle that the tests hold every sampler, covariance and weight against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks import Network
from openmm_vtdis.runtime import cuda_graphs
from openmm_vtdis.runtime.allocator import keep_freed_memory

R = TypeVar("R")
_ODD_TOLERANCE = 1e-3
"""Relative tolerance of the test for odd denoisers: networks run in single precision."""


class Denoiser(Protocol):
    """D(x, t) = E[x_0 | x_t = x] on a space."""

    @property
    def space(self) -> Space:
        """The space of x."""
        ...

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, M, D), t scalar or (B,) -> (B, M, D), in x's type."""
        ...


@runtime_checkable
class PairDenoiser(Denoiser, Protocol):
    """A denoiser that also gives coefficients of the posterior for every pair of particles."""

    @property
    def knows_pairs(self) -> bool:
        """Whether it gives pair coefficients."""
        ...

    def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t), t (B,), and pair coefficients (B, P, 4)."""
        ...


def knows_pairs(denoiser: Denoiser) -> TypeGuard[PairDenoiser]:
    """Whether a denoiser can serve the "pairwise" covariance."""
    return isinstance(denoiser, PairDenoiser) and denoiser.knows_pairs


def check_pairs(denoiser: Denoiser) -> PairDenoiser:
    """Return the denoiser if it has a pair head.

    Raises
    ------
    ValueError
        If it has none.
    """
    if not knows_pairs(denoiser):
        raise ValueError(
            'covariance: expected a network with a pair head for "pairwise", got one without; '
            "call train_pair_head() first"
        )
    return denoiser


class PreconditionedDenoiser(nn.Module):
    """A network wrapped in EDM preconditioning, for data of unit variance per degree of freedom.

    Parameters
    ----------
    network
        Maps (B, M, D) and log t (B,) to a displacement (B, M, D).
    space
        Where configurations live; outputs are projected onto it.
    """

    def __init__(self, network: nn.Module, space: Space) -> None:
        super().__init__()
        keep_freed_memory()
        self.network = network
        self.space = space

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t). The network runs in its own precision; the skip path in that of x."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        return self._combine(x, t, self.network(*self._inputs(x, t)))

    @property
    def identity(self) -> tuple[Any, ...]:
        """The space, and the network with its weights."""
        return "preconditioned", dataclasses.astuple(self.space), self.network

    @property
    def knows_pairs(self) -> bool:
        """Whether the network has a pair head."""
        return isinstance(self.network, Network) and self.network.pair_head is not None

    @property
    def graph_safe(self) -> bool:
        """Whether evaluations may be recorded as CUDA graphs: the network says so, on a GPU."""
        safe = isinstance(self.network, Network) and self.network.graph_safe
        return safe and next(self.parameters()).is_cuda

    def with_messages(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t), t (B,), and the messages (B, M, M, H) of the network's last layer."""
        if not isinstance(self.network, Network):
            raise ValueError(
                f"expected a network with messages, got a {type(self.network).__name__}"
            )
        displacement, messages = self.network.with_messages(*self._inputs(x, t))
        return self._combine(x, t, displacement), messages

    def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t), t (B,), and pair coefficients (B, P, 4) from the network's head."""
        denoised, messages = self.with_messages(x, t)
        if not isinstance(self.network, Network) or self.network.pair_head is None:
            raise ValueError("expected a network with a pair head, got one without")
        head = self.network.pair_head
        return denoised, head(messages, denoised.to(messages.dtype), t.log().to(messages.dtype))

    def _inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x and log t, in the network's precision."""
        precision = next(self.network.parameters()).dtype
        scaled = x / (1.0 + t.square())[:, None, None].sqrt()
        return scaled.to(precision), t.log().to(precision)

    def _combine(self, x: Tensor, t: Tensor, displacement: Tensor) -> Tensor:
        """c_skip x + c_out F."""
        total = (1.0 + t.square())[:, None, None]
        c_out = t[:, None, None] / total.sqrt()
        return x / total + c_out * self.space.project(displacement.to(x.dtype))

    def loss(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        r"""EDM loss per configuration, ``|D - x_0|^2 / (c_out^2 d)``: clean (B, M, D), t (B,) ->
        (B,).

        With log t drawn uniformly this weighting is, below t = 1, the one under which the loss is
        the KL divergence between the forward and reverse processes.
        """
        residual = self(clean + t[:, None, None] * noise, t) - clean
        c_out_square = t.square() / (1.0 + t.square())
        return residual.square().sum(dim=(-2, -1)) / (c_out_square * self.space.dim)


class GaussianMixtureDenoiser:
    """Exact denoiser of a mixture of isotropic Gaussians on a space.

    Parameters
    ----------
    space
        All of R^{M x D} or its zero-CoM subspace.
    weights
        (K,) positive, summing to one.
    means
        (K, M, D), projected onto the space.
    variances
        (K,) positive.
    """

    def __init__(self, space: Space, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        self.space = space
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = space.project(torch.as_tensor(means, dtype=torch.float64))
        self.variances = torch.as_tensor(variances, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) in float64, returned in x's dtype."""
        y = x.to(torch.float64)
        means, spread = self.means.to(y), self.variances.to(y)
        level = torch.as_tensor(t, dtype=torch.float64, device=y.device).expand(y.shape[0])
        total = spread + level.square()[:, None]
        difference = y[:, None] - means
        square = difference.square().sum(dim=(-2, -1))
        logits = self.weights.to(y).log() - 0.5 * (square / total + self.space.dim * total.log())
        posterior = torch.softmax(logits, dim=1)
        shrunk = means + (spread / total)[:, :, None, None] * difference
        return (posterior[:, :, None, None] * shrunk).sum(dim=1).to(x.dtype)

    def scaled(self, length: float) -> GaussianMixtureDenoiser:
        """The same mixture in units of ``length``."""
        return GaussianMixtureDenoiser(
            self.space, self.weights, self.means / length, self.variances / length**2
        )


@torch.no_grad()
def check_network(denoiser: Denoiser, device: torch.device) -> None:
    """Check that a user's network maps (B, M, D) and log t (B,) to (B, M, D).

    Raises
    ------
    ValueError
        If it does not.
    """
    space = denoiser.space
    x = space.standard_normal(2, make_rng(0)).to(device)
    shape = f"(B, {space.n_particles}, {space.n_dims})"
    what = f"network: expected a map of x {shape} and log t (B,) to {shape}"
    try:
        with torch.no_grad():
            found = denoiser(x, torch.ones(2, dtype=x.dtype, device=device))
    except Exception as error:  # whatever the network raises
        raise ValueError(f"{what}, got {type(error).__name__}: {error}") from error
    if found.shape != x.shape:
        raise ValueError(f"{what}, got {tuple(found.shape)} for {tuple(x.shape)}")


def check_mirror_symmetry(denoiser: Denoiser) -> None:
    """Check that D(-x, t) = -D(x, t), without which mirror images cannot be folded.

    Raises
    ------
    ValueError
        If it does not hold on random configurations.
    """
    rng = torch.Generator().manual_seed(0)
    module = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
    device = torch.device("cpu") if module is None else module.device
    x = denoiser.space.standard_normal(8, rng).to(device)
    for t in (0.1, 1.0):
        level = torch.tensor(t, dtype=x.dtype, device=device)
        there, back = denoiser(x, level) - x, denoiser(-x, level) + x
        if not float((there + back).norm()) < _ODD_TOLERANCE * float(there.norm()):
            raise ValueError(
                "stereochemistry: expected a network that treats mirror images alike, such as the "
                "EGNN, got one that does not; use one, or give stereochemistry='any'"
            )


class RecordedDenoiser:
    """A denoiser whose evaluations are recorded as CUDA graphs while its weights stay in place.

    Evaluations that are differentiated, and large ones, are not recorded.
    """

    def __init__(self, denoiser: PreconditionedDenoiser) -> None:
        self.denoiser = denoiser
        self._mean = cuda_graphs.Recorded(denoiser)
        self._pairs = cuda_graphs.Recorded(denoiser.with_pairs, self._mean.memory)

    @property
    def space(self) -> Space:
        """The denoiser's space."""
        return self.denoiser.space

    @property
    def knows_pairs(self) -> bool:
        """Whether the denoiser has a pair head."""
        return self.denoiser.knows_pairs

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) for x (B, M, D) and t scalar or (B,)."""
        return self._evaluate(self.denoiser, self._mean, x, t)

    def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t) and pair coefficients (B, P, 4)."""
        return self._evaluate(self.denoiser.with_pairs, self._pairs, x, t)

    @staticmethod
    def _evaluate(
        evaluation: Callable[[Tensor, Tensor], R],
        recorded: cuda_graphs.Recorded[R],
        x: Tensor,
        t: Tensor,
    ) -> R:
        if torch.is_grad_enabled() or not cuda_graphs.small_enough(x):
            return evaluation(x, t)
        return recorded(x, torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)))


def recorded(denoiser: Denoiser) -> Denoiser:
    """Return a recorded denoiser for one run of the diffusion, or the same if it cannot be."""
    if isinstance(denoiser, PreconditionedDenoiser) and denoiser.graph_safe:
        return RecordedDenoiser(denoiser)
    return denoiser
