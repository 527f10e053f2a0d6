"""Networks by name, by size, and as archives describe them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from openmm_vtdis.core import checks
from openmm_vtdis.core.defaults import package_defaults
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks.base import NETWORKS, Network

_MOLECULE, _OTHER = "egnn-4x128", "mlp-7x512"
"""Default networks for the zero-centre-of-mass subspace, and for other spaces."""


def build_network(description: dict[str, Any]) -> Network:
    """Make a network from ``{"kind": "egnn", **config}``.

    Raises
    ------
    ValueError
        If nobody knows the kind.
    """
    config = dict(description)
    cls = NETWORKS[config.pop("kind", "")]
    with package_defaults():
        return cls(**config)


def describe_network(network: nn.Module) -> dict[str, Any]:
    """The JSON-able description that :func:`build_network` reads.

    Raises
    ------
    ValueError
        If archives do not know its class, or it computes something else than its ``config`` says.
    """
    kind = NETWORKS.kind_of(network)
    if isinstance(network, Network) and kind is not None and not _is_changed(network, kind):
        config: dict[str, Any] = json.loads(json.dumps(network.config, default=int))
        return {"kind": kind, **config}
    changed = "" if kind is None else " that was changed (hooks, or weights of other names)"
    raise ValueError(
        f"network: expected one of {sorted(NETWORKS)} to be stored in an archive, "
        f"got {type(network).__name__}{changed}"
    )


def _is_changed(network: Network, kind: str) -> bool:
    """Whether a network computes something else than one made from its ``config`` would."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with torch.random.fork_rng(devices=[]):
        fresh = build_network({"kind": kind, **network.config})
    return hooked or fresh.state_dict().keys() != network.state_dict().keys()


def can_describe(network: nn.Module) -> bool:
    """Whether an archive can hold it."""
    try:
        describe_network(network)
    except (ValueError, TypeError):
        return False
    return True


def parse_size(name: str) -> tuple[str, int, int]:
    """Read a size such as "egnn-4x128": kind, layers and width.

    The paper's sizes are "egnn-4x128" (DW-4), "egnn-6x128" (LJ-13), "egnn-7x256" (ALDP) and
    "mlp-7x512" (GMM-2).
    """
    match = re.fullmatch(r"([\w.-]+?)-(\d+)x(\d+)", name)
    if match is None or match[1] not in NETWORKS:
        raise ValueError(
            f'network: expected a size such as "egnn-4x128", of one of {", ".join(NETWORKS)}, got '
            f"{name!r}"
        )
    return match[1], int(match[2]), int(match[3])


def network_for(
    network: str | nn.Module | None,
    labels: Sequence[int],
    space: Space,
    seed: int | None,
    features: Mapping[str, Any],
) -> nn.Module:
    """Return the network of a generator: a given one, one of a size, or the default.

    Raises
    ------
    ValueError
        For anything else.
    """
    if network is None:
        network = _MOLECULE if space.centred else _OTHER
    if isinstance(network, str):
        return network_of_size(network, labels, space, seed, features)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f'network: expected a size such as "egnn-4x128" or a torch module, got {network!r}'
        )
    return network


def network_of_size(
    name: str,
    labels: Sequence[int],
    space: Space,
    seed: int | None = None,
    features: Mapping[str, Any] | None = None,
) -> Network:
    """A new network of a size such as "egnn-4x128" for particles with these labels.

    Parameters
    ----------
    seed
        Seed of its weights; None: torch's global rng.
    features
        See :meth:`~openmm_vtdis.networks.Network.from_size`.
    """
    kind, n_layers, n_hidden = parse_size(name)
    with torch.random.fork_rng(devices=[], enabled=seed is not None), package_defaults():
        if seed is not None:
            torch.manual_seed(checks.positive_integer("seed", seed, minimum=0))
        return NETWORKS[kind].from_size(n_layers, n_hidden, labels, space, features or {})
