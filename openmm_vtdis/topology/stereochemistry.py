r"""Handedness: stereocentres, and folding mirror images onto one of them.

An equivariant model makes a molecule and its mirror image with equal probability, where molecular
dynamics stays with the one it started from. A *stereocentre* is an atom with four neighbours that
carry four different labels (or a sulfur or phosphorus atom with three). Its handedness is the sign
of the signed volume of its neighbours a, b, c, d in the order of their labels,

    s(x) = sign [(a - d) . ((b - d) x (c - d))].

The target is the density exp(-u) restricted to the configurations in which all K centres have the
reference handedness. A generated configuration may then

* agree in all centres: it stays;
* disagree in all: its mirror image agrees. Reflecting a whole trajectory changes neither q nor p,
  so the folded sample comes from the proposal p(x) + p(-x) = 2 p(x): exact, with log w lowered
  by log 2 (for the one that stays, too);
* disagree in some: it is outside the target, and has weight zero. (The proposal then reaches
  beyond the target: over frames of the target <1/w> is the share of the proposal that is inside,
  divided by Z, and a forward ESS, which takes it to be 1/Z, is too large by that share.)

Labels decide what a centre is: atoms that share one are exchanged freely by the model, so that an
order of them has no handedness. Not looked for are axes and planes of chirality, double bonds (E
and Z), and centres two of whose neighbours share a label although their surroundings differ in
handedness, as in a ring (cis and trans): the target then holds all of these isomers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from openmm import app
from torch import Tensor

from openmm_vtdis.topology.graph import bonded_graph, name_of

_STABLE_PYRAMIDS = ("S", "P")
"""Elements whose centres of three neighbours do not invert."""


@dataclass(frozen=True)
class Stereocentre:
    """An atom that has a handedness.

    Attributes
    ----------
    name
        Name in messages, such as "CA of ALA 2".
    corners
        Four atoms: its neighbours in the order of their labels; if it has three, also itself.
    """

    name: str
    corners: tuple[int, int, int, int]


def stereocentres(topology: app.Topology, labels: Sequence[int]) -> list[Stereocentre]:
    """The stereocentres of a molecule whose atoms carry these labels, (M,)."""
    graph = bonded_graph(topology)
    found = []
    for atom in topology.atoms():
        neighbours = sorted(graph.adj[atom.index], key=lambda i: labels[i])
        if len({labels[i] for i in neighbours}) != len(neighbours):
            continue
        if len(neighbours) == 3 and graph.nodes[atom.index]["colour"] in _STABLE_PYRAMIDS:
            neighbours.append(atom.index)
        if len(neighbours) == 4:
            found.append(Stereocentre(name_of(atom), tuple(neighbours)))
    return found


@dataclass(frozen=True)
class Handedness:
    """A reference handedness of every stereocentre.

    Attributes
    ----------
    centres
        K stereocentres, at least one.
    signs
        +1 or -1 for each.
    """

    centres: tuple[Stereocentre, ...]
    signs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.centres or len(self.centres) != len(self.signs):
            raise ValueError(
                f"signs: expected one for each of {len(self.centres)} stereocentres, got "
                f"{len(self.signs)}"
            )
        if not all(sign in (-1, 1) for sign in self.signs):
            raise ValueError(f"signs: expected +1 and -1, got {self.signs}")

    @classmethod
    def of(cls, centres: Sequence[Stereocentre], x: Tensor) -> Handedness:
        """Handedness of one configuration (M, 3).

        Raises
        ------
        ValueError
            If a centre is exactly flat.
        """
        signs = handedness(centres, x[None])[0].to(torch.int64).tolist()
        for centre, sign in zip(centres, signs, strict=True):
            if sign == 0:
                raise ValueError(f"expected a handedness of {centre.name}, got a flat one")
        return cls(tuple(centres), tuple(signs))

    def agreement(self, x: Tensor) -> Tensor:
        """+1 where every centre agrees, -1 where none does, else 0: (B, M, 3) -> (B,) int64."""
        signs = _constant(self.signs, x.device)
        product = handedness(self.centres, x) * signs
        right, wrong = (product > 0).all(dim=1), (product < 0).all(dim=1)
        return right.to(torch.int64) - wrong.to(torch.int64)

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mirror (B, M, 3) where no centre agrees; also (B,) bool, where all of them now do."""
        agreement = self.agreement(x)
        return torch.where((agreement < 0)[:, None, None], -x, x), agreement != 0

    def canonical(self, x: Tensor) -> Tensor:
        """Mirror where the first centre disagrees: the same for a configuration and its mirror
        image, and equal to :meth:`fold` where all centres agree or none does. (B, M, 3).
        """
        sign = handedness(self.centres[:1], x)[:, 0] * self.signs[0]
        return torch.where((sign < 0)[:, None, None], -x, x)

    def check(self, name: str, x: Tensor) -> None:
        """Check that all configurations (n, M, 3) agree.

        Raises
        ------
        ValueError
            If one does not; the message names the first, and its centre.
        """
        signs = _constant(self.signs, x.device)
        wrong = handedness(self.centres, x) != signs
        bad = torch.nonzero(wrong.any(dim=1)).flatten()
        if len(bad):
            first = int(bad[0])
            centre = self.centres[int(wrong[first].to(torch.int8).argmax())]
            raise ValueError(
                f"{name}: expected the handedness of the reference at every stereocentre, got "
                f"the other one in {len(bad)} of {len(x)} frames, the first at index {first} "
                f"({centre.name}); remove these frames, or give stereochemistry='any'"
            )


def handedness(centres: Sequence[Stereocentre], x: Tensor) -> Tensor:
    """Signs of the signed volumes, (B, M, 3) -> (B, K) int8."""
    corners = _constant(tuple(centre.corners for centre in centres), x.device)
    a, b, c, d = (x[:, index] for index in corners.mT)
    volume = ((a - d) * torch.linalg.cross(b - d, c - d)).sum(dim=-1)
    return volume.sign().to(torch.int8)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Integers as a tensor, made once for each device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
