"""Pure torch networks: x (B, M, D) and log noise level (B,) to a displacement (B, M, D).

A network carries its constructor arguments in ``config``, from which :func:`build_network` makes
it again; no system's name appears here.
"""

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
from openmm_vtdis.networks.egnn import EGNN, EGNNLayer
from openmm_vtdis.networks.mlp import MLP

__all__ = [
    "EGNN",
    "MLP",
    "EGNNLayer",
    "build_network",
    "can_describe",
    "describe_network",
    "is_own",
    "network_for",
    "network_of_size",
    "parse_size",
]

_NETWORKS: dict[str, type[nn.Module]] = {"egnn": EGNN, "mlp": MLP}


def build_network(description: dict[str, Any]) -> nn.Module:
    """Make a network from ``{"kind": "egnn" | "mlp", **config}``."""
    config = dict(description)
    kind = config.pop("kind", None)
    if kind not in _NETWORKS:
        raise ValueError(f"network: expected a kind among {sorted(_NETWORKS)}, got {kind!r}")
    with package_defaults():
        return _NETWORKS[kind](**config)


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return the JSON-able description that :func:`build_network` reads."""
    for kind, cls in _NETWORKS.items():
        if type(network) is cls and not _is_changed(network):
            config: dict[str, Any] = json.loads(json.dumps(network.config, default=int))
            return {"kind": kind, **config}
    changed = " that was changed (hooks, or weights of other names)"
    raise ValueError(
        f"network: expected one of {sorted(_NETWORKS)} to be stored in an archive, "
        f"got {type(network).__name__}{changed if is_own(network) else ''}"
    )


def _is_changed(network: nn.Module) -> bool:
    """Whether a network computes something else than one made from its ``config`` would."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    kind = next(kind for kind, cls in _NETWORKS.items() if type(network) is cls)
    with torch.random.fork_rng(devices=[]):
        fresh = build_network({"kind": kind, **network.config})  # type: ignore[dict-item]
    return hooked or fresh.state_dict().keys() != network.state_dict().keys()


def is_own(network: nn.Module) -> bool:
    """Whether it is of a class of this package."""
    return type(network) in _NETWORKS.values()


def can_describe(network: nn.Module) -> bool:
    """Whether it is one of the package's own, which an archive can hold."""
    return is_own(network) and not _is_changed(network)


def parse_size(name: str) -> dict[str, Any]:
    """Read a size such as "egnn-4x128" (kind-layers x width) into a partial description.

    The paper's sizes are "egnn-4x128" (DW-4), "egnn-6x128" (LJ-13), "egnn-7x256" (ALDP) and
    "mlp-7x512" (GMM-2).
    """
    match = re.fullmatch(r"(egnn|mlp)-(\d+)x(\d+)", name)
    if match is None:
        raise ValueError(f'network: expected a size such as "egnn-4x128", got {name!r}')
    kind, n_layers, n_hidden = match.groups()
    return {"kind": kind, "n_layers": int(n_layers), "n_hidden": int(n_hidden)}


_MOLECULE, _OTHER = "egnn-4x128", "mlp-7x512"
"""Networks of particles around their centre of mass, and of a space without one."""


def network_for(
    network: str | nn.Module | None,
    labels: Sequence[int],
    space: Space,
    seed: int | None,
    features: Mapping[str, Any],
) -> nn.Module:
    """The network that a generator was asked to have: as it is, of a size, or the default.

    Raises
    ------
    ValueError
        For anything else.
    """
    if network is None:
        network = _MOLECULE if space.centred else _OTHER
    if isinstance(network, str):
        return network_of_size(network, labels, space.n_dims, seed, **features)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f'network: expected a size such as "egnn-4x128" or a torch module, got {network!r}'
        )
    return network


def network_of_size(
    name: str, labels: Sequence[int], n_dims: int, seed: int | None = None, **features: Any
) -> nn.Module:
    """A new network of a size such as "egnn-4x128" for M particles with these labels.

    Parameters
    ----------
    seed
        Of its weights; None: torch's global stream.
    features
        ``node_features`` and ``edge_features`` of an :class:`EGNN`.
    """
    description = parse_size(name)
    if description["kind"] == "mlp":
        description |= {"n_particles": len(labels), "n_dims": n_dims}
    else:
        description |= {"labels": list(labels), "n_dims": n_dims, **features}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(checks.positive_integer("seed", seed, minimum=0))
        return build_network(description)
