"""When two energies of one configuration are the same."""

from __future__ import annotations

import torch
from torch import Tensor

_SPREAD, _SINGLE = 1e-5, 3e-7


def same_energy(energies: Tensor, unit: float = 1.0) -> Tensor:
    """How much energies (..., n), in a unit of which kT has ``unit``, may differ and be the same.

    By how far they lie apart, not by their size, which may be that of all electrons: only what
    single precision resolves goes by that.
    """
    known = torch.where(torch.isfinite(energies), energies, torch.nan)
    middle = known.nanmedian(dim=-1, keepdim=True).values.nan_to_num()
    return _SPREAD * ((energies - middle).abs() + unit) + _SINGLE * energies.abs()
