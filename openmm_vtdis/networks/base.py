"""The base of networks: a torch module that describes itself and declares its capabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from openmm_vtdis.core.registry import Registry
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks.pair_head import PairHead


class Network(nn.Module):
    """x (B, M, D) and log noise level (B,) to a displacement (B, M, D).

    Attributes
    ----------
    kind
        Name of the class in archives and in sizes such as "egnn-4x128".
    graph_safe
        Whether its evaluation waits for nothing that it computes, so that it may be recorded as a
        CUDA graph. A subclass says so for itself: it inherits no promise.
    config
        Arguments of the constructor, JSON-able: what an archive keeps beside the weights.
    edge_messages
        Width H of the messages (B, M, M, H) that :meth:`with_messages` gives, which a pair head can
        read; None: it has none.
    pair_head
        The head that gives pair coefficients; None: no head.
    """

    kind: ClassVar[str]
    graph_safe: ClassVar[bool] = False

    config: dict[str, Any]
    edge_messages: int | None = None
    pair_head: PairHead | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "graph_safe" not in vars(cls):
            cls.graph_safe = False

    def __init__(self) -> None:
        super().__init__()
        self.pair_head = None

    @classmethod
    @abstractmethod
    def from_size(
        cls,
        n_layers: int,
        n_hidden: int,
        labels: Sequence[int],
        space: Space,
        features: Mapping[str, Any],
    ) -> Self:
        """Make a new network of the given depth and width.

        Parameters
        ----------
        labels
            (M,) class of each particle.
        space
            Space of the configurations.
        features
            ``node_features`` (M, F) and ``edge_features`` (M, M, E) of a molecule, or nothing.
        """

    @property
    def identity(self) -> tuple[Any, ...]:
        """Its constructor's arguments and its weights, as an archive holds them."""
        return type(self).__qualname__, self.config, self.state_dict()

    @property
    def width(self) -> int:
        """Features per pair of particles, or per particle, which decide the memory needed."""
        return int(self.config.get("n_hidden", 64))

    def with_messages(self, x: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """The displacement, and messages (B, M, M, H).

        Raises
        ------
        ValueError
            If it has no messages.
        """
        raise ValueError(f"expected a network with messages, got a {type(self).__name__}")

    def add_pair_head(self, n_hidden: int = 64) -> None:
        """Add an untrained head for pair coefficients, or put one in place of the old.

        Raises
        ------
        ValueError
            If it has no messages.
        """
        if self.edge_messages is None:
            raise ValueError(
                f"pair head: expected a network with messages, got a {type(self).__name__}"
            )
        weight = next(self.parameters())
        head = PairHead(len(self.config["labels"]), self.edge_messages, n_hidden)
        self.pair_head = head.to(weight.device, weight.dtype)
        self.config["pair_head"] = n_hidden

    def take_pair_head(self) -> tuple[PairHead | None, int | None]:
        """Remove the head; return it and its width, as :meth:`put_pair_head` takes them."""
        found = self.pair_head, self.config.get("pair_head")
        self.put_pair_head(None, None)
        return found

    def put_pair_head(self, head: PairHead | None, n_hidden: int | None) -> None:
        """Set the head and its width."""
        self.pair_head = head
        if self.edge_messages is not None:
            self.config["pair_head"] = n_hidden


NETWORKS: Registry[Network] = Registry("networks")
"""Networks by their kind; others register with it, or by an entry point."""
