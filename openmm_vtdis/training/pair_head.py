r"""Training the pair head: the likelihood of x_0 - D under the posterior's Gaussian.

With x = x_0 + t xi, r = x_0 - D(x, t) and t^2 C the covariance that the head gives, minus the log
likelihood of r over the degrees of freedom, up to constants,

    loss = [ r^T C^-1 r / t^2 + log det C ] / (2 d),

is least where t^2 C is the covariance of the posterior, or of all that the denoiser cannot know.
Stiff directions and wide ones lie up to seven decades apart, so that it is taken in double
precision. The denoiser is frozen. :class:`~openmm_vtdis.training.trainer.Trainer` does the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from openmm_vtdis.core.defaults import package_defaults
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.posteriors.pairwise import posterior_shape
from openmm_vtdis.networks import Network
from openmm_vtdis.storage.fingerprint import fingerprint


class PairObjective(nn.Module):
    """Trainable pair head of a denoiser, for a :class:`~openmm_vtdis.training.trainer.Trainer`.

    Raises
    ------
    ValueError
        If the denoiser's network has none.
    """

    def __init__(self, denoiser: PreconditionedDenoiser) -> None:
        super().__init__()
        network = denoiser.network
        if not isinstance(network, Network) or network.pair_head is None:
            raise ValueError("pair head: expected a network that has one, got one without")
        self.head = network.pair_head
        self._frozen = (denoiser,)  # in a tuple: its weights are not this module's

    def extra_repr(self) -> str:
        """The frozen weights' fingerprint, by which a checkpoint of another denoiser is refused."""
        state = self._frozen[0].state_dict()
        frozen = [state[name] for name in state if not name.startswith("network.pair_head.")]
        return f"denoiser={fingerprint(frozen)}"

    @property
    def space(self) -> Space:
        """The space of the configurations."""
        return self._frozen[0].space

    @property
    def graph_safe(self) -> bool:
        """Never: its training waits for decompositions."""
        return False

    def loss(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss (B,) of clean (B, M, D), t (B,) and noise (B, M, D)."""
        x = clean + t[:, None, None] * noise
        with torch.no_grad():
            denoised, messages = self._frozen[0].with_messages(x, t)
        pairs = self.head(messages, denoised, t.log()).double()
        denoised, t = denoised.double(), t.double()
        factor = torch.linalg.cholesky(posterior_shape(self.space, pairs, denoised, t))
        residual = self.space.reduce(clean - denoised).flatten(1) / t[:, None]
        white = torch.linalg.solve_triangular(factor, residual[:, :, None], upper=False)
        log_det = torch.diagonal(factor, dim1=1, dim2=2).log().sum(dim=1)
        return (0.5 * white.square().sum(dim=(1, 2)) + log_det) / self.space.dim


@contextlib.contextmanager
def new_pair_head(denoiser: object, n_hidden: int, seed: int) -> Iterator[PairObjective]:
    """Give a denoiser's network an untrained head; take it away again if an exception passes.

    Raises
    ------
    ValueError
        If it is not a learned denoiser around a network that can have one.
    """
    if not isinstance(denoiser, PreconditionedDenoiser):
        raise _without_messages(denoiser)
    network = denoiser.network
    if not isinstance(network, Network) or network.edge_messages is None:
        raise _without_messages(network)
    before = network.take_pair_head()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with package_defaults():
                network.add_pair_head(n_hidden)
        yield PairObjective(denoiser)
    except BaseException:
        network.put_pair_head(*before)
        raise


def forget_pair_head(network: nn.Module) -> None:
    """Remove a head that was trained on messages of earlier weights."""
    if isinstance(network, Network):
        network.put_pair_head(None, None)


def _without_messages(thing: object) -> ValueError:
    return ValueError(
        "train_pair_head: expected a trained network with messages that the pair head reads, such "
        f"as the EGNN, got {type(thing).__name__}"
    )
