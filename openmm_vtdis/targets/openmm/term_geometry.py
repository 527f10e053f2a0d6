r"""Internal coordinates of batched points: distances, angles and dihedrals.

Points are (3, P, B): P tuples of particles, B samples. Angles come from atan2, whose derivative
is finite where that of acos is not::

    theta(a, b, c)    = atan2(|u x v|, u . v),                u = a - b, v = c - b
    phi(a, b, c, d)   = atan2(|v| u . (v x w), (u x v) . (v x w)),
                        u = b - a, v = c - b, w = d - c       (IUPAC sign)
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, (3, P, B) twice -> (P, B) nm."""
    return (a - b).square().sum(dim=0).sqrt()


def angle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The angle at b, (P, B) in [0, pi]."""
    u, v = a - b, c - b
    return torch.atan2(cross(u, v).square().sum(dim=0).sqrt(), (u * v).sum(dim=0))


def dihedral(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The angle between the planes abc and bcd, (P, B) in (-pi, pi]."""
    u, v, w = b - a, c - b, d - c
    normal = cross(v, w)
    sine = v.square().sum(dim=0).sqrt() * (u * normal).sum(dim=0)
    return torch.atan2(sine, (cross(u, v) * normal).sum(dim=0))


def cross(u: Tensor, v: Tensor) -> Tensor:
    """u x v along the first axis."""
    (a, b, c), (d, e, f) = u, v
    return torch.stack([b * f - c * e, c * d - a * f, a * e - b * d])
