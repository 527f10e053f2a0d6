r"""OpenMM's tabulated functions as torch functions, for use in Lepton expressions.

A ``Continuous1DFunction`` is a cubic spline through equally spaced values, natural or periodic,
and zero outside its range; the discrete ones are looked up at the nearest integers (NaN outside
the table, where OpenMM raises an error).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import openmm
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from openmm_vtdis.targets.openmm.lepton import FUNCTIONS, Function
from openmm_vtdis.targets.openmm.terms import Untranslatable


def tabulated_functions(force: Any, taken: Collection[str] = ()) -> dict[str, Function]:
    """Name to function, for every tabulated function of a force; names in ``taken`` are refused.

    Raises
    ------
    Untranslatable
        For two- and three-dimensional splines, and for names that other functions have.
    """
    found = {}
    for k in range(force.getNumTabulatedFunctions()):
        name, table = force.getTabulatedFunctionName(k), force.getTabulatedFunction(k)
        if name in FUNCTIONS or name in taken:
            raise Untranslatable(type(force).__name__, f"a tabulated function named {name!r}")
        found[name] = _translate(type(force).__name__, table)
    return found


def _translate(force: str, table: openmm.TabulatedFunction) -> Function:
    if isinstance(table, openmm.Continuous1DFunction):
        values, low, high = table.getFunctionParameters()
        return 1, spline(np.asarray(values), low, high, table.getPeriodic())
    if isinstance(table, openmm.Discrete1DFunction):
        values = table.getFunctionParameters()
        return 1, lookup((len(values),), values)
    if isinstance(table, openmm.Discrete2DFunction | openmm.Discrete3DFunction):
        *shape, values = table.getFunctionParameters()
        return len(shape), lookup(tuple(shape), values)
    raise Untranslatable(force, f"a tabulated function of class {type(table).__name__}")


def spline(values: np.ndarray, low: float, high: float, periodic: bool) -> Callable[..., Tensor]:
    """The cubic spline through values at equally spaced points from low to high."""
    knots = np.linspace(low, high, len(values))
    if periodic:
        values = np.append(values[:-1], values[0])
    fit = CubicSpline(knots, values, bc_type="periodic" if periodic else "natural")
    coefficients = torch.tensor(fit.c.copy())
    spacing = (high - low) / (len(values) - 1)

    def evaluate(x: Tensor) -> Tensor:
        if periodic:
            x = low + torch.remainder(x - low, high - low)
        cell = ((x.detach() - low) / spacing).nan_to_num(0.0).floor()
        cell = cell.clamp(0, len(values) - 2)
        a, b, c, d = coefficients.to(x.device)[:, cell.long()]
        offset = x - (low + spacing * cell)
        inside = (x >= low) & (x <= high)
        return torch.where(inside | x.isnan(), ((a * offset + b) * offset + c) * offset + d, 0.0)

    return evaluate


def lookup(shape: tuple[int, ...], values: Any) -> Callable[..., Tensor]:
    """The table of this shape, first index fastest, at the nearest integers."""
    table = torch.tensor(list(values), dtype=torch.float64)

    def evaluate(*arguments: Tensor) -> Tensor:
        position, stride = torch.zeros((), dtype=torch.int64), 1
        inside = torch.ones((), dtype=torch.bool)
        for size, argument in zip(shape, arguments, strict=True):
            number = argument.detach().nan_to_num(-1.0)
            index = number.sign() * (number.abs() + 0.5).floor()  # halves away from zero, as in C
            inside = inside.to(index.device) & (index >= 0) & (index < size)
            position = position.to(index.device) + stride * index.clamp(0, size - 1).long()
            stride *= size
        return torch.where(inside, table.to(position.device)[position], torch.nan)

    return evaluate
